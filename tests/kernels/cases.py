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

from kernels.attention import AttentionBatch, SharedPrefixes, Workspace, shared_rows
from kernels.linear import Norm

#: Allowed |error| / (1 + |expected|): a few units in the last place of the output's dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, roundings: int = 1) -> None:
    """`expected` in fp64; the tolerance is that of actual's dtype, for each rounding on the way."""
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected).abs() / (1 + expected.abs())
    assert not error.isnan().any(), "NaN in the result"
    assert error.numel() == 0 or error.max() <= roundings * TOLERANCE[actual.dtype], float(error.max())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty and its kin return NaN instead of whatever the memory held."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)  # on a GPU too: its tests fill gigabytes
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double().cpu(), weight.double().cpu()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().cpu().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


@dataclass(frozen=True)
class LinearCase:
    """`columns` of the result; with swiglu the weight has twice as many rows."""

    tokens: int
    columns: int
    depth: int
    norm: str | None = None  # "folded" into the weight | "gain"
    bias: bool = False
    swiglu: bool = False
    add: bool = False
    seed: int = 0

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """Results are of the order of one."""

        def tensor(*shape: int, seed: int) -> torch.Tensor:
            return random(*shape, seed=self.seed + seed, dtype=dtype, device=device)

        rows = self.columns * (2 if self.swiglu else 1)
        gain = tensor(self.depth, seed=3) if self.norm == "gain" else None
        return {
            "x": tensor(self.tokens, self.depth, seed=1),
            "weight": tensor(rows, self.depth, seed=2) * self.depth**-0.5,
            "bias": tensor(rows, seed=4) if self.bias else None,
            "norm": Norm(eps=0.1, gain=gain) if self.norm else None,
            "swiglu": self.swiglu,
            "add_to": tensor(self.tokens, self.columns, seed=5) if self.add else None,
        }

    def expected(self, inputs: dict[str, Any]) -> torch.Tensor:
        """To be called before: `linear` changes add_to."""
        x, weight, norm = inputs["x"].double(), inputs["weight"], inputs["norm"]
        if norm is not None:
            gain = torch.ones(self.depth) if norm.gain is None else norm.gain
            x = rms_norm(x, gain, norm.eps)
        y = (x.to(weight.device) @ weight.double().T).cpu()  # 28,672 x 4,096 in fp64: better on a GPU
        if self.bias:
            y += inputs["bias"].double().cpu()
        if self.swiglu:
            y = swiglu(y)
        if self.add:
            y += inputs["add_to"].double().cpu()
        return y


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
class AttentionInputs:
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    batch: AttentionBatch


@dataclass(frozen=True)
class AttentionCase:
    """`rows` holds (queries, context) pairs; a context of 0 is a padding row; the leading rows with one query
    are the decodes. `shared` holds (blocks, rows) of decodes that begin with the same so many pages."""

    rows: tuple[tuple[int, int], ...]
    group: int
    n_kv: int
    dim: int
    block_size: int
    window: int = 0
    seed: int = 0
    shared: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def decodes(self) -> int:
        return next((row for row, (queries, _) in enumerate(self.rows) if queries != 1), len(self.rows))

    def workspace(self, device: str, **options: Any) -> Workspace:
        """One that just holds the decodes."""
        n_q = self.group * self.n_kv
        return Workspace(max(1, self.decodes), n_q, self.n_kv, self.dim, device, **options)

    def inputs(
        self, dtype: torch.dtype, device: str, workspace: Workspace | None = None, empty_tiles: int = 0
    ) -> AttentionInputs:
        """Pages in random order, and lines of the table too. Page 0, which no row owns, fills the tables and
        is NaN; so is every slot after a row's context. `empty_tiles` stand before, between and after the
        tiles of `shared`."""
        blocks = [-(-context // self.block_size) for _, context in self.rows]
        generator = torch.Generator().manual_seed(self.seed)
        order = (torch.randperm(sum(blocks), generator=generator) + 1).tolist()
        lines = torch.randperm(len(self.rows) + 2, generator=generator)[: len(self.rows)].int()
        tables = torch.zeros(len(self.rows) + 2, max([1, *blocks]), dtype=torch.int32)
        shape = (len(order) + 1, self.n_kv, self.block_size, self.dim)
        k, v = (torch.randn(shape, generator=generator) for _ in range(2))
        k[0], v[0] = math.nan, math.nan
        for row, (_, context) in enumerate(self.rows):
            for block in range(blocks[row]):
                page = order.pop()
                tables[lines[row], block] = page
                written = context - block * self.block_size
                k[page, :, written:], v[page, :, written:] = math.nan, math.nan
            if context == 0:
                lines[row] = -1
        for count, rows in self.shared:
            for row in rows:
                tables[lines[row], :count] = tables[lines[rows[0]], :count]
        starts = torch.tensor([0, *(queries for queries, _ in self.rows)]).cumsum(0).int()
        contexts = torch.tensor([context for _, context in self.rows], dtype=torch.int32)
        q = torch.randn(int(starts[-1]), self.group * self.n_kv, self.dim, generator=generator)
        batch = AttentionBatch(
            block_tables=tables.to(device),
            slots=lines.to(device),
            query_start=starts.to(device),
            context_len=contexts.to(device),
            decodes=self.decodes,
            max_query=max(queries for queries, _ in self.rows),
            shared=self._shared(device, empty_tiles) if self.shared or empty_tiles else None,
            workspace=workspace,
        )
        return AttentionInputs(q.to(device, dtype), k.to(device, dtype), v.to(device, dtype), batch)

    def _shared(self, device: str, empty_tiles: int) -> SharedPrefixes:
        size = shared_rows(self.group * self.n_kv, self.n_kv)
        tokens = torch.zeros(self.decodes, dtype=torch.int32)
        nobody = [[-1] * size] * empty_tiles
        tiles = [*nobody]
        for count, rows in self.shared:
            tokens[list(rows)] = count * self.block_size
            parts = [rows[first : first + size] for first in range(0, len(rows), size)]
            tiles += [[*part, *[-1] * (size - len(part))] for part in parts]
            tiles += nobody
        return SharedPrefixes(tokens.to(device), torch.tensor(tiles, dtype=torch.int32, device=device))

    def expected(self, inputs: AttentionInputs) -> torch.Tensor:
        tables, lines = inputs.batch.block_tables, inputs.batch.slots.tolist()
        out = torch.zeros_like(inputs.q, dtype=torch.float64)
        first = 0
        for row, (queries, context) in enumerate(self.rows):
            if context and queries:
                key = torch.arange(context, device=out.device)
                pages, offsets = tables[lines[row], key // self.block_size].long(), key % self.block_size
                k, v = (  # [context, n_q, D]
                    pool[pages, :, offsets].double().repeat_interleave(self.group, 1)
                    for pool in (inputs.k_pages, inputs.v_pages)
                )
                q = inputs.q[first : first + queries].double()
                scores = torch.einsum("qhd,khd->hqk", q, k) * self.dim**-0.5
                query = key[-queries:, None]
                unseen = key > query
                if self.window:
                    unseen |= key <= query - self.window
                weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
                out[first : first + queries] = torch.einsum("hqk,khd->qhd", weights, v)
            first += queries
        return out.cpu()
