"""The scheduler alone: no device, no clock; sampled tokens are made up."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.wire.messages import Finish, FinishReason
from services.worker.commit import Sampled, commit, end
from services.worker.counters import Counters
from services.worker.pages import PagePool
from services.worker.plan import StepPlan
from services.worker.request import Output, Request
from services.worker.scheduler import Limits, Scheduler
from services.worker.sequence import Phase, Sequence
from tests.worker.requests import BLOCK, make_request, prompt

MAX_LEN = 10_000
STOP = 319


class Loader:
    """A store that loads what it is told to hold, when the test says so."""

    def __init__(self) -> None:
        self.active: dict[Sequence, int] = {}
        self.cancelled: list[Sequence] = []
        self.helps = True

    def start(self, sequence: Sequence, first_block: int) -> bool:
        if self.helps:
            self.active[sequence] = first_block
        return self.helps

    def cancel(self, sequence: Sequence) -> None:
        del self.active[sequence]
        self.cancelled.append(sequence)


class Bench:
    """A scheduler with its pool, stepped by hand."""

    def __init__(
        self, *, pages: int = 100, running: int = 8, budget: int = 64, loader: Loader | None = None
    ) -> None:
        self.pool = PagePool(pages)
        self.scheduler = Scheduler(Limits(BLOCK, running, budget), self.pool, loader)
        self.counters = Counters()
        self.steps: deque[StepPlan] = deque()
        self.now = 0.0

    def add(self, request: Request) -> Sequence:
        sequence = Sequence(
            request,
            block_size=BLOCK,
            max_length=min(MAX_LEN, len(request.tokens) + request.sampling.max_tokens),
            stop_ids=frozenset([STOP]),
        )
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(self.now)
        assert plan is not None
        self.steps.append(plan)
        return plan

    def commit(self, token: int = 1) -> list[Output]:
        plan = self.steps.popleft()
        self.now += 1
        tokens = Sampled([token] * len(plan.sampled))
        return commit(self.scheduler, plan, tokens, self.now, self.counters)

    def step(self, token: int = 1) -> StepPlan:
        plan = self.plan()
        self.commit(token)
        return plan


def chunks(plan: StepPlan) -> list[tuple[object, int, int]]:
    return [(chunk.sequence.request.key, chunk.start, chunk.length) for chunk in plan.chunks]


def decodes(plan: StepPlan) -> list[object]:
    return [sequence.request.key for sequence in plan.decodes]


# ---- batching


def test_a_long_prompt_is_computed_in_chunks_and_samples_with_the_last() -> None:
    bench = Bench(budget=64)
    bench.add(make_request("a", prompt(150)))
    plans = [bench.step() for _ in range(3)]
    assert [chunks(plan) for plan in plans] == [[("a", 0, 64)], [("a", 64, 64)], [("a", 128, 22)]]
    assert [len(plan.sampled) for plan in plans] == [0, 0, 1]


def test_decodes_come_first_and_prefill_gets_the_rest_of_the_budget() -> None:
    bench = Bench(budget=64)
    for key in "ab":
        bench.add(make_request(key, prompt(10, seed=ord(key))))
    bench.step()
    bench.add(make_request("c", prompt(100, seed=3)))
    plan = bench.step()
    assert decodes(plan) == ["a", "b"]
    assert chunks(plan) == [("c", 0, 62)]


def test_a_step_admits_as_many_prompts_as_fit_its_budget() -> None:
    bench = Bench(budget=64)
    for key in range(4):
        bench.add(make_request(key, prompt(25, seed=key)))
    assert chunks(bench.step()) == [(0, 0, 25), (1, 0, 25), (2, 0, 14)]


def test_higher_priority_is_admitted_first_then_earlier_arrival_then_earlier_submission() -> None:
    bench = Bench(budget=64, running=64)
    bench.add(make_request("late", prompt(5, 1), arrival_s=2.0))
    bench.add(make_request("early", prompt(5, 2), arrival_s=1.0))
    bench.add(make_request("same", prompt(5, 3), arrival_s=1.0))
    bench.add(make_request("urgent", prompt(5, 4), arrival_s=3.0, priority=1))
    assert [key for key, _, _ in chunks(bench.step())] == ["urgent", "early", "same", "late"]


def test_a_waiting_prompt_of_higher_priority_goes_before_an_admitted_one() -> None:
    bench = Bench(budget=64)
    bench.add(make_request("plain", prompt(200, 1), arrival_s=1.0))
    bench.step()
    bench.add(make_request("equal", prompt(100, 2), arrival_s=0.0))
    bench.add(make_request("urgent", prompt(100, 3), arrival_s=2.0, priority=1))
    assert chunks(bench.step()) == [("urgent", 0, 64)]
    assert chunks(bench.step()) == [("urgent", 64, 36), ("plain", 64, 28)]


def test_no_more_sequences_run_than_allowed() -> None:
    bench = Bench(running=2)
    for key in range(3):
        bench.add(make_request(key, prompt(5, seed=key), max_tokens=2))
    bench.step()
    assert (bench.scheduler.running, bench.scheduler.waiting) == (2, 1)
    bench.step()  # the first two end here
    assert chunks(bench.step()) == [(2, 0, 5)]


def test_the_load_counts_uncached_prompt_tokens_of_running_and_waiting() -> None:
    bench = Bench(budget=64)
    bench.add(make_request("a", prompt(150)))
    assert bench.scheduler.queued_prefill_tokens == 150
    bench.step()
    assert bench.scheduler.queued_prefill_tokens == 86
    bench.add(make_request("b", prompt(150)))
    assert bench.scheduler.queued_prefill_tokens == 86 + 150 - 64, "64 of them are on the device already"


# ---- sharing


def test_parallel_samples_of_one_prompt_compute_it_once_in_one_step() -> None:
    bench = Bench(budget=200)
    first, *others = [bench.add(make_request(key, prompt(100))) for key in range(4)]
    plan = bench.step()
    assert chunks(plan) == [(0, 0, 100), (1, 96, 4), (2, 96, 4), (3, 96, 4)]
    assert all(other.pages[:6] == first.pages[:6] for other in others)
    assert all(other.gpu_tokens == 96 for other in others)
    assert len({sequence.pages[6] for sequence in (first, *others)}) == 4


def test_a_prompt_that_is_held_to_its_last_token_computes_that_one_and_writes_nothing() -> None:
    bench = Bench()
    bench.add(make_request("a", prompt(64), max_tokens=1))
    bench.step()
    again = bench.add(make_request("b", prompt(64)))
    plan = bench.step()
    assert chunks(plan) == [("b", 63, 1)]
    assert plan.chunks[0].write_from == 64
    assert again.gpu_tokens == 64


def test_prompts_that_start_to_share_while_being_computed_meet_on_the_same_pages() -> None:
    bench = Bench(budget=48)
    bench.add(make_request("ahead", prompt(200), arrival_s=1.0))
    bench.step()
    behind = bench.add(make_request("behind", prompt(200), arrival_s=2.0))
    computed: dict[object, int] = {"ahead": 48, "behind": 0}
    while behind.phase is not Phase.DECODE:
        for key, _, length in chunks(bench.step()):
            computed[key] += length
    assert computed == {"ahead": 200, "behind": 8}
    bench.pool.check()


def test_generated_blocks_are_named_so_that_the_next_turn_hits_them() -> None:
    bench = Bench(budget=200)
    first = bench.add(make_request("turn 1", prompt(30), max_tokens=40))
    while first.phase is not Phase.FINISHED:
        bench.step(token=7)
    conversation = prompt(30) + [7] * 40 + prompt(10, seed=1)
    second = bench.add(make_request("turn 2", conversation))
    bench.step()
    assert second.gpu_tokens == 64, "69 tokens had their KV computed: four whole blocks"


def test_sequences_that_generate_the_same_block_end_up_on_one_page() -> None:
    bench = Bench(budget=200)
    a, b = (bench.add(make_request(key, prompt(30), max_tokens=40)) for key in "ab")
    for _ in range(20):
        bench.step(token=7)
    assert a.pages[:3] == b.pages[:3]
    bench.pool.check()


def test_a_chunk_takes_over_blocks_that_another_finished_in_between() -> None:
    bench = Bench(budget=40, running=8)
    slow = bench.add(make_request("slow", prompt(100)))
    bench.step()  # 40 of its tokens: two blocks and a half
    bench.add(make_request("fast", prompt(100), priority=1, max_tokens=1))
    bench.scheduler._prefill.remove(slow)  # as if it had no turn
    while bench.scheduler.waiting or bench.scheduler._prefill:
        bench.step()
    bench.scheduler._prefill.append(slow)
    assert chunks(bench.step()) == [("slow", 96, 4)]
    assert slow.gpu_tokens == 100 - 40 - 4, "what it computed itself is no hit"
    bench.pool.check()


# ---- memory


def test_a_prompt_waits_until_its_pages_are_there() -> None:
    bench = Bench(pages=8, budget=200)
    first = bench.add(make_request("a", prompt(100, 1), max_tokens=2))  # 7 pages
    bench.add(make_request("b", prompt(60, 2)))
    assert [key for key, _, _ in chunks(bench.step())] == ["a"]
    assert bench.scheduler.waiting == 1
    bench.step()
    assert first.phase is Phase.FINISHED
    assert [key for key, _, _ in chunks(bench.step())] == ["b"]


def test_admission_leaves_room_for_running_sequences_to_grow() -> None:
    bench = Bench(pages=200, budget=10_000)
    bench.add(make_request("a", prompt(16 * 100, 1)))
    bench.add(make_request("b", prompt(16 * 98, 2)))
    bench.step()
    assert bench.scheduler.waiting == 1, "101 + 99 pages would leave none of the 1 %"


def test_when_pages_run_out_the_last_in_order_gives_way_and_comes_back() -> None:
    bench = Bench(pages=8, budget=200)
    first = bench.add(make_request("first", prompt(45, 1), max_tokens=40, arrival_s=1.0))
    second = bench.add(make_request("second", prompt(45, 2), max_tokens=40, arrival_s=2.0))
    bench.step()
    while second.phase is Phase.DECODE:
        bench.step()
        bench.pool.check()
    assert first.phase is Phase.DECODE
    assert (second.pages, second.slot, second.preemptions) == ([], -1, 1)
    while first.phase is not Phase.FINISHED:
        bench.step()
    while second.phase is not Phase.FINISHED:
        bench.step()
    assert (len(first.tokens), len(second.tokens)) == (85, 85)
    assert bench.pool.referenced == 0
    bench.pool.check()


def test_lower_priority_is_preempted_before_later_arrival() -> None:
    bench = Bench(pages=8, budget=200)
    low = bench.add(make_request("low", prompt(45, 1), max_tokens=40, arrival_s=1.0))
    high = bench.add(make_request("high", prompt(45, 2), max_tokens=40, arrival_s=2.0, priority=1))
    while high.phase is not Phase.FINISHED:
        bench.step()
    assert low.preemptions > 0
    assert high.preemptions == 0


def test_a_preempted_sequence_hits_its_own_blocks_and_counts_no_hit_for_them() -> None:
    bench = Bench(pages=20, budget=200)
    sequence = bench.add(make_request("a", prompt(100), max_tokens=40))
    for _ in range(15):
        bench.step()
    bench.scheduler._preempt(sequence, bench.now)
    plan = bench.step()
    assert chunks(plan) == [("a", 112, 3)], "115 known tokens, 7 whole blocks of them still cached"
    assert sequence.gpu_tokens == 0
    assert len(sequence.tokens) == 116


# ---- ends


def test_a_stop_token_ends_the_stream_and_is_not_part_of_it() -> None:
    bench = Bench()
    bench.add(make_request("a", prompt(5)))
    bench.plan()
    (output,) = bench.commit(token=STOP)
    assert output.tokens == ()
    assert output.start is not None
    assert output.finish == Finish("stop", stop_token=STOP)
    assert bench.pool.referenced == 0


def test_max_tokens_ends_the_stream_with_its_last_token() -> None:
    bench = Bench()
    bench.add(make_request("a", prompt(5), max_tokens=2))
    bench.step()
    bench.plan()
    (output,) = bench.commit(token=9)
    assert output.tokens == (9,)
    assert output.finish == Finish("length")
    assert bench.scheduler.plan(0.0) is None


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_released_sequence_leaves_nothing_behind_in_whatever_phase(steps: int) -> None:
    bench = Bench(budget=40)
    sequence = bench.add(make_request("a", prompt(60)))
    for _ in range(steps):
        bench.step()
    bench.scheduler.release(sequence, bench.now)
    bench.scheduler.release(sequence, bench.now)  # twice is once
    assert (bench.pool.referenced, bench.scheduler.running, bench.scheduler.waiting) == (0, 0, 0)
    assert bench.scheduler.plan(bench.now) is None
    bench.pool.check()


def test_start_says_where_the_prompt_came_from_and_how_long_it_took() -> None:
    bench = Bench(budget=64)
    bench.add(make_request("a", prompt(64), max_tokens=1))
    bench.step()
    bench.add(make_request("b", prompt(100), arrival_s=bench.now))
    bench.now += 5
    bench.plan()
    (output,) = bench.commit()
    assert output.start is not None
    assert (output.start.prompt_tokens, output.start.gpu_tokens) == (100, 64)
    assert (output.start.queue_s, output.start.prefill_s) == (5.0, 1.0)


# ---- overlap: a step is planned before the one before it is committed


def test_a_step_is_planned_on_tokens_that_nobody_has_seen() -> None:
    bench = Bench()
    sequence = bench.add(make_request("a", prompt(30), max_tokens=20))
    bench.plan()
    second = bench.plan()
    assert second.decode_starts == [30]
    assert (len(sequence.tokens), sequence.length) == (30, 32)


def test_a_stop_found_late_discards_one_token() -> None:
    bench = Bench()
    bench.add(make_request("a", prompt(5)))
    bench.plan()
    bench.plan()
    assert bench.commit(token=STOP)[0].finish is not None
    assert bench.commit(token=3) == []
    assert bench.pool.referenced == 0


def test_the_last_token_is_known_by_count_so_nothing_is_planned_after_it() -> None:
    bench = Bench()
    bench.add(make_request("a", prompt(5), max_tokens=2))
    bench.plan()
    bench.plan()
    assert bench.scheduler.plan(0.0) is None
    bench.commit()
    assert bench.commit()[0].finish == Finish("length")


def test_a_preempted_sequence_keeps_the_token_under_way_and_waits_for_it() -> None:
    bench = Bench()
    sequence = bench.add(make_request("a", prompt(40), max_tokens=20))
    bench.step()
    bench.plan()
    bench.scheduler._preempt(sequence, 0.0)
    assert bench.scheduler.plan(0.0) is None, "its last token is not known yet"
    assert bench.commit(token=5)[0].tokens == (5,)
    assert chunks(bench.step()) == [("a", 32, 10)]


def test_a_failed_step_takes_its_block_names_back_and_sharers_start_over() -> None:
    bench = Bench(budget=200)
    doomed = bench.add(make_request("a", prompt(64)))
    plan = bench.plan()
    sharer = bench.add(make_request("b", prompt(80)))
    bench.plan()
    end(bench.scheduler, doomed, "error", 0.0, bench.counters)
    bench.scheduler.undo(plan, 0.0)
    assert sharer.phase is Phase.WAITING
    assert bench.pool.match(sharer.hashes) == []
    bench.pool.check()
    bench.steps.popleft()
    bench.commit()
    assert chunks(bench.step())[0][1] == 0, "it computes the whole prompt itself"


def test_blocks_loaded_below_those_of_a_failed_step_are_found_again() -> None:
    loader = Loader()
    loader.helps = False
    bench = Bench(budget=200, loader=loader)
    doomed = bench.add(make_request("doomed", prompt(64)))
    plan = bench.plan()
    loader.helps = True
    loading = bench.add(make_request("loading", prompt(100)))
    later = bench.plan()
    del loader.active[loading]
    bench.scheduler.loaded(loading, 1, 0.0)  # block 4, while the step that fills blocks 0 to 3 runs
    end(bench.scheduler, doomed, "error", 0.0, bench.counters)
    for failed in (later, plan):
        bench.scheduler.undo(failed, 0.0)
    bench.steps.clear()
    loader.helps = False
    assert chunks(bench.step()) == [("loading", 0, 64)], "up to the block that is still there"
    assert chunks(bench.step()) == [("loading", 80, 20)]
    bench.pool.check()


def test_what_a_failed_step_was_to_tell_the_tables_is_told_by_the_next() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=200)
    loading = bench.add(make_request("loading", prompt(64)))
    bench.add(make_request("too short to load", prompt(10, 1)))
    failed = bench.plan()
    bench.steps.clear()
    bench.scheduler.release(failed.chunks[0].sequence, 0.0)
    bench.scheduler.undo(failed, 0.0)
    bench.scheduler.loaded(loading, 2, 0.0)
    plan = bench.plan()
    assert plan.placed[loading.slot] is loading
    assert [plan.pages[loading.slot, index] for index in range(5)] == loading.pages


# ---- loads from the store


def test_a_loading_sequence_holds_its_pages_and_lets_others_pass() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    loading = bench.add(make_request("loading", prompt(60, 1)))
    bench.add(make_request("short", prompt(10, 2)))
    assert chunks(bench.step()) == [("short", 0, 10)]
    assert loading.phase is Phase.LOADING
    assert bench.pool.referenced == 4 + 1


def test_loaded_blocks_are_named_and_counted_and_the_rest_is_computed() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(60)))
    assert bench.scheduler.plan(0.0) is None
    del loader.active[sequence]
    bench.scheduler.loaded(sequence, 2, 0.0)
    plan = bench.step()
    assert chunks(plan) == [("a", 32, 28)]
    assert plan.placed[sequence.slot] is sequence, "tables hear of it with its first step"
    assert (sequence.store_tokens, sequence.gpu_tokens) == (32, 0)
    assert len(bench.pool.match(sequence.hashes)) == 3


def test_only_blocks_that_are_not_on_the_device_are_loaded() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    loader.helps = False
    bench.add(make_request("a", prompt(40), max_tokens=1))
    bench.step()
    loader.helps = True
    sequence = bench.add(make_request("b", prompt(90)))
    bench.scheduler.plan(0.0)
    assert loader.active[sequence] == 2


def test_one_load_serves_all_prompts_that_need_the_same_blocks() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    sequences = [bench.add(make_request(key, prompt(60))) for key in range(3)]
    bench.add(make_request("other", prompt(10, seed=9)))
    assert chunks(bench.step()) == [("other", 0, 10)]
    assert list(loader.active) == [sequences[0]]
    del loader.active[sequences[0]]
    bench.scheduler.loaded(sequences[0], 3, 0.0)
    assert chunks(bench.step()) == [(0, 48, 12), (1, 48, 12), (2, 48, 12)]
    assert [s.store_tokens for s in sequences] == [48, 0, 0]
    assert [s.gpu_tokens for s in sequences] == [0, 48, 48]


def test_a_load_that_comes_back_empty_just_computes() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(60)))
    bench.scheduler.plan(0.0)
    del loader.active[sequence]
    bench.scheduler.loaded(sequence, 0, 0.0)
    assert chunks(bench.step()) == [("a", 0, 60)]


def test_blocks_that_another_computed_while_they_were_loaded_are_shared() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(60)))
    bench.scheduler.plan(0.0)
    pages = bench.pool.allocate(1, 0.0)
    bench.pool.register(pages[0], sequence.hashes[0], sequence.parent(0))
    del loader.active[sequence]
    bench.scheduler.loaded(sequence, 2, 0.0)
    assert sequence.pages[0] == pages[0]
    bench.pool.release(pages[0], 0.0)
    bench.pool.check()


def test_a_cancel_while_loading_is_clean() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(60)))
    bench.scheduler.plan(0.0)
    bench.scheduler.release(sequence, 0.0)
    assert loader.cancelled == [sequence]
    assert (bench.pool.referenced, bench.scheduler.running) == (0, 0)
    bench.add(make_request("b", prompt(60)))
    assert bench.scheduler.plan(0.0) is None
    assert len(loader.active) == 1, "the next one starts its own load"


# ---- everything at once


class Chaos:
    """A scheduler under any order of requests, cancels, loads, failures and late commits."""

    def __init__(self, pages: int, running: int, depth: int) -> None:
        self.loader = Loader()
        self.bench = Bench(pages=pages, running=running, budget=24, loader=self.loader)
        self.depth = depth
        self.live: list[Sequence] = []
        self.finishes: dict[object, int] = {}

    def submit(self, a: int, b: int) -> None:
        key = len(self.finishes)
        request = make_request(
            key, prompt(1 + b % 90, seed=a % 3), max_tokens=1 + a * b % 40, priority=b % 2, arrival_s=a % 5
        )
        sequence = self.bench.add(request)
        sequence.max_length = min(sequence.max_length, self.bench.pool.pages * BLOCK)
        self.live.append(sequence)
        self.finishes[key] = 0

    def cancel(self, a: int, b: int) -> None:
        if self.live:
            self.end(self.live[a % len(self.live)], "cancelled")

    def switch_store(self, a: int, b: int) -> None:
        self.loader.helps = not self.loader.helps

    def load(self, a: int, b: int) -> None:
        if self.loader.active:
            sequence = list(self.loader.active)[a % len(self.loader.active)]
            first = self.loader.active.pop(sequence)
            self.bench.scheduler.loaded(sequence, b % (len(sequence.hashes) - first + 1), self.bench.now)

    def step(self, a: int, b: int) -> None:
        plan = self.bench.scheduler.plan(self.bench.now)
        if plan is not None:
            self.bench.steps.append(plan)
            self.check_plan(plan)
        if len(self.bench.steps) >= self.depth or (plan is None and self.bench.steps):
            for output in self.bench.commit(token=STOP if a == 7 else b % 2):
                self.finishes[output.key] += output.finish is not None
        self.forget_finished()

    def run(self, a: int, b: int) -> None:
        for _ in range(a % 20):
            self.step(1, b)
            self.check()

    def fail(self, a: int, b: int) -> None:
        """A launch raises."""
        plan = self.bench.scheduler.plan(self.bench.now)
        if plan is not None:
            for sequence in plan.members:
                self.end(sequence, "error")
            self.bench.scheduler.undo(plan, self.bench.now)

    def fail_late(self, a: int, b: int) -> None:
        """The oldest step under way raises when its result is asked for, and takes the later ones along."""
        plans = list(self.bench.steps)
        self.bench.steps.clear()
        for plan in plans:
            for sequence in plan.members:
                if sequence.phase is not Phase.FINISHED:
                    self.end(sequence, "error")
        for plan in reversed(plans):
            self.bench.scheduler.undo(plan, self.bench.now)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        end(self.bench.scheduler, sequence, reason, self.bench.now, self.bench.counters)
        self.finishes[sequence.request.key] += 1
        self.forget_finished()

    def forget_finished(self) -> None:
        self.live = [sequence for sequence in self.live if sequence.phase is not Phase.FINISHED]

    def drain(self) -> None:
        """No more trouble: everything ends by itself."""
        self.loader.helps = False
        while self.loader.active:
            self.load(0, 0)
        for _ in range(3_000):
            if not self.live:
                break
            self.step(1, 1)
        while self.bench.steps:
            self.bench.commit()

    def check_plan(self, plan: StepPlan) -> None:
        assert len(plan.decodes) + plan.prefill_tokens <= self.bench.scheduler.limits.max_step_tokens
        members = plan.members
        assert len(set(members)) == len(members), "a sequence is in a step once"
        for chunk in plan.chunks:
            assert chunk.length > 0
            assert chunk.start + chunk.length <= chunk.sequence.capacity
            assert chunk.write_from >= chunk.start
        for sequence, start in zip(plan.decodes, plan.decode_starts, strict=True):
            assert start < sequence.capacity
        for sequence in members:
            if sequence.computed % BLOCK:
                page = sequence.pages[sequence.computed // BLOCK]
                assert self.bench.pool._references[page] == 1, "a page that is written has one user"

    def check(self) -> None:
        pool = self.bench.pool
        pool.check()
        held = [page for sequence in self.live for page in sequence.pages]
        assert pool.referenced == len(set(held))
        for page in set(held):
            assert pool._references[page] == held.count(page)
        assert self.bench.scheduler.running == sum(sequence.slot >= 0 for sequence in self.live)
        for sequence in self.live:
            assert self.finishes[sequence.request.key] == 0
            assert sequence.computed <= sequence.length <= sequence.max_length
            if sequence.pages:
                named = pool.match(sequence.hashes)[: sequence.computed // BLOCK]
                assert sequence.pages[: len(named)] == named, "it holds the pages that carry the names"


_KINDS = (
    ["submit"] * 4 + ["run"] * 3 + ["step", "cancel", "load", "load", "switch_store", "fail", "fail_late"]
)

operations = st.lists(
    st.tuples(st.sampled_from(_KINDS), st.integers(0, 40), st.integers(0, 100)), min_size=20, max_size=80
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(pages=st.integers(6, 14), running=st.integers(1, 5), depth=st.integers(1, 2), todo=operations)
def test_in_any_order_of_events_the_books_balance_and_everything_ends_once(
    pages: int, running: int, depth: int, todo: list[tuple[str, int, int]]
) -> None:
    chaos = Chaos(pages, running, depth)
    for kind, a, b in todo:
        getattr(chaos, kind)(a, b)
        chaos.check()
    chaos.drain()
    chaos.check()
    assert not chaos.live
    assert set(chaos.finishes.values()) <= {1}
    assert chaos.bench.pool.referenced == 0
