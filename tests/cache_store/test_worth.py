"""Classes, ages and the densities learned from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_store.worth import (
    AGES,
    CLASSES,
    Events,
    History,
    Weights,
    age_bucket,
    tier,
    value_class,
)

ONCE, OFTEN = value_class(1, 1), value_class(1, 9)


def density(weights: Weights, value_class: int, age_s: float) -> float:
    return weights.density[value_class * AGES + age_bucket(1000 * age_s)]


@pytest.mark.parametrize(
    ("priority", "expected"), [(0, 0), (34, 0), (35, 1), (36, 2), (69, 2), (70, 3), (100, 3)]
)
def test_hints_fall_into_four_tiers_around_the_default(priority: int, expected: int) -> None:
    assert tier(priority) == expected


def test_every_tier_and_frequency_has_a_class_of_its_own() -> None:
    assert {value_class(t, uses) for t in range(4) for uses in range(1, 16)} == set(range(CLASSES))
    assert value_class(2, 4) == value_class(2, 15)


@pytest.mark.parametrize(
    ("age_ms", "bucket"),
    [
        (-5, 0),
        (0, 0),
        (249, 0),
        (250, 1),
        (999, 3),
        (1000, 4),
        (1499, 4),
        (1500, 5),
        (3000, 8),
        (10**9, 47),
    ],
)
def test_ages_are_cut_into_quarters_of_an_octave(age_ms: int, bucket: int) -> None:
    assert age_bucket(age_ms) == bucket


@given(st.integers(0, 10**8), st.integers(0, 10**8))
def test_an_older_block_is_never_in_a_younger_bucket(a: int, b: int) -> None:
    assert (age_bucket(a) <= age_bucket(b)) or a > b


def test_without_evidence_it_is_least_recently_used_whatever_the_class() -> None:
    weights = History().fold(Events())
    for c in range(CLASSES):
        of_class = weights.density[c * AGES : (c + 1) * AGES]
        assert list(of_class) == sorted(of_class, reverse=True)
        assert of_class == weights.density[:AGES]


def test_a_class_that_is_used_again_is_worth_more_than_one_that_dies() -> None:
    hits = {(OFTEN, age_bucket(60_000)): 5000.0}
    deaths = {(ONCE, age_bucket(1_800_000)): 5000.0}
    weights = History().fold(Events(hits, deaths, 200))
    for age_s in (1, 10, 50):
        assert density(weights, OFTEN, age_s) > 5 * density(weights, ONCE, age_s)
    assert density(weights, OFTEN, 50) > 2 * density(weights, OFTEN, 100), "after 60 s it never comes back"


def test_a_hint_that_is_always_wrong_is_worth_as_much_as_one_that_is_always_right() -> None:
    said_to_last, said_to_end = value_class(3, 1), value_class(0, 1)
    returned = {(said_to_end, age_bucket(60_000)): 5000.0}
    died = {(said_to_last, age_bucket(1_800_000)): 5000.0}
    weights = History().fold(Events(returned, died, 200))
    assert density(weights, said_to_end, 10) > 5 * density(weights, said_to_last, 10)


def test_what_was_learned_fades_so_that_a_class_which_turns_is_judged_anew() -> None:
    history = History()
    history.fold(Events({(ONCE, age_bucket(60_000)): 5000.0}, {}, 13_800))
    assert sum(history.hits) == pytest.approx(2500, rel=0.01)
    history.fold(Events(lookups=138_000))
    weights = history.fold(Events({}, {(ONCE, age_bucket(1_800_000)): 500.0}, 200))
    assert density(weights, ONCE, 10) < density(weights, OFTEN, 10)


def test_history_and_weights_come_back_whole_and_a_foreign_history_is_an_empty_one() -> None:
    history = History()
    weights = history.fold(Events({(3, 4): 5.0}, {(6, 7): 8.0}, 9))
    again = History.from_bytes(history.to_bytes())
    assert (again.hits, again.deaths) == (history.hits, history.deaths)
    assert Weights.from_bytes(weights.to_bytes()) == weights
    assert History.from_bytes(b"of another layout").hits == History().hits
