from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.gate import blocks_worth_loading

MIB = 1 << 20


def gate(recompute_s: list[float], bandwidth: float, latency: float = 0.001, size: int = MIB) -> int:
    return blocks_worth_loading(
        recompute_s, bandwidth_bytes_s=bandwidth, latency_s=latency, bytes_per_block=size
    )


def cumulative(step_s: list[float]) -> list[float]:
    return [math.fsum(step_s[: i + 1]) for i in range(len(step_s))]


def test_a_fast_link_loads_everything() -> None:
    assert gate([0.01 * i for i in range(1, 101)], bandwidth=1000 * MIB) == 100


def test_a_slow_link_loads_nothing() -> None:
    assert gate([0.01 * i for i in range(1, 101)], bandwidth=50 * MIB) == 0


def test_a_link_without_bandwidth_loads_nothing() -> None:
    assert gate([1.0, 2.0], bandwidth=0.0) == 0
    assert gate([math.inf], bandwidth=0.0) == 0


def test_latency_makes_a_short_prefix_not_worth_it() -> None:
    recompute_s = [0.01 * i for i in range(1, 101)]
    assert gate(recompute_s[:4], bandwidth=1000 * MIB, latency=0.05) == 0
    assert gate(recompute_s, bandwidth=1000 * MIB, latency=0.05) == 100


def test_dear_later_blocks_make_a_long_load_worth_it_where_a_short_one_is_not() -> None:
    growing = cumulative([0.001 * i for i in range(1, 101)])  # attention: each block costs more than the last
    assert gate(growing[:20], bandwidth=50 * MIB) == 0
    assert gate(growing, bandwidth=50 * MIB) == 100


def test_cheap_later_blocks_are_left_to_compute() -> None:
    assert gate(cumulative([0.1] * 5 + [0.001] * 5), bandwidth=50 * MIB) == 5


def test_an_unknown_compute_rate_loads() -> None:
    assert gate([math.inf, math.inf], bandwidth=MIB) == 2


def test_nothing_to_load_is_nothing() -> None:
    assert gate([], bandwidth=1000 * MIB) == 0


@pytest.mark.parametrize(("bandwidth", "latency", "size"), [(-1, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_senseless_measures_are_refused(bandwidth: float, latency: float, size: int) -> None:
    with pytest.raises(ValueError, match="bytes_per_block must be positive"):
        gate([1.0], bandwidth, latency, size)


steps = st.lists(st.floats(0, 0.1), max_size=30)
bandwidths = st.floats(1, 1e12)
factors = st.floats(1, 1e3)


@given(steps, bandwidths, st.floats(0, 1), factors)
def test_it_is_monotone_in_bandwidth_and_latency(
    step_s: list[float], bandwidth: float, latency: float, factor: float
) -> None:
    recompute_s = cumulative(step_s)
    blocks = gate(recompute_s, bandwidth, latency)
    assert gate(recompute_s, bandwidth * factor, latency) >= blocks
    assert gate(recompute_s, bandwidth, latency / factor) >= blocks


@given(steps, bandwidths, st.floats(0, 1))
def test_it_never_chooses_a_load_that_is_slower_than_computing(
    step_s: list[float], bandwidth: float, latency: float
) -> None:
    recompute_s = cumulative(step_s)
    blocks = gate(recompute_s, bandwidth, latency)
    if blocks:
        assert latency + blocks * MIB / bandwidth < recompute_s[blocks - 1]
