from __future__ import annotations

import pytest
import torch

from kernels.swiglu import swiglu
from tests.kernels import cases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1536, 14336])
def test_swiglu_is_that_of_fp64(dtype: torch.dtype, columns: int) -> None:
    gate_up = 4 * cases.random(33, 2 * columns, seed=0, dtype=dtype, device="cuda")
    with cases.poisoned_memory():
        cases.assert_close(swiglu(gate_up), cases.swiglu(gate_up))
