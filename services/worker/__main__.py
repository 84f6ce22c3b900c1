"""One worker as a process: `python -m services.worker --model PATH`.

Prints one line with its addresses when routers may come. SIGTERM and SIGINT drain it: routers are told, the
running requests finish. A second signal ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvloop

from services.cache_store.frames import CODEC_IDS
from services.options import between, port, size
from services.worker.config import EngineConfig
from services.worker.process import Worker, WorkerConfig

log = logging.getLogger("services.worker")

#: A stuck engine must not keep the process for longer than this once its requests are done or given up.
STOP_TIMEOUT_S = 10.0


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 drained, 1 could not start or failed, 2 bad options."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        config = _config(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    code: int = uvloop.run(_serve(config, options.drain_timeout))
    return code


async def _serve(config: WorkerConfig, drain_timeout_s: float) -> int:
    ready = False
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if not ready:
            os._exit(0)  # nothing to drain; the threads that load the model would hold a graceful end up
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)

    worker = Worker(config)
    try:
        await worker.start()
    except (OSError, ValueError) as error:
        log.debug("start failed", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    ready = True
    print(
        f"ready worker={config.name} channel={config.host}:{worker.port} "
        f"metrics=http://{config.host}:{worker.metrics_port}/metrics",
        flush=True,
    )

    failed = asyncio.create_task(worker.wait_failed())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([failed, stopped], return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        log.error("the engine has failed, see above; this process ends")
    elif not await worker.drain(drain_timeout_s):
        log.warning("requests still ran after %g s of draining; routers take them elsewhere", drain_timeout_s)
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await worker.stop()
    except TimeoutError:
        log.error("the engine did not stop within %g s", STOP_TIMEOUT_S)
        os._exit(1)
    return 1 if failed.done() else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.worker", description="Serve a model to routers."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a .gguf file or a Hugging Face folder")
    add("--name", default=f"{socket.gethostname()}-{os.getpid()}", help="id of this worker in the fleet")
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--port", type=port, default=0, help="of the token channel; 0 = any free one (default)")
    add(
        "--metrics-port",
        type=port,
        default=0,
        help="of /metrics, /health and /ready; 0 = any free one",
    )
    add(
        "--secret-file",
        type=Path,
        metavar="PATH",
        help="secret shared with the routers; default: REPRISE_CHANNEL_SECRET. Needed unless on loopback",
    )
    add("--device", default="cpu", help="cpu (default) or cuda[:n]")
    add(
        "--dtype",
        help="float32, bfloat16 or float16; by default float32 on the CPU, the model's own elsewhere",
    )
    add("--threads", type=between(1, 4096), help="CPU threads; by default PyTorch's choice")
    add(
        "--kv-memory",
        type=size,
        metavar="SIZE",
        help="for KV pages; by default 1GiB on the CPU, on a GPU what is left of --gpu-memory",
    )
    add("--gpu-memory", type=float, metavar="SHARE", help="of the card that may be used (default 0.92)")
    add("--block-size", type=int, help="tokens a block, the same in the whole deployment (16; GPU 64)")
    add("--max-running", type=int, help="sequences in one step (default 16; GPU 256)")
    add("--max-step-tokens", type=int, help="tokens computed in one step (default 512; GPU 8192)")
    add("--max-model-len", type=int, help="prompt and generated tokens; by default the model's own limit")
    add(
        "--host-cache",
        type=size,
        metavar="SIZE",
        help="host memory for KV blocks that leave the pages, pinned on a GPU machine; by default none",
    )
    add("--redis", metavar="URL[,URL...]", help="servers of the shared cache store; by default none")
    add(
        "--store-capacity",
        type=size,
        metavar="SIZE",
        help="of the whole store, where none is set yet",
    )
    add(
        "--store-codec",
        choices=list(CODEC_IDS),
        help="how KV blocks travel to the store: none as they are (default), int8 (GPU: default) and fp8 at "
        "half of bf16's bytes, k8v4 at two fifths; blocks of more exact codecs are read too",
    )
    add("--drain-timeout", type=float, default=120.0, metavar="S", help="seconds (default %(default)g)")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    return parser


def _config(options: argparse.Namespace) -> WorkerConfig:
    return WorkerConfig(
        model=options.model,
        name=options.name,
        host=options.host,
        port=options.port,
        metrics_port=options.metrics_port,
        secret=_secret(options.secret_file),
        engine=EngineConfig.for_device(
            options.device,
            block_size=options.block_size,
            kv_bytes=options.kv_memory,
            gpu_memory=options.gpu_memory,
            max_running=options.max_running,
            max_step_tokens=options.max_step_tokens,
            max_model_len=options.max_model_len,
            host_bytes=options.host_cache,
            store_codec=options.store_codec,
        ),
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        redis_url=options.redis,
        store_bytes=options.store_capacity,
    )


def _secret(path: Path | None) -> bytes:
    if path is None:
        return os.environ.get("REPRISE_CHANNEL_SECRET", "").encode()
    secret = path.read_bytes().strip()
    if not secret:
        raise ValueError(f"--secret-file {path} is empty")
    return secret


if __name__ == "__main__":
    sys.exit(main())
