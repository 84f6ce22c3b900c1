"""The kernels as CUDA runs them, in the dtypes that serve; tests/kernels has the small cases."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import paged_attention
from kernels.norm import rms_norm
from kernels.philox import philox_uniform_vocab
from kernels.rope import rope_kv_write
from kernels.sampling import SamplingBatch, sample
from kernels.swiglu import swiglu
from tests.kernels import cases

DEVICE = "cuda"
EPS = 1e-6
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@dtypes
@pytest.mark.parametrize("hidden", [576, 4096, 8192])
def test_norm_is_that_of_fp64(dtype: torch.dtype, hidden: int) -> None:
    x, residual = (cases.random(33, hidden, seed=i, dtype=dtype, device=DEVICE) for i in range(2))
    weight = cases.random(hidden, seed=2, dtype=dtype, device=DEVICE)
    with cases.poisoned_memory():
        cases.assert_close(rms_norm(x, weight, EPS), cases.rms_norm(x, weight, EPS))
        total = (x.double() + residual.double()).to(dtype)
        cases.assert_close(rms_norm(x, weight, EPS, residual), cases.rms_norm(total, weight, EPS))
    assert torch.equal(residual, total)


@dtypes
@pytest.mark.parametrize("columns", [1536, 14336])
def test_swiglu_is_that_of_fp64(dtype: torch.dtype, columns: int) -> None:
    gate_up = 4 * cases.random(33, 2 * columns, seed=0, dtype=dtype, device=DEVICE)
    with cases.poisoned_memory():
        cases.assert_close(swiglu(gate_up), cases.swiglu(gate_up))


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


@dtypes
@pytest.mark.parametrize("rows", [((1, 700), (1, 64), (1, 0), (1, 65)), ((130, 400), (1, 300), (17, 17))])
@pytest.mark.parametrize(
    ("group", "dim", "block_size"), [(4, 128, 64), (3, 64, 16), (7, 128, 128), (1, 96, 32)]
)
@pytest.mark.parametrize("window", [0, 100])
def test_attention_is_that_of_fp64(
    dtype: torch.dtype,
    rows: tuple[tuple[int, int], ...],
    group: int,
    dim: int,
    block_size: int,
    window: int,
) -> None:
    case = cases.AttentionCase(rows, group=group, n_kv=2, dim=dim, block_size=block_size, window=window)
    inputs = case.inputs(dtype, DEVICE)
    with cases.poisoned_memory():
        out = paged_attention(**inputs, **case.options)
    cases.assert_close(out, case.expected(inputs))


def test_attention_replays_from_a_cuda_graph_with_other_lengths() -> None:
    captured = cases.AttentionCase(((1, 300), (1, 200)), group=4, n_kv=2, dim=128, block_size=64)
    replayed = cases.AttentionCase(((1, 10), (1, 0)), group=4, n_kv=2, dim=128, block_size=64, seed=1)
    inputs = captured.inputs(torch.bfloat16, DEVICE)
    paged_attention(**inputs, **captured.options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(**inputs, **captured.options)
    others = replayed.inputs(torch.bfloat16, DEVICE)
    inputs["q"].copy_(others["q"])
    inputs["context_len"].copy_(others["context_len"])
    for name in ("k_pages", "v_pages"):
        inputs[name][: len(others[name])] = others[name]
    inputs["block_tables"][:, : others["block_tables"].shape[1]] = others["block_tables"]
    graph.replay()
    cases.assert_close(out, replayed.expected(others))


def test_a_row_draws_the_same_token_on_cuda_and_cpu() -> None:
    rows, vocab = 64, 49_152
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    index = torch.arange(rows)
    on_cpu = SamplingBatch(
        temperature=(index % 4) / 2,
        top_p=torch.where(index % 3 == 0, 0.9, 1.0),
        top_k=torch.where(index % 5 == 0, 40, 0),
        min_p=torch.where(index % 7 == 0, 0.05, 0.0),
        presence=torch.zeros(rows),
        frequency=torch.zeros(rows),
        repetition=torch.ones(rows),
        seed=torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        position=index,
    )
    tensors = {name: value.to(DEVICE) for name, value in vars(on_cpu).items() if value is not None}
    tokens = sample(logits.to(DEVICE), SamplingBatch(**tensors)).tokens.cpu()
    assert torch.equal(tokens, sample(logits, on_cpu).tokens)
    cuda_noise = philox_uniform_vocab(tensors["seed"], tensors["position"], vocab).cpu()
    assert torch.equal(cuda_noise, philox_uniform_vocab(on_cpu.seed, on_cpu.position, vocab))
