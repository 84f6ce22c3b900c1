"""Deleting a prefix: a block that is condemned leaves the store, with all that follows it.

Condemned by an operator, or by a reader that found wrong values (`frames.BadFrame.taints`). That is one call:
from then on no lookup finds the block (functions.lua). Who follows it is not kept anywhere, for that would
cost memory with every block; so all records are read, a slice after the other, and what is found goes,
children before parents. What a reader holds a lease of waits until that ends. The condemned block goes last,
and what was written under it meanwhile is found by reading all again. As the condemned blocks are listed in
Redis, any service goes on with what another one has begun.

What follows a lost block is right, but nobody finds it before the block is written again. If that has not
happened in ten minutes, it goes in the same way: by its rank alone it might stay for ever, in a store that is
not full or at a high priority. The lost block goes with the last one that follows it. Who writes it in the
moment of the deletion loses some of what follows, and nothing else.

While it reads, a service holds about 200 bytes for every block of the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from services.cache_store.functions import StoreFunctions

#: A step of the upkeep: 32,768 records read take some 50 ms of ours, and 0.2 ms of the server's at a time.
_SLICE = 512
_SLICES = 64

#: Blocks that a call may remove: about 1 ms of the server's only thread.
_DROPS = 64

#: What has waited so long may wait for a child that was written later: read all again.
_PATIENCE_S = 5.0


class Deletion:
    """The deletions of one server. `unlink` is given the names of dropped payloads."""

    def __init__(
        self,
        functions: StoreFunctions,
        unlink: Callable[[list[bytes]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._functions = functions
        self._unlink = unlink
        self._clock = clock
        self._waiting: list[bytes] = []
        self._waiting_since_s = 0.0
        self._cursor = 0
        self._parents: dict[bytes, bytes] = {}  # of the slices read so far

    def step(self) -> None:
        """Go on for a moment. Raises what redis-py raises; the next step goes on from there."""
        if self._waiting and self._clock() - self._waiting_since_s < _PATIENCE_S:
            self._drop()
            return
        if not any(self._functions.doomed()):
            self._waiting, self._cursor, self._parents = [], 0, {}
            return
        for _ in range(_SLICES):
            self._cursor, parents = self._functions.parents(self._cursor, _SLICE)
            self._parents.update(parents)
            if self._cursor == 0:
                break
        else:
            return
        parents, self._parents = self._parents, {}
        condemned, lost = self._functions.doomed()
        lost -= condemned
        self._waiting = [block for block in deepest_first(condemned | lost, parents) if block not in lost]
        self._waiting_since_s = self._clock()
        self._drop()

    def _drop(self) -> None:
        left: list[bytes] = []
        for start in range(0, len(self._waiting), _DROPS):
            waiting, dropped = self._functions.drop(self._waiting[start : start + _DROPS])
            self._unlink(dropped)
            left += waiting
        self._waiting = left


def deepest_first(doomed: Iterable[bytes], parents: Mapping[bytes, bytes]) -> list[bytes]:
    """The blocks `doomed` and all that follow them, children before parents. `parents` is block -> parent;
    what has no entry is not stored."""
    children: dict[bytes, list[bytes]] = {}
    for block, parent in parents.items():
        children.setdefault(parent, []).append(block)
    # A block under two of them comes once, in the place of the deeper search that reached it last.
    found: dict[bytes, None] = {}
    level: Sequence[bytes] = list(doomed)
    while level:
        for block in level:
            found.pop(block, None)
            found[block] = None
        level = [child for block in level for child in children.get(block, ())]
    return list(reversed(found))
