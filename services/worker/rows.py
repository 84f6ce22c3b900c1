"""The numbers of a step plan as host arrays, int32: what the device cannot know by itself."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import NamedTuple

import numpy as np

from services.worker.plan import StepPlan
from services.worker.prefixes import PrefixGroup


class Size(NamedTuple):
    """What a batch has room for: decode rows, chunk rows, and tokens of the chunks together."""

    decodes: int
    chunks: int = 0
    tokens: int = 0

    @property
    def rows(self) -> int:
        return self.decodes + self.chunks


class Rows:
    """Rows are the plan's decodes, then its chunks; tokens are those of the rows, in order."""

    def __init__(self, plan: StepPlan) -> None:
        self.decode_slots = np.array([sequence.slot for sequence in plan.decodes], dtype=np.int32)
        self.decode_positions = np.array(plan.decode_starts, dtype=np.int32)
        chunks = plan.chunks
        self._slots = np.array([chunk.sequence.slot for chunk in chunks], dtype=np.int32)
        self._starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        self._lengths = np.array([chunk.length for chunk in chunks], dtype=np.int32)
        self._write_from = np.array([chunk.write_from for chunk in chunks], dtype=np.int32)
        self._samples = np.array([chunk.samples for chunk in chunks], dtype=bool)
        self.size = Size(len(plan.decodes), len(chunks), int(self._lengths.sum()))

    @property
    def max_query(self) -> int:
        """Most tokens of one row."""
        return int(self._lengths.max(initial=1))

    def sampled(self, size: Size) -> list[int]:
        """Rows of the batch that get a token from this step."""
        chunks = self._samples.nonzero()[0] + size.decodes
        return [*range(self.size.decodes), *chunks.tolist()]

    def batch(self, size: Size) -> list[np.ndarray]:
        """A batch of `size`, its first decode rows and first chunk rows those of the plan, the rest padding.

        Of the tokens: slots, positions, first positions written. Of the rows: slots, context lengths, first
        tokens (and their end), last tokens, slots that the step samples for (-1 = it does not).
        """
        decodes, real, chunks = size.decodes, self.size.decodes, self.size.chunks
        tokens = np.zeros((3, decodes + size.tokens), dtype=np.int32)
        tokens[0] = -1
        tokens[:, :real] = self.decode_slots, self.decode_positions, self.decode_positions
        rows = np.zeros((2, size.rows), dtype=np.int32)
        rows[0] = -1
        rows[:, :real] = self.decode_slots, self.decode_positions + 1
        first = np.arange(size.rows + 1, dtype=np.int32)
        sampled = rows[0].copy()
        if chunks:
            where = slice(decodes, decodes + self.size.tokens)
            begins = np.cumsum(self._lengths) - self._lengths
            tokens[0, where] = np.repeat(self._slots, self._lengths)
            tokens[1, where] = np.arange(self.size.tokens) - np.repeat(begins - self._starts, self._lengths)
            tokens[2, where] = np.repeat(self._write_from, self._lengths)
            where = slice(decodes, decodes + chunks)
            rows[0, where] = self._slots
            rows[1, where] = self._starts + self._lengths
            first[where] = decodes + begins
            sampled[where] = np.where(self._samples, self._slots, -1)
        first[decodes + chunks :] = decodes + self.size.tokens
        return [*tokens, *rows, first, np.maximum(first[1:] - 1, 0), sampled]


def prefix_tiles(
    groups: Ordered[PrefixGroup], *, rows: int, tiles: int, rows_a_tile: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """`SharedPrefixes.tokens` [rows] and `.tiles` [tiles, rows_a_tile] of these groups.

    Groups that find no tile any more are left out: their rows read the prefix themselves.
    """
    tokens = np.zeros(rows, dtype=np.int32)
    members = np.full((tiles, rows_a_tile), -1, dtype=np.int32)
    tile = 0
    for group in sorted(groups, key=lambda group: -group.blocks * len(group.rows)):
        for first in range(0, len(group.rows), rows_a_tile):
            if tile == tiles:
                return tokens, members
            part = group.rows[first : first + rows_a_tile]
            members[tile, : len(part)] = part
            tokens[part] = group.blocks * block_size
            tile += 1
    return tokens, members
