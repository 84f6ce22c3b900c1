from __future__ import annotations

import pytest

from services.cache_store.link import LinkEstimate

MIB = 1 << 20


def test_before_the_first_load_it_is_optimistic() -> None:
    link = LinkEstimate()
    assert link.bytes_per_s(0.0) >= 1e9
    assert link.latency_s(0.0) <= 0.001


@pytest.mark.parametrize("true_rate", [1e6, 1e8, 1e10])
def test_it_comes_to_believe_what_it_sees(true_rate: float) -> None:
    link = LinkEstimate()
    for now in range(30):
        link.observe_read(MIB, MIB / true_rate, now)
        link.observe_lookup(0.02, now)
    assert link.bytes_per_s(30.0) == pytest.approx(true_rate, rel=0.1)
    assert link.latency_s(30.0) == pytest.approx(0.02, rel=0.1)


def test_one_slow_load_is_enough_to_doubt_the_link() -> None:
    link = LinkEstimate()
    link.observe_read(MIB, 1.0, 0.0)
    assert link.bytes_per_s(0.0) < 4 * MIB


def test_a_bad_opinion_fades_until_the_link_is_tried_again() -> None:
    link = LinkEstimate()
    for now in range(30):
        link.observe_read(MIB, 1.0, now)
        link.observe_lookup(1.0, now)
    assert link.bytes_per_s(60.0) == pytest.approx(2 * link.bytes_per_s(29.0), rel=0.1)
    assert link.bytes_per_s(600.0) == LinkEstimate().bytes_per_s(0.0)
    assert link.latency_s(600.0) == LinkEstimate().latency_s(0.0)


def test_a_good_opinion_does_not_fade() -> None:
    link = LinkEstimate()
    for now in range(30):
        link.observe_read(MIB, MIB / 1e10, now)
    assert link.bytes_per_s(1e6) == link.bytes_per_s(29.0) > 5e9
