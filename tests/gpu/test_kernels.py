"""The kernels as CUDA runs them, in the dtypes that serve; tests/kernels has the small cases."""

from __future__ import annotations

import pytest
import torch

from kernels.rope import rope_kv_write
from tests.kernels import cases

DEVICE = "cuda"
EPS = 1e-6
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@dtypes
@pytest.mark.parametrize(
    ("n_q", "n_kv", "dim", "normed"), [(9, 3, 64, False), (32, 8, 128, True), (4, 4, 96, True)]
)
def test_q_is_rotated_and_kv_written_to_the_slots_and_nowhere_else(
    dtype: torch.dtype, n_q: int, n_kv: int, dim: int, normed: bool
) -> None:
    slots = (*range(60, 80), -1, 200, 5, -1)
    case = cases.RopeCase(slots, pages=4, n_q=n_q, n_kv=n_kv, dim=dim, block_size=64, normed=normed)
    inputs = case.inputs(dtype, DEVICE)
    with cases.poisoned_memory():
        q = rope_kv_write(**inputs, eps=EPS)
    case.check(q, inputs, EPS)
