"""Attention kernels on one GPU: time, bandwidth and arithmetic against the floor, beside PyTorch's SDPA.

    python -m benchmarks.attention              # decode, shared prefixes, prefill, host cost of a launch
    python -m benchmarks.attention --tune       # the candidates of kernels/tuned/sm90.py instead

Every time is that of one layer in a CUDA graph of several, each with KV of its own so that none is found in
the L2 cache; the map of a decode step is made once a graph, as in a step. The floor is bytes / 3.0 TB/s (the
card's copy bandwidth) for decode, operations / 750 TFLOP/s (cuBLAS, 8192^3) for prefill, and for shared
prefixes the larger of the bytes, each prefix read once, / 3.0 TB/s and the operations / 500 TFLOP/s. SDPA
runs its flash backend on contiguous KV.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention
from kernels.attention import AttentionBatch, SharedPrefixes, Workspace, paged_attention, plan, shared_rows
from kernels.tuned import sm90

T = TypeVar("T")
DEVICE = "cuda"
DTYPE = torch.bfloat16
BLOCK = 64
POOL_BYTES = 24 << 30
BEYOND_L2_BYTES = 400e6
BYTES_PER_US = 3.0e6
PREFILL_FLOP_PER_US = 750e6
SHARED_FLOP_PER_US = 500e6


@dataclass(frozen=True)
class Heads:
    name: str
    n_q: int
    n_kv: int
    dim: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.n_kv * self.dim * DTYPE.itemsize


LLAMA = Heads("llama-8b", 32, 8, 128)
QWEN3 = Heads("qwen3-0.6b", 16, 8, 128)


@dataclass(frozen=True)
class Case:
    """`rows` holds (queries, context); `shared` the rows of each shared prefix of `prefix` tokens."""

    heads: Heads
    label: str
    rows: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, ...], ...] = ()
    prefix: int = 0

    @property
    def decodes(self) -> int:
        return next((row for row, (queries, _) in enumerate(self.rows) if queries != 1), len(self.rows))

    @property
    def read_bytes(self) -> float:
        saved = sum(len(rows) - 1 for rows in self.shared) * self.prefix
        return (sum(context for _, context in self.rows) - saved) * self.heads.token_bytes

    @property
    def flop(self) -> float:
        pairs = sum(queries * (context - (queries - 1) / 2) for queries, context in self.rows)
        return 4 * self.heads.dim * self.heads.n_q * pairs

    @property
    def floor_us(self) -> float:
        if self.shared:
            return max(self.read_bytes / BYTES_PER_US, self.flop / SHARED_FLOP_PER_US)
        if self.decodes:
            return self.read_bytes / BYTES_PER_US
        return max(self.read_bytes / BYTES_PER_US, self.flop / PREFILL_FLOP_PER_US)


def decode(heads: Heads, batch: int, context: int) -> Case:
    return Case(heads, f"{batch} x {context}", ((1, context),) * batch)


def decode_cases() -> list[Case]:
    draw = random.Random(0)
    mixed = tuple((1, draw.randint(100, 1500)) for _ in range(256))
    return [
        *(decode(LLAMA, batch, context) for batch in (1, 8, 32, 128) for context in (256, 1024, 4096)),
        decode(LLAMA, 64, 4096),
        decode(LLAMA, 256, 1000),
        Case(LLAMA, "256 x 100..1500", mixed),
        Case(LLAMA, "31 x 4k + 1 x 128k", ((1, 4096),) * 31 + ((1, 131072),)),
        Case(LLAMA, "1 x 128k", ((1, 131072),)),
        *(decode(QWEN3, batch, context) for batch in (1, 8, 32, 128) for context in (256, 1024)),
        Case(QWEN3, "256 x 100..1500", mixed),
    ]


def shared_cases() -> list[Case]:
    def case(batch: int, prefixes: int = 8, tokens: int = 4096) -> Case:
        each = batch // prefixes
        groups = tuple(tuple(range(first, first + each)) for first in range(0, batch, each))
        draw = random.Random(0)
        rows = tuple((1, tokens + draw.randint(128, 192)) for _ in range(batch))
        return Case(LLAMA, f"{batch} rows, {prefixes} x {tokens} shared", rows, groups, tokens)

    return [case(64), case(256), case(512)]


def prefill_cases() -> list[Case]:
    return [
        *(Case(heads, f"{n} causal", ((n, n),)) for heads in (LLAMA, QWEN3) for n in (1024, 4096, 8192)),
        Case(LLAMA, "128 @ 4096", ((128, 4224),)),
        Case(LLAMA, "16 x (128 @ 4096)", ((128, 4224),) * 16),
        Case(LLAMA, "8 x 1024 causal", ((1024, 1024),) * 8),
    ]


class Bench:
    """Holds one pool of KV that all cases lay their layers out in."""

    def __init__(self) -> None:
        self._pool = torch.empty(POOL_BYTES // DTYPE.itemsize, dtype=DTYPE, device=DEVICE)
        for part in self._pool.chunk(64):
            part.normal_()

    def time(
        self, case: Case, *, decode_tile: sm90.DecodeTile | None = None, prefill_tile: sm90.Tile | None = None
    ) -> float:
        """µs of one layer."""
        heads = case.heads
        layers, k, v, batch, q = self._laid_out(case, decode_tile)

        def run() -> None:
            ready = plan(batch)
            for layer in range(layers):
                attention.launch(q, k[layer], v[layer], ready, scale=heads.dim**-0.5, tile=prefill_tile)

        return _graph_us(run) / layers

    def host_us(self, case: Case) -> float:
        """µs that Python takes to launch one layer eagerly."""
        _, k, v, batch, q = self._laid_out(case, None)
        ready = plan(batch)
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(20):
                paged_attention(q, k[0], v[0], ready, scale=case.heads.dim**-0.5)
            best = min(best, (time.perf_counter() - started) / 20 * 1e6)
        return best

    def map_us(self, case: Case) -> float:
        _, _, _, batch, _ = self._laid_out(case, None)

        def run() -> None:
            for _ in range(20):
                plan(batch)

        return _graph_us(run) / 20

    def sdpa_us(self, case: Case) -> float | None:
        """The same with SDPA, where all rows are alike and a chunk is a whole prompt."""
        queries, context = case.rows[0]
        if case.shared or len(set(case.rows)) > 1 or (queries > 1 and queries != context):
            return None
        heads, batch = case.heads, len(case.rows)
        layers = self._layers(batch * context * heads.token_bytes)
        shape = (layers, 2, batch, heads.n_kv, context, heads.dim)
        kv = self._pool[: torch.Size(shape).numel()].view(shape)
        q = torch.randn(batch, heads.n_q, queries, heads.dim, dtype=DTYPE, device=DEVICE)

        def run() -> None:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                for k, v in kv:
                    F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

        return _graph_us(run) / layers

    def _laid_out(
        self, case: Case, tile: sm90.DecodeTile | None
    ) -> tuple[int, torch.Tensor, torch.Tensor, AttentionBatch, torch.Tensor]:
        heads = case.heads
        blocks = [-(-context // BLOCK) for _, context in case.rows]
        begins = [0] * len(blocks)  # block that is the row's own
        for rows in case.shared:
            for row in rows[1:]:
                begins[row] = case.prefix // BLOCK
        pages = sum(blocks) - sum(begins)
        order = torch.randperm(pages, dtype=torch.int32)
        tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        taken = 0
        for row, (begin, end) in enumerate(zip(begins, blocks, strict=True)):
            tables[row, begin:end] = order[taken : taken + end - begin]
            taken += end - begin
        shared = None
        if case.shared:
            size = shared_rows(heads.n_q, heads.n_kv)
            tokens = torch.zeros(case.decodes, dtype=torch.int32)
            tiles = []
            for rows in case.shared:
                tables[list(rows), : case.prefix // BLOCK] = tables[rows[0], : case.prefix // BLOCK]
                tokens[list(rows)] = case.prefix
                for first in range(0, len(rows), size):
                    part = rows[first : first + size]
                    tiles.append([*part, *[-1] * (size - len(part))])
            shared = SharedPrefixes(tokens.to(DEVICE), torch.tensor(tiles, dtype=torch.int32, device=DEVICE))
        layers = self._layers(pages * BLOCK * heads.token_bytes)
        shape = (2, layers, pages, heads.n_kv, BLOCK, heads.dim)
        k, v = self._pool[: torch.Size(shape).numel()].view(shape)
        lengths = [queries for queries, _ in case.rows]
        batch = AttentionBatch(
            block_tables=tables.to(DEVICE),
            slots=torch.arange(len(blocks), dtype=torch.int32, device=DEVICE),
            query_start=torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(),
            context_len=torch.tensor([context for _, context in case.rows], device=DEVICE).int(),
            decodes=case.decodes,
            max_query=max(lengths),
            shared=shared,
            workspace=Workspace(1024, heads.n_q, heads.n_kv, heads.dim, DEVICE, tile=tile),
        )
        q = torch.randn(sum(lengths), heads.n_q, heads.dim, device=DEVICE, dtype=DTYPE)
        return layers, k, v, batch, q

    def _layers(self, layer_bytes: float) -> int:
        enough = max(10, min(64, round(BEYOND_L2_BYTES / layer_bytes)))
        return max(1, min(enough, int(POOL_BYTES / layer_bytes)))


def _graph_us(run: Callable[[], None], repeats: int = 7) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3)
    return statistics.median(times[2:])


def report(bench: Bench, title: str, cases: Sequence[Case]) -> None:
    print(f"\n{title}")
    columns = f"{'us':>9} {'GB/s':>7} {'TFLOP/s':>8} {'floor us':>9} {'floor':>6} {'SDPA us':>9}"
    print(f"{'model':11} {'rows':28} {columns}")
    for case in cases:
        us = bench.time(case)
        sdpa = bench.sdpa_us(case)
        print(
            f"{case.heads.name:11} {case.label:28} {us:9.2f} {case.read_bytes / us / 1e3:7.0f} "
            f"{case.flop / us / 1e6:8.1f} {case.floor_us:9.2f} {case.floor_us / us:6.0%} "
            f"{'-' if sdpa is None else f'{sdpa:.2f}':>9}",
            flush=True,
        )


def tune(bench: Bench) -> None:
    """µs of every candidate, a column each."""
    of_decode = [case for case in decode_cases() if case.heads is LLAMA and case.label != "128 x 4096"]
    of_decode += [decode(QWEN3, 1, 256), decode(QWEN3, 128, 256)]
    _table("decode", sm90.DECODE_CANDIDATES, of_decode, lambda case, tile: bench.time(case, decode_tile=tile))
    _table(
        "prefill",
        sm90.PREFILL_CANDIDATES,
        prefill_cases(),
        lambda case, tile: bench.time(case, prefill_tile=tile),
    )


def _table(title: str, tiles: Sequence[T], cases: Sequence[Case], us: Callable[[Case, T], float]) -> None:
    print(f"\n{title}: us with each of")
    for number, tile in enumerate(tiles):
        print(f"  [{number}] {tile}")
    print(f"{'model':11} {'rows':28} " + " ".join(f"{f'[{i}]':>9}" for i in range(len(tiles))))
    for case in cases:
        times = " ".join(f"{us(case, tile):9.2f}" for tile in tiles)
        print(f"{case.heads.name:11} {case.label:28} {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", action="store_true", help="time the candidates of kernels/tuned/sm90.py")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    bench = Bench()
    if options.tune:
        tune(bench)
        return
    report(bench, "decode", decode_cases())
    report(bench, "decode of rows that share a prefix", shared_cases())
    report(bench, "prefill", prefill_cases())
    print("\nmap of a step, us")
    for case in (decode(LLAMA, 1, 256), decode(LLAMA, 256, 1000), shared_cases()[-1]):
        print(f"{case.label:40} {bench.map_us(case):9.2f}")
    print("\nhost us to launch one layer")
    for case in (decode(LLAMA, 8, 256), shared_cases()[0], prefill_cases()[0]):
        print(f"{case.label:40} {bench.host_us(case):9.2f}")


if __name__ == "__main__":
    main()
