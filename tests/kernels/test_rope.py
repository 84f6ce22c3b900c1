from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import rope
from kernels.tuned import sm90
from tests.kernels import cases

EPS = 0.1  # large enough to matter


@st.composite
def rope_cases(draw: st.DrawFn) -> cases.RopeCase:
    block_size = draw(st.sampled_from([16, 32, 128]))
    pages = draw(st.integers(1, 4))
    slots = draw(st.lists(st.integers(0, pages * block_size - 1), unique=True, max_size=4))
    padding = draw(st.integers(0, 2))
    n_kv = draw(st.integers(1, 2))
    return cases.RopeCase(
        slots=tuple(draw(st.permutations([*slots, *[-1] * padding]))),
        pages=pages,
        n_q=n_kv * draw(st.sampled_from([1, 3, 7])),
        n_kv=n_kv,
        dim=draw(st.sampled_from([64, 96, 128])),
        block_size=block_size,
        normed=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("run", [rope.reference, rope.launch])
@given(case=rope_cases())
@settings(max_examples=15)
def test_q_is_rotated_and_kv_written_to_the_slots_and_nowhere_else(
    run: Callable[..., torch.Tensor], dtype: torch.dtype, case: cases.RopeCase
) -> None:
    inputs = case.inputs(dtype, "cpu")
    with cases.poisoned_memory():
        q = run(**inputs, eps=EPS)
    case.check(q, inputs, EPS)


@pytest.mark.parametrize("normed", [False, True])
def test_programs_of_many_tokens_do_the_same(normed: bool) -> None:
    slots = (*range(100), -1, *range(110, 310), -1)
    case = cases.RopeCase(slots, pages=5, n_q=2, n_kv=1, dim=64, block_size=64, normed=normed)
    for count in (70, len(slots)):
        assert sm90.rope_tile(count)[0] > 1
        part = replace(case, slots=slots[:count])
        inputs = part.inputs(torch.float16, "cpu")
        with cases.poisoned_memory():
            q = rope.launch(**inputs, eps=EPS)
        part.check(q, inputs, EPS)


@pytest.mark.parametrize("run", [rope.reference, rope.launch])
def test_pages_may_hold_another_dtype_than_the_activations(run: Callable[..., torch.Tensor]) -> None:
    case = cases.RopeCase(slots=(3, 20), pages=2, n_q=2, n_kv=2, dim=64, block_size=16, normed=False)
    inputs = case.inputs(torch.float32, "cpu") | {
        name: torch.full((2, 2, 16, 64), torch.nan, dtype=torch.float16) for name in ("k_pages", "v_pages")
    }
    case.check(run(**inputs, eps=EPS), inputs, EPS)


def test_slots_are_64_bit() -> None:
    beyond = 2**31 // (128 * 128)  # the first page whose elements an int32 cannot number
    # 4 GiB of address space each, not of memory
    pools = [torch.empty(beyond + 1, 1, 128, 128, dtype=torch.float16) for _ in range(2)]
    case = cases.RopeCase(slots=(5,), pages=1, n_q=1, n_kv=1, dim=128, block_size=128, normed=False)
    inputs = case.inputs(torch.float16, "cpu")
    far = inputs | {"slots": torch.tensor([beyond * 128 + 5]), "k_pages": pools[0], "v_pages": pools[1]}
    assert torch.equal(rope.launch(**far), rope.launch(**inputs))
    for pool, name in zip(pools, ("k_pages", "v_pages"), strict=True):
        assert torch.equal(pool[beyond, 0, 5], inputs[name][0, 0, 5])
