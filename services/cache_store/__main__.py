"""`python -m services.cache_store`: upkeep, metrics and operators' API of the store, beside its servers."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from redis import Redis

from services.cache_store.address import Address, split_urls
from services.cache_store.by_server import ByServer
from services.cache_store.embedded import public_url
from services.cache_store.functions import StoreFunctions
from services.cache_store.operators import Operators, Server
from services.cache_store.operators_http import OperatorsServer, operators_app
from services.cache_store.recorder import Recorder, TraceFile
from services.cache_store.service import LOW_WATERMARK, Upkeep
from services.cache_store.tenants_file import TenantsFile
from services.options import between, port, seconds, size

#: An operator's question waits no longer for a server.
_ANSWER_S = 2.0


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as ending:
        try:
            _start(options, stop, ending)
        except _BadOption as error:
            print(f"cache store: {error}", file=sys.stderr)
            return 2
        stop.wait()
    return 0


class _BadOption(Exception):
    """Names the option, and what is wrong with it."""


def _start(options: argparse.Namespace, stop: threading.Event, ending: ExitStack) -> None:
    """Start everything; `ending` ends it. Raises _BadOption."""
    tenants = _tenants(options.tenants, options.capacity)
    keys = _keys(options.api_keys_file)
    where = public_url(options.redis)
    try:
        urls = {Address.from_url(url).name: url for url in split_urls(options.redis)}
        capacity = options.capacity // len(urls)
        upkeeps = {
            name: Upkeep(url, capacity, tenants=tenants, servers=len(urls)) for name, url in urls.items()
        }
    except (OSError, ValueError) as error:
        raise _BadOption(f"--redis {where}: {error}") from None
    for upkeep in upkeeps.values():
        ending.callback(upkeep.close)

    registry = CollectorRegistry()
    registry.register(ByServer(upkeeps))
    try:
        server, thread = start_http_server(options.metrics_port, options.host, registry)
    except OSError as error:
        raise _BadOption(
            f"--metrics-port {options.metrics_port} on {options.host}: {error.strerror}"
        ) from None
    ending.callback(thread.join)
    ending.callback(server.server_close)
    ending.callback(server.shutdown)
    metrics = f"http://{options.host}:{server.server_port}/metrics"
    size_text = f"{options.capacity / (1 << 30):.2f} GiB"
    print(f"cache store: upkeep of {where}, capacity {size_text}, metrics at {metrics}", flush=True)

    if keys:
        servers = {
            name: Server(_functions(url, ending), capacity, upkeeps[name].is_up) for name, url in urls.items()
        }
        app = operators_app(Operators(servers), keys, tenants.names if tenants else dict)
        api = OperatorsServer(app, _listener(options.host, options.api_port))
        ending.callback(api.close)
        print(f"cache store: operators' API at http://{options.host}:{api.port}/v1/cache", flush=True)

    if options.record is not None:
        trace = _trace(options.record, options.block_size)
        ending.callback(trace.close)
        recorders = {name: Recorder(_functions(url, ending), trace) for name, url in urls.items()}
        registry.register(ByServer(recorders))
        for recorder in recorders.values():
            _run(recorder.run, stop, ending=ending)

    # A thread each: one server that does not answer must not keep the others from their upkeep.
    for upkeep in upkeeps.values():
        _run(upkeep.run, stop, options.interval, ending=ending)


def _run(work: Callable[..., None], stop: threading.Event, *arguments: Any, ending: ExitStack) -> None:
    """In a thread until `stop`."""
    thread = threading.Thread(target=work, args=(stop, *arguments))
    thread.start()
    ending.callback(thread.join)
    ending.callback(stop.set)


def _trace(path: Path, block_size: int) -> TraceFile:
    try:
        return TraceFile(path, block_size)
    except OSError as error:
        raise _BadOption(f"--record {path}: {error.strerror}") from None


def _functions(url: str, ending: ExitStack) -> StoreFunctions:
    redis = Redis.from_url(url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S)
    ending.callback(redis.close)
    return StoreFunctions(redis)


def _listener(host: str, number: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise _BadOption(f"--api-port {number} on {host}: {error.strerror}") from None


def _tenants(path: Path | None, capacity: int) -> TenantsFile | None:
    try:
        return None if path is None else TenantsFile(path, int(LOW_WATERMARK * capacity))
    except (OSError, ValueError) as error:
        raise _BadOption(f"--tenants {path}: {error}") from None


def _keys(path: Path | None) -> list[str]:
    try:
        text = os.environ.get("REPRISE_STORE_API_KEYS", "") if path is None else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _BadOption(f"--api-keys-file {path}: {error}") from None
    keys = text.replace(",", "\n").split()
    if path is not None and not keys:
        raise _BadOption(f"--api-keys-file {path}: holds no key")
    return keys


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
    add("--host", default="127.0.0.1", help="to serve metrics and API on (default %(default)s)")
    add("--metrics-port", type=port, default=0, metavar="PORT", help="default: any free one")
    add(
        "--api-port",
        type=port,
        default=0,
        metavar="PORT",
        help="of the operators' API; default: any free one",
    )
    add(
        "--api-keys-file",
        type=Path,
        metavar="FILE",
        help="keys of the API, one a line; default: REPRISE_STORE_API_KEYS, else there is no API",
    )
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="write what workers ask for there, anonymised, in Mooncake's format (docs/store.md)",
    )
    add(
        "--block-size",
        type=between(1, 4096),
        default=64,
        metavar="TOKENS",
        help="the deployment's, for the lengths in the record (default %(default)s)",
    )
    add(
        "--tenants",
        type=Path,
        metavar="FILE",
        help="quotas and floors by tenant, JSON, read again when it changes (docs/store.md)",
    )
    add(
        "--interval",
        type=seconds,
        default=0.5,
        metavar="S",
        help="between rounds (default %(default)g)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
