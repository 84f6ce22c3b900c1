"""Random inputs of kernels and what must come out, in fp64 and as plainly as possible.

Shared by the interpreter tests (fp32, fp16) and by tests/gpu (bf16, fp16). What a kernel must not read holds
NaN, so that one wrong load shows in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

#: Allowed |error| / (1 + |expected|): a few units in the last place of the output's dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` in fp64; the tolerance is that of actual's dtype."""
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected).abs() / (1 + expected.abs())
    assert not error.isnan().any(), "NaN in the result"
    assert error.numel() == 0 or error.max() <= TOLERANCE[actual.dtype], float(error.max())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty and its kin return NaN instead of whatever the memory held."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double().cpu(), weight.double().cpu()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().cpu().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


@dataclass(frozen=True)
class RopeCase:
    """Tokens with a negative slot are padding."""

    slots: tuple[int, ...]
    pages: int
    n_q: int
    n_kv: int
    dim: int
    block_size: int
    normed: bool
    seed: int = 0

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        def tensor(*shape: int, seed: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return random(*shape, seed=self.seed + seed, dtype=dtype, device=device)

        tokens = len(self.slots)
        positions = torch.arange(tokens, device=device) * 7 % 50
        page_shape = (self.pages, self.n_kv, self.block_size, self.dim)
        return {
            "qkv": tensor(tokens, (self.n_q + 2 * self.n_kv) * self.dim, seed=1),
            "cos_sin": tensor(50, self.dim, seed=2, dtype=torch.float32),
            "positions": positions,
            "slots": torch.tensor(self.slots, dtype=torch.int64, device=device),
            "k_pages": torch.full(page_shape, math.nan, dtype=dtype, device=device),
            "v_pages": torch.full(page_shape, math.nan, dtype=dtype, device=device),
            "q_norm": tensor(self.dim, seed=3) if self.normed else None,
            "k_norm": tensor(self.dim, seed=4) if self.normed else None,
        }

    def expected(self, inputs: dict[str, Any], eps: float) -> tuple[torch.Tensor, ...]:
        """q, and the K and V that a token's slot holds: [T, heads, D] each."""
        qkv, table, positions = inputs["qkv"], inputs["cos_sin"], inputs["positions"]
        heads = qkv.double().cpu().view(len(self.slots), self.n_q + 2 * self.n_kv, self.dim)
        q, k, v = heads.split([self.n_q, self.n_kv, self.n_kv], dim=1)
        rotated = []
        for x, weight in ((q, inputs["q_norm"]), (k, inputs["k_norm"])):
            if weight is not None:
                x = rms_norm(x, weight, eps)
            out = torch.empty_like(x)
            half = self.dim // 2
            for token, position in enumerate(positions.tolist()):
                for i in range(half):
                    cos, sin = float(table[position, i]), float(table[position, half + i])
                    out[token, :, i] = x[token, :, i] * cos - x[token, :, half + i] * sin
                    out[token, :, half + i] = x[token, :, half + i] * cos + x[token, :, i] * sin
            rotated.append(out)
        return *rotated, v

    def check(self, q: torch.Tensor, inputs: dict[str, Any], eps: float) -> None:
        """q and the pages hold what they must; no other slot was written."""
        expected_q, expected_k, expected_v = self.expected(inputs, eps)
        assert_close(q, expected_q)
        real = [token for token, slot in enumerate(self.slots) if slot >= 0]
        for name, expected in (("k_pages", expected_k), ("v_pages", expected_v)):
            pages = inputs[name]
            by_slot = pages.transpose(1, 2).flatten(0, 1)  # [slots, n_kv, D]
            filled = [self.slots[token] for token in real]
            assert_close(by_slot[filled], expected[real])
            untouched = torch.ones(len(by_slot), dtype=torch.bool)
            untouched[filled] = False
            assert by_slot[untouched.to(by_slot.device)].isnan().all()


@dataclass(frozen=True)
class AttentionCase:
    """`rows` holds (queries, context) pairs; a context of 0 is a padding row."""

    rows: tuple[tuple[int, int], ...]
    group: int
    n_kv: int
    dim: int
    block_size: int
    window: int = 0
    seed: int = 0

    @property
    def options(self) -> dict[str, float]:
        max_query = max(queries for queries, _ in self.rows)
        return {"scale": self.dim**-0.5, "max_query": max_query, "window": self.window}

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        """Pages in random order. Page 0, which no row owns, fills the tables and is NaN; so is every slot
        after a row's context."""
        blocks = [-(-context // self.block_size) for _, context in self.rows]
        generator = torch.Generator().manual_seed(self.seed)
        order = (torch.randperm(sum(blocks), generator=generator) + 1).tolist()
        tables = torch.zeros(len(self.rows), max(blocks) + 1, dtype=torch.int32)
        shape = (len(order) + 1, self.n_kv, self.block_size, self.dim)
        k, v = (torch.randn(shape, generator=generator) for _ in range(2))
        k[0], v[0] = math.nan, math.nan
        for row, (_, context) in enumerate(self.rows):
            for block in range(blocks[row]):
                page = order.pop()
                tables[row, block] = page
                written = context - block * self.block_size
                k[page, :, written:], v[page, :, written:] = math.nan, math.nan
        starts = torch.tensor([0, *(queries for queries, _ in self.rows)]).cumsum(0).int()
        contexts = torch.tensor([context for _, context in self.rows], dtype=torch.int32)
        q = torch.randn(int(starts[-1]), self.group * self.n_kv, self.dim, generator=generator)
        return {
            "q": q.to(device, dtype),
            "k_pages": k.to(device, dtype),
            "v_pages": v.to(device, dtype),
            "block_tables": tables.to(device),
            "query_start": starts.to(device),
            "context_len": contexts.to(device),
        }

    def expected(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k_pages, v_pages = (inputs[name].double().cpu() for name in ("q", "k_pages", "v_pages"))
        tables = inputs["block_tables"].tolist()
        out = torch.zeros_like(q)
        token = 0
        for row, (queries, context) in enumerate(self.rows):
            slots = [divmod(i, self.block_size) for i in range(context)]
            for position in range(context - queries, context) if context else [-1] * queries:
                oldest = max(0, position + 1 - self.window) if self.window else 0
                seen = slots[oldest : position + 1]
                if seen:
                    pages = torch.tensor([tables[row][block] for block, _ in seen])
                    offsets = torch.tensor([offset for _, offset in seen])
                    k, v = k_pages[pages, :, offsets], v_pages[pages, :, offsets]  # [keys, n_kv, D]
                    for head in range(q.shape[1]):
                        kv_head = head // self.group
                        scores = (k[:, kv_head] @ q[token, head]) * self.dim**-0.5
                        out[token, head] = scores.softmax(0) @ v[:, kv_head]
                token += 1
        return out
