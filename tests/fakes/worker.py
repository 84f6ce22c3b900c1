"""A fake worker as a process: `python -m tests.fakes.worker --port 0 --name w0 --step-ms 12.5`.

Prints `ready worker=w0 channel=host:port` when routers may come; SIGTERM drains it. The channel's secret is
REPRISE_CHANNEL_SECRET's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal

import uvloop

from tests.fakes.clock import CLOCK_WORDS, clock_reply
from tests.fakes.engine import FakeEngine
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.sampled import sampled_reply


async def _serve(options: argparse.Namespace) -> None:
    engine = FakeEngine(
        clock_reply if options.clock else sampled_reply if options.sampled else options.reply,
        step_s=options.step_ms / 1000,
        prefill_tokens_per_s=options.prefill_tokens_per_s,
        block_size=options.block_size,
        gpu_blocks=options.gpu_blocks,
        max_running=options.max_running,
    )
    secret = os.environ.get("REPRISE_CHANNEL_SECRET", "").encode()
    words = CLOCK_WORDS if options.clock else []
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
        "--clock", action="store_true", help="tokens tell when they were made, see fakes.clock"
    )
    parser.add_argument(
        "--sampled", action="store_true", help="tokens depend on what sampling does, see fakes.sampled"
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
