"""The scheduler alone: no device, no clock; sampled tokens are made up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

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


class Load:
    """What the test has the store bring of one sequence's blocks, from the back."""

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end  # of the run that the store has
        self.brought = 0
        self.over = False
        self.most_tokens = MAX_LEN  # of a chunk meanwhile
        self.in_pages = 0  # of what was brought


class Loader:
    """A store that loads when and what the test says."""

    def __init__(self) -> None:
        self.active: dict[Sequence, Load] = {}
        self.cancelled: list[Sequence] = []
        self.helps = True
        self.on_host = 0  # blocks from the first one on that is not in a page
        self.written: Callable[[Sequence, int], None] = lambda sequence, block: None

    def held(self, sequence: Sequence, first_block: int) -> int:
        return min(self.on_host, len(sequence.hashes) - first_block)

    def restore(self, sequence: Sequence, first_block: int) -> int:
        return self.held(sequence, first_block)

    def start(self, sequence: Sequence, first_block: int, ahead_tokens: int) -> bool:
        if self.helps:
            assert sequence not in self.active
            self.active[sequence] = Load(first_block, len(sequence.hashes))
        return self.helps

    def fill(self, sequence: Sequence, front: int) -> range | None:
        load = self.active[sequence]
        end = load.end
        while load.in_pages < load.brought and end - load.in_pages > front:
            load.in_pages += 1
            self.written(sequence, end - load.in_pages)
        tail = range(end - load.in_pages, end)
        return None if (load.over and not tail) or front >= end else tail

    def most_tokens(self, sequence: Sequence, wanted: int, plan: StepPlan, now: float, busy_s: float) -> int:
        return min(wanted, self.active[sequence].most_tokens)

    def cancel(self, sequence: Sequence) -> None:
        del self.active[sequence]
        self.cancelled.append(sequence)

    def follows(self, sequence: Sequence, front: int) -> int | None:
        return None

    def receive(self, sequence: Sequence, front: int) -> int:
        raise AssertionError("there is nothing to follow")

    def leave(self, sequence: Sequence) -> None:
        pass


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


def test_blocks_of_host_memory_are_there_at_once_and_the_store_is_asked_for_the_rest() -> None:
    loader = Loader()
    loader.on_host = 3
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(150)))
    assert bench.scheduler.queued_prefill_tokens == 150 - 3 * BLOCK
    load = loader.active[sequence]
    assert load.first == 3
    load.over = True
    assert chunks(bench.step()) == [("a", 3 * BLOCK, 64)]
    assert sequence.host_tokens == 3 * BLOCK
    assert bench.pool.match(sequence.hashes)[:3] == sequence.pages[:3]
    bench.plan()
    (output,) = bench.commit()
    assert output.start is not None
    assert (output.start.gpu_tokens, output.start.host_tokens, output.start.store_tokens) == (0, 48, 0)


def test_a_prompt_that_host_memory_has_to_its_last_token_computes_that_one() -> None:
    loader = Loader()
    loader.on_host = 100
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(4 * BLOCK)))
    assert not loader.active
    assert chunks(bench.step()) == [("a", 4 * BLOCK - 1, 1)]
    assert sequence.host_tokens == 4 * BLOCK


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
    bench = Bench(budget=200, loader=loader)
    loader.helps = False
    doomed = bench.add(make_request("doomed", prompt(64)))
    plan = bench.plan()
    loader.helps = True
    loading = bench.add(make_request("loading", prompt(100)))
    loader.active[loading].brought = 2  # blocks 4 and 5, while the step that fills blocks 0 to 3 runs
    later = bench.plan()
    assert chunks(later) == [("loading", 96, 4)]
    end(bench.scheduler, doomed, "error", 0.0, bench.counters)
    end(bench.scheduler, loading, "error", 0.0, bench.counters)
    for failed in (later, plan):
        bench.scheduler.undo(failed, 0.0)
    bench.steps.clear()
    loader.helps = False
    bench.add(make_request("again", prompt(100)))
    assert chunks(bench.step()) == [("again", 0, 64)], "up to the block that is still there"
    assert chunks(bench.step()) == [("again", 96, 4)]
    bench.pool.check()


def test_what_a_failed_step_was_to_tell_the_tables_is_told_by_the_next() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=200)
    loading = bench.add(make_request("loading", prompt(64)))
    loader.active[loading].most_tokens = 0
    bench.add(make_request("first", prompt(10, 1), priority=1))
    failed = bench.plan()
    assert chunks(failed) == [("first", 0, 10)]
    bench.scheduler.plan(0.0)
    failed.placed |= bench.scheduler._placed
    bench.steps.clear()
    bench.scheduler.release(failed.chunks[0].sequence, 0.0)
    bench.scheduler.undo(failed, 0.0)
    loader.active[loading].brought = 4
    plan = bench.plan()
    assert plan.placed[loading.slot] is loading
    assert [plan.pages[loading.slot, index] for index in range(5)] == loading.pages


# ---- loads from the store


def test_a_prompt_is_computed_from_the_front_until_it_meets_its_load() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=32)
    sequence = bench.add(make_request("a", prompt(170)))
    load = loader.active[sequence]
    load.brought = 1  # block 9 of 0 to 9
    assert chunks(bench.step()) == [("a", 0, 32)]
    load.brought = 5
    assert chunks(bench.step()) == [("a", 32, 32)]
    assert bench.pool.match(sequence.hashes) == sequence.pages[:4], "what is not met has no name"
    load.brought = 7  # computing was at block 4: 3 would be too late
    plan = bench.step()
    assert chunks(plan) == [("a", 160, 10)]
    assert loader.active == {}
    assert (sequence.store_tokens, sequence.gpu_tokens) == (96, 0)
    assert bench.pool.match(sequence.hashes) == sequence.pages[:10]
    assert sequence.phase is Phase.DECODE


def test_a_chunk_ends_where_the_load_has_got_to_and_the_next_begins_behind_it() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=200)
    sequence = bench.add(make_request("a", prompt(100)))
    loader.active[sequence].brought = 3
    assert chunks(bench.step()) == [("a", 0, 48)]
    assert len(bench.pool.match(sequence.hashes)) == 6
    assert chunks(bench.step()) == [("a", 96, 4)]


def test_a_load_that_ends_early_leaves_what_it_brought() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=32)
    sequence = bench.add(make_request("a", prompt(100)))
    loader.active[sequence].brought = 2
    loader.active[sequence].over = True
    assert [chunks(bench.step()) for _ in range(3)] == [[("a", 0, 32)], [("a", 32, 32)], [("a", 96, 4)]]


def test_a_load_that_brings_nothing_is_forgotten_and_all_is_computed() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(60)))
    loader.active[sequence].over = True
    assert chunks(bench.step()) == [("a", 0, 60)]
    assert loader.active == {}
    assert sequence.store_tokens == 0


def test_a_step_is_short_while_a_load_is_expected_and_nobody_behind_makes_it_longer() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=100)
    loading = bench.add(make_request("loading", prompt(90, 1)))
    loader.active[loading].most_tokens = 20
    loader.helps = False
    bench.add(make_request("behind", prompt(10, 2)))
    assert chunks(bench.step()) == [("loading", 0, 20)]
    loader.active[loading].most_tokens = 0
    assert bench.scheduler.plan(0.0) is None, "it waits for a moment, and the device with it"
    bench.add(make_request("urgent", prompt(10, 3), priority=1))
    assert chunks(bench.step()) == [("urgent", 0, 10)], "who is served before it is not kept"
    loader.active[loading].brought = 3
    loader.active[loading].most_tokens = 100
    assert chunks(bench.step()) == [("loading", 20, 12)], "then it jumps, and its last tokens must not wait"
    assert chunks(bench.step()) == [("loading", 80, 10), ("behind", 0, 10)]


def test_a_load_begins_when_its_sequence_is_queued_and_serves_it_when_it_is_admitted() -> None:
    loader = Loader()
    bench = Bench(loader=loader, running=1)
    loader.helps = False
    bench.add(make_request("first", prompt(10, 1), max_tokens=2))
    bench.step()
    loader.helps = True
    queued = bench.add(make_request("queued", prompt(60, 2)))
    loader.active[queued].brought = 3
    bench.step()
    assert chunks(bench.step()) == [("queued", 48, 12)]


def test_only_blocks_that_are_not_on_the_device_are_loaded() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    loader.helps = False
    bench.add(make_request("a", prompt(40), max_tokens=1))
    bench.step()
    loader.helps = True
    sequence = bench.add(make_request("b", prompt(90)))
    assert loader.active[sequence].first == 2


def test_a_store_that_was_of_no_help_is_asked_again_on_admission() -> None:
    loader = Loader()
    loader.helps = False
    bench = Bench(loader=loader, running=1)
    bench.add(make_request("first", prompt(10, 1), max_tokens=2))
    bench.step()
    sequence = bench.add(make_request("queued", prompt(60, 2)))
    loader.helps = True
    bench.step()
    bench.step()
    assert sequence in [*loader.active, *loader.cancelled]


def test_one_load_serves_all_prompts_that_need_the_same_blocks() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=200)
    sequences = [bench.add(make_request(key, prompt(60))) for key in range(3)]
    bench.add(make_request("other", prompt(10, seed=9), priority=1))
    assert list(loader.active) == [sequences[0]]
    loader.active[sequences[0]].most_tokens = 16
    assert chunks(bench.step()) == [("other", 0, 10), (0, 0, 16)]
    loader.active[sequences[0]].brought = 2
    assert chunks(bench.step()) == [(0, 48, 12), (1, 48, 12), (2, 48, 12)]
    assert [s.store_tokens for s in sequences] == [32, 0, 0]
    assert [s.gpu_tokens for s in sequences] == [0, 48, 48]


def test_nobody_waits_for_the_load_of_a_sequence_that_is_served_after_it() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=60)
    later = bench.add(make_request("later", prompt(60)))
    loader.active[later].most_tokens = 0
    urgent = bench.add(make_request("urgent", prompt(60), priority=1))
    assert list(loader.active) == [later, urgent]
    assert chunks(bench.step()) == [("urgent", 0, 60)]
    assert chunks(bench.step()) == [("later", 48, 12)]
    assert loader.active == {}
    bench.pool.check()


def test_blocks_that_another_computed_while_they_were_loaded_are_shared() -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(60)))
    loader.active[sequence].most_tokens = 0
    bench.scheduler.plan(0.0)
    pages = bench.pool.allocate(2, 0.0)
    for index, page in enumerate(pages):
        bench.pool.register(page, sequence.hashes[index], sequence.parent(index))
    loader.active[sequence].brought = 2
    assert chunks(bench.step()) == [("a", 48, 12)]
    assert sequence.pages[:2] == pages
    assert (sequence.gpu_tokens, sequence.store_tokens) == (32, 16)
    for page in pages:
        bench.pool.release(page, 0.0)
    bench.pool.check()


@pytest.mark.parametrize("admitted", [False, True])
def test_a_cancel_while_loading_is_clean(admitted: bool) -> None:
    loader = Loader()
    bench = Bench(loader=loader)
    sequence = bench.add(make_request("a", prompt(60)))
    loader.active[sequence].most_tokens = 0
    if admitted:
        bench.scheduler.plan(0.0)
    bench.scheduler.release(sequence, 0.0)
    assert loader.cancelled == [sequence]
    assert (bench.pool.referenced, bench.scheduler.running) == (0, 0)
    bench.add(make_request("b", prompt(60)))
    assert len(loader.active) == 1, "the next one starts its own load"


def test_a_preempted_sequence_gives_up_its_load_and_starts_another_when_it_comes_back() -> None:
    loader = Loader()
    bench = Bench(loader=loader, budget=32)
    sequence = bench.add(make_request("a", prompt(100)))
    loader.active[sequence].brought = 1
    bench.step()
    bench.scheduler._preempt(sequence, bench.now)
    assert loader.active == {}
    assert chunks(bench.step()) == [("a", 32, 32)]
    assert loader.active[sequence].first == 2


# ---- everything at once


class Chaos:
    """A scheduler under any order of requests, cancels, loads, failures and late commits.

    `kv` is what the pages really hold of prompts, steps and loads being the only ones to write: every row of
    every step must find the KV of all tokens before it.
    """

    def __init__(self, pages: int, running: int, depth: int) -> None:
        self.loader = Loader()
        self.bench = Bench(pages=pages, running=running, budget=24, loader=self.loader)
        self.depth = depth
        self.live: list[Sequence] = []
        self.finishes: dict[object, int] = {}
        self.loader.written = self.write_loaded
        self.kv: dict[tuple[int, int], bytes] = {}  # (page, place in it) -> all tokens up to this one
        self.written: dict[int, list[tuple[int, int]]] = {}  # by id of a plan under way
        self.ends: dict[Sequence, tuple[int, int]] = {}  # (preemptions, tokens planned)

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
            load = list(self.loader.active.values())[a % len(self.loader.active)]
            load.brought = min(load.brought + b % 3, load.end - load.first)
            load.most_tokens = b
            load.over = a > 30

    def find_less(self, a: int, b: int) -> None:
        """The store answers, and has not all of it."""
        fresh = [load for load in self.loader.active.values() if not load.brought]
        if fresh:
            load = fresh[a % len(fresh)]
            load.end = load.first + b % (load.end - load.first + 1)

    def write_loaded(self, sequence: Sequence, block: int) -> None:
        for place in range(BLOCK):
            position = block * BLOCK + place
            self.kv[sequence.pages[block], place] = bytes_of(sequence, position)

    def launch(self, plan: StepPlan) -> None:
        """What the step writes and reads."""
        places = self.written[id(plan)] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            preemptions, planned = self.ends.get(sequence, (0, 0))
            assert preemptions < sequence.preemptions or chunk.write_from >= planned, "computed once"
            self.ends[sequence] = sequence.preemptions, chunk.start + chunk.length
            for position in range(chunk.write_from, chunk.start + chunk.length):
                place = sequence.pages[position // BLOCK], position % BLOCK
                self.kv[place] = bytes_of(sequence, position)
                places.append(place)
        reads = [(chunk.sequence, chunk.start + chunk.length) for chunk in plan.chunks]
        reads += zip(plan.decodes, plan.decode_starts, strict=True)
        for sequence, length in reads:
            for position in range(min(length, sequence.prompt_length)):
                place = sequence.pages[position // BLOCK], position % BLOCK
                assert self.kv[place] == bytes_of(sequence, position), f"{position} is read, not there"

    def step(self, a: int, b: int) -> None:
        plan = self.bench.scheduler.plan(self.bench.now)
        if plan is not None:
            self.bench.steps.append(plan)
            self.check_plan(plan)
            self.launch(plan)
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
            self.kv.update(dict.fromkeys(self.written[id(plan)], b"garbage"))

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        end(self.bench.scheduler, sequence, reason, self.bench.now, self.bench.counters)
        self.finishes[sequence.request.key] += 1
        self.forget_finished()

    def forget_finished(self) -> None:
        self.live = [sequence for sequence in self.live if sequence.phase is not Phase.FINISHED]

    def drain(self) -> None:
        """No more trouble: everything ends by itself."""
        self.loader.helps = False
        for load in self.loader.active.values():
            load.most_tokens, load.over = MAX_LEN, True
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


def bytes_of(sequence: Sequence, position: int) -> bytes:
    """What the KV of a prompt's token depends on."""
    return sequence.tokens[: position + 1].tobytes()


_KINDS = (
    ["submit"] * 4
    + ["run"] * 3
    + ["step", "step", "cancel", "load", "load", "load", "load", "find_less"]
    + ["switch_store", "fail", "fail_late"]
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
    assert chaos.loader.active == {}
    assert chaos.bench.scheduler._loading == {}
