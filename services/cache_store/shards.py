"""Which of several servers holds a prefix.

A whole tree of prefixes lives on one server, for a block's record counts its children, is a leaf or not, and
is leased through the blocks after it. So the server is chosen by the hash of the prefix's first block, which
all blocks of the tree share and whoever has the tree's hashes knows. (The root above it would not do: it is
the same for all prompts of a tenant.)

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998): every
server gets a score for the block and the best one has it. All workers agree without talking, in whatever
order they were told the servers; a server more takes 1/(n+1) of the trees and moves no others, a server less
spreads its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

_PERSON = b"reprise-shard"


class Rendezvous:
    """Chooses among servers by name (Address.name), which all workers must write alike."""

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise ValueError("there must be one server at least")
        self._keys = [blake2b(name.encode(), person=_PERSON).digest() for name in names]

    def choose(self, first: bytes) -> int:
        """Index of the server that has the prefixes whose first block is `first`."""
        if len(self._keys) == 1:
            return 0
        return max(range(len(self._keys)), key=lambda index: blake2b(first, key=self._keys[index]).digest())
