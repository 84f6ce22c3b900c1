from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from redis import Redis

from services.cache_store.embedded import (
    LocalRedis,
    RedisUnavailable,
    check_redis,
    embedded_server,
    find_or_start_redis,
    find_server,
    public_url,
    start_redis,
)

EMPTY_PATH = {"PATH": "/nowhere"}


def test_every_server_found_here_starts_answers_and_has_functions(any_server: LocalRedis) -> None:
    check_redis(any_server.url)
    check_redis(any_server.socket_url)
    with Redis.from_url(any_server.socket_url) as client:
        settings = client.config_get("save", "appendonly", "maxmemory-policy", "bind")
        assert settings == {
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "bind": "127.0.0.1",
        }
        assert client.function_list() is not None
    assert any_server.directory.stat().st_mode & 0o777 == 0o700


def test_a_server_ends_with_whoever_started_it_even_by_kill() -> None:
    code = (
        "from services.cache_store.embedded import *\n"
        "server = start_redis(find_server(), max_memory=64 << 20)\n"
        "print(server.process.pid, server.directory, flush=True)\n"
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        pid, directory = parent.stdout.readline().split()
        server = psutil.Process(int(pid))
        parent.kill()
    server.wait(timeout=10)
    shutil.rmtree(directory)


def test_a_server_stopped_is_gone_with_its_directory_and_may_be_stopped_again() -> None:
    server = start_redis(find_server(), max_memory=64 << 20)
    server.stop()
    assert server.process.poll() is not None
    assert not server.directory.exists()
    server.stop()
    with pytest.raises(RedisUnavailable, match=r"no Redis at redis://127\.0\.0\.1"):
        check_redis(server.url)


def test_redis_url_wins_and_starts_nothing(redis_server: LocalRedis) -> None:
    environ = {"REDIS_URL": redis_server.url, "PATH": os.environ["PATH"]}
    assert find_or_start_redis(environ, max_memory=1) == (redis_server.url, None)


def test_without_anything_on_path_the_package_s_server_is_started() -> None:
    assert find_server(EMPTY_PATH) == embedded_server()
    url, server = find_or_start_redis(EMPTY_PATH, max_memory=64 << 20)
    assert server is not None
    try:
        check_redis(url)
    finally:
        server.stop()


def test_a_server_on_path_comes_before_the_package_s(tmp_path: Path) -> None:
    fake = tmp_path / "valkey-server"
    fake.touch(mode=0o755)
    assert find_server({"PATH": str(tmp_path)}) == fake


def test_without_any_server_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cache_store.embedded.embedded_server", lambda: None)
    with pytest.raises(RedisUnavailable, match="set REDIS_URL, or install redis-server"):
        find_server(EMPTY_PATH)


def test_a_taken_port_is_one_clear_line_and_leaves_nothing(redis_server: LocalRedis) -> None:
    port = int(redis_server.url.split(":")[2].split("/")[0])
    before = set(Path(redis_server.directory.parent).glob("reprise-redis-*"))
    with pytest.raises(RedisUnavailable, match=f"did not start: port {port} is taken$"):
        start_redis(find_server(), port=port, max_memory=64 << 20)
    assert set(Path(redis_server.directory.parent).glob("reprise-redis-*")) <= before


@pytest.mark.parametrize(("binary", "cause"), [("/nowhere", "No such file"), ("/bin/false", "exit code 1")])
def test_a_binary_that_does_not_start_is_one_clear_line(binary: str, cause: str) -> None:
    with pytest.raises(RedisUnavailable, match=f"{binary} did not start: .*{cause}"):
        start_redis(Path(binary), max_memory=64 << 20)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://user:secret@127.0.0.1:1/0", "no Redis at redis://127.0.0.1:1/0: .*refused"),
        ("user:secret@host", "REDIS_URL host is not a Redis URL"),
        ("unix:///nowhere/redis.sock", "no Redis at unix:///nowhere/redis.sock"),
    ],
)
def test_a_url_without_a_redis_behind_it_is_one_line_without_the_password(url: str, message: str) -> None:
    with pytest.raises(RedisUnavailable, match=message) as caught:
        check_redis(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_password_is_named_as_such() -> None:
    server = start_redis(find_server(), max_memory=64 << 20)
    try:
        with Redis.from_url(server.socket_url) as client:
            client.config_set("requirepass", "right")
        check_redis(server.url.replace("redis://", "redis://:right@"))
        with pytest.raises(RedisUnavailable, match="refuses the user or password"):
            check_redis(server.url.replace("redis://", "redis://:wrong@"))
    finally:
        server.stop()


def test_a_public_url_has_no_user_and_no_password() -> None:
    assert public_url("rediss://me:secret@host:6379/1") == "rediss://host:6379/1"
    assert public_url("redis://host:6379") == "redis://host:6379"
    assert public_url("unix:///r.sock?password=secret") == "unix:///r.sock"
    assert public_url("redis://:secret@a:1/0,rediss://me:secret@b:2") == "redis://a:1/0,rediss://b:2"
