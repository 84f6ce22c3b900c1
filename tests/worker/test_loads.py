"""Loads in virtual time: the scheduler, StoreLoads and StoreLoad as they are, a device that takes what the
test says, and a store that answers and sends blocks whenever it likes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_payload import Codec
from services.worker.commit import Sampled, commit
from services.worker.counters import Counters
from services.worker.pages import PagePool
from services.worker.plan import StepPlan
from services.worker.rates import Rates
from services.worker.request import Request
from services.worker.scheduler import Limits, Scheduler
from services.worker.sequence import Phase, Sequence
from services.worker.store_reader import StoreLoad
from services.worker.store_traffic import StoreLoads
from services.worker.tiers import EncodedBlock, Outlook
from tests.worker.requests import BLOCK, make_request, prompt

BLOCK_S = 0.010  # to compute a block
TICK_S = 0.0005  # between two looks of an engine that waits
BLOCK_BYTES = 1000


@dataclass
class Sent:
    """What the store does for one load: when it answers, with how many blocks, and when each comes."""

    answer_s: float = 0.001
    found: int = 1_000_000
    gaps_s: list[float] = field(default_factory=list)  # before each block; the load ends after the last
    promised_s: float = 0.001  # a block, as the link is believed to be


class Store:
    """A `StoreTier` whose loads go by the clock of the simulation."""

    def __init__(self, script: list[Sent]) -> None:
        self.now = 0.0
        self.script = script
        self.loads: list[tuple[StoreLoad, float, Sent]] = []

    def start_load(
        self, hashes: Any, recompute_s: Any, tenant: str, first: bytes, most: int, outlook: Outlook
    ) -> StoreLoad | None:
        if not self.script:
            return None
        sent = self.script.pop(0)
        load = StoreLoad(hashes, recompute_s, tenant, most, 0.001, sent.promised_s, lambda: self.now)
        self.loads.append((load, self.now, sent))
        return load

    def advance(self, until_s: float) -> None:
        """Everything that happens until then, at its own time."""
        since_s = self.now
        events = []
        for load, started_s, sent in self.loads:
            at_s = started_s + sent.answer_s
            found = min(sent.found, len(load.hashes))
            events.append((at_s, load, found))
            for gap_s in sent.gaps_s[: min(found, load.most)]:
                at_s += gap_s
                events.append((at_s, load, -1))
            events.append((at_s, load, -2))
        for at_s, load, what in sorted(events, key=lambda event: event[0]):
            if not since_s < at_s <= until_s or load.over:
                continue
            self.now = at_s
            if what == -2:
                load.finish()
            elif what == -1:
                block_s = max(1e-9, at_s - load._heard_s)
                load.add([EncodedBlock(Codec.NONE, torch.empty(0))], block_s)
                load.expect(block_s)
            else:
                load.answer(what)
        self.now = until_s


class Simulation:
    """An engine without a device. Steps take `overhead_s`, and BLOCK_S for each block of tokens."""

    def __init__(
        self, script: list[Sent] | None, *, overhead_s: float = 0.0, budget: int = 320, pages: int = 400
    ) -> None:
        self.store = Store(list(script or []))
        self.rates = Rates()
        self.rates.prefill_tokens_per_s = BLOCK / BLOCK_S
        self.rates.decode_step_s = overhead_s
        self.overhead_s = overhead_s
        copies: Any = SimpleNamespace(
            codec=Codec.NONE, shape=SimpleNamespace(payload_bytes=lambda codec: BLOCK_BYTES), write=self.write
        )
        self.loads = StoreLoads(self.store, copies, self.rates, BLOCK, budget)  # type: ignore[arg-type]
        self.pool = PagePool(pages)
        self.scheduler = Scheduler(
            Limits(BLOCK, 8, budget), self.pool, self.loads if script is not None else None
        )
        self.steps = self.computed = self.loaded = 0
        self.first_token_s: dict[object, float] = {}

    def write(self, pages: list[int], blocks: list[EncodedBlock]) -> None:
        assert len(pages) == len(blocks)
        self.loaded += len(blocks)

    def run(self, requests: list[Request], cancels: dict[object, float] | None = None) -> None:
        waiting = sorted(requests, key=lambda request: request.arrival_s)
        live: list[Sequence] = []
        for _ in range(100_000):
            now = self.store.now
            while waiting and waiting[0].arrival_s <= now:
                request = waiting.pop(0)
                live.append(
                    Sequence(
                        request,
                        block_size=BLOCK,
                        max_length=len(request.tokens) + request.sampling.max_tokens,
                        stop_ids=frozenset(),
                    )
                )
                self.scheduler.add(live[-1])
            for sequence in live:
                if (cancels or {}).get(sequence.request.key, math.inf) <= now:
                    self.scheduler.release(sequence, now)
            live = [sequence for sequence in live if sequence.phase is not Phase.FINISHED]
            if not live and not waiting:
                break
            plan = self.scheduler.plan(now)
            if plan is None:
                self.store.advance(now + TICK_S)
                continue
            self.step(plan)
        assert not live, "everything ends"
        self.check_empty()

    def step(self, plan: StepPlan) -> None:
        self.steps += 1
        self.computed += sum(
            chunk.start + chunk.length - max(chunk.start, chunk.write_from) for chunk in plan.chunks
        )
        tokens = plan.prefill_tokens + len(plan.decodes)
        self.store.advance(self.store.now + self.overhead_s + tokens * BLOCK_S / BLOCK)
        for output in commit(
            self.scheduler, plan, Sampled([1] * len(plan.sampled)), self.store.now, Counters()
        ):
            if output.start is not None:
                self.first_token_s[output.key] = self.store.now

    def check_empty(self) -> None:
        self.pool.check()
        assert self.pool.referenced == 0
        assert not self.loads
        assert self.scheduler._loading == {}
        assert all(load.over for load, _, _ in self.store.loads)


def ttft(script: list[Sent] | None, blocks: int = 60, **options: Any) -> float:
    simulation = Simulation(script, **options)
    simulation.run([make_request("a", prompt(blocks * BLOCK + 5), max_tokens=1)])
    return simulation.first_token_s["a"]


ALONE_S = ttft(None)
RATES = [0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0]  # seconds a block, from 100x as fast as computing


@pytest.mark.parametrize("block_s", RATES)
def test_a_steady_store_is_used_nearly_as_well_as_can_be(block_s: float) -> None:
    best_s = min(max(m * BLOCK_S, 0.001 + (60 - m) * block_s) for m in range(61))
    seconds = ttft([Sent(gaps_s=[block_s] * 60, promised_s=block_s)])
    assert seconds <= min(ALONE_S + 0.005, best_s + 2 * BLOCK_S + 0.005)


@pytest.mark.parametrize("block_s", RATES)
@pytest.mark.parametrize("promised_s", [0.0001, 0.01, 1.0])
def test_a_store_of_which_something_else_was_believed_costs_nothing(
    block_s: float, promised_s: float
) -> None:
    assert ttft([Sent(gaps_s=[block_s] * 60, promised_s=promised_s)]) <= ALONE_S + 0.005


def test_a_dead_store_costs_a_few_steps_more_and_five_milliseconds() -> None:
    """`overhead_s` is what the second of two half steps costs."""
    overhead_s = 0.02
    alone = Simulation(None, overhead_s=overhead_s)
    dead = Simulation([Sent(answer_s=1000.0, promised_s=0.0001)], overhead_s=overhead_s)
    for simulation in (alone, dead):
        simulation.run([make_request("a", prompt(965), max_tokens=1)])
    assert dead.steps <= alone.steps + 2
    assert dead.first_token_s["a"] <= alone.first_token_s["a"] + 2 * overhead_s + 0.005


def test_a_prompt_that_nobody_stored_is_computed_in_whole_steps_as_soon_as_that_is_known() -> None:
    simulation = Simulation([Sent(found=0, answer_s=0.002)], overhead_s=0.02)
    simulation.run([make_request("a", prompt(965), max_tokens=1)])
    assert simulation.steps == 4
    assert simulation.first_token_s["a"] == pytest.approx(
        0.0025 + 4 * 0.02 + 965 / BLOCK * BLOCK_S, abs=0.001
    )


def test_a_load_that_was_made_in_the_queue_is_there_at_admission() -> None:
    simulation = Simulation([Sent(found=0), Sent(gaps_s=[0.005] * 50)])
    simulation.run(
        [
            make_request("first", prompt(640, 1), max_tokens=1),
            make_request("second", prompt(805, 2), max_tokens=1),
        ]
    )
    waited_s = simulation.first_token_s["second"] - simulation.first_token_s["first"]
    assert waited_s <= BLOCK_S, "250 ms of load in 400 ms of queue"


def test_a_load_beyond_the_hosts_memory_goes_on_when_there_is_room_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.worker.store_traffic._HOST_BYTES", 16 * BLOCK_BYTES)
    sent = Sent(gaps_s=[0.001] * 60)
    simulation = Simulation([sent] * 4)
    simulation.run([make_request("a", prompt(965), max_tokens=1)])
    assert len(simulation.store.loads) > 2
    assert all(load.most <= 16 for load, _, _ in simulation.store.loads)
    assert simulation.first_token_s["a"] < 0.3 * ALONE_S


def test_loads_in_the_queue_share_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.store_traffic._HOST_BYTES", 100 * BLOCK_BYTES)
    simulation = Simulation([Sent(gaps_s=[0.001] * 60) for _ in range(8)])
    for number in range(4):
        request = make_request(number, prompt(965, number), max_tokens=1)
        sequence = Sequence(request, block_size=BLOCK, max_length=966, stop_ids=frozenset())
        simulation.scheduler.add(sequence)
    assert [load.most for load, _, _ in simulation.store.loads] == [60, 40]


scripts = st.builds(
    Sent,
    answer_s=st.sampled_from([0.0, 0.001, 0.004, 0.02, 0.5, 100.0]),
    found=st.sampled_from([0, 1, 5, 30, 1_000_000]),
    gaps_s=st.lists(st.sampled_from([0.0, 0.0005, 0.003, 0.009, 0.02, 0.1, 2.0]), max_size=60),
    promised_s=st.sampled_from([1e-5, 0.001, 0.01, 1.0]),
)


@settings(max_examples=200, deadline=None)
@given(script=scripts, blocks=st.integers(1, 60), budget=st.sampled_from([32, 80, 320, 2000]))
def test_however_the_store_behaves_no_request_is_later_than_without_it(
    script: Sent, blocks: int, budget: int
) -> None:
    alone_s = ttft(None, blocks, budget=budget)
    assert ttft([script], blocks, budget=budget) <= alone_s + 0.005 + TICK_S


shapes = st.lists(
    st.tuples(st.integers(1, 400), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=5
)


@settings(max_examples=200, deadline=None)
@given(script=st.lists(scripts, min_size=1, max_size=8), shapes=shapes)
def test_of_many_requests_each_waits_five_milliseconds_at_most_for_itself_and_those_before_it(
    script: list[Sent], shapes: list[tuple[int, int, int]]
) -> None:
    """All at once: who came later would find the steps begun at other times."""
    requests = [
        make_request(key, prompt(length, seed), max_tokens=1, priority=priority)
        for key, (length, seed, priority) in enumerate(shapes)
    ]
    alone, with_store = Simulation(None), Simulation(script)
    for simulation in (alone, with_store):
        simulation.run(requests)
    for key, seconds in alone.first_token_s.items():
        assert with_store.first_token_s[key] <= seconds + len(requests) * (0.005 + TICK_S)
    assert with_store.computed <= alone.computed, "what is loaded or shared is not computed"


@settings(max_examples=200, deadline=None)
@given(
    script=st.lists(scripts, min_size=1, max_size=8),
    shapes=shapes,
    arrivals_s=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    cancels=st.dictionaries(st.integers(0, 4), st.floats(0, 2), max_size=3),
    pages=st.integers(30, 60),
)
def test_with_little_memory_and_cancels_at_any_time_everything_ends_and_nothing_is_held(
    script: list[Sent],
    shapes: list[tuple[int, int, int]],
    arrivals_s: list[float],
    cancels: dict[object, float],
    pages: int,
) -> None:
    simulation = Simulation(script, pages=pages)
    simulation.run(
        [
            make_request(key, prompt(length, seed), max_tokens=40, priority=priority, arrival_s=arrival_s)
            for key, ((length, seed, priority), arrival_s) in enumerate(zip(shapes, arrivals_s, strict=False))
        ],
        cancels,
    )
    assert set(simulation.first_token_s) | set(cancels) >= set(range(len(shapes)))
