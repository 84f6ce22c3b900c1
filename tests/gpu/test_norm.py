from __future__ import annotations

import pytest
import torch

from kernels.norm import rms_norm
from tests.kernels import cases

EPS = 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [576, 4096, 8192])
@pytest.mark.parametrize("with_gain", [False, True])
def test_norm_is_that_of_fp64(dtype: torch.dtype, hidden: int, with_gain: bool) -> None:
    x = cases.random(33, hidden, seed=0, dtype=dtype, device="cuda")
    gain = cases.random(hidden, seed=1, dtype=dtype, device="cuda") if with_gain else None
    with cases.poisoned_memory():
        y = rms_norm(x, gain, EPS)
    cases.assert_close(y, cases.rms_norm(x, torch.ones(hidden) if gain is None else gain, EPS))
