"""How many workers one request may lose, and which prompts are kept out."""

import pytest

from services.router.retry import (
    LIVES,
    MAX_QUARANTINED,
    MAX_RESUMES,
    QUARANTINE_S,
    Losses,
    Quarantine,
)


@pytest.mark.parametrize(("suspects", "most"), [(1, LIVES), (2, 2 * LIVES), (4, 4 * LIVES)])
def test_blame_is_shared_by_all_that_the_worker_may_have_died_of(suspects, most):
    losses = Losses()
    for _ in range(most):
        assert not losses.guilty
        losses.add(served=False, suspects=suspects)
    assert losses.guilty
    assert losses.too_many


def test_where_many_die_together_over_and_over_nobody_is_guilty():
    losses = Losses()
    for _ in range(MAX_RESUMES + 1):
        assert not losses.too_many
        losses.add(served=False, suspects=50)
    assert losses.too_many
    assert not losses.guilty


def test_a_token_takes_the_blame_away_but_not_the_count():
    losses = Losses()
    for _ in range(MAX_RESUMES // 2):
        losses.add(served=False, suspects=1)
        losses.add(served=True, suspects=0)
        assert losses.blame == 0
    assert not losses.too_many
    losses.add(served=True, suspects=0)
    assert losses.too_many


def test_a_prompt_is_kept_out_for_its_time_and_no_other_with_it():
    quarantine = Quarantine()
    assert not quarantine.holds(b"one", 0.0)
    quarantine.add(b"one", 0.0)
    assert quarantine.holds(b"one", QUARANTINE_S - 1)
    assert not quarantine.holds(b"other", 0.0)
    assert not quarantine.holds(b"one", QUARANTINE_S + 1)
    quarantine.add(b"one", QUARANTINE_S + 2)
    assert quarantine.holds(b"one", 2 * QUARANTINE_S)


def test_the_oldest_is_forgotten_when_there_are_too_many():
    quarantine = Quarantine()
    for number in range(MAX_QUARANTINED + 1):
        quarantine.add(b"%d" % number, 0.0)
    assert not quarantine.holds(b"0", 1.0)
    assert quarantine.holds(b"1", 1.0)
    assert quarantine.holds(b"%d" % MAX_QUARANTINED, 1.0)
