"""Attention as CUDA runs it, in the dtypes that serve; tests/kernels has the small cases."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kernels.attention import Workspace, paged_attention, plan
from kernels.tuned import sm90
from tests.kernels import cases

DEVICE = "cuda"
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
#: group, n_kv, dim, block_size
shapes = pytest.mark.parametrize(
    "shape",
    [(4, 8, 128, 64), (2, 8, 128, 64), (3, 3, 64, 16), (7, 4, 128, 128), (1, 4, 96, 32), (2, 4, 256, 64)],
    ids=str,
)


def make(
    shape: tuple[int, int, int, int],
    rows: tuple[tuple[int, int], ...],
    window: int = 0,
    seed: int = 0,
    shared: tuple[tuple[int, tuple[int, ...]], ...] = (),
) -> cases.AttentionCase:
    group, n_kv, dim, block_size = shape
    return cases.AttentionCase(rows, group, n_kv, dim, block_size, window, seed, shared)


def attend(case: cases.AttentionCase, inputs: cases.AttentionInputs) -> torch.Tensor:
    ready = plan(inputs.batch, window=case.window)
    return paged_attention(inputs.q, inputs.k_pages, inputs.v_pages, ready, scale=case.dim**-0.5)


def check(
    case: cases.AttentionCase,
    dtype: torch.dtype = torch.bfloat16,
    workspace: Workspace | None = None,
    empty_tiles: int = 0,
) -> None:
    with cases.poisoned_memory():
        workspace = workspace or case.workspace(DEVICE)
        inputs = case.inputs(dtype, DEVICE, workspace, empty_tiles)
        out = attend(case, inputs)
    cases.assert_close(out, case.expected(inputs))
    assert (workspace.arrived == 0).all()


@dtypes
@shapes
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(
    "rows",
    [
        ((1, 700), (1, 64), (1, 0), (1, 65), (1, 1)),
        ((130, 400), (1, 300), (17, 17), (3, 0)),
        ((1, 33), (1, 512), (1, 0), (128, 4224), (33, 97)),
    ],
    ids=["decodes", "chunks", "mixed"],
)
def test_attention_is_that_of_fp64(
    dtype: torch.dtype, shape: tuple[int, int, int, int], window: int, rows: tuple[tuple[int, int], ...]
) -> None:
    check(make(shape, rows, window), dtype)


@shapes
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_of_up_to_32k_tokens_are_those_of_fp64(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    draw = random.Random(seed)
    contexts = [int(2 ** draw.uniform(0, 15)) for _ in range(draw.choice([1, 5, 40]))]
    contexts += [0] * draw.randrange(3)
    draw.shuffle(contexts)
    rows = [(1, context) for context in contexts]
    for _ in range(draw.randrange(3)):
        context = int(2 ** draw.uniform(1, 14))
        rows.append((draw.randint(2, min(300, context)), context))
    check(make(shape, tuple(rows), draw.choice([0, 0, 1000]), seed))


@pytest.mark.parametrize("tile", sm90.DECODE_CANDIDATES, ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 128, 64), (7, 4, 128, 16)], ids=str)
def test_every_tile_of_the_table_decodes_alike(
    tile: sm90.DecodeTile, shape: tuple[int, int, int, int]
) -> None:
    case = make(shape, ((1, 5000), (1, 1), (1, 0), *((1, 100 + row) for row in range(100))))
    check(case, workspace=case.workspace(DEVICE, tile=tile))


@shapes
def test_every_row_of_a_large_batch_is_right(shape: tuple[int, int, int, int]) -> None:
    draw = random.Random(0)
    check(make(shape, tuple((1, draw.randint(0, 900)) for _ in range(300))))


@dtypes
@shapes
@pytest.mark.parametrize("empty_tiles", [0, 2])
def test_rows_that_share_a_prefix_attend_as_if_each_had_its_own(
    dtype: torch.dtype, shape: tuple[int, int, int, int], empty_tiles: int
) -> None:
    draw = random.Random(empty_tiles)
    rows: list[tuple[int, int]] = []
    shared = []
    for tokens, count in ((128, 3), (4096, 70), (1024, 1)):
        shared.append((tokens // shape[3], tuple(range(len(rows), len(rows) + count))))
        rows += [(1, tokens + draw.randint(1, 300)) for _ in range(count)]
        rows += [(1, draw.randint(0, 2000)) for _ in range(2)]  # in no tile
    rows.append((100, 500))
    case = make(shape, tuple(rows), shared=tuple(shared))
    check(case, dtype, case.workspace(DEVICE, max_tiles=40), empty_tiles)


def test_results_repeat_bit_for_bit() -> None:
    """Whoever arrives last combines a row, but always in the same order."""
    shared = ((16, tuple(range(40))),)
    case = make((4, 8, 128, 64), tuple((1, 1100 + 300 * row) for row in range(48)), shared=shared)
    inputs = case.inputs(torch.bfloat16, DEVICE, case.workspace(DEVICE))
    first = attend(case, inputs)
    for _ in range(100):
        assert torch.equal(attend(case, inputs), first)


@pytest.mark.parametrize("shared", [False, True])
def test_a_graph_replays_with_other_lengths(shared: bool) -> None:
    shape = (4, 2, 128, 64)
    captured = make(shape, ((1, 3000), (1, 200), (1, 400)), shared=((2, (1, 2)),) if shared else ())
    workspace = captured.workspace(DEVICE)
    inputs = captured.inputs(torch.bfloat16, DEVICE, workspace)
    attend(captured, inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # layers
            out = attend(captured, inputs)
    replays = [
        make(shape, ((1, 10), (1, 0), (1, 0)), seed=1, shared=((0, (0, 2)),) if shared else ()),
        make(shape, ((1, 500), (1, 300), (1, 2500)), seed=2, shared=((4, (0, 1, 2)),) if shared else ()),
        replace(captured, seed=3),
    ]
    for case in replays:
        others = case.inputs(torch.bfloat16, DEVICE)
        inputs.q.copy_(others.q)
        for pool, other in ((inputs.k_pages, others.k_pages), (inputs.v_pages, others.v_pages)):
            pool[: len(other)] = other[: len(pool)]
        batch, other_batch = inputs.batch, others.batch
        batch.context_len.copy_(other_batch.context_len)
        batch.slots.copy_(other_batch.slots)
        batch.block_tables.zero_()
        batch.block_tables[:, : other_batch.block_tables.shape[1]] = other_batch.block_tables
        if batch.shared is not None and other_batch.shared is not None:
            batch.shared.tokens.copy_(other_batch.shared.tokens)
            batch.shared.tiles.copy_(other_batch.shared.tiles)
        graph.replay()
        cases.assert_close(out, case.expected(others))
