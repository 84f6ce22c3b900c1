from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.worker.pages import PagePool
from services.worker.prefixes import MIN_ROWS, PrefixGroups
from services.worker.rows import prefix_tiles
from services.worker.scheduler import Limits, Scheduler
from services.worker.sequence import Sequence
from tests.worker.requests import BLOCK, make_request, prompt


def decoding(prompts: list[list[int]], pages: int = 2048) -> tuple[Scheduler, list[Sequence]]:
    """Sequences that have prefilled these prompts, in this order."""
    limits = Limits(BLOCK, max_running=len(prompts), max_step_tokens=100_000, group_prefixes=True)
    scheduler = Scheduler(limits, PagePool(pages))
    sequences = []
    for number, tokens in enumerate(prompts):
        request = make_request(number, tokens, max_tokens=1000)
        sequence = Sequence(request, block_size=BLOCK, max_length=len(tokens) + 1000, stop_ids=frozenset())
        scheduler.add(sequence)
        sequences.append(sequence)
    scheduler.plan(0.0)
    return scheduler, sequences


def test_rows_with_the_same_first_pages_are_one_group() -> None:
    shared = [prompt(10 * BLOCK, seed=1), prompt(10 * BLOCK, seed=2)]
    scheduler, _ = decoding([shared[i % 2] + prompt(20, seed=10 + i) for i in range(2 * MIN_ROWS)])
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.prefixes == [(10, list(range(0, 2 * MIN_ROWS, 2))), (10, list(range(1, 2 * MIN_ROWS, 2)))]


def test_fewer_rows_than_a_tile_is_worth_and_unrelated_rows_are_no_group() -> None:
    shared = prompt(10 * BLOCK, seed=1)
    prompts = [shared + prompt(20, seed=10 + i) for i in range(MIN_ROWS - 1)]
    prompts += [prompt(200, seed=100 + i) for i in range(5)]
    scheduler, _ = decoding(prompts)
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.prefixes == []


def test_a_group_ends_when_its_rows_leave() -> None:
    shared = prompt(10 * BLOCK, seed=1)
    scheduler, sequences = decoding([shared + prompt(20, seed=10 + i) for i in range(MIN_ROWS)])
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert len(plan.prefixes) == 1
    scheduler.release(sequences[0], 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.prefixes == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=24))
def test_what_a_group_says_is_true_of_every_row(prompts: list[tuple[int, int]]) -> None:
    trunks = [prompt(12 * BLOCK, seed=seed) for seed in range(4)]
    scheduler, sequences = decoding(
        [
            trunks[trunk][: blocks * BLOCK] + prompt(20, seed=50 + i)
            for i, (trunk, blocks) in enumerate(prompts)
        ]
    )
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.decodes == sequences
    rows = [row for group in plan.prefixes for row in group.rows]
    assert len(rows) == len(set(rows))
    for blocks, members in plan.prefixes:
        assert len(members) >= MIN_ROWS
        assert len({tuple(sequences[row].pages[:blocks]) for row in members}) == 1
        assert all(sequences[row].computed > blocks * BLOCK for row in members)


def test_a_steady_batch_is_grouped_once() -> None:
    shared = prompt(10 * BLOCK, seed=1)
    scheduler, sequences = decoding([shared + prompt(20, seed=10 + i) for i in range(MIN_ROWS)])
    groups = PrefixGroups(scheduler.pool)
    assert groups.of(sequences) is groups.of(list(sequences))


def test_tiles_list_the_rows_of_each_group_and_leave_out_what_does_not_fit() -> None:
    scheduler, _ = decoding(
        [prompt(10 * BLOCK, seed=1) + prompt(20, seed=10 + i) for i in range(6)]
        + [prompt(4 * BLOCK, seed=2) + prompt(20, seed=30 + i) for i in range(4)]
    )
    plan = scheduler.plan(0.0)
    assert plan is not None
    tokens, tiles = prefix_tiles(plan.prefixes, rows=16, tiles=4, rows_a_tile=4, block_size=BLOCK)
    assert tokens.tolist() == [10 * BLOCK] * 6 + [4 * BLOCK] * 4 + [0] * 6
    assert tiles.tolist() == [[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, 9], [-1] * 4]
    tokens, tiles = prefix_tiles(plan.prefixes, rows=16, tiles=1, rows_a_tile=4, block_size=BLOCK)
    assert np.flatnonzero(tokens).tolist() == [0, 1, 2, 3]
    assert tiles.tolist() == [[0, 1, 2, 3]]
