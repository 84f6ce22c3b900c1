"""Turns: who goes first, how many, and that nobody is forgotten."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from services.cache_store.lanes import LIMITS, Lane, LaneBusy, Lanes, Limit

MIB = 1 << 20


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


class Waiters:
    """Threads that take a turn each, in the order in which they were started, and note when they got it."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.order: list[str] = []
        self._threads: list[threading.Thread] = []

    def start(self, name: str, lane: Lane, size: int = MIB) -> None:
        def run() -> None:
            with self._lanes.turn(lane, size, 20):
                self.order.append(name)

        before = len(self._lanes._waiting)
        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        wait_until(lambda: len(self._lanes._waiting) > before)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()


def test_of_those_that_wait_the_highest_lane_goes_first_and_then_who_came_first() -> None:
    lanes = Lanes({lane: Limit(1, 64 * MIB) for lane in Lane})
    waiters = Waiters(lanes)
    with ExitStack() as held:
        for lane in (Lane.PREFETCH, Lane.GET):
            held.enter_context(lanes.turn(lane, MIB, 1))
        for name, lane in (("g1", Lane.GET), ("p1", Lane.PREFETCH), ("g2", Lane.GET), ("p2", Lane.PREFETCH)):
            waiters.start(name, lane)
    waiters.join()
    assert [name for name in waiters.order if name[0] == "p"] == ["p1", "p2"]
    assert [name for name in waiters.order if name[0] == "g"] == ["g1", "g2"]
    assert lanes.under_way() == {}


def test_with_all_reads_taken_the_next_one_is_a_prefetch_whoever_came_first() -> None:
    lanes = Lanes()
    waiters = Waiters(lanes)
    with lanes.turn(Lane.GET, MIB, 1), lanes.turn(Lane.PREFETCH, MIB, 1):
        with lanes.turn(Lane.PREFETCH, MIB, 1):
            waiters.start("get", Lane.GET)
            waiters.start("prefetch", Lane.PREFETCH)
        waiters.join()  # one turn came free, which either could have
    assert waiters.order[0] == "prefetch"


def test_no_read_waits_for_a_write() -> None:
    lanes = Lanes()
    with ExitStack() as writes:
        for _ in range(LIMITS[Lane.PUT].turns):
            writes.enter_context(lanes.turn(Lane.PUT, 8 * MIB, 1))
        with pytest.raises(LaneBusy, match="no turn to PUT"), lanes.turn(Lane.PUT, 1, 0.01):
            pass
        for lane in (Lane.PEEK, Lane.PREFETCH, Lane.GET):
            with lanes.turn(lane, 8 * MIB, 0.01):
                pass


def test_bytes_in_a_lane_are_bounded_and_one_large_turn_is_let_in_alone() -> None:
    lanes = Lanes({lane: Limit(10, 10 * MIB) for lane in Lane})
    with lanes.turn(Lane.PUT, 6 * MIB, 1), lanes.turn(Lane.PUT, 4 * MIB, 1):
        assert lanes.under_way() == {Lane.PUT: (2, 10 * MIB)}
        with pytest.raises(LaneBusy), lanes.turn(Lane.PUT, 1, 0.01):
            pass
    with lanes.turn(Lane.PUT, 20 * MIB, 1), pytest.raises(LaneBusy), lanes.turn(Lane.PUT, 1, 0.01):
        pass
    assert lanes.under_way() == {}


def test_one_that_gives_up_waiting_holds_up_nobody() -> None:
    lanes = Lanes({lane: Limit(1, 10 * MIB) for lane in Lane})
    with lanes.turn(Lane.GET, 1, 1), pytest.raises(LaneBusy), lanes.turn(Lane.GET, 1, 0.01):
        pass
    with lanes.turn(Lane.GET, 1, 0.01):
        pass


def test_a_write_gives_way_to_a_read_but_not_for_ever() -> None:
    lanes = Lanes()
    with lanes.turn(Lane.PUT, MIB, 1):
        started = time.monotonic()
        lanes.give_way(Lane.PUT)
        nobody_s = time.monotonic() - started
        with lanes.turn(Lane.PREFETCH, MIB, 1):
            started = time.monotonic()
            lanes.give_way(Lane.PUT)
            somebody_s = time.monotonic() - started
    assert somebody_s > 0.008 > nobody_s


def test_closing_ends_all_waiting_for_ever() -> None:
    lanes = Lanes({lane: Limit(1, 10 * MIB) for lane in Lane})
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            with lanes.turn(Lane.GET, 1, 20):
                pass
        except BaseException as error:
            errors.append(error)

    with lanes.turn(Lane.GET, 1, 1):
        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: lanes._waiting)
        lanes.close()
        thread.join(10)
    assert [type(error) for error in errors] == [ConnectionAbortedError]
    with pytest.raises(ConnectionAbortedError), lanes.turn(Lane.PEEK, 1, 1):
        pass
    assert lanes.under_way() == {}


def test_an_error_in_a_turn_ends_the_turn() -> None:
    lanes = Lanes()
    with pytest.raises(OSError, match="broken"), lanes.turn(Lane.GET, MIB, 1):
        raise OSError("broken")
    assert lanes.under_way() == {}
