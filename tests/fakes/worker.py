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
from collections.abc import Iterator, Sequence

import uvloop
from prometheus_client import CollectorRegistry

from services.wire.channel_server import bind
from services.wire.limits import ChannelLimits
from services.wire.messages import Hello
from services.worker.request import Request
from services.worker.server import WorkerServer
from tests.fakes.engine import FakeEngine
from tests.fakes.text import FAKE_VOCAB, byte_text_assets, fake_card

#: With `--clock` a token is a word " 0000" to " 8191": the monotonic clock in units of CLOCK_S when the token
#: was made, so that whoever receives it knows how long it took, up to 0.8 s.
CLOCK_TOKENS = 8192
CLOCK_S = 1e-4


def clock_reply(request: Request) -> Iterator[int]:
    while True:
        yield FAKE_VOCAB + int(time.monotonic() / CLOCK_S) % CLOCK_TOKENS


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
        )
        sock = bind(self.host, self.port, self.secret)
        self.port = sock.getsockname()[1]
        self.registry = CollectorRegistry()
        self.server = WorkerServer(engine, hello, text, self.secret, self.registry, self.limits)
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
        clock_reply if options.clock else options.reply,
        step_s=options.step_ms / 1000,
        prefill_tokens_per_s=options.prefill_tokens_per_s,
        block_size=options.block_size,
        gpu_blocks=options.gpu_blocks,
        max_running=options.max_running,
    )
    secret = os.environ.get("REPRISE_CHANNEL_SECRET", "").encode()
    words = [f" {n:04}" for n in range(CLOCK_TOKENS)] if options.clock else []
    worker = FakeWorker(
        engine, name=options.name, model=options.model, port=options.port, secret=secret, words=words
    )
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
    parser.add_argument(
        "--clock", action="store_true", help="every token tells when it was made, see CLOCK_S"
    )
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--prefill-tokens-per-s", type=float, default=1e9)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--gpu-blocks", type=int, default=4096)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--drain-timeout", type=float, default=10.0)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
