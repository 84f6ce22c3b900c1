"""What one server of the store says of itself to Prometheus: `reprise_store_*`.

Hits and deaths are what eviction learns from (worth.py). A block that comes back after it was evicted is a
hit of its class there, of a ghost; here these are apart, for no request had anything of them.

*At twice the memory*: a block that comes back while fewer ghosts than the store has blocks were used after
it would, in the order of last uses, still be there in a store of twice the size. Those, with the blocks that
were found, are an estimate of what lookups would find there; `benchmarks/eviction.py TRACE --twice` has it
beside a replay with twice the capacity.

*Hint lift*: of the blocks of a hint, the share that was used again, hits / (hits + deaths), over the same of
blocks without a hint; of the faded history, so of the last hours. 1 = the hint says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.cache_store.functions import Usage
from services.cache_store.worth import AGES, CLASSES, FREQUENCIES, TIER_NAMES, TIERS, History

#: Owners with metrics of their own, those with the most bytes; the rest is `other`.
TOP_OWNERS = 20

#: Hits and deaths of a hint below which its lift is chance.
LEAST_EVIDENCE = 200

_DEFAULT_TIER = 1


def families(usage: Usage, history: History, tenants: Mapping[bytes, str]) -> Iterable[Metric]:
    """All of them. `tenants` names owners by digest; others appear as digests."""
    counts = usage.counts
    for name, help_, value in (
        ("capacity_bytes", "What the store may hold.", usage.capacity),
        ("bytes", "What it holds, allocator's rounding and metadata included.", usage.total),
        ("pinned_bytes", "What may not be evicted, for operators have pinned it.", usage.pinned),
        ("blocks", "Blocks stored or being written.", usage.blocks),
        ("leaves", "Blocks that could be evicted next: nothing that is stored builds on them.", usage.leaves),
        ("reservations", "Blocks being written.", usage.reservations),
        ("dropped_payloads", "Payloads of evicted blocks not yet deleted.", usage.dropped),
        ("ghosts", "Evicted blocks that are remembered.", usage.ghosts),
        ("lost_blocks", "Blocks without a payload, which hide what is stored behind them.", usage.lost),
    ):
        yield GaugeMetricFamily(f"reprise_store_{name}", help_, value)
    for name, key, help_ in (
        ("lookups", "lookups", "Lookups by workers."),
        ("lookup_blocks", "asked", "Blocks asked for in lookups."),
        ("hit_blocks", "found", "Blocks found by lookups."),
        ("written_blocks", "committed", "Blocks written."),
        ("reaped_reservations", "reaped", "Blocks whose writer did not finish in time."),
        ("expired_retentions", "expired", "Time limits of retentions that ended."),
        ("deleted_blocks", "deleted", "Blocks deleted: by operators, or because they follow a bad one."),
    ):
        yield CounterMetricFamily(f"reprise_store_{name}", help_, counts.get(key, 0))
    yield CounterMetricFamily(
        "reprise_store_saved_prefill_seconds",
        "Seconds that workers would have needed to compute the blocks they loaded instead.",
        counts.get("saved_us", 0) / 1e6,
    )
    yield CounterMetricFamily(
        "reprise_store_hit_blocks_at_twice_memory",
        "Estimate of the blocks that lookups would have found in a store of twice the memory.",
        counts.get("found", 0) + counts.get("returned_soon", 0),
    )
    yield from _by_class(usage)
    yield _hint_lift(history)
    evicted = CounterMetricFamily(
        "reprise_store_evicted",
        "Blocks evicted, by reason (room for a write, the watermark, Redis out of memory) and by the hint "
        "that their users gave.",
        labels=["reason", "hint"],
    )
    quarantined = CounterMetricFamily(
        "reprise_store_quarantined",
        "Payloads found missing or bad by a reader, by what was wrong.",
        labels=["reason"],
    )
    for key, value in counts.items():
        match key.split(":"):
            case ["evicted", reason, tier]:
                evicted.add_metric([reason, TIER_NAMES[int(tier)]], value)
            case ["quarantined", reason]:
                quarantined.add_metric([reason], value)
    yield evicted
    yield quarantined
    yield from _by_owner(usage, tenants)


def _by_class(usage: Usage) -> Iterable[Metric]:
    hits = CounterMetricFamily(
        "reprise_store_hits",
        "Uses of stored blocks, looked up or written again, by the hint that the users before gave and the "
        "number of uses before.",
        labels=["hint", "uses"],
    )
    returned = CounterMetricFamily(
        "reprise_store_ghost_hits",
        "Blocks written that had been evicted before, by hint: with more memory they might have been hits.",
        labels=["hint"],
    )
    deaths = CounterMetricFamily(
        "reprise_store_ghost_deaths",
        "Evicted blocks that did not come back in time, by hint.",
        labels=["hint"],
    )
    for tier in range(TIERS):
        came_back = died = 0
        for frequency in range(FREQUENCIES):
            c = tier * FREQUENCIES + frequency
            used = usage.counts.get(f"uses:{c}", 0) + _of_class(usage.events.hits, c)
            ghosts = usage.counts.get(f"returned:{c}", 0)
            last = frequency == FREQUENCIES - 1
            hits.add_metric([TIER_NAMES[tier], f"{frequency + 1}{'+' if last else ''}"], used - ghosts)
            came_back += ghosts
            died += usage.counts.get(f"deaths:{c}", 0) + _of_class(usage.events.deaths, c)
        returned.add_metric([TIER_NAMES[tier]], came_back)
        deaths.add_metric([TIER_NAMES[tier]], died)
    return hits, returned, deaths


def _of_class(events: Mapping[tuple[int, int], float], value_class: int) -> int:
    return sum(int(count) for (c, _), count in events.items() if c == value_class)


def _hint_lift(history: History) -> Metric:
    lift = GaugeMetricFamily(
        "reprise_store_hint_lift",
        "How much more often blocks of this hint are used again than blocks without one; absent until there "
        "is evidence.",
        labels=["hint"],
    )
    shares = {}
    for tier in range(TIERS):
        part = slice(tier * CLASSES // TIERS * AGES, (tier + 1) * CLASSES // TIERS * AGES)
        hits, deaths = sum(history.hits[part]), sum(history.deaths[part])
        if hits + deaths >= LEAST_EVIDENCE:
            shares[tier] = hits / (hits + deaths)
    without = shares.pop(_DEFAULT_TIER, 0.0)
    if without:
        for tier, share in shares.items():
            lift.add_metric([TIER_NAMES[tier]], share / without)
    return lift


def _by_owner(usage: Usage, tenants: Mapping[bytes, str]) -> Iterable[Metric]:
    known = usage.owners.keys() | usage.quotas.keys() | usage.floors.keys()
    ranked = sorted(known, key=lambda owner: (-usage.owners.get(owner, 0), owner))
    top, rest = ranked[:TOP_OWNERS], ranked[TOP_OWNERS:]
    size = GaugeMetricFamily(
        "reprise_store_owner_bytes",
        f"What the {TOP_OWNERS} largest tenants hold, by name or digest, and all others together.",
        labels=["owner"],
    )
    quota = GaugeMetricFamily(
        "reprise_store_owner_quota_bytes", "The most that a tenant may hold.", labels=["owner"]
    )
    floor = GaugeMetricFamily(
        "reprise_store_owner_floor_bytes", "What is not evicted for other tenants.", labels=["owner"]
    )
    for owner in top:
        name = tenants.get(owner, owner.hex())
        size.add_metric([name], usage.owners.get(owner, 0))
        if owner in usage.quotas:
            quota.add_metric([name], usage.quotas[owner])
        if owner in usage.floors:
            floor.add_metric([name], usage.floors[owner])
    if rest:
        size.add_metric(["other"], sum(usage.owners.get(owner, 0) for owner in rest))
    return size, quota, floor
