"""What one worker knows to be in the store, and the events by which routers learn of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

#: About 40 MB; 16 million tokens at 64 tokens a block.
_MOST_BLOCKS = 1 << 18


class KnownBlocks:
    """A bounded set of block hashes, least recently confirmed ones forgotten first; thread-safe.

    The store is shared, so this is a belief: others write and evict too. Each contact with the store corrects
    it, and every change of it is an event, so that whoever applies the events holds the same set.
    """

    def __init__(self, most: int = _MOST_BLOCKS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self._stored: dict[bytes, None] = {}  # since the last take_events, net of each other
        self._removed: dict[bytes, None] = {}

    def __contains__(self, block: bytes) -> bool:
        return block in self._blocks

    def add(self, blocks: Iterable[bytes]) -> None:
        """These are in the store."""
        with self._lock:
            for block in blocks:
                if block in self._blocks:
                    self._blocks.move_to_end(block)
                    continue
                self._blocks[block] = None
                self._note(block, self._stored, self._removed)
            while len(self._blocks) > self._most:
                oldest, _ = self._blocks.popitem(last=False)
                self._note(oldest, self._removed, self._stored)

    def discard(self, blocks: Iterable[bytes]) -> None:
        """These are not."""
        with self._lock:
            for block in blocks:
                if block in self._blocks:
                    del self._blocks[block]
                    self._note(block, self._removed, self._stored)

    def clear(self) -> None:
        """The store was emptied."""
        self.discard(list(self._blocks))

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """(stored, removed) since the last call; no block is in both."""
        with self._lock:
            events = list(self._stored), list(self._removed)
            self._stored, self._removed = {}, {}
            return events

    def _note(self, block: bytes, event: dict[bytes, None], opposite: dict[bytes, None]) -> None:
        if block in opposite:
            del opposite[block]  # nobody has heard of it yet
        else:
            event[block] = None
