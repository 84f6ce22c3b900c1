"""Every kernel on one GPU, at the shapes of the models that the peers' figures are of.

    python -m benchmarks.kernels [small linear attention sampling]

`small` are the kernels that only move bytes: norm, rope + KV write, SwiGLU, the step's inputs; microseconds
in a CUDA graph, the share of their floor (bytes / 3.0 TB/s, the copy bandwidth of an H100), and PyTorch's own
kernels beside them. The others are the tables of benchmarks/linear.py, attention.py and sampling.py.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.linear import BYTES_PER_US, DEVICE, DTYPE, time_us
from kernels import rope, step_inputs, swiglu
from kernels.norm import rms_norm

PARTS = ("small", "linear", "attention", "sampling")
TOKENS = (1, 32, 256, 4096)
BLOCK_SIZE = 64
CALLS = 20  # in one graph
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    ffn: int
    n_q: int
    n_kv: int
    dim: int
    normed: bool  # q and k are


SHAPES = (
    Shape("llama-8b", hidden=4096, ffn=14336, n_q=32, n_kv=8, dim=128, normed=False),
    Shape("qwen3-0.6b", hidden=1024, ffn=3072, n_q=16, n_kv=8, dim=128, normed=True),
)


class Case(NamedTuple):
    kernel: str
    moved_bytes: int
    ours: Callable[[], object]
    torchs: Callable[[], object]


def cases(shape: Shape, tokens: int) -> Iterator[Case]:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=DEVICE, dtype=DTYPE)

    x, gain = random(tokens, shape.hidden), random(shape.hidden)
    yield Case(
        "norm",
        2 * x.nbytes,
        lambda: rms_norm(x, gain, EPS),
        lambda: F.rms_norm(x, (shape.hidden,), gain, EPS),
    )

    gate_up = random(tokens, 2 * shape.ffn)
    gate, up = gate_up.chunk(2, dim=-1)
    yield Case("SwiGLU", gate_up.nbytes * 3 // 2, lambda: swiglu.swiglu(gate_up), lambda: F.silu(gate) * up)

    heads = shape.n_q + 2 * shape.n_kv
    qkv, table = random(tokens, heads * shape.dim), torch.rand(8192, shape.dim, device=DEVICE)
    pages = [random(tokens // BLOCK_SIZE + 1, shape.n_kv, BLOCK_SIZE, shape.dim) for _ in range(2)]
    norms = [random(shape.dim) if shape.normed else None for _ in range(2)]
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    inputs = (qkv, table, positions, positions.long(), *pages)
    yield Case(
        "rope + KV write",
        2 * qkv.nbytes + tokens * shape.dim * 4,
        lambda: rope.rope_kv_write(*inputs, q_norm=norms[0], k_norm=norms[1]),
        lambda: _rope_in_torch(*inputs, *norms),
    )

    embedding = random(32_000, shape.hidden)
    ids = torch.randint(0, 32_000, (1, 8192), dtype=torch.int32, device=DEVICE)
    table_of_pages = torch.zeros(1, 8192 // BLOCK_SIZE, dtype=torch.int32, device=DEVICE)
    slots = torch.zeros_like(positions)
    yield Case(
        "step inputs",
        2 * x.nbytes,
        lambda: step_inputs.step_inputs(
            slots, positions, positions, ids, table_of_pages, embedding, block_size=BLOCK_SIZE
        ),
        lambda: embedding[ids[0, :tokens]],
    )


def _rope_in_torch(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> torch.Tensor:
    """What `rope_kv_write` does, without looking at values: it can be captured."""
    _, n_kv, block_size, dim = k_pages.shape
    heads = qkv.view(len(qkv), -1, dim)
    q, k, v = heads.split([heads.shape[1] - 2 * n_kv, n_kv, n_kv], dim=1)
    cos, sin = (part.to(qkv.dtype) for part in cos_sin[positions].unsqueeze(1).chunk(2, dim=-1))
    rotated = []
    for x, gain in ((q, q_norm), (k, k_norm)):
        x = x if gain is None else F.rms_norm(x, (dim,), gain)
        a, b = x.chunk(2, dim=-1)
        rotated.append(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
    page, offset = slots // block_size, slots % block_size
    k_pages[page, :, offset] = rotated[1]
    v_pages[page, :, offset] = v
    return rotated[0]


def small() -> None:
    print(f"{'model':11} {'kernel':16} {'tokens':>6} {'us':>8} {'GB/s':>7} {'floor':>6} {'PyTorch us':>11}")
    for shape in SHAPES:
        for tokens in TOKENS:
            for case in cases(shape, tokens):
                us = time_us([case.ours] * CALLS)
                theirs = time_us([case.torchs] * CALLS)
                rate, share = case.moved_bytes / us / 1e3, case.moved_bytes / BYTES_PER_US / us
                print(
                    f"{shape.name:11} {case.kernel:16} {tokens:6} {us:8.2f} {rate:7.0f} {share:6.0%} "
                    f"{theirs:11.2f}",
                    flush=True,
                )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=PARTS, help="(default all)")
    parts = parser.parse_args().parts or PARTS
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device")
    if "small" in parts:
        small()
    for part in parts:
        if part != "small":
            sys.argv = [part]
            runpy.run_module(f"benchmarks.{part}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
