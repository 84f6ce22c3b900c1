from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import norm
from tests.kernels import cases

EPS = 0.1  # large enough to matter
shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 64, 96, 576, 1000]), st.integers(0, 999))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("run", [norm.reference, norm.launch])
@given(shape=shapes)
@settings(max_examples=15)
def test_norm_is_that_of_fp64(
    run: Callable[..., torch.Tensor], dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    tokens, hidden, seed = shape
    x = cases.random(tokens, hidden, seed=seed, dtype=dtype, device="cpu")
    weight = cases.random(hidden, seed=seed + 1, dtype=dtype, device="cpu")
    with cases.poisoned_memory():
        y = run(x, weight, EPS)
    cases.assert_close(y, cases.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("run", [norm.reference, norm.launch])
@given(shape=shapes)
@settings(max_examples=15)
def test_residual_is_updated_in_place_and_then_normed(
    run: Callable[..., torch.Tensor], dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    tokens, hidden, seed = shape
    x, residual = (cases.random(tokens, hidden, seed=seed + i, dtype=dtype, device="cpu") for i in range(2))
    weight = cases.random(hidden, seed=seed + 2, dtype=dtype, device="cpu")
    total = (x.double() + residual.double()).to(dtype)
    with cases.poisoned_memory():
        y = run(x, weight, EPS, residual)
    assert torch.equal(residual, total)
    cases.assert_close(y, cases.rms_norm(total, weight, EPS))


def test_no_tokens_give_no_tokens() -> None:
    assert norm.launch(torch.empty(0, 64), torch.ones(64), EPS).shape == (0, 64)
