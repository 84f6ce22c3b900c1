"""Pages: which page of KV memory holds which block, who uses it, and which one is taken next.

A page is always exactly one of
    free         holds nothing worth keeping
    referenced   in use by one or more sequences (or about to be filled for one)
    cached       used by nobody, still holding a block that has a name, so that a later prompt may hit it
Allocation takes free pages first and then evicts cached ones in the order of the eviction policy.

Invariant the callers keep: a sequence that references the page of a named block references the pages that
name all blocks before it. Then no cached page has a referenced block below it, the policy's leaf-first rule
never blocks eviction for good, and free + cached pages are what can be allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.policy import EvictionPolicy


class PagePool:
    """Owner of `pages` page numbers. Every operation is O(1) a page, heap operations of the policy aside."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"pages must be at least 1, got {pages}")
        self.pages = pages
        self._policy = EvictionPolicy()
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages
        self.sharing_version = 0  # another one means: the pages with several users may be others
        self._hash_of: list[bytes | None] = [None] * pages
        self._page_of: dict[bytes, int] = {}
        self._cached = 0
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free) + self._cached

    @property
    def referenced(self) -> int:
        return self.pages - len(self._free) - self._cached

    def lookup(self, hash: bytes) -> int | None:
        """The page that holds this block."""
        return self._page_of.get(hash)

    def match(self, hashes: Sequence[bytes], start: int = 0) -> list[int]:
        """Pages of the leading run of `hashes[start:]` that is held here."""
        found: list[int] = []
        for index in range(start, len(hashes)):
            page = self._page_of.get(hashes[index])
            if page is None:
                break
            found.append(page)
        return found

    def users(self, page: int) -> int:
        """Sequences that hold this page."""
        return self._references[page]

    def is_cached(self, page: int) -> bool:
        """Whether sharing this page takes it out of what can be allocated."""
        return not self._references[page] and self._hash_of[page] is not None

    def allocate(self, count: int, now: float) -> list[int]:
        """`count` pages with one reference each and no name. Raises ValueError beyond `available`."""
        if count > self.available:
            raise ValueError(f"cannot allocate {count} pages, {self.available} are available")
        while len(self._free) < count:
            hash = self._policy.evict(now)
            assert hash is not None, "cached pages are evictable (see the invariant above)"
            page = self._page_of[hash]
            self._unname(page, hash)
            self._cached -= 1
            self._free.append(page)
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, page: int, now: float) -> None:
        """One more user of a named page."""
        if not self._references[page]:
            hash = self._hash_of[page]
            assert hash is not None, "only named pages outlive their users"
            self._policy.hold(hash, now)
            self._cached -= 1
        self._references[page] += 1
        self.sharing_version += 1

    def release(self, page: int, now: float) -> None:
        """One user less. Release a sequence's pages from its tail: earlier releases are evicted earlier."""
        self._references[page] -= 1
        if self._references[page]:
            self.sharing_version += 1
            return
        hash = self._hash_of[page]
        if hash is None:
            self._free.append(page)
        else:
            self._cached += 1
            self._policy.release(hash, now)

    def grant(self, page: int, priority: int, ttl_s: float | None) -> None:
        """A user of this page states how long to keep its block (see policy); without a name it has none."""
        hash = self._hash_of[page]
        if hash is not None:
            self._policy.grant(hash, priority, ttl_s)

    def register(self, page: int, hash: bytes, parent: bytes) -> None:
        """Name a referenced page; `hash` must not be held yet."""
        assert hash not in self._page_of, "a block has one page"
        self._hash_of[page] = hash
        self._page_of[hash] = page
        self._policy.insert(hash, parent)
        if hash in self._removed:
            del self._removed[hash]
        else:
            self._stored[hash] = None

    def unregister(self, page: int, now: float) -> None:
        """Take a page's name away: what it holds is not what the name says."""
        hash = self._hash_of[page]
        assert hash is not None, f"page {page} has no name"
        self._policy.remove(hash, now)
        self._unname(page, hash)
        if not self._references[page]:
            self._cached -= 1
            self._free.append(page)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """(stored, removed) since the last call, net: a block that came and went is in neither."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def _unname(self, page: int, hash: bytes) -> None:
        self._hash_of[page] = None
        del self._page_of[hash]
        if hash in self._stored:
            del self._stored[hash]
        else:
            self._removed[hash] = None

    def check(self) -> None:
        """Prove the accounting; raises AssertionError. For tests: O(pages)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        for page in range(self.pages):
            hash, references = self._hash_of[page], self._references[page]
            assert references >= 0, f"page {page} has {references} references"
            assert (page in free) == (not references and hash is None), f"page {page} is free and more"
            assert hash is None or self._page_of[hash] == page, f"two pages hold the block of page {page}"
        cached = sum(1 for p in range(self.pages) if not self._references[p] and self._hash_of[p] is not None)
        assert cached == self._cached, f"{cached} pages are cached, the count says {self._cached}"
        named = sum(1 for hash in self._hash_of if hash is not None)
        assert named == len(self._page_of) == len(self._policy), "names, pages and the policy disagree"
