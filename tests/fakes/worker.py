"""A fake worker: the true server and channel around a FakeEngine, in this process or as one of its own.

async with FakeWorker(FakeEngine("hello"), name="w0") as worker:   # worker.host, worker.port
python -m tests.fakes.worker --port 0 --name w0 --step-ms 12.5      # prints "ready … channel=host:port"
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time

import uvloop
from prometheus_client import CollectorRegistry

from services.wire.channel_server import bind
from services.wire.limits import ChannelLimits
from services.wire.messages import Hello
from services.worker.server import WorkerServer
from tests.fakes.engine import FakeEngine
from tests.fakes.text import byte_text_assets, fake_card


class FakeWorker:
    """Listens between `start` and `stop`. Started again it is a restarted worker: same port, new epoch."""

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
    ) -> None:
        self.engine = engine or FakeEngine()
        self.name = name
        self.model = model
        self.host = host
        self.port = port  # the true one after `start`
        self.secret = secret
        self.limits = limits

    async def start(self) -> None:
        engine = self.engine
        hello = Hello(
            worker_id=self.name,
            epoch=time.time_ns(),
            proof=b"",
            model=fake_card(self.model, engine.max_model_len),
            block_size=engine.block_size,
            gpu_blocks=engine.gpu_blocks,
            max_running=engine.max_running,
            prefill_tokens_per_s=engine.prefill_tokens_per_s,
            decode_step_s=engine.step_s,
        )
        sock = bind(self.host, self.port, self.secret)
        self.port = sock.getsockname()[1]
        self.registry = CollectorRegistry()
        self.server = WorkerServer(engine, hello, byte_text_assets(), self.secret, self.registry, self.limits)
        await self.server.start(sock)

    async def stop(self) -> None:
        await self.server.stop()

    async def __aenter__(self) -> FakeWorker:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


async def _serve(options: argparse.Namespace) -> None:
    engine = FakeEngine(
        options.reply,
        step_s=options.step_ms / 1000,
        prefill_tokens_per_s=options.prefill_tokens_per_s,
        block_size=options.block_size,
        gpu_blocks=options.gpu_blocks,
        max_running=options.max_running,
    )
    secret = os.environ.get("REPRISE_CHANNEL_SECRET", "").encode()
    worker = FakeWorker(engine, name=options.name, model=options.model, port=options.port, secret=secret)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with worker:
        print(f"ready worker={worker.name} channel={worker.host}:{worker.port}", flush=True)
        await stop.wait()
        await worker.server.drain(options.drain_timeout)


def main() -> None:
    parser = argparse.ArgumentParser(description="A fake worker speaking the true token channel.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--name", default="fake-worker")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--reply", help="text of every answer; endless without")
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--prefill-tokens-per-s", type=float, default=1e9)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--gpu-blocks", type=int, default=4096)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--drain-timeout", type=float, default=10.0)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
