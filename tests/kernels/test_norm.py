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
    gain = cases.random(hidden, seed=seed + 1, dtype=dtype, device="cpu")
    with cases.poisoned_memory():
        y = run(x, gain, EPS)
    cases.assert_close(y, cases.rms_norm(x, gain, EPS))


@pytest.mark.parametrize("run", [norm.reference, norm.launch])
def test_no_gain_is_a_gain_of_one(run: Callable[..., torch.Tensor]) -> None:
    x = cases.random(3, 96, seed=0, dtype=torch.float32, device="cpu")
    cases.assert_close(run(x, None, EPS), cases.rms_norm(x, torch.ones(96), EPS))


def test_no_tokens_give_no_tokens() -> None:
    assert norm.launch(torch.empty(0, 64), torch.ones(64), EPS).shape == (0, 64)
