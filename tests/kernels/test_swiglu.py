from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import swiglu
from tests.kernels import cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("run", [swiglu.reference, swiglu.launch])
@given(tokens=st.integers(0, 3), columns=st.sampled_from([1, 48, 1024, 1536]), seed=st.integers(0, 999))
@settings(max_examples=15)
def test_swiglu_is_that_of_fp64(
    run: Callable[..., torch.Tensor], dtype: torch.dtype, tokens: int, columns: int, seed: int
) -> None:
    gate_up = 4 * cases.random(tokens, 2 * columns, seed=seed, dtype=dtype, device="cpu")
    with cases.poisoned_memory():
        out = run(gate_up)
    cases.assert_close(out, cases.swiglu(gate_up))
