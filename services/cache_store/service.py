"""Upkeep of the store and its metrics: what has to happen even when no worker calls.

The store works without it: writers reap, expire and evict as far as they need to. With it there is room
before anybody asks, the capacity and the tenants' limits survive a restart of Redis, and payloads of dead
evictors and prefixes that operators deleted go away.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis import Redis
from redis.exceptions import RedisError

from services.cache_store.deletion import Deletion
from services.cache_store.embedded import public_url
from services.cache_store.functions import StoreFunctions, Usage
from services.cache_store.learning import learn
from services.cache_store.metrics import families
from services.cache_store.payloads import unlink_payloads
from services.cache_store.tenants_file import Limits, TenantsFile
from services.cache_store.worth import History

log = logging.getLogger(__name__)

#: Evict from the high to the low watermark. Below 85 % the allocator's rounding and bursts of writes fit too.
HIGH_WATERMARK = 0.85
LOW_WATERMARK = 0.80

#: Learn after so many lookups. Then so often at least, for weights are good for ten minutes only; before,
#: plain priorities are better than weights that nothing speaks for.
LEARN_EVERY = 200
LEARN_EVERY_S = 60.0

_SLICE = 256  # reservations and retentions a call
_SWEEP = 1024  # dropped payloads a round


class Upkeep(Collector):
    """Keeps one shard tidy, and is the collector of its metrics. `usage` is None while Redis is away. With
    `tenants` it applies the file's limits, the part of one of `servers`, and no others."""

    def __init__(
        self,
        url: str,
        capacity: int,
        *,
        shard: int = 0,
        tenants: TenantsFile | None = None,
        servers: int = 1,
    ) -> None:
        if capacity <= 0:
            raise ValueError(f"capacity must be positive, got {capacity} bytes")
        self.usage: Usage | None = None
        self._where = public_url(url)
        self._capacity = capacity
        self._learned_s = -math.inf
        self._shard = shard
        self._redis = Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3)
        self._functions = StoreFunctions(self._redis, shard=shard)
        self._history = History()
        self._tenants = tenants
        self._servers = servers
        self._deletion = Deletion(self._functions, self._unlink)

    def is_up(self) -> bool:
        """Whether the last round reached Redis."""
        return self.usage is not None

    def run(self, stop: threading.Event, interval_s: float) -> None:
        """One round every `interval_s` until `stop`; rounds that fail are tried again."""
        complained = False
        while not stop.is_set():
            try:
                self.round()
                if complained:
                    log.info("Redis at %s is back", self._where)
                complained = False
            except (RedisError, OSError) as error:
                self.usage = None
                if not complained:
                    log.warning("no upkeep of the store: Redis at %s: %s", self._where, error)
                complained = True
            stop.wait(interval_s)

    def round(self) -> None:
        """Set the capacity and the limits, reap and expire what is due, delete what operators condemned,
        evict to the low watermark, sweep, measure. Raises what redis-py raises."""
        functions = self._functions
        if self.usage is None:
            self._check_memory_settings()
        if functions.usage().capacity != self._capacity:  # a Redis that is full takes no write
            functions.configure(self._capacity)
        self._learn()
        while True:
            reaped, expired, dropped = functions.upkeep(_SLICE)
            self._unlink(dropped)
            if max(reaped, expired) < _SLICE:
                break
        self._deletion.step()
        usage = functions.usage()
        self._govern(usage)
        if usage.total > HIGH_WATERMARK * self._capacity:
            more = True
            while more:
                dropped, _, more = functions.evict(int(LOW_WATERMARK * self._capacity))
                self._unlink(dropped)
        self._unlink(functions.some_dropped(_SWEEP))
        self.usage = functions.usage()

    def close(self) -> None:
        self._redis.close()

    def _learn(self) -> None:
        """Bring the policy's weights up to date. Of several services the first to come does it."""
        now_s = time.monotonic()
        learning = self._functions.events()
        self._history = History.from_bytes(learning.history)
        overdue = learning.version > 0 and now_s - self._learned_s >= LEARN_EVERY_S
        if overdue or learning.lookups >= LEARN_EVERY:
            learn(self._functions, learning)
            self._learned_s = now_s

    def _govern(self, usage: Usage) -> None:
        """Make the file's limits those of the store, where they differ."""
        if self._tenants is None:
            return
        wanted = {owner: limits.share(self._servers) for owner, limits in self._tenants.limits().items()}
        for owner in wanted.keys() | usage.quotas.keys() | usage.floors.keys():
            limits = wanted.get(owner, Limits())
            if (limits.quota, limits.floor) != (usage.quotas.get(owner), usage.floors.get(owner)):
                self._functions.govern(owner, quota=limits.quota, floor=limits.floor)

    def _check_memory_settings(self) -> None:
        memory = self._redis.info("memory")
        limit, policy = int(memory["maxmemory"]), memory["maxmemory_policy"]
        if limit and limit < self._capacity:
            log.warning("maxmemory of Redis is %d bytes, below the capacity of %d", limit, self._capacity)
        if policy != "noeviction":
            log.warning("maxmemory-policy is %s: Redis evicts blocks on its own; use noeviction", policy)

    def _unlink(self, names: list[bytes]) -> None:
        if names:
            unlink_payloads(self._redis, names, shard=self._shard)
            self._functions.unlinked(names)

    def collect(self) -> Iterable[Metric]:
        usage = self.usage
        up = GaugeMetricFamily("reprise_store_up", "Whether the last round of upkeep reached Redis.")
        up.add_metric([], float(usage is not None))
        yield up
        if self._tenants is not None:
            yield GaugeMetricFamily(
                "reprise_store_tenants_file_sound",
                "Whether the file of quotas and floors makes sense; if not, older ones are in force.",
                float(self._tenants.sound),
            )
        if usage is not None:
            yield from families(usage, self._history, self._tenants.names() if self._tenants else {})
