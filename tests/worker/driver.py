"""The smallest engine: runs token sequences through a decoder, with pages handed out at random."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import torch

from services.worker.batch import Batch
from services.worker.kv import KVCache
from services.worker.load import LoadedModel


class Driver:
    """Keeps the tokens and pages of each sequence; a sequence grows by what `step` is given for it."""

    def __init__(self, model: LoadedModel, *, pages: int = 128, block_size: int = 16) -> None:
        self.model = model
        self.kv = KVCache(model.spec, pages, block_size, model.kv_dtype, model.decoder.device)
        self._free = random.Random(0).sample(range(pages), pages)
        self._lengths: dict[Hashable, int] = {}
        self._pages: dict[Hashable, list[int]] = {}

    def batch(self, work: Sequence[tuple[Hashable, Sequence[int]]]) -> Batch:
        """One step that appends the given tokens to the named sequences, logits wanted of every token."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        for key, new in work:
            first = self._lengths.get(key, 0)
            pages = self._pages.setdefault(key, [])
            size = self.kv.block_size
            while len(pages) * size < first + len(new):
                pages.append(self._free.pop())
            for position in range(first, first + len(new)):
                positions.append(position)
                slots.append(pages[position // size] * size + position % size)
            tokens += new
            query_start.append(len(tokens))
            self._lengths[key] = first + len(new)
        width = max(len(self._pages[key]) for key, _ in work)
        tables = [self._pages[key] + [0] * (width - len(self._pages[key])) for key, _ in work]
        return Batch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_start=torch.tensor(query_start, dtype=torch.int32),
            context_len=torch.tensor([self._lengths[key] for key, _ in work], dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logit_rows=torch.arange(len(tokens)),
            max_query=max(len(new) for _, new in work),
        )

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
