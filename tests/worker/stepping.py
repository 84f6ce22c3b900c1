"""An engine that a test steps by hand, and a store in memory for it."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from services.wire.messages import Finish, Logprob, Start, Tier
from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.load import LoadedModel
from services.worker.models.random import TINY, random_model
from services.worker.request import Request, StepReport
from services.worker.tiers import EncodedBlock, OfferedBlock, Outlook


@functools.cache
def tiny_model() -> LoadedModel:
    """Random weights, 512 tokens, token 7 ends a text."""
    return random_model({**TINY, "eos_token_id": 7}, max_model_len=512)


class Stepped:
    """Runs an engine's turns on the test's thread and keeps what it reports.

    Fails the test if a request gets tokens after its finish, a second finish, or a second start.
    """

    def __init__(
        self, store: MemoryStore | None = None, model: LoadedModel | None = None, **config: Any
    ) -> None:
        config = {"pages": 128, "max_running": 16, "max_step_tokens": 64} | config
        self.engine = Engine(model or tiny_model(), EngineConfig(**config), store, clock=self.time)
        self.engine._listener = self.note
        self.now = 0.0
        self.reports: list[StepReport] = []
        self.tokens: dict[Hashable, list[int]] = {}
        self.logprobs: dict[Hashable, list[Logprob]] = {}
        self.starts: dict[Hashable, Start] = {}
        self.finishes: dict[Hashable, Finish] = {}
        self.held: dict[Tier, set[bytes]] = {"gpu": set(), "host": set(), "store": set()}

    def time(self) -> float:
        self.now += 1e-4
        return self.now

    def note(self, report: StepReport) -> None:
        self.reports.append(report)
        for output in report.outputs:
            assert output.key not in self.finishes, "nothing comes after a finish"
            self.tokens.setdefault(output.key, []).extend(output.tokens)
            self.logprobs.setdefault(output.key, []).extend(output.logprobs)
            if output.start is not None:
                assert output.key not in self.starts, "a request starts once"
                self.starts[output.key] = output.start
            if output.finish is not None:
                self.finishes[output.key] = output.finish
        for tier, hashes in report.removed.items():
            assert self.held[tier].issuperset(hashes)
            self.held[tier].difference_update(hashes)
        for tier, hashes in report.stored.items():
            assert self.held[tier].isdisjoint(hashes)
            self.held[tier].update(hashes)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine._turn()

    def run(self, requests: Iterable[Request] = (), *, every: int = 0) -> dict[Hashable, list[int]]:
        """Submit the requests, one each `every` turns, and step until all have finished. Their tokens."""
        for request in requests:
            self.engine.submit(request)
            self.turn(every)
        while not self.engine.idle:
            self.turn()
        return self.tokens

    def settle(self) -> None:
        """Let the copies to the store finish."""
        while self.engine._write_behind:
            self.turn()

    def check_empty(self) -> None:
        """Nothing is held by anyone, and everybody has been told what is cached."""
        pool = self.engine._pool
        pool.check()
        assert pool.referenced == 0
        assert self.engine._scheduler.running == self.engine._scheduler.waiting == 0
        assert self.held["gpu"] == set(pool._page_of)


class MemoryStore:
    """A `StoreTier` in memory. A load brings all it has when it is looked at for the `polls`-th time after
    the first."""

    def __init__(self, polls: int = 2, size: int = 1_000_000, servers: int = 1) -> None:
        self.blocks: dict[bytes, OfferedBlock] = {}
        self.polls = polls
        self.size = size  # blocks that it takes in all
        self.rooms = [1_000_000] * servers  # of their queues
        self.loads: list[MemoryLoad] = []
        self.recompute_s: list[Sequence[float]] = []
        self.new: list[bytes] = []
        self.most = 1_000_000  # blocks a load brings at most
        self.retained: list[tuple[list[bytes], int, float | None, str]] = []
        self.worth_at_least = 0.0
        self.awaited: frozenset[bytes] = frozenset()

    def start_load(
        self,
        hashes: Sequence[bytes],
        recompute_s: Sequence[float],
        tenant: str,
        first: bytes,
        most: int,
        outlook: Outlook | None = None,
    ) -> MemoryLoad | None:
        self.recompute_s.append(recompute_s)
        found: list[EncodedBlock] = []
        for hash in hashes[: self.most]:
            if hash not in self.blocks:
                break
            found.append(self.blocks[hash].kv)
        if not found:
            return None
        self.loads.append(MemoryLoad(found, most, self.polls))
        return self.loads[-1]

    def offer(self, blocks: Sequence[OfferedBlock]) -> int:
        taken = blocks[: self.size - len(self.blocks)]
        for block in taken:
            assert block.hash not in self.blocks, "copied in vain"
            self.blocks[block.hash] = block
            self.new.append(block.hash)
        return len(taken)

    def wants(self, hashes: Sequence[bytes], first: bytes) -> Sequence[bool]:
        return [hash not in self.blocks for hash in hashes]

    def server(self, first: bytes) -> int:
        return first[0] % len(self.rooms)

    def room(self, server: int) -> int:
        return self.rooms[server]

    def threshold(self, first: bytes) -> float:
        return self.worth_at_least

    def retain(
        self, hashes: Sequence[bytes], priority: int, ttl_s: float | None, tenant: str, first: bytes
    ) -> None:
        self.retained.append((list(hashes), priority, ttl_s, tenant))

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        new, self.new = self.new, []
        return new, []

    def tokens_per_s(self) -> float:
        return 1e6

    def close(self) -> None:
        pass


class MemoryLoad:
    """A `Load` that says honestly how many turns are left of it, a turn taking a millisecond."""

    def __init__(self, found: list[EncodedBlock], most: int, polls: int) -> None:
        self.found = len(found)
        self.over = False
        self.flight = None
        self.polls = polls
        self.cancelled = False
        self._blocks = found[::-1][:most]

    def take(self) -> list[EncodedBlock]:
        self.polls -= 1
        if self.over or self.polls >= 0:
            return []
        self.over = True
        return self._blocks

    def expected_s(self, blocks: int) -> float:
        return 0.001 * self.polls

    def cancel(self) -> None:
        self.over = self.cancelled = True
