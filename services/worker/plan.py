"""A step plan: everything one forward pass does, decided before it runs and without token values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from services.worker.prefixes import PrefixGroup
from services.worker.sequence import FilledBlock, Sequence


class Chunk(NamedTuple):
    """Known tokens `start` to `start + length` of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    length: int
    write_from: int  # tokens before this one only attend: their KV is in shared pages already
    samples: bool  # the chunk ends at the sequence's end and yields its next token


@dataclass(slots=True)
class StepPlan:
    """One step. Rows are the decodes, then the chunks, in this order."""

    decodes: list[Sequence] = field(default_factory=list)  # one token each, and each samples
    decode_starts: list[int] = field(default_factory=list)  # position of that token
    chunks: list[Chunk] = field(default_factory=list)
    placed: dict[int, Sequence] = field(default_factory=dict)  # slot -> new occupant: tables need its tokens
    pages: dict[tuple[int, int], int] = field(default_factory=dict)  # (slot, block index) -> page, changes
    filled: list[FilledBlock] = field(default_factory=list)
    prefixes: list[PrefixGroup] = field(default_factory=list)  # decodes that begin with the same pages

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token from this step, in row order."""
        return self.decodes + [chunk.sequence for chunk in self.chunks if chunk.samples]

    @property
    def members(self) -> list[Sequence]:
        return self.decodes + [chunk.sequence for chunk in self.chunks]

    @property
    def prefill_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)
