"""Page accounting: every page is exactly one of free, cached, referenced."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.worker.pages import PagePool

ROOT = b"root"


def fill(pool: PagePool, *hashes: bytes) -> list[int]:
    """Pages that hold a chain of blocks, referenced once."""
    pages = pool.allocate(len(hashes), 0.0)
    parent = ROOT
    for page, hash in zip(pages, hashes, strict=True):
        pool.register(page, hash, parent)
        parent = hash
    return pages


def release(pool: PagePool, pages: list[int]) -> None:
    for page in reversed(pages):
        pool.release(page, 0.0)


def test_a_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="pages must be at least 1, got 0"):
        PagePool(0)


def test_unnamed_pages_are_free_again_and_named_ones_stay_cached() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2, 0.0)
    pool.register(pages[0], b"a", ROOT)
    release(pool, pages)
    pool.check()
    assert (pool.available, pool.referenced) == (3, 0)
    assert pool.lookup(b"a") == pages[0]


def test_allocation_takes_free_pages_before_it_evicts() -> None:
    pool = PagePool(3)
    release(pool, fill(pool, b"a", b"b"))
    (page,) = pool.allocate(1, 0.0)
    assert pool.match([b"a", b"b"]) != []
    pool.allocate(1, 0.0)
    assert pool.lookup(b"b") is None, "the tail goes first"
    assert pool.lookup(b"a") is not None
    pool.release(page, 0.0)
    pool.check()


def test_more_pages_than_available_are_refused_and_nothing_is_lost() -> None:
    pool = PagePool(2)
    release(pool, fill(pool, b"a"))
    with pytest.raises(ValueError, match="cannot allocate 3 pages, 2 are available"):
        pool.allocate(3, 0.0)
    assert pool.lookup(b"a") is not None
    pool.check()


def test_a_shared_page_is_held_until_its_last_user_leaves() -> None:
    pool = PagePool(2)
    pages = fill(pool, b"a")
    release(pool, pages)
    pool.share(pages[0], 0.0)
    pool.share(pages[0], 0.0)
    pool.release(pages[0], 0.0)
    assert (pool.available, pool.referenced) == (1, 1)
    pool.release(pages[0], 0.0)
    assert (pool.available, pool.referenced) == (2, 0)
    pool.check()


def test_match_returns_the_leading_run_only() -> None:
    pool = PagePool(4)
    pages = fill(pool, b"a", b"b")
    other = fill(pool, b"d")
    assert pool.match([b"a", b"b", b"c", b"d"]) == pages
    assert pool.match([b"a", b"b", b"c"], 1) == pages[1:]
    assert pool.match([b"x", b"a"]) == []
    assert pool.match([b"d"]) == other


def test_events_are_net_of_what_came_and_went() -> None:
    pool = PagePool(1)
    (page,) = fill(pool, b"a")
    assert pool.take_events() == ([b"a"], [])
    pool.release(page, 0.0)
    (page,) = fill(pool, b"b")  # evicts a
    assert pool.take_events() == ([b"b"], [b"a"])
    pool.release(page, 0.0)
    (page,) = fill(pool, b"c")  # evicts b
    pool.release(page, 0.0)
    fill(pool, b"b")  # evicts c, which nobody has heard of
    assert pool.take_events() == ([], [])


def test_an_unregistered_page_is_matched_no_more() -> None:
    pool = PagePool(2)
    pages = fill(pool, b"a", b"b")
    pool.release(pages[1], 0.0)
    for page in pages:
        pool.unregister(page, 0.0)
    pool.check()
    assert pool.match([b"a"]) == []
    assert (pool.available, pool.referenced) == (1, 1), "the user keeps the page without its name"


def test_priority_decides_what_is_evicted() -> None:
    pool = PagePool(2)
    important, plain = fill(pool, b"i"), fill(pool, b"p")
    pool.grant(important[0], 90, None)
    release(pool, important)
    release(pool, plain)
    pool.allocate(1, 0.0)
    assert pool.lookup(b"i") is not None
    assert pool.lookup(b"p") is None


class PoolMachine(RuleBasedStateMachine):
    """Users of chains come and go; the books of the pool match a plain list of users at every step."""

    PAGES = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.PAGES)
        self.users: list[list[int]] = []
        self.reported: set[bytes] = set()

    @rule(chain=st.lists(st.integers(0, 2), min_size=1, max_size=5), named=st.integers(0, 5))
    def use(self, chain: list[int], named: int) -> None:
        hashes = [bytes(chain[: i + 1]) for i in range(len(chain))]
        held = self.pool.match(hashes)
        needed = len(chain) - len(held) + sum(map(self.pool.is_cached, held))
        if needed > self.pool.available:
            return
        for page in held:
            self.pool.share(page, 0.0)
        pages = held + self.pool.allocate(len(chain) - len(held), 0.0)
        for index in range(len(held), min(named, len(chain))):
            self.pool.register(pages[index], hashes[index], hashes[index - 1] if index else ROOT)
        self.users.append(pages)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.users:
            release(self.pool, self.users.pop(data.draw(st.integers(0, len(self.users) - 1))))

    @rule()
    def report(self) -> None:
        stored, removed = self.pool.take_events()
        assert self.reported.issuperset(removed)
        self.reported.difference_update(removed)
        assert self.reported.isdisjoint(stored)
        self.reported.update(stored)
        assert self.reported == set(self.pool._page_of)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        used = {page for pages in self.users for page in pages}
        assert self.pool.referenced == len(used)
        assert self.pool.available == self.PAGES - len(used)
        for page in used:
            assert self.pool._references[page] == sum(pages.count(page) for pages in self.users)


TestPoolAgainstAListOfUsers = PoolMachine.TestCase
TestPoolAgainstAListOfUsers.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
