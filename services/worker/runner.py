"""Runs one step plan on the device: gather its tokens, one forward pass, sample, keep what was sampled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kernels.sampling import SampleResult, sample
from services.wire.messages import Logprob
from services.worker.batch import Batch
from services.worker.commit import Sampled
from services.worker.kv import KVCache
from services.worker.plan import StepPlan
from services.worker.tables import Tables

#: `Decoder.forward`: logits [len(batch.logit_rows), vocabulary] in fp32.
Forward = Callable[[Batch, KVCache], torch.Tensor]


class Launched:
    """A step under way."""

    def __init__(self, device: torch.device, result: SampleResult | None, top: list[int] | None) -> None:
        """`result` is None when no row samples. Row r wants `top[r]` best tokens, -1 = no log-probability."""
        self._top = top
        self._tokens = self._chosen = self._top_tokens = self._top_logprobs = None
        if result is not None:
            self._tokens = _to_host(result.tokens)
            self._chosen = _to_host(result.chosen_logprob)
            self._top_tokens = _to_host(result.top_tokens)
            self._top_logprobs = _to_host(result.top_logprobs)
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        if self._done is not None:
            self._done.record()

    def result(self) -> Sampled:
        """Waits for the step, tokens or not. Raises what the device raised."""
        if self._done is not None:
            self._done.synchronize()
        if self._tokens is None:
            return Sampled([])
        if self._top is None:
            return Sampled(self._tokens.tolist())
        assert self._chosen is not None
        assert self._top_tokens is not None
        assert self._top_logprobs is not None
        rows = zip(
            self._top,
            self._chosen.tolist(),
            self._top_tokens.tolist(),
            self._top_logprobs.tolist(),
            strict=True,
        )
        logprobs = [
            Logprob(chosen, tuple(zip(ids[:k], values[:k], strict=True))) if k >= 0 else None
            for k, chosen, ids, values in rows
        ]
        return Sampled(self._tokens.tolist(), logprobs)


class Runner:
    """Executes plans in the order of their launches. One stream: what is launched later sees everything that
    was launched before."""

    def __init__(self, forward: Forward, kv: KVCache, *, max_running: int, max_length: int) -> None:
        self._forward = forward
        self._kv = kv
        self._tables = Tables(max_running, max_length, kv.block_size, kv.storage.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Start the step. The tokens it samples stay on the device until `result` is asked for."""
        tables = self._tables
        tables.place(plan.placed)
        tables.set_pages(plan.pages)
        rows = _Rows(plan)
        device = tables.device
        slots, _, ends, write_from = torch.from_numpy(rows.by_row).to(device, non_blocking=True)
        row, positions = torch.from_numpy(rows.by_token).to(device, non_blocking=True)

        size = self._kv.block_size
        token_slots = slots[row]
        kv_slots = tables.pages[token_slots, positions // size].long() * size + positions % size
        if rows.reads_only:
            kv_slots = torch.where(positions < write_from[row], -1, kv_slots)
        blocks = -(-int(rows.ends.max()) // size)
        sampled = torch.from_numpy(rows.sampled).to(device, non_blocking=True)
        query_start = torch.from_numpy(rows.query_start).to(device, non_blocking=True)
        logits = self._forward(
            Batch(
                token_ids=tables.tokens[token_slots, positions],
                positions=positions,
                slots=kv_slots,
                query_start=query_start,
                context_len=ends.int(),
                block_tables=tables.pages[:, :blocks][slots],
                logit_rows=query_start[sampled + 1].long() - 1,
                max_query=rows.max_query,
            ),
            self._kv,
        )
        if not len(sampled):
            return Launched(device, None, None)
        host_slots = rows.slots[rows.sampled].tolist()
        lengths = ends[sampled]
        top = tables.logprobs(host_slots)
        params = tables.sampling(host_slots, slots[sampled], lengths)
        result = sample(logits, params, logprobs=-1 if top is None else max(top))
        tables.tokens[slots[sampled], lengths] = result.tokens.int()
        return Launched(device, result, top)


class _Rows:
    """The numbers of a plan as host arrays."""

    def __init__(self, plan: StepPlan) -> None:
        decodes, chunks = len(plan.decodes), plan.chunks
        rows = decodes + len(chunks)
        self.by_row = np.empty((4, rows), dtype=np.int64)  # slot, first position, end, first written position
        self.slots, self.starts, self.ends, self.write_from = self.by_row
        self.slots[:decodes] = [sequence.slot for sequence in plan.decodes]
        self.starts[:decodes] = plan.decode_starts
        self.slots[decodes:] = [chunk.sequence.slot for chunk in chunks]
        self.starts[decodes:] = [chunk.start for chunk in chunks]
        lengths = np.ones(rows, dtype=np.int64)
        lengths[decodes:] = [chunk.length for chunk in chunks]
        np.add(self.starts, lengths, out=self.ends)
        self.write_from[:decodes] = self.starts[:decodes]
        self.write_from[decodes:] = [chunk.write_from for chunk in chunks]
        self.reads_only = bool((self.write_from > self.starts).any())

        self.query_start = np.zeros(rows + 1, dtype=np.int32)
        np.cumsum(lengths, out=self.query_start[1:])
        self.max_query = int(lengths.max())
        self.by_token = np.empty((2, int(self.query_start[-1])), dtype=np.int64)  # row, position
        row, position = self.by_token
        row[:] = np.repeat(np.arange(rows), lengths)
        position[:] = np.arange(len(position)) - np.repeat(self.query_start[:-1] - self.starts, lengths)
        samples = np.ones(rows, dtype=bool)
        samples[decodes:] = [chunk.samples for chunk in chunks]
        self.sampled = samples.nonzero()[0]


def _to_host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy that arrives with the stream; on the CPU the tensor itself."""
    if tensor is None or not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
