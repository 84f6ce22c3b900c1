"""The metrics: driven through the functions and read as Prometheus does."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from redis import Redis

from services.cache_store.functions import owner_digest
from services.cache_store.learning import learn
from services.cache_store.metrics import LEAST_EVIDENCE, TOP_OWNERS, families
from services.cache_store.worth import AGES, History, value_class
from tests.cache_store.harness import ALICE, BOB, Store, chain
from tests.cache_store.test_service import parse


@pytest.fixture
def store(redis: Redis) -> Store:
    return Store(redis, capacity=1_000)


class _Collector:
    def __init__(self, store: Store, history: History) -> None:
        self._store = store
        self._history = history

    def collect(self):  # type: ignore[no-untyped-def]
        return families(self._store.calls.usage(), self._history, {ALICE: "alice"})


def metrics_of(store: Store, history: History | None = None) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(_Collector(store, history or History()))  # type: ignore[arg-type]
    return {
        name.removeprefix("reprise_store_"): value
        for name, value in parse(generate_latest(registry).decode()).items()
    }


def test_hits_are_counted_by_hint_and_uses_and_folding_loses_none(store: Store) -> None:
    plain, high = chain("plain", 3), chain("high", 2)
    store.store(plain)
    store.store(high, priority=80)
    for _ in range(5):
        store.calls.lookup(plain, ALICE, 0)
    store.calls.lookup(high, ALICE, 0)
    before = metrics_of(store)
    assert {name: value for name, value in before.items() if name.startswith("hits_total") and value} == {
        "hits_total[default][1]": 3,
        "hits_total[default][2]": 3,
        "hits_total[default][3]": 3,
        "hits_total[default][4+]": 6,
        "hits_total[high][1]": 2,
    }
    assert learn(store.calls, store.calls.events())
    assert metrics_of(store) == before
    store.calls.lookup(high, ALICE, 0)
    assert metrics_of(store)["hits_total[high][2]"] == 2


def test_evictions_are_counted_by_reason_and_hint(store: Store) -> None:
    store.store(chain("plain", 6))
    store.store(chain("high", 4), priority=80)
    store.store(chain("new", 2), priority=80)
    store.calls.evict(300, "watermark")
    metrics = metrics_of(store)
    assert {name: value for name, value in metrics.items() if name.startswith("evicted")} == {
        "evicted_total[default][room]": 2,
        "evicted_total[default][watermark]": 4,
        "evicted_total[high][watermark]": 3,
    }


def test_blocks_that_come_back_are_ghost_hits_and_hits_at_twice_the_memory_only_if_soon(
    store: Store,
) -> None:
    old, *later = [chain(f"{i}", 10) for i in range(3)]
    store.store(old)
    store.calls.lookup(old, ALICE, 0)
    for blocks in later:
        store.store(blocks)  # 10 blocks of room: each makes the one before a ghost
    assert store.store(later[0]) == "W" * 10  # 20 ghosts, these the younger ten
    metrics = metrics_of(store)
    assert metrics["ghost_hits_total[default]"] == 10
    assert metrics["hit_blocks_total"] == 10
    assert metrics["hit_blocks_at_twice_memory_total"] == 20
    assert sum(value for name, value in metrics.items() if name.startswith("hits_total")) == 10
    assert store.store(old) == "W" * 10
    metrics = metrics_of(store)
    assert metrics["ghost_hits_total[default]"] == 20
    assert metrics["hit_blocks_at_twice_memory_total"] < 30, "they had been away too long"


def test_ghosts_that_do_not_come_back_are_deaths(store: Store) -> None:
    store.store(chain("a", 5), priority=80)
    store.calls.evict(0)
    store.turn_clock(1_800_001)
    store.calls.upkeep(1)
    assert metrics_of(store)["ghost_deaths_total[high]"] == 5
    assert learn(store.calls, store.calls.events())
    assert metrics_of(store)["ghost_deaths_total[high]"] == 5


def test_hint_lift_compares_shares_of_blocks_used_again_and_waits_for_evidence(store: Store) -> None:
    history = History()

    def happened(tier: int, hits: float, deaths: float) -> None:
        history.hits[value_class(tier, 1) * AGES] = hits
        history.deaths[value_class(tier, 3) * AGES + 7] = deaths

    happened(1, 100, 300)
    happened(3, 300, 100)
    happened(0, 20, 380)
    happened(2, LEAST_EVIDENCE - 1, 0)
    lift = {name: value for name, value in metrics_of(store, history).items() if "lift" in name}
    assert lift == {"hint_lift[high]": pytest.approx(3), "hint_lift[low]": pytest.approx(0.2)}
    happened(1, 0, LEAST_EVIDENCE - 1)
    assert not any("lift" in name for name in metrics_of(store, history)), "nothing to compare with"


def test_seconds_of_prefill_saved_come_with_the_release(store: Store) -> None:
    blocks = chain("a", 3)
    store.store(blocks)
    fences = store.calls.lookup(blocks, ALICE, 5_000)
    store.calls.release(blocks[-1], fences[-1], 1.25)
    store.calls.release(blocks[-1], fences[-1], 0.5)  # too late for the lease, yet it was saved
    assert metrics_of(store)["saved_prefill_seconds_total"] == pytest.approx(1.75)


def test_owners_beyond_the_largest_are_one(store: Store) -> None:
    store.calls.configure(10**6)
    store.store(chain("alice", 50), size=200)
    store.calls.govern(ALICE, quota=20_000, floor=100)
    store.calls.govern(BOB, quota=0)  # has nothing
    owners = [owner_digest(f"tenant {i}") for i in range(TOP_OWNERS + 5)]
    for i, owner in enumerate(owners):
        store.store(chain(f"{i}", 1), size=1000 - i, owner=owner)
    metrics = metrics_of(store)
    sizes = {name: value for name, value in metrics.items() if name.startswith("owner_bytes")}
    assert len(sizes) == TOP_OWNERS + 1
    assert sizes["owner_bytes[alice]"] == 10_000
    assert sizes[f"owner_bytes[{owners[0].hex()}]"] == 1000
    assert sizes["owner_bytes[other]"] == sum(1000 - i for i in range(TOP_OWNERS - 1, TOP_OWNERS + 5))
    assert sum(sizes.values()) == metrics["bytes"]
    assert metrics["owner_quota_bytes[alice]"] == 20_000
    assert metrics["owner_floor_bytes[alice]"] == 100
