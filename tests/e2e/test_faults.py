"""Parts that die while clients wait."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from services.cache_store.embedded import start_redis
from tests.cache_store.conftest import SERVERS
from tests.e2e.parts import Stack, eventually, stack
from tests.launch.started import free_port

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def prompt(seed: int, tokens: int = 200) -> list[int]:
    return [(seed * 31 + 7 * i) % 250 for i in range(tokens)]


def test_no_request_fails_while_redis_dies_and_returns(tiny_model_path: Path) -> None:
    port = free_port()
    redis = start_redis(Path(SERVERS[0]), max_memory=256 << 20, port=port)
    try:
        options = ("--redis", redis.url, "--store-capacity", "64MiB", "--kv-memory", "2MiB")
        with stack(tiny_model_path, 2, *options) as running:
            asked, stop = 0, threading.Event()

            def ask_until_stopped(client: int) -> int:
                nonlocal asked
                answers = 0
                while not stop.is_set():
                    tokens = prompt(client * 1000 + answers % 7)
                    answer = running.client.completions.create(model="tiny", prompt=tokens, max_tokens=4)
                    assert answer.usage
                    answers += 1
                    asked += 1
                return answers

            def more(count: int) -> None:
                goal = asked + count
                eventually(lambda: asked >= goal or any(f.done() for f in clients))

            with ThreadPoolExecutor(4) as pool:
                clients = [pool.submit(ask_until_stopped, client) for client in range(4)]
                try:
                    more(20)
                    eventually(lambda: stored(running) > 0)
                    redis.process.kill()
                    redis.process.wait()
                    more(40)
                    redis.stop()
                    redis = start_redis(Path(SERVERS[0]), max_memory=256 << 20, port=port)
                    before = written(running)
                    more(20)
                    eventually(lambda: written(running) > before)  # the store is used again
                finally:
                    stop.set()
                assert sum(client.result() for client in clients) == asked
    finally:
        redis.stop()


def stored(running: Stack) -> float:
    return sum(w.metric("reprise_held_blocks", tier="store") for w in running.workers.values())


def written(running: Stack) -> float:
    return sum(w.metric("reprise_store_tier_total", what="written:stored") for w in running.workers.values())


def test_a_client_that_hangs_up_gives_its_pages_back(tiny_model_path: Path) -> None:
    with stack(tiny_model_path, 1) as running:
        (only,) = running.workers.values()
        body = {"model": "tiny", "prompt": prompt(1), "max_tokens": 800, "ignore_eos": True, "stream": True}
        for _ in range(3):
            with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=30) as answer:
                next(answer.iter_lines())
        eventually(lambda: only.metric("vllm:num_requests_running") == 0)
        assert only.metric("vllm:kv_cache_usage_perc") == 0
        assert only.metric("vllm:request_success_total", finished_reason="abort") == 3
