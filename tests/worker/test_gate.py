from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.gate import blocks_worth_loading, meeting_point

MIB = 1 << 20


def gate(recompute_s: list[float], bandwidth: float, latency: float = 0.001, size: int = MIB) -> int:
    return blocks_worth_loading(
        recompute_s, bandwidth_bytes_s=bandwidth, latency_s=latency, bytes_per_block=size
    )


def cumulative(step_s: list[float]) -> list[float]:
    return [math.fsum(step_s[: i + 1]) for i in range(len(step_s))]


EVEN = [0.01 * i for i in range(1, 101)]


def test_a_fast_link_loads_nearly_everything() -> None:
    assert gate(EVEN, bandwidth=1000 * MIB) == 91, "91 ms to load, 90 ms to compute the other nine"


def test_equal_speeds_share_the_work() -> None:
    assert gate(EVEN, bandwidth=100 * MIB) == 50


def test_a_slow_link_brings_its_share_and_a_very_slow_one_is_left_alone() -> None:
    assert gate(EVEN, bandwidth=20 * MIB) == 16
    assert gate(EVEN, bandwidth=5 * MIB) == 0, "4 % of the time"


def test_a_link_without_bandwidth_loads_nothing() -> None:
    assert gate([1.0, 2.0], bandwidth=0.0) == 0
    assert gate([math.inf], bandwidth=0.0) == 0


def test_latency_makes_a_short_prefix_not_worth_it() -> None:
    assert gate(EVEN[:4], bandwidth=1000 * MIB, latency=0.05) == 0
    assert gate(EVEN, bandwidth=1000 * MIB, latency=0.05) > 80


def test_a_single_block_is_loaded_when_that_is_faster() -> None:
    assert gate([0.01], bandwidth=1000 * MIB) == 1
    assert gate([0.01], bandwidth=50 * MIB) == 0


def test_dear_later_blocks_are_worth_more_of_a_load() -> None:
    growing = cumulative([0.0002 * i for i in range(1, 101)])  # attention: each costs more than the last
    even = [growing[-1] / 100 * i for i in range(1, 101)]
    assert gate(growing, bandwidth=50 * MIB) > 0
    assert done_s(growing, 50 * MIB) < done_s(even, 50 * MIB)


def done_s(recompute_s: list[float], bandwidth: float, latency: float = 0.0) -> float:
    loaded = gate(recompute_s, bandwidth, latency)
    computed = len(recompute_s) - loaded
    return max(recompute_s[computed - 1] if computed else 0.0, latency + loaded * MIB / bandwidth)


def test_what_saves_less_than_a_millisecond_is_computed() -> None:
    assert gate([0.0001 * i for i in range(1, 6)], bandwidth=1e6 * MIB, latency=0.0) == 0


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
def test_no_other_split_of_the_same_run_would_be_done_sooner(
    step_s: list[float], bandwidth: float, latency: float
) -> None:
    recompute_s = cumulative(step_s)
    count = len(recompute_s)
    loaded = gate(recompute_s, bandwidth, latency)
    splits = [
        max(recompute_s[count - n - 1] if n < count else 0.0, latency + n * MIB / bandwidth if n else 0.0)
        for n in range(count + 1)
    ]
    if loaded:
        assert splits[loaded] <= min(splits) + 1e-9
        assert splits[loaded] <= 0.95 * recompute_s[-1] + 1e-9
    elif count:
        assert min(splits) > min(0.95 * recompute_s[-1], recompute_s[-1] - 0.001) - 1e-9


@given(st.integers(0, 30), st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_the_meeting_point_is_the_first_where_the_load_is_not_late(
    blocks: int, compute: float, ahead: float, arrive: float
) -> None:
    def compute_s(count: int) -> float:
        return ahead + compute * count

    def arrive_s(count: int) -> float:
        return arrive * count

    point = meeting_point(blocks, compute_s, arrive_s)
    in_time = [m for m in range(blocks) if arrive_s(blocks - m) <= compute_s(m)]
    assert point == (in_time[0] if in_time else blocks)
