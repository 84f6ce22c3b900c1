"""The router as a process: `python -m services.router --workers host:port,host:port`.

Prints one line with its address when clients may come. SIGTERM and SIGINT let running answers finish; a
second signal ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from dataclasses import fields
from pathlib import Path

import uvloop

from services.fleet import Fleet, StaticFleet
from services.options import port, size
from services.router.answer.families import CALL_STYLES
from services.router.config import RouterConfig
from services.router.router import Router
from services.router.server import HttpServer

_THINKS = {"auto": None, "think": True, "none": False}

_DEFAULTS = {field.name: field.default for field in fields(RouterConfig)}


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 stopped, 1 could not start, 2 bad options."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        config = _config(options)
        fleet = _fleet(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        sock = _listen(options.host, options.port)
    except OSError as error:
        print(f"error: cannot listen on {options.host}:{options.port}: {error.strerror}", file=sys.stderr)
        return 1
    uvloop.run(_serve(config, fleet, sock, options.drain_timeout))
    return 0


async def _serve(config: RouterConfig, fleet: Fleet, sock: socket.socket, drain_timeout_s: float) -> None:
    async with Router(config, fleet) as router:
        server = HttpServer(router, drain_timeout_s)

        def on_signal(number: signal.Signals) -> None:
            if server.should_exit:
                os._exit(128 + number)
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        host, port = sock.getsockname()[:2]
        print(f"ready http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await server.serve(sockets=[sock])


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    return sock


def _fleet(options: argparse.Namespace) -> Fleet:
    if options.fleet == "ray":
        from services.fleet.ray_serve import RayServeFleet  # ray takes seconds to import

        return RayServeFleet(options.ray_app, options.ray_deployment)
    if not options.workers:
        raise ValueError("--workers host:port,… is needed with --fleet static")
    return StaticFleet(options.workers)


def _config(options: argparse.Namespace) -> RouterConfig:
    return RouterConfig(
        channel_secret=_secret(options.secret_file, "REPRISE_CHANNEL_SECRET"),
        salt_secret=_secret(options.salt_secret_file, "REPRISE_SALT_SECRET") or None,
        api_keys=_api_keys(options.api_keys_file),
        max_queue=options.max_queue,
        queue_timeout_s=options.queue_timeout,
        stall_timeout_s=options.stall_timeout,
        max_body_bytes=options.max_body,
        tool_call_parser=None if options.tool_call_parser == "auto" else options.tool_call_parser,
        thinks=_THINKS[options.reasoning_parser],
    )


def _secret(path: Path | None, variable: str) -> bytes:
    if path is not None:
        return path.read_bytes().strip()
    return os.environ.get(variable, "").encode()


def _api_keys(path: Path | None) -> tuple[str, ...]:
    text = path.read_text() if path is not None else os.environ.get("REPRISE_API_KEYS", "")
    keys = tuple(key for key in text.replace(",", "\n").split() if key)
    if path is not None and not keys:
        raise ValueError(f"{path} holds no API key")
    return keys


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.router", description="The OpenAI API over a fleet of workers."
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--port", type=port, default=8000, help="0 = any free one (default %(default)s)")
    add("--fleet", choices=["static", "ray"], default="static", help="how workers are found (%(default)s)")
    add("--workers", metavar="HOST:PORT,…", help="their token channels, for --fleet static")
    add("--ray-app", default="reprise", help="Ray Serve application, for --fleet ray (%(default)s)")
    add("--ray-deployment", default="Worker", help="its deployment of workers (%(default)s)")
    add(
        "--secret-file",
        type=Path,
        metavar="PATH",
        help="secret shared with the workers; default: REPRISE_CHANNEL_SECRET",
    )
    add(
        "--salt-secret-file",
        type=Path,
        metavar="PATH",
        help="secret behind the tenants' cache salts, the same on all routers; default: REPRISE_SALT_SECRET, "
        "else the channel's",
    )
    add(
        "--api-keys-file",
        type=Path,
        metavar="PATH",
        help="keys that clients must show, one a line; default: REPRISE_API_KEYS, else everybody may ask",
    )
    add(
        "--max-queue",
        type=int,
        default=_DEFAULTS["max_queue"],
        help="requests that may wait for a worker, a model; more get 429 (default %(default)s)",
    )
    add(
        "--queue-timeout",
        type=float,
        default=_DEFAULTS["queue_timeout_s"],
        metavar="S",
        help="longest wait for a worker (default %(default)g s)",
    )
    add(
        "--stall-timeout",
        type=float,
        default=_DEFAULTS["stall_timeout_s"],
        metavar="S",
        help="longest silence of a worker about a request (default %(default)g s)",
    )
    add(
        "--max-body",
        type=size,
        default=_DEFAULTS["max_body_bytes"],
        metavar="SIZE",
        help="largest request body, 8MiB say (default %(default)s bytes)",
    )
    add(
        "--tool-call-parser",
        choices=["auto", *CALL_STYLES],
        default="auto",
        help="how models write calls of tools (default auto: as each model's chat template tells)",
    )
    add(
        "--reasoning-parser",
        choices=list(_THINKS),
        default="auto",
        help="whether models write thoughts in <think></think> (default auto: as each template tells)",
    )
    add("--drain-timeout", type=float, default=120.0, metavar="S", help="seconds (default %(default)g)")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    return parser


if __name__ == "__main__":
    sys.exit(main())
