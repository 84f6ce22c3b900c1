"""Which decodes begin with the same pages, so that attention can read those once for all of them."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import NamedTuple

from services.worker.pages import PagePool
from services.worker.sequence import Sequence

#: A prefix counts as shared by so many rows. With fewer, a tile of the shared pass is mostly padding and
#: reads little less than its rows would by themselves.
MIN_ROWS = 4

#: Blocks a row that sharing must save on average to be worth its extra launch in every layer.
_MIN_SAVED_BLOCKS = 2


class PrefixGroup(NamedTuple):
    """Rows whose first `blocks` pages are the same."""

    blocks: int
    rows: list[int]  # indices into the step's decodes


class PrefixGroups:
    """Finds the groups of a step. What it found holds until rows come, go, or share other pages, so a steady
    batch costs one comparison."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._decodes: list[Sequence] = []
        self._version = -1
        self._groups: list[PrefixGroup] = []

    def of(self, decodes: list[Sequence]) -> list[PrefixGroup]:
        """Groups of the decodes, each decode in one at most; none when sharing is not worth it."""
        if self._version != self._pool.sharing_version or self._decodes != decodes:
            self._version, self._decodes = self._pool.sharing_version, decodes
            self._groups = _groups(decodes, self._pool)
        return self._groups


def _groups(decodes: Ordered[Sequence], pool: PagePool) -> list[PrefixGroup]:
    # A page that k sequences hold is preceded by pages that the same k hold: the deepest page that enough
    # hold names the whole prefix, and is found by bisection.
    by_page: dict[int, PrefixGroup] = {}
    for row, sequence in enumerate(decodes):
        pages = sequence.pages
        low, high = 0, len(pages)
        if pool.users(pages[0]) < MIN_ROWS:
            continue
        while low < high:
            middle = (low + high + 1) // 2
            if pool.users(pages[middle - 1]) >= MIN_ROWS:
                low = middle
            else:
                high = middle - 1
        by_page.setdefault(pages[low - 1], PrefixGroup(low, [])).rows.append(row)
    groups = [group for group in by_page.values() if len(group.rows) >= MIN_ROWS]
    saved = sum(group.blocks * (len(group.rows) - 1) for group in groups)
    return groups if saved >= _MIN_SAVED_BLOCKS * len(decodes) else []
