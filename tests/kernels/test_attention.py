from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention
from kernels.tuned import sm90
from tests.kernels import cases

# A loop's bound in Triton 3.6's interpreter is an array of one element.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@st.composite
def attention_cases(draw: st.DrawFn) -> cases.AttentionCase:
    row = st.integers(0, 70).flatmap(
        lambda context: st.tuples(st.integers(0, min(context, 12) if context else 2), st.just(context))
    )
    return cases.AttentionCase(
        rows=tuple(draw(st.lists(row, min_size=1, max_size=3))),
        group=draw(st.sampled_from([1, 3, 4, 7])),
        n_kv=draw(st.integers(1, 2)),
        dim=draw(st.sampled_from([64, 96, 128])),
        block_size=draw(st.sampled_from([16, 32, 64, 128])),
        window=draw(st.sampled_from([0, 0, 1, 5, 33])),
        seed=draw(st.integers(0, 999)),
    )


def check(run: Callable[..., torch.Tensor], case: cases.AttentionCase, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cpu")
    with cases.poisoned_memory():
        out = run(**inputs, **case.options)
    cases.assert_close(out, case.expected(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("run", [attention.reference, attention.launch])
@given(case=attention_cases())
@settings(max_examples=30)
def test_attention_is_that_of_fp64(
    run: Callable[..., torch.Tensor], dtype: torch.dtype, case: cases.AttentionCase
) -> None:
    check(run, case, dtype)


@pytest.mark.parametrize("run", [attention.reference, attention.launch])
@pytest.mark.parametrize("context", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("window", [0, 16, 17])
def test_decode_at_a_page_boundary(run: Callable[..., torch.Tensor], context: int, window: int) -> None:
    rows = ((1, context), (1, 0), (1, context + 16))
    check(
        run, cases.AttentionCase(rows, group=3, n_kv=1, dim=64, block_size=16, window=window), torch.float32
    )


@pytest.mark.parametrize("tile", [sm90.Tile(16, 16, 1, 1), sm90.Tile(64, 32, 1, 1), sm90.Tile(128, 64, 1, 1)])
@pytest.mark.parametrize("window", [0, 40])
def test_every_tile_gives_the_same_prefill(tile: sm90.Tile, window: int) -> None:
    case = cases.AttentionCase(((45, 150), (3, 3)), group=7, n_kv=1, dim=64, block_size=64, window=window)
    inputs = case.inputs(torch.float32, "cpu")
    cases.assert_close(attention.launch(**inputs, **case.options, tile=tile), case.expected(inputs))


@pytest.mark.parametrize("run", [attention.reference, attention.launch])
def test_a_chunked_prefill_attends_as_the_whole(run: Callable[..., torch.Tensor]) -> None:
    case = cases.AttentionCase(((40, 40),), group=3, n_kv=1, dim=64, block_size=16)
    inputs = case.inputs(torch.float32, "cpu")
    parts = []
    for first, last in ((0, 7), (7, 16), (16, 39), (39, 40)):
        chunk = inputs | {
            "q": inputs["q"][first:last].contiguous(),
            "query_start": torch.tensor([0, last - first], dtype=torch.int32),
            "context_len": torch.tensor([last], dtype=torch.int32),
        }
        parts.append(run(**chunk, **case.options))
    cases.assert_close(torch.cat(parts), case.expected(inputs))


def test_a_row_of_the_reference_does_not_depend_on_the_others() -> None:
    rows = ((1, 100), (5, 60), (1, 7), (9, 9))
    case = cases.AttentionCase(rows, group=3, n_kv=3, dim=64, block_size=16)
    inputs = case.inputs(torch.float32, "cpu")
    whole = attention.reference(**inputs, **case.options)
    starts = inputs["query_start"].tolist()
    for row, (first, last) in enumerate(pairwise(starts)):
        alone = inputs | {
            "q": inputs["q"][first:last],
            "block_tables": inputs["block_tables"][row : row + 1],
            "query_start": torch.tensor([0, last - first], dtype=torch.int32),
            "context_len": inputs["context_len"][row : row + 1],
        }
        assert torch.equal(attention.reference(**alone, **case.options), whole[first:last])


def test_a_padding_row_of_the_kernel_reads_nothing_and_gives_zeros() -> None:
    case = cases.AttentionCase(((1, 20), (1, 0)), group=4, n_kv=1, dim=64, block_size=16)
    inputs = case.inputs(torch.float32, "cpu")
    inputs["block_tables"][1] = 1 << 30  # a read there would crash
    with cases.poisoned_memory():
        out = attention.launch(**inputs, **case.options)
    assert (out[1] == 0).all()


def test_page_offsets_are_64_bit() -> None:
    case = cases.AttentionCase(((1, 16), (2, 30)), group=1, n_kv=1, dim=128, block_size=128)
    inputs = case.inputs(torch.float16, "cpu")
    beyond = 2**31 // (128 * 128)  # the first page whose elements an int32 cannot number
    pool = torch.empty(beyond + 2, 1, 128, 128, dtype=torch.float16)  # 4 GiB of address space, not of memory
    for row, page in enumerate((beyond, beyond + 1)):
        pool[page] = inputs["k_pages"][inputs["block_tables"][row, 0]]
    near = inputs | {"v_pages": inputs["k_pages"]}
    tables = torch.tensor([[beyond], [beyond + 1]], dtype=torch.int32)
    far = inputs | {"k_pages": pool, "v_pages": pool, "block_tables": tables}
    for run in (attention.reference, attention.launch):
        assert torch.equal(run(**far, **case.options), run(**near, **case.options))


def test_a_tile_writes_its_own_queries_only() -> None:
    case = cases.AttentionCase(((10, 40),), group=3, n_kv=1, dim=64, block_size=16)
    inputs = case.inputs(torch.float32, "cpu")
    with cases.poisoned_memory():
        first_tile = attention.launch(
            **inputs, **case.options | {"max_query": 5}, tile=sm90.Tile(16, 16, 1, 1)
        )
    cases.assert_close(first_tile[:5], case.expected(inputs)[:5])
    assert first_tile[5:].isnan().all()


def test_the_table_takes_the_smallest_tile_that_holds_the_queries() -> None:
    assert [sm90.attention_tile(4, queries).rows for queries in (1, 4, 5, 16, 17, 512)] == [
        16,
        16,
        64,
        64,
        128,
        128,
    ]
