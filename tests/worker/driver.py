"""The smallest engine: runs token sequences through a decoder, with pages handed out at random."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import torch

from kernels.attention import AttentionBatch, Workspace
from services.worker.batch import Batch
from services.worker.kv import KVCache
from services.worker.load import LoadedModel


class Driver:
    """Keeps the tokens and pages of each sequence; a sequence grows by what `step` is given for it."""

    def __init__(
        self, model: LoadedModel, *, pages: int = 128, block_size: int = 16, slots: int = 64
    ) -> None:
        self.model = model
        device = model.decoder.device
        spec = model.spec
        self.kv = KVCache(spec, pages, block_size, model.kv_dtype, device)
        self._free = random.Random(0).sample(range(pages), pages)
        self._slots: dict[Hashable, int] = {}
        self._lengths: list[int] = [0] * slots
        self._pages: list[list[int]] = [[] for _ in range(slots)]
        self._tokens = torch.zeros(slots, pages * block_size, dtype=torch.int32, device=device)
        self._tables = torch.zeros(slots, pages, dtype=torch.int32, device=device)
        self._workspace = (
            Workspace(slots, spec.heads, spec.kv_heads, spec.head_dim, device=device)
            if device.type == "cuda"
            else None
        )

    def batch(self, work: Sequence[tuple[Hashable, Sequence[int]]]) -> Batch:
        """One step that appends the given tokens to the named sequences, logits wanted of every token.

        Sequences that get a single token must come first."""
        rows: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        query_start = [0]
        device = self.kv.storage.device
        for key, new in work:
            slot = self._slots.setdefault(key, len(self._slots))
            first = self._lengths[slot]
            last = self._lengths[slot] = first + len(new)
            pages = self._pages[slot]
            while len(pages) * self.kv.block_size < last:
                pages.append(self._free.pop())
            self._tables[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            self._tokens[slot, first:last] = torch.tensor(new, dtype=torch.int32)
            rows.append(slot)
            slots += [slot] * len(new)
            positions += range(first, last)
            query_start.append(len(positions))
        lengths = [len(new) for _, new in work]
        decodes = next((row for row, length in enumerate(lengths) if length > 1), len(lengths))

        def tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        attention = AttentionBatch(
            block_tables=self._tables,
            slots=tensor(rows),
            query_start=tensor(query_start),
            context_len=tensor([self._lengths[slot] for slot in rows]),
            decodes=decodes,
            max_query=max(lengths),
            workspace=self._workspace,
        )
        place = tensor(positions)
        return Batch(tensor(slots), place, place, self._tokens, attention, logit_rows=None)

    def pages(self, key: Hashable) -> list[int]:
        """Of a sequence, in the order of its blocks."""
        return self._pages[self._slots[key]]

    def step(self, work: Sequence[tuple[Hashable, Sequence[int]]]) -> list[torch.Tensor]:
        """Run it; the logits [new tokens, vocab] of each sequence."""
        with torch.inference_mode():
            logits = self.model.decoder.forward(self.batch(work), self.kv)
        return list(logits.split([len(new) for _, new in work]))

    def logits(self, tokens: Sequence[int], *, chunk: int = 1 << 30) -> torch.Tensor:
        """Logits [tokens, vocab] of a new sequence, prefilled in chunks of `chunk` tokens."""
        key = object()
        chunks = [tokens[start : start + chunk] for start in range(0, len(tokens), chunk)]
        return torch.cat([self.step([(key, piece)])[0] for piece in chunks])

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most likely next tokens of a new sequence, one step each."""
        key = object()
        generated: list[int] = []
        new = list(tokens)
        for _ in range(count):
            new = [int(self.step([(key, new)])[0][-1].argmax())]
            generated += new
        return generated
