"""`python -m services.cache_store`: the store's upkeep and metrics, beside one Redis or several."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading

from prometheus_client import CollectorRegistry, start_http_server

from services.cache_store.address import Address, split_urls
from services.cache_store.by_server import ByServer
from services.cache_store.embedded import public_url
from services.cache_store.service import Upkeep
from services.options import port, seconds, size


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        urls = split_urls(options.redis)
        upkeeps = {Address.from_url(url).name: Upkeep(url, options.capacity // len(urls)) for url in urls}
    except (OSError, ValueError) as error:
        return _fail(f"--redis {public_url(options.redis)}: {error}")
    registry = CollectorRegistry()
    registry.register(ByServer(upkeeps))
    try:
        server, thread = start_http_server(options.metrics_port, options.host, registry)
    except OSError as error:
        return _fail(f"--metrics-port {options.metrics_port} on {options.host}: {error.strerror}")
    capacity = f"{options.capacity / (1 << 30):.2f} GiB"
    metrics = f"http://{options.host}:{server.server_port}/metrics"
    where = public_url(options.redis)
    print(f"cache store: upkeep of {where}, capacity {capacity}, metrics at {metrics}", flush=True)
    # A thread each: one server that does not answer must not keep the others from their upkeep.
    rounds = [threading.Thread(target=one.run, args=(stop, options.interval)) for one in upkeeps.values()]
    try:
        for one in rounds:
            one.start()
        stop.wait()
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        for one in (thread, *rounds):
            one.join()
        for upkeep in upkeeps.values():
            upkeep.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.cache_store", description=__doc__)
    add = parser.add_argument
    default_redis = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
    add(
        "--redis",
        metavar="URL[,URL...]",
        default=default_redis,
        help="the store's servers; default: REDIS_URL, else 127.0.0.1:6379",
    )
    add(
        "--capacity",
        type=size,
        default="4GiB",
        metavar="SIZE",
        help="of the whole store (default %(default)s)",
    )
    add("--host", default="127.0.0.1", help="to serve the metrics on (default %(default)s)")
    add("--metrics-port", type=port, default=0, metavar="PORT", help="default: any free one")
    add(
        "--interval",
        type=seconds,
        default=0.5,
        metavar="S",
        help="between rounds (default %(default)g)",
    )
    return parser


def _fail(message: str) -> int:
    print(f"cache store: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
