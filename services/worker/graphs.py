"""CUDA graphs of steps: one launch for the whole step, sampling included.

There is a graph for every number of decodes in `DECODES`, and one for every pair of `MIXED_DECODES` and
`CHUNK_TOKENS` for steps that also prefill a little; a step takes the smallest that holds it, the rest of
which is padding. Grids depend on these sizes alone and everything else is read from device memory: the step's
own numbers from one buffer that the host sends before it replays, all that lasts from the tables.

Launched one by one, the kernels of a step cost the host some 40 us each, 11 ms for 28 layers. Up to so much
work of the device a graph is faster, padding and all; beyond, the host is ahead anyway and exact sizes win.
So the graphs of mixed steps are captured from few tokens up to where the device takes longer than the host.

A graph comes in variants: for decodes that share prefixes; with log-probabilities; and masked, for steps with
a row that follows a grammar: those end with the logits, and the sampler is launched once the masks are known.
The latter two are captured when a step first wants one (tens of milliseconds; nothing is compiled).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kernels.attention import AttentionBatch, SharedPrefixes, Workspace
from kernels.sampling import SampleResult, sample
from services.worker.batch import Batch
from services.worker.check import MAX_LOGPROBS
from services.worker.kv import KVCache
from services.worker.models.decoder import Decoder
from services.worker.plan import StepPlan
from services.worker.prefixes import MIN_ROWS, PrefixGroup
from services.worker.rows import Rows, Size, prefix_tiles
from services.worker.staging import Staging, layout
from services.worker.tables import Tables

#: Rows of decode graphs. Steps of 8 up to 64, where a row more makes the matrices no slower, then an eighth
#: to a fourth of padding at most.
DECODES = (
    *(1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
    *(320, 384, 448, 512, 640, 768, 896, 1024),
)

#: Decode rows, and tokens of chunks, of the graphs of mixed steps: coarse, for there is one for each pair.
MIXED_DECODES = (0, 8, 32, 64, 128, 256, 512, 1024)
CHUNK_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def chunk_rows(tokens: int) -> int:
    """Chunks that a graph with so many tokens has rows for. A row costs a large graph many idle programs."""
    return 8 if tokens <= 1024 else 4


class Variant(NamedTuple):
    size: Size
    shared: bool = False
    logprobs: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Logits:
    """What a step computes before it samples: arguments of `kernels.sampling.sample`."""

    values: torch.Tensor  # [L, V]
    slots: torch.Tensor  # [L] int32, -1 = the row does not sample
    lengths: torch.Tensor  # [L] int32


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    result: SampleResult | Logits  # rewritten by every replay


class StepGraphs:
    """The graphs of one engine. Not thread-safe; replays run on the current stream."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        tables: Tables,
        workspace: Workspace,
        staging: Staging,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        """Captures. `max_rows` decodes and `max_tokens` tokens at most are ever in a step."""
        self._decoder = decoder
        self._kv = kv
        self._tables = tables
        self._workspace = workspace
        self._staging = staging
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._query_start = torch.arange(max_rows + 1, dtype=torch.int32, device=decoder.device)
        self._decodes = _up_to(DECODES, max_rows)
        self._mixed_decodes = _up_to(MIXED_DECODES, max_rows)
        self._chunk_tokens: list[int] = []
        most = min(max_tokens, CHUNK_TOKENS[-1])
        variants = [Variant(Size(max_rows), True), Variant(Size(max_rows, chunk_rows(most), most))]
        sizes = [layout([part.size for part in self._padding(variant)])[-1] for variant in variants]
        self._inputs = torch.zeros(max(sizes), dtype=torch.int32, device=decoder.device)
        self._graphs: dict[Variant, _Captured] = {}
        self._max_rows = max(variant.size.rows for variant in variants)
        self._logits: torch.Tensor | None = None  # [max rows, V] of the masked graphs, one for them all
        for rows in reversed(self._decodes):  # the largest first: the others fit into its memory
            self._capture(Variant(Size(rows)))
            if rows >= MIN_ROWS:
                self._capture(Variant(Size(rows), shared=True))
        for tokens in CHUNK_TOKENS:
            variants = [Variant(Size(n, chunk_rows(tokens), tokens)) for n in self._mixed_decodes]
            if tokens > most or not self._host_is_slower(variants[0]):
                break
            for variant in variants:
                self._capture(variant)
            self._chunk_tokens.append(tokens)

    def variant(
        self, rows: Rows, groups: Ordered[PrefixGroup], logprobs: int, masked: bool
    ) -> Variant | None:
        """The graph for a step, None when it is better launched kernel by kernel."""
        decodes, chunks, tokens = rows.size
        explained = logprobs >= 0 and not masked  # a masked graph does not sample
        if not chunks:
            size = Size(_smallest(self._decodes, decodes))
            return Variant(size, shared=bool(groups), logprobs=explained, masked=masked)
        fitting = [most for most in self._chunk_tokens if most >= tokens and chunk_rows(most) >= chunks]
        if not fitting or groups or explained:
            return None
        size = Size(_smallest(self._mixed_decodes, decodes), chunk_rows(fitting[0]), fitting[0])
        return Variant(size, masked=masked)

    def replay(self, variant: Variant, rows: Rows, groups: Ordered[PrefixGroup]) -> SampleResult | Logits:
        """Run one step. The result has a row for each of the variant's and is valid until the next replay."""
        if variant not in self._graphs:
            self._capture(variant)
        captured = self._graphs[variant]
        if variant.size.chunks:
            parts = rows.batch(variant.size)
        else:
            parts = self._padding(variant)
            count = rows.size.decodes
            parts[0][:count] = rows.decode_slots
            parts[1][:count] = rows.decode_positions
            parts[2][:count] = rows.decode_positions + 1
        if variant.shared:
            parts[3:] = prefix_tiles(
                groups,
                rows=variant.size.decodes,
                tiles=len(parts[4]),
                rows_a_tile=self._workspace.rows_a_tile,
                block_size=self._kv.block_size,
            )
        self._staging.send(parts, into=self._inputs)
        captured.graph.replay()
        return captured.result

    def _padding(self, variant: Variant) -> list[np.ndarray]:
        """What a step without rows sends. Decodes alone: slots, positions, context lengths, prefix tiles;
        mixed steps: what `Rows.batch` gives."""
        size = variant.size
        if size.chunks:
            return Rows(StepPlan()).batch(size)
        parts = [np.zeros(size.decodes, dtype=np.int32) for _ in range(3)]
        parts[0].fill(-1)
        if variant.shared:
            rows_a_tile = self._workspace.rows_a_tile
            tiles = 2 * -(-size.decodes // rows_a_tile)  # as `Workspace` has room for
            parts.append(np.zeros(size.decodes, dtype=np.int32))
            parts.append(np.full((tiles, rows_a_tile), -1, dtype=np.int32))
        return parts

    def _step(self, variant: Variant) -> Callable[[], SampleResult | Logits]:
        """What the graph of a variant holds, over its inputs, which are set to padding."""
        tables, size = self._tables, variant.size
        parts = self._staging.send(self._padding(variant), into=self._inputs)
        if size.chunks:
            slots, positions, write_from, row_slots, ends, first, last, sampled = parts
        else:
            slots, positions, ends = parts[:3]
            write_from, row_slots, sampled = positions, slots, slots
            first, last = self._query_start[: size.decodes + 1], None
        attention = AttentionBatch(
            block_tables=tables.pages,
            slots=row_slots,
            query_start=first,
            context_len=ends,
            decodes=size.decodes,
            max_query=max(1, size.tokens),
            shared=SharedPrefixes(*parts[3:]) if variant.shared else None,
            workspace=self._workspace,
        )
        batch = Batch(slots, positions, write_from, tables.tokens, attention, last)
        most = MAX_LOGPROBS if variant.logprobs else -1

        def step() -> SampleResult | Logits:
            logits = self._decoder.forward(batch, self._kv)
            if variant.masked:
                return Logits(self._kept(logits), sampled, ends)
            return sample(logits, tables.sampling, tables.tokens, sampled, ends, logprobs=most)

        self._stream.wait_stream(torch.cuda.current_stream())
        return step

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy where every masked graph leaves its logits: kept as they are, each graph would have memory
        of its own for them, which the others cannot use."""
        if self._logits is None:
            self._logits = logits.new_empty(self._max_rows, logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)

    def _host_is_slower(self, variant: Variant) -> bool:
        """Whether launching the kernels one by one takes the host longer than the device to run them."""
        step = self._step(variant)
        with torch.cuda.stream(self._stream):
            step()  # loads every kernel
            self._stream.synchronize()
            begun_s = time.perf_counter()
            step()
            launched_s = time.perf_counter()
            self._stream.synchronize()
            return time.perf_counter() - launched_s < 0.25 * (launched_s - begun_s)

    def _capture(self, variant: Variant) -> None:
        step = self._step(variant)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            step()  # loads every kernel and allocates what lasts: neither may happen in a capture
            self._stream.synchronize()
            # Not torch.cuda.graph: it collects garbage first, 0.1 s each time. Thread-local, because other
            # threads use the device meanwhile (copies to the store).
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = step()
            finally:
                graph.capture_end()
        self._graphs[variant] = _Captured(graph, result)


def _up_to(sizes: Ordered[int], most: int) -> list[int]:
    """Those below `most`, and `most`."""
    return [*(size for size in sizes if size < most), most]


def _smallest(sizes: Ordered[int], least: int) -> int:
    return next(size for size in sizes if size >= least)
