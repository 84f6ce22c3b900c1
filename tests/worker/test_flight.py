"""Following another worker in virtual time: the scheduler, StoreLoads and Flight as they are, a device that
takes what the test says, and another worker that brings its blocks whenever it likes, or dies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_payload import Codec
from services.cache_store.claims import LIFE_S, Followed
from services.worker.flight import SHARE, Flight, State
from services.worker.store_reader import StoreLoad
from services.worker.tiers import EncodedBlock, Outlook
from tests.worker.requests import BLOCK, make_request, prompt
from tests.worker.test_loads import BLOCK_S, TICK_S, Sent, Simulation, Store

POLL_S = 0.01
PAYLOAD = EncodedBlock(Codec.NONE, torch.empty(0))
PROMPT = prompt(60 * BLOCK + 5)
ALONE_S = 60 * BLOCK_S + 5 / BLOCK * BLOCK_S


@dataclass
class Other:
    """What a worker does that computes `blocks` of those that the store lacks, and when it should be done."""

    blocks: int = 60
    promised_s: float = 0.6
    gaps_s: list[float] = field(default_factory=list)  # before each block; after the last it lets go
    silent_s: float = math.inf  # when the store says nothing any more
    stored: int = 0  # blocks that the store had before


def steady(blocks: int = 60, block_s: float = BLOCK_S, **options: Any) -> Other:
    return Other(blocks, blocks * block_s, [block_s] * blocks, **options)


class FollowedStore(Store):
    """Each load finds what the next of `others` has left of it, None = that nobody computes it."""

    def __init__(self, others: list[Other | None]) -> None:
        super().__init__([])
        self.others = others
        self.flights: list[Flight] = []
        self.counts: Counter[str] = Counter()
        self.events: list[tuple[float, Callable[[], object]]] = []

    def start_load(
        self, hashes: Any, recompute_s: Any, tenant: str, first: bytes, most: int, outlook: Outlook
    ) -> StoreLoad | None:
        other = self.others.pop(0) if self.others else None
        if other is None:
            return None
        stored = min(other.stored, len(hashes))
        self.script = [Sent(found=stored, gaps_s=[0.0001] * stored)]
        load = super().start_load(hashes, recompute_s, tenant, first, most, outlook)
        assert load is not None
        run = hashes[stored:]
        if not run:
            return load
        before_s = recompute_s[stored - 1] if stored else 0.0
        costs = [seconds - before_s for seconds in recompute_s[stored:]]
        flight = Flight(run, costs, tenant, stored, most, outlook, self.count, lambda: None, lambda: self.now)
        asked_s = self.now + 0.0005
        blocks = min(other.blocks, len(run))
        self.events.append((asked_s, lambda: self.follow(load, flight, other, blocks)))
        at_s = asked_s
        for number, gap_s in enumerate(other.gaps_s[:blocks]):
            at_s += gap_s
            if at_s < other.silent_s:
                self.events.append((at_s, lambda number=number: self.bring(flight, number)))  # type: ignore[misc]
        if at_s < other.silent_s:
            # What was awaited is all here, as is seen at once; or that it will not be, with the next look.
            all_here = len(other.gaps_s) >= blocks
            self.events.append((at_s + (0.001 if all_here else POLL_S), flight.over))
        self.flights.append(flight)
        return load

    def count(self, what: str, by: int) -> None:
        self.counts[what] += by

    def follow(self, load: StoreLoad, flight: Flight, other: Other, blocks: int) -> None:
        if flight.theirs(Followed(blocks, other.promised_s, b"key", b"claimer"), 0) and not load.depart(
            flight
        ):
            flight.leave(computed=False)
        self.events += [
            (self.now + POLL_S * poll, lambda: flight.heard(flight.brought))
            for poll in range(1, 1000)
            if self.now + POLL_S * poll < other.silent_s
        ]

    def bring(self, flight: Flight, number: int) -> None:
        if flight.state is State.THEIRS and flight.room > 0 and number == flight.brought:
            flight.heard(number + 1)
            flight.add(number, [PAYLOAD])

    def advance(self, until_s: float) -> None:
        while due := [event for event in self.events if event[0] <= until_s]:
            event = min(due, key=lambda event: event[0])
            self.events.remove(event)
            super().advance(max(self.now, event[0]))
            event[1]()
        super().advance(until_s)


class Following(Simulation):
    def __init__(self, *others: Other | None, **options: Any) -> None:
        super().__init__([], **options)
        self.store: FollowedStore = FollowedStore(list(others))
        self.loads._store = self.store  # type: ignore[assignment]

    def check_empty(self) -> None:
        super().check_empty()
        states = {flight.state for flight in self.store.flights}
        assert states <= {State.OVER, State.ASKING}, "the other may not have been heard of before the end"
        assert not any(flight.take(0) for flight in self.store.flights)


def ttft(*others: Other | None, **options: Any) -> tuple[float, Following]:
    simulation = Following(*others, **options)
    simulation.run([make_request("a", PROMPT, max_tokens=1)])
    return simulation.first_token_s["a"], simulation


# ---- another that does what it promised


@pytest.mark.parametrize("budget", [32, 320, 2000])
def test_what_another_computes_is_not_computed(budget: int) -> None:
    seconds, simulation = ttft(steady(), budget=budget)
    assert simulation.computed == 5
    assert seconds <= ALONE_S + 0.005 + TICK_S
    assert simulation.store.counts == {"follows": 1, "followed_blocks": 60}


def test_one_that_is_ahead_or_faster_saves_that_time() -> None:
    assert ttft(steady(block_s=BLOCK_S / 4))[0] < ALONE_S / 3
    assert ttft(steady(blocks=60, block_s=BLOCK_S / 2))[0] < 0.6 * ALONE_S


def test_a_part_that_two_prompts_share_is_followed_and_the_rest_computed() -> None:
    seconds, simulation = ttft(steady(blocks=40))
    assert simulation.computed == 20 * BLOCK + 5
    assert seconds <= ALONE_S + POLL_S + 0.005


@pytest.mark.parametrize("stored", [1, 20, 59])
def test_what_the_store_has_is_loaded_and_what_follows_is_followed(stored: int) -> None:
    """Computing goes on from the front while the load comes, and ends where the flight begins."""
    seconds, simulation = ttft(steady(blocks=60 - stored, stored=stored))
    assert simulation.computed <= 5 + 8 * BLOCK
    assert seconds < ALONE_S


def test_blocks_of_one_step_of_the_other_come_together() -> None:
    gaps_s = [0.0] * 60
    gaps_s[0] = gaps_s[20] = gaps_s[40] = 20 * BLOCK_S
    seconds, simulation = ttft(Other(60, 0.6, gaps_s))
    assert simulation.computed == 5
    assert seconds <= ALONE_S + 0.005 + TICK_S


def test_others_behind_the_one_that_waits_go_on() -> None:
    simulation = Following(steady())
    requests = [
        make_request("follows", PROMPT, max_tokens=1),
        make_request("behind", prompt(20 * BLOCK, 2), max_tokens=1),
    ]
    simulation.run(requests)
    assert simulation.first_token_s["behind"] <= 20 * BLOCK_S + 0.01
    assert simulation.computed == 5 + 20 * BLOCK


def test_others_of_the_same_prompt_wait_with_it_and_need_no_pages() -> None:
    simulation = Following(steady(), pages=70)
    simulation.run([make_request(key, PROMPT, max_tokens=1) for key in range(5)])
    assert simulation.computed <= 5 * (5 + BLOCK), "each the end of its prompt, which is no block"
    assert len(simulation.store.flights) == 1
    assert max(simulation.first_token_s.values()) <= ALONE_S + 0.02


def test_a_part_of_the_prompt_is_there_for_others_as_soon_as_it_has_come() -> None:
    simulation = Following(steady())
    short = make_request("short", PROMPT[: 10 * BLOCK] + prompt(5, 9), max_tokens=1)
    simulation.run([make_request("long", PROMPT, max_tokens=1), short])
    assert simulation.first_token_s["short"] <= 10 * BLOCK_S + 0.02


def test_what_came_in_the_queue_is_there_at_the_turn() -> None:
    simulation = Following(None, steady())
    simulation.run(
        [
            make_request("first", prompt(80 * BLOCK, 3), max_tokens=1),
            make_request("second", PROMPT, max_tokens=1),
        ]
    )
    waited_s = simulation.first_token_s["second"] - simulation.first_token_s["first"]
    assert waited_s <= BLOCK_S, "600 ms of the other's in 800 ms of queue"
    assert simulation.computed == 80 * BLOCK + 5


def test_a_long_queue_ends_no_flight_however_late_the_other_is() -> None:
    late = Other(60, 0.1, [0.0] * 60)
    late.gaps_s[0] = 2.5
    simulation = Following(None, late, budget=160)
    simulation.run(
        [
            make_request("first", prompt(300 * BLOCK, 3), max_tokens=1),
            make_request("second", PROMPT, max_tokens=1),
        ]
    )
    assert simulation.computed == 300 * BLOCK + 5
    assert simulation.store.counts["follows_recomputed"] == 0


def test_blocks_that_wait_for_the_turn_take_the_hosts_memory_that_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.worker.store_traffic._HOST_BYTES", 16 * 1000)
    simulation = Following(None, steady())
    simulation.run(
        [
            make_request("first", prompt(80 * BLOCK, 3), max_tokens=1),
            make_request("second", PROMPT, max_tokens=1),
        ]
    )
    assert simulation.store.counts["followed_blocks"] == 16


# ---- another that does not


def test_one_that_dies_is_recomputed_from_where_it_was() -> None:
    seconds, simulation = ttft(Other(60, 0.6, [BLOCK_S] * 30))
    assert simulation.computed == 30 * BLOCK + 5
    assert simulation.store.counts["follows_recomputed"] == 1
    assert seconds <= ALONE_S + 2 * POLL_S + 0.005


def test_a_store_that_falls_silent_is_waited_for_a_second() -> None:
    other = steady(block_s=0.05, silent_s=0.2)
    other.promised_s = 100.0  # else the promise would end it first
    seconds, simulation = ttft(other)
    assert simulation.computed == (60 - 3) * BLOCK + 5
    assert seconds <= 0.2 + LIFE_S + (60 - 3) * BLOCK_S + 0.02


def test_without_progress_it_waits_for_the_promise_and_a_quarter_of_computing() -> None:
    for promised_s in (0.05, 0.3, 0.6):
        other = Other(60, promised_s, [1000.0])
        seconds, simulation = ttft(other)
        late_s = seconds - ALONE_S
        assert late_s == pytest.approx(promised_s + SHARE * 0.6, abs=0.01)
        assert simulation.store.counts["follows_recomputed"] == 1


others = st.builds(
    Other,
    blocks=st.integers(1, 60),
    promised_s=st.floats(0, 1.25 * 0.6),
    gaps_s=st.lists(st.sampled_from([0.0, 0.001, 0.009, 0.012, 0.02, 0.1, 0.4, 2.0]), max_size=60),
    silent_s=st.sampled_from([math.inf, math.inf, 0.05, 0.3]),
    stored=st.sampled_from([0, 0, 1, 30]),
)


@settings(max_examples=300, deadline=None)
@given(other=others, length=st.integers(1, 1000), budget=st.sampled_from([32, 80, 320, 2000]))
def test_however_the_other_behaves_a_request_is_no_later_than_promised_and_a_quarter(
    other: Other, length: int, budget: int
) -> None:
    """And with what the store lets nobody wait for, later than R + R/4, not by more than 3/2 R."""
    alone, following = Simulation(None, budget=budget), Following(other, budget=budget)
    awaited_s = min(other.blocks, max(0, length // BLOCK - other.stored)) * BLOCK_S
    other.promised_s = min(other.promised_s, (1 + SHARE) * awaited_s)
    for simulation in (alone, following):
        simulation.run([make_request("a", prompt(length), max_tokens=1)])
    late_s = following.first_token_s["a"] - alone.first_token_s["a"]
    assert late_s <= other.promised_s + SHARE * awaited_s + 0.01 + 2 * TICK_S
    assert late_s <= 1.5 * awaited_s + 0.01 + 2 * TICK_S
    assert following.computed <= alone.computed


shapes = st.lists(
    st.tuples(st.integers(1, 400), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=5
)


@settings(max_examples=200, deadline=None)
@given(
    script=st.lists(st.one_of(st.none(), others), min_size=1, max_size=6),
    shapes=shapes,
    arrivals_s=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    cancels=st.dictionaries(st.integers(0, 4), st.floats(0, 2), max_size=3),
    pages=st.integers(30, 60),
)
def test_with_little_memory_and_cancels_at_any_time_everything_ends_and_nothing_is_held(
    script: list[Other | None],
    shapes: list[tuple[int, int, int]],
    arrivals_s: list[float],
    cancels: dict[object, float],
    pages: int,
) -> None:
    simulation = Following(*script, pages=pages)
    simulation.run(
        [
            make_request(key, prompt(length, seed), max_tokens=40, priority=priority, arrival_s=arrival_s)
            for key, ((length, seed, priority), arrival_s) in enumerate(zip(shapes, arrivals_s, strict=False))
        ],
        cancels,
    )
    assert set(simulation.first_token_s) | set(cancels) >= set(range(len(shapes)))
