"""Runs one step plan on the device: the plan's numbers go over, one forward pass, sample, results come back.

Most steps replay a CUDA graph (see `graphs`); those with much to prefill, and all on the CPU, launch kernel
by kernel what a graph holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from kernels.attention import AttentionBatch, SharedPrefixes, Workspace
from kernels.sampling import SampleResult, TokenMask, sample
from services.wire.messages import Logprob
from services.worker.batch import Batch
from services.worker.commit import Sampled
from services.worker.graphs import Logits, StepGraphs
from services.worker.kv import KVCache
from services.worker.models.decoder import Decoder
from services.worker.plan import StepPlan
from services.worker.prefixes import PrefixGroup
from services.worker.rows import Rows, prefix_tiles
from services.worker.sequence import Sequence
from services.worker.staging import Staging
from services.worker.tables import Tables


class Launched:
    """A step under way."""

    def __init__(
        self,
        result: SampleResult | None = None,
        rows: Ordered[int] = (),
        top: list[int] | None = None,
        begun: torch.cuda.Event | None = None,
    ) -> None:
        """`rows` of the result are the step's tokens, in order. The i-th of them wants `top[i]` best tokens,
        -1 = no log-probability; `top` None = none does. `begun` was recorded before the step's first launch,
        None on the CPU."""
        self._rows = rows
        self._top = top
        self._begun = begun
        self._results: list[torch.Tensor] = []
        if result is not None and rows:
            self._results = [_to_host(result.tokens), _to_host(result.finite)]
            if top is not None:
                assert result.chosen_logprob is not None
                assert result.top_tokens is not None
                assert result.top_logprobs is not None
                explained = (result.chosen_logprob, result.top_tokens, result.top_logprobs)
                self._results += [_to_host(tensor) for tensor in explained]
        self._done = None if begun is None else _record()

    def result(self) -> Sampled:
        """Waits for the step, tokens or not. Raises what the device raised."""
        if self._done is not None:
            self._done.synchronize()
        if not self._results:
            return Sampled([])
        columns: list[list[Any]] = [tensor.tolist() for tensor in self._results]
        tokens, finite, *explained = ([column[row] for row in self._rows] for column in columns)
        broken = frozenset() if all(finite) else {row for row, good in enumerate(finite) if not good}
        if self._top is None:
            return Sampled(tokens, broken=broken)
        logprobs = [
            Logprob(chosen, _possible(ids[:k], values[:k])) if k >= 0 else None
            for k, chosen, ids, values in zip(self._top, *explained, strict=True)
        ]
        return Sampled(tokens, logprobs, broken)

    def idle_s(self, before: Launched) -> float:
        """How long the device had nothing to do between the step `before` and this one, both done."""
        if before._done is None or self._begun is None:
            return 0.0
        return max(0.0, float(before._done.elapsed_time(self._begun)) * 1e-3)


@dataclass(frozen=True, slots=True)
class Unsampled:
    """A step under way that computes logits and no tokens yet; fields as `Launched` takes them."""

    logits: Logits
    rows: Ordered[int]
    top: list[int] | None
    begun: torch.cuda.Event | None


class Runner:
    """Executes plans in the order of their launches. One stream: what is launched later sees everything that
    was launched before."""

    def __init__(
        self, decoder: Decoder, kv: KVCache, *, max_running: int, max_step_tokens: int, max_length: int
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._device = decoder.device
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._tables = Tables(max_running, max_length, kv.block_size, self._device)
        self._staging = Staging(self._device)
        self._workspace: Workspace | None = None
        self._graphs: StepGraphs | None = None
        if self.on_gpu:
            spec = decoder.spec
            self._workspace = Workspace(
                max_running, spec.heads, spec.kv_heads, spec.head_dim, device=self._device
            )

    @property
    def vocab(self) -> int:
        """Tokens that a line of logits has."""
        return self._decoder.spec.vocab_size

    @property
    def on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the graphs and load what other steps run; on the CPU there is neither. The tables must be
        unused."""
        if self._workspace is not None:
            self._decoder.load_products(self._max_step_tokens)
            self._graphs = StepGraphs(
                self._decoder,
                self._kv,
                self._tables,
                self._workspace,
                self._staging,
                self._max_running,
                self._max_step_tokens,
            )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched | Unsampled:
        """Start the step. The tokens it samples stay on the device until `result` is asked for. A step of
        which a row follows a grammar goes as far as the logits: `sample` must follow before the next launch.
        """
        self._tables.place(plan.placed)
        self._tables.set_pages(plan.pages)
        sequences = plan.sampled
        top = _logprobs(sequences)
        most = _most(top)
        masked = any(map(_matcher, sequences))
        rows = Rows(plan)
        variant = None
        if self._graphs is not None:
            variant = self._graphs.variant(rows, plan.prefixes, most, masked)
        begun = _record() if self.on_gpu else None
        if variant is not None:
            assert self._graphs is not None
            size = variant.size
            result = self._graphs.replay(variant, rows, plan.prefixes)
        else:
            size = rows.size
            result = self._run(rows, plan.prefixes, most, masked)
        if isinstance(result, Logits):
            return Unsampled(result, rows.sampled(size), top, begun)
        return Launched(result, rows.sampled(size), top, begun)

    @torch.inference_mode()
    def sample(self, step: Unsampled, masked: Ordered[int], words: np.ndarray) -> Launched:
        """Have the step sample. Of its tokens, in order, those in `masked` must be among what `words` (as
        `TokenMask.words`, a line each) allow."""
        mask = None
        if masked:
            rows = np.array([step.rows[i] for i in masked], dtype=np.int32)
            mask = TokenMask(*self._staging.send([rows, words]))
        return Launched(self._sampled(step.logits, _most(step.top), mask), step.rows, step.top, step.begun)

    def _sampled(self, logits: Logits, logprobs: int, mask: TokenMask | None = None) -> SampleResult:
        tables = self._tables
        return sample(
            logits.values,
            tables.sampling,
            tables.tokens,
            logits.slots,
            logits.lengths,
            logprobs=logprobs,
            mask=mask,
        )

    def _run(
        self, rows: Rows, groups: Ordered[PrefixGroup], logprobs: int, masked: bool
    ) -> SampleResult | Logits:
        tables, size = self._tables, rows.size
        parts = rows.batch(size)
        if groups:
            assert self._workspace is not None
            parts += prefix_tiles(
                groups,
                rows=size.decodes,
                tiles=self._workspace.max_tiles,
                rows_a_tile=self._workspace.rows_a_tile,
                block_size=self._kv.block_size,
            )
        sent = self._staging.send(parts)
        slots, positions, write_from, row_slots, ends, first, last, sampled, *shared = sent
        attention = AttentionBatch(
            block_tables=tables.pages,
            slots=row_slots,
            query_start=first,
            context_len=ends,
            decodes=size.decodes,
            max_query=rows.max_query,
            shared=SharedPrefixes(*shared) if shared else None,
            workspace=self._workspace,
        )
        batch = Batch(slots, positions, write_from, tables.tokens, attention, logit_rows=last)
        logits = Logits(self._decoder.forward(batch, self._kv), sampled, ends)
        return logits if masked else self._sampled(logits, logprobs)


#: Of a sequence: None unless it follows a grammar.
_matcher = attrgetter("matcher")


def _most(top: list[int] | None) -> int:
    """Log-probabilities that a row asks for at most, -1 = none does."""
    return -1 if top is None else max(top)


def _logprobs(sampled: Ordered[Sequence]) -> list[int] | None:
    """How many top log-probabilities each row asks for, -1 = none; None if no row does."""
    wanted = [sequence.request.sampling.logprobs for sequence in sampled]
    return wanted if any(k >= 0 for k in wanted) else None


def _possible(ids: list[int], logprobs: list[float]) -> tuple[tuple[int, float], ...]:
    """The best tokens, where a grammar leaves so many."""
    return tuple(pair for pair in zip(ids, logprobs, strict=True) if pair[1] > -math.inf)


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that arrives with the stream; on the CPU the tensor itself."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
