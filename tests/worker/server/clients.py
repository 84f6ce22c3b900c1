"""A router for tests: a channel that collects what comes back."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from services.wire.channel import WorkerChannel
from services.wire.hashes import chain_hashes, join_hashes, pack_tokens, root_hash, split_hashes
from services.wire.messages import Finish, SamplingParams
from tests.fakes.until import until


class Router:
    """Listens to one worker, keeping the account of its blocks as a router does."""

    def __init__(self, host, port, secret=b"") -> None:
        self.channel = WorkerChannel(host, port, secret=secret, router_id="test", listener=self)
        self.held: dict[str, set[bytes]] | None = None
        self.seen_stats = []
        self.drained: str | None = None
        self.lost_reason: str | None = None

    def connected(self, hello):
        self.held = None

    def lost(self, reason):
        self.lost_reason = reason

    def snapshot(self, snapshot):
        self.held = {tier: set(split_hashes(packed)) for tier, packed in snapshot.held.items()}

    def events(self, events):
        for tier, packed in events.removed.items():
            self.held.setdefault(tier, set()).difference_update(split_hashes(packed))
        for tier, packed in events.stored.items():
            self.held.setdefault(tier, set()).update(split_hashes(packed))

    def stats(self, stats):
        self.seen_stats.append(stats)

    def draining(self, reason):
        self.drained = reason

    def ask(self, tokens, **sampling) -> Answer:
        hello = self.channel.hello
        packed = pack_tokens(tokens)
        root = root_hash(hello.model.fingerprint)
        answer = Answer()
        answer.request = self.channel.submit(
            answer,
            tokens=packed,
            root=root,
            hashes=join_hashes(chain_hashes(root, packed, hello.block_size)),
            sampling=SamplingParams(**{"max_tokens": 8} | sampling),
        )
        return answer


class Answer:
    """The sink of one request."""

    def __init__(self) -> None:
        self.items = []
        self.request = 0

    def __call__(self, item) -> None:
        self.items.append(item)

    @property
    def tokens(self) -> list[int]:
        return [token for item in self.items for token in item.tokens]

    @property
    def finish(self) -> Finish | None:
        return self.items[-1].finish if self.items else None

    @property
    def start(self):
        return self.items[0].start

    async def finished(self) -> Answer:
        await until(lambda: self.finish)
        return self


@asynccontextmanager
async def routing_to(worker, secret=b""):
    """A Router connected to anything with a host and a port."""
    router = Router(worker.host, worker.port, secret)
    task = asyncio.create_task(router.channel.run())
    try:
        await until(lambda: router.held is not None)
        yield router
    finally:
        task.cancel()
        await asyncio.wait([task])
