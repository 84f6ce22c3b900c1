"""A grammar for tests that need no library: the i-th token of an answer is one of ten, i·10 to i·10 + 9."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Stairs:
    """A `Matcher`; the answer is whole after `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.taken: list[int] = []

    @property
    def complete(self) -> bool:
        return len(self.taken) == self.length

    @property
    def fault(self) -> str:
        return "" if climbs(self.taken) else f"{self.taken[-1]} is not on step {len(self.taken) - 1}"

    def allow(self, words: np.ndarray) -> None:
        bits = np.zeros(32 * len(words), dtype=np.uint8)
        bits[10 * len(self.taken) : 10 * len(self.taken) + 10] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        self.taken.append(token)


def climbs(tokens: Sequence[int]) -> bool:
    """Whether an answer follows this grammar."""
    return [token // 10 for token in tokens] == list(range(len(tokens)))
