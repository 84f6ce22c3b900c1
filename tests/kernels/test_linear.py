from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import decode_gemm, linear
from kernels.tuned.gemm_sm90 import MEASURED, GemmTile, gemm_tile
from tests.kernels import cases


def combinations(norms: Sequence[str | None]) -> st.SearchStrategy[cases.LinearCase]:
    return st.builds(
        cases.LinearCase,
        tokens=st.sampled_from([1, 2, 15, 16, 17, 33, 64]),
        columns=st.sampled_from([1, 31, 64, 96]),
        depth=st.sampled_from([1, 40, 64, 130, 256]),
        norm=st.sampled_from(norms),
        bias=st.booleans(),
        swiglu=st.booleans(),
        add=st.booleans(),
        seed=st.integers(0, 999),
    )


tiles = st.builds(
    GemmTile,
    rows=st.sampled_from([32, 64]),
    tokens=st.sampled_from([16, 32, 64]),
    depth=st.sampled_from([32, 64]),
    split=st.sampled_from([1, 2, 4]),
    warps=st.just(4),
    stages=st.just(3),
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@dtypes
@pytest.mark.parametrize("run", [linear.linear, linear.launch])
@given(case=combinations([None, "folded", "gain"]))
@settings(max_examples=25)
def test_linear_is_that_of_fp64(
    run: Callable[..., torch.Tensor], dtype: torch.dtype, case: cases.LinearCase
) -> None:
    inputs = case.inputs(dtype, "cpu")
    expected = case.expected(inputs)
    with cases.poisoned_memory():
        y = run(**inputs)
    cases.assert_close(y, expected, roundings=2)  # norm and SwiGLU may be kernels that round too
    assert inputs["add_to"] is None or y is inputs["add_to"]


@dtypes
@given(case=combinations([None, "folded"]), tile=tiles)
@settings(max_examples=60)
def test_every_tile_gives_that_of_fp64_and_repeats_it(
    dtype: torch.dtype, case: cases.LinearCase, tile: GemmTile
) -> None:
    """Twice, so that a counter left behind by split K would show."""
    results = []
    for _ in range(2):
        inputs = case.inputs(dtype, "cpu")
        expected = case.expected(inputs)
        norm = inputs.pop("norm")
        eps = None if norm is None else norm.eps
        with cases.poisoned_memory():
            results.append(decode_gemm.launch(**inputs, tile=tile, norm_eps=eps))
        cases.assert_close(results[-1], expected)
    assert torch.equal(*results)


@pytest.mark.parametrize("swiglu", [False, True])
def test_no_tokens_give_no_tokens(swiglu: bool) -> None:
    y = linear.launch(torch.empty(0, 64), torch.ones(32, 64), swiglu=swiglu)
    assert y.shape == (0, 16 if swiglu else 32)


def test_more_split_tiles_than_counters_are_refused() -> None:
    tile = GemmTile(rows=16, tokens=16, depth=16, split=2, warps=4, stages=3)
    with pytest.raises(ValueError, match="8193 tiles with split K; at most 8192"):
        decode_gemm.launch(torch.ones(1, 16), torch.ones(16 * 8193, 16), None, tile)


shapes = st.tuples(
    st.integers(1, 400_000),
    st.integers(1, 65_536) | st.integers(1, 1024).map(lambda steps: 64 * steps),
    st.integers(0, 400),
)


@given(shape=shapes | st.sampled_from(sorted(MEASURED)))
@settings(max_examples=500)
def test_every_shape_has_a_tile_that_fits_an_h100_or_goes_to_cublas(shape: tuple[int, int, int]) -> None:
    rows, depth, tokens = shape
    tile = gemm_tile(rows, depth, tokens)
    if tile is None:
        assert tokens > 64 or shape in MEASURED
        return
    assert tokens <= tile.tokens or tokens > 64, "the weights of few tokens are streamed once"
    assert tile.stages >= 2
    assert tile.shared_bytes <= 227 * 1024
    assert tile.split == 1 or -(-rows // tile.rows) <= 8192
    assert tile.prefetch % 32 == 0
