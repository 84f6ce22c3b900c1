"""A fake worker: the true server and channel around a FakeEngine, in the caller's event loop."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from services.wire.channel_server import bind
from services.wire.limits import ChannelLimits
from services.wire.messages import Hello
from services.worker.server import WorkerServer
from tests.fakes.engine import FakeEngine
from tests.fakes.text import byte_text_assets, fake_card


class FakeWorker:
    """Listens between `start` and `stop`, or inside `async with`; `host` and `port` say where.

    Started again it is a restarted worker: same port, new epoch, empty cache.
    """

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        name: str = "fake-worker",
        model: str = "fake",
        host: str = "127.0.0.1",
        port: int = 0,
        secret: bytes = b"",
        limits: ChannelLimits | None = None,
        words: Sequence[str] = (),
    ) -> None:
        self.engine = engine or FakeEngine()
        self.name = name
        self.model = model
        self.host = host
        self.port = port  # the true one after `start`
        self.secret = secret
        self.limits = limits
        self.words = words  # whole tokens after the special ones, see byte_text_assets

    async def start(self) -> None:
        engine = self.engine
        text = byte_text_assets(self.words)
        hello = Hello(
            worker_id=self.name,
            epoch=time.time_ns(),
            proof=b"",
            model=fake_card(self.model, engine.max_model_len, text, len(self.words)),
            block_size=engine.block_size,
            gpu_blocks=engine.gpu_blocks,
            max_running=engine.max_running,
            prefill_tokens_per_s=engine.prefill_tokens_per_s,
            decode_step_s=engine.step_s,
            max_step_tokens=engine.max_step_tokens,
        )
        sock = bind(self.host, self.port, self.secret)
        self.port = sock.getsockname()[1]
        self.registry = CollectorRegistry()
        self.server = WorkerServer(engine, hello, text, self.secret, self.registry, self.limits)
        await self.server.start(sock)

    async def stop(self) -> None:
        await self.server.stop()

    async def kill(self) -> None:
        """Die as by SIGKILL: what is not sent is lost, nobody is told anything."""
        for connection in list(self.server.channel.connections):
            connection.abort()
        await self.server.stop()

    async def __aenter__(self) -> FakeWorker:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
