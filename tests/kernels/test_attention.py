from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention
from kernels.attention import AttentionBatch, SharedPrefixes, Workspace, plan
from kernels.tuned import sm90
from tests.kernels import cases

# A loop's bound in Triton 3.6's interpreter is an array of one element.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

#: Tiles so small that short rows have several.
SMALL = sm90.DecodeTile(keys=16, warps=1, stages=1, programs_per_sm=1, least_tiles=1, combined=512)
KERNEL = "kernel"
REFERENCE = "reference"
both = pytest.mark.parametrize("which", [REFERENCE, KERNEL])


@st.composite
def attention_cases(draw: st.DrawFn) -> cases.AttentionCase:
    decode = st.tuples(st.just(1), st.integers(0, 150))
    chunk = st.integers(0, 70).flatmap(
        lambda context: st.tuples(st.integers(0, min(context, 12) if context else 2), st.just(context))
    )
    rows = draw(st.lists(decode, max_size=4)) + draw(st.lists(chunk, max_size=2))
    block_size = draw(st.sampled_from([16, 32, 64, 128]))
    return cases.AttentionCase(
        rows=tuple(rows or [(1, 5)]),
        group=draw(st.sampled_from([1, 3, 4, 7])),
        n_kv=draw(st.integers(1, 2)),
        dim=draw(st.sampled_from([64, 96, 128])),
        block_size=block_size,
        window=draw(st.sampled_from([0, 0, 1, 5, 33])),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def shared_cases(draw: st.DrawFn) -> cases.AttentionCase:
    block_size = draw(st.sampled_from([16, 32, 64]))
    rows: list[tuple[int, int]] = []
    shared = []
    for _ in range(draw(st.integers(1, 2))):
        blocks = draw(st.integers(1, 160 // block_size))
        own = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
        shared.append((blocks, tuple(range(len(rows), len(rows) + len(own)))))
        rows += [(1, blocks * block_size + tokens) for tokens in own]
        rows += draw(st.lists(st.tuples(st.just(1), st.integers(0, 70)), max_size=1))  # in no tile
    return cases.AttentionCase(
        rows=tuple(rows),
        group=draw(st.sampled_from([1, 3, 4, 7])),
        n_kv=draw(st.integers(1, 2)),
        dim=draw(st.sampled_from([64, 96])),
        block_size=block_size,
        seed=draw(st.integers(0, 999)),
        shared=tuple(shared),
    )


def attend(
    which: str, case: cases.AttentionCase, inputs: cases.AttentionInputs, **options: Any
) -> torch.Tensor:
    run = attention.launch if which == KERNEL else attention.reference
    ready = plan(inputs.batch, window=case.window)
    with cases.poisoned_memory():
        return run(inputs.q, inputs.k_pages, inputs.v_pages, ready, scale=case.dim**-0.5, **options)


def check(
    which: str,
    case: cases.AttentionCase,
    dtype: torch.dtype = torch.float32,
    workspace: Workspace | None = None,
    empty_tiles: int = 0,
) -> None:
    if workspace is None and which == KERNEL:
        with cases.poisoned_memory():
            workspace = case.workspace("cpu", tile=SMALL, programs=3)
    inputs = case.inputs(dtype, "cpu", workspace, empty_tiles)
    cases.assert_close(attend(which, case, inputs), case.expected(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@both
@given(case=attention_cases())
@settings(max_examples=30)
def test_attention_is_that_of_fp64(which: str, dtype: torch.dtype, case: cases.AttentionCase) -> None:
    check(which, case, dtype)


@both
@pytest.mark.parametrize("context", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("window", [0, 16, 17])
def test_decode_at_a_page_boundary(which: str, context: int, window: int) -> None:
    rows = ((1, context), (1, 0), (1, context + 16))
    check(which, cases.AttentionCase(rows, group=3, n_kv=1, dim=64, block_size=16, window=window))


@pytest.mark.parametrize("context", [63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_decode_with_the_shipped_tile_at_its_boundaries(context: int, block_size: int) -> None:
    case = cases.AttentionCase(((1, context), (1, 1)), group=4, n_kv=1, dim=64, block_size=block_size)
    check(KERNEL, case, workspace=case.workspace("cpu", programs=2))


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("least_tiles", [1, 3])
def test_a_decode_is_the_same_however_many_programs_share_it(programs: int, least_tiles: int) -> None:
    case = cases.AttentionCase(((1, 300), (1, 0), (1, 20), (1, 90)), group=3, n_kv=1, dim=64, block_size=32)
    tile = replace(SMALL, least_tiles=least_tiles)
    check(KERNEL, case, workspace=case.workspace("cpu", tile=tile, programs=programs))


def test_many_rows_are_dealt_out() -> None:
    rows = tuple((1, 1 + 7 * row % 40) for row in range(100))
    check(KERNEL, cases.AttentionCase(rows, group=1, n_kv=1, dim=16, block_size=16))


@pytest.mark.parametrize("group", [16, 20])
def test_large_groups_take_larger_tiles(group: int) -> None:
    check(KERNEL, cases.AttentionCase(((1, 70), (1, 3), (3, 20)), group=group, n_kv=1, dim=64, block_size=16))


def test_one_workspace_serves_batches_one_after_the_other() -> None:
    workspace = Workspace(3, 8, 2, 64, "cpu", tile=SMALL, programs=4)
    for contexts in ((300, 20, 90), (20, 200, 0), (5, 0, 1), (300, 20, 90)):
        rows = tuple((1, context) for context in contexts)
        check(
            KERNEL,
            cases.AttentionCase(rows, group=4, n_kv=2, dim=64, block_size=16),
            workspace=workspace,
        )
        assert (workspace.arrived == 0).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@given(case=shared_cases(), empty_tiles=st.integers(0, 2))
@settings(max_examples=20)
def test_rows_that_share_a_prefix_attend_as_if_each_had_its_own(
    which: str, dtype: torch.dtype, case: cases.AttentionCase, empty_tiles: int
) -> None:
    if which == REFERENCE:
        check(which, case, dtype, empty_tiles=empty_tiles)
        return
    for shared_programs in (1, 3):
        workspace = case.workspace(
            "cpu", tile=SMALL, programs=3, shared_programs=shared_programs, max_tiles=8
        )
        check(which, case, dtype, workspace, empty_tiles)


def test_more_rows_than_a_tile_holds_take_several() -> None:
    rows = tuple((1, 65 + row) for row in range(7))
    case = cases.AttentionCase(rows, group=40, n_kv=1, dim=64, block_size=64, shared=((1, tuple(range(7))),))
    assert attention.shared_rows(40, 1) == 3
    check(KERNEL, case)


def test_without_a_shared_prefix_every_tile_is_empty() -> None:
    case = cases.AttentionCase(((1, 50), (1, 0), (1, 7)), group=4, n_kv=1, dim=64, block_size=16)
    check(KERNEL, case, workspace=case.workspace("cpu", programs=3, max_tiles=3), empty_tiles=3)


def test_a_window_ignores_that_a_prefix_is_shared() -> None:
    rows = ((1, 70), (1, 75))
    case = cases.AttentionCase(rows, group=4, n_kv=1, dim=64, block_size=16, window=20, shared=((2, (0, 1)),))
    check(KERNEL, case)


@pytest.mark.parametrize("tile", [sm90.Tile(16, 16, 1, 1), sm90.Tile(64, 32, 1, 1), sm90.Tile(128, 64, 1, 1)])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("window", [0, 40, 100])
def test_every_tile_gives_the_same_prefill(tile: sm90.Tile, block_size: int, window: int) -> None:
    rows = ((45, 150), (3, 3), (2, 0))
    case = cases.AttentionCase(rows, group=7, n_kv=1, dim=64, block_size=block_size, window=window)
    inputs = case.inputs(torch.float32, "cpu")
    cases.assert_close(attend(KERNEL, case, inputs, tile=tile), case.expected(inputs))


@both
def test_a_chunked_prefill_attends_as_the_whole(which: str) -> None:
    case = cases.AttentionCase(((40, 40),), group=3, n_kv=1, dim=64, block_size=16)
    inputs = case.inputs(torch.float32, "cpu")
    parts = []
    for first, last in ((0, 7), (7, 16), (16, 39), (39, 40)):
        batch = AttentionBatch(
            inputs.batch.block_tables,
            inputs.batch.slots,
            query_start=torch.tensor([0, last - first], dtype=torch.int32),
            context_len=torch.tensor([last], dtype=torch.int32),
            decodes=0,
            max_query=last - first,
        )
        chunk = cases.AttentionInputs(
            inputs.q[first:last].contiguous(), inputs.k_pages, inputs.v_pages, batch
        )
        parts.append(attend(which, case, chunk))
    cases.assert_close(torch.cat(parts), case.expected(inputs))


def test_a_row_of_the_reference_does_not_depend_on_the_others() -> None:
    rows = ((1, 100), (5, 60), (1, 7), (9, 9))
    case = cases.AttentionCase(rows, group=3, n_kv=3, dim=64, block_size=16)
    inputs = case.inputs(torch.float32, "cpu")
    whole = attend(REFERENCE, case, inputs)
    starts = inputs.batch.query_start.tolist()
    for row, (first, last) in enumerate(pairwise(starts)):
        batch = AttentionBatch(
            inputs.batch.block_tables,
            inputs.batch.slots[row : row + 1],
            query_start=torch.tensor([0, last - first], dtype=torch.int32),
            context_len=inputs.batch.context_len[row : row + 1],
            decodes=0,
            max_query=last - first,
        )
        alone = cases.AttentionInputs(inputs.q[first:last], inputs.k_pages, inputs.v_pages, batch)
        assert torch.equal(attend(REFERENCE, case, alone), whole[first:last])


def test_a_padding_row_of_the_kernel_reads_no_keys_and_gives_zeros() -> None:
    case = cases.AttentionCase(((1, 20), (1, 0), (2, 0)), group=4, n_kv=1, dim=64, block_size=16)
    inputs = case.inputs(torch.float32, "cpu", case.workspace("cpu", programs=2))
    inputs.batch.block_tables[0] = 1 << 30 if int(inputs.batch.slots[0]) else 1  # keys there: a crash
    out = attend(KERNEL, case, inputs)
    assert (out[1:] == 0).all()


def test_page_offsets_are_64_bit() -> None:
    case = cases.AttentionCase(((1, 16), (2, 30)), group=1, n_kv=1, dim=128, block_size=128)
    near = case.inputs(torch.float16, "cpu", case.workspace("cpu", programs=2))
    beyond = 2**31 // (128 * 128)  # the first page whose elements an int32 cannot number
    pool = torch.empty(beyond + 2, 1, 128, 128, dtype=torch.float16)  # 4 GiB of address space, not of memory
    slots = near.batch.slots.tolist()
    pages = near.batch.block_tables[slots, 0]
    pool[beyond:] = near.k_pages[pages]
    near = cases.AttentionInputs(near.q, near.k_pages, near.k_pages, near.batch)
    results = [attend(which, case, near) for which in (REFERENCE, KERNEL)]
    near.batch.block_tables[slots, 0] = torch.tensor([beyond, beyond + 1], dtype=torch.int32)
    far = cases.AttentionInputs(near.q, pool, pool, near.batch)
    for which, result in zip((REFERENCE, KERNEL), results, strict=True):
        assert torch.equal(attend(which, case, far), result)


def test_a_tile_writes_its_own_queries_only() -> None:
    case = cases.AttentionCase(((10, 40),), group=3, n_kv=1, dim=64, block_size=16)
    inputs = case.inputs(torch.float32, "cpu")
    inputs.batch.query_start.copy_(torch.tensor([0, 10]))
    first_five = AttentionBatch(**vars(inputs.batch) | {"max_query": 5})
    cut = cases.AttentionInputs(inputs.q, inputs.k_pages, inputs.v_pages, first_five)
    first_tile = attend(KERNEL, case, cut, tile=sm90.Tile(16, 16, 1, 1))
    cases.assert_close(first_tile[:5], case.expected(inputs)[:5])
    assert first_tile[5:].isnan().all()


def test_a_batch_too_large_for_the_workspace_is_refused() -> None:
    case = cases.AttentionCase(((1, 20), (1, 30)), group=4, n_kv=1, dim=64, block_size=16)
    small = Workspace(1, 4, 1, 64, "cpu", programs=1)
    with pytest.raises(ValueError, match="2 decode rows, but the attention workspace has room for 1"):
        plan(case.inputs(torch.float32, "cpu", small).batch)
    inputs = case.inputs(torch.float32, "cpu", Workspace(2, 4, 1, 64, "cpu", programs=1, max_tiles=1))
    tiles = torch.full((2, 32), -1, dtype=torch.int32)
    shared = SharedPrefixes(torch.zeros(2, dtype=torch.int32), tiles)
    with pytest.raises(ValueError, match=r"2 tiles of shared prefixes, but .* has room for 1"):
        plan(AttentionBatch(**vars(inputs.batch) | {"shared": shared}))


def test_the_table_takes_the_large_tile_for_many_short_chunks() -> None:
    def rows(group: int, max_query: int, heads: int) -> int:
        return sm90.prefill_tile(group, 128, max_query, heads).rows

    assert rows(4, 8192, 8) == 64
    assert rows(4, 128, 8) == 64  # 32 programs of 128 rows would leave most of the device idle
    assert rows(4, 128, 8 * 33) == 128
    assert rows(80, 8, 1) == 128  # a whole group must fit
