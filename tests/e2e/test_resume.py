"""Workers that are killed, frozen or drained while they answer: real engines, one unbroken answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.chaos import KINDS, Plan, ask, chaos, difference, request
from services.cache_store.embedded import LocalRedis
from services.router.pulse import LEAST_S
from tests.e2e.parts import Stack, WorkerProcess, eventually, route_of, stack

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PLAN = Plan((), streams=2 * len(KINDS), tokens=400)


async def disturbed(running: Stack, disturb: Callable[[WorkerProcess], None]) -> tuple[WorkerProcess, float]:
    """Ask for answers of every kind, once undisturbed and once while `disturb` is done to a worker that has
    some of them: they must be the same. Returns the worker and how long the answers took from then on."""
    bodies = [request(i, PLAN, "tiny") for i in range(PLAN.streams)]
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
        expected = await asyncio.gather(*(ask(client, body) for body in bodies))
        again = [asyncio.create_task(ask(client, body)) for body in bodies]
        worker = await asyncio.to_thread(busiest, running)
        disturb(worker)
        began_s = time.monotonic()
        for answer, undisturbed in zip(await asyncio.gather(*again), expected, strict=True):
            assert difference(answer, undisturbed) == ""
        return worker, time.monotonic() - began_s


def busiest(running: Stack) -> WorkerProcess:
    """The worker with the most sequences, once all requests are on some worker and have got tokens."""
    before = generated(running)
    eventually(lambda: generated(running) > before + 20 * PLAN.streams)
    return max(running.workers.values(), key=lambda worker: worker.metric("vllm:num_requests_running"))


def generated(running: Stack) -> float:
    return sum(worker.metric("vllm:generation_tokens_total") for worker in running.workers.values())


def router_metric(running: Stack, name: str) -> float:
    text = httpx.get(f"{running.url}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def resumes(running: Stack, reason: str) -> float:
    return router_metric(running, f'reprise_router_resumes_total{{reason="{reason}"}}')


def send(number: signal.Signals) -> Callable[[WorkerProcess], None]:
    return lambda worker: os.kill(worker.process.pid, number)


OPTIONS = ("--max-running", "64")


def test_a_killed_workers_answers_go_on(tiny_model_path: Path) -> None:
    with stack(tiny_model_path, 2, *OPTIONS) as running:
        worker, _ = asyncio.run(disturbed(running, send(signal.SIGKILL)))
        (other,) = (one for one in running.workers.values() if one is not worker)
        assert resumes(running, "worker_lost") > PLAN.streams / 4
        assert other.metric("vllm:num_requests_running") == 0
        assert other.metric("vllm:kv_cache_usage_perc") == 0
        assert router_metric(running, "reprise_router_broken_streams_total") == 0


def test_the_kv_of_a_long_prompt_and_of_its_answer_comes_from_the_store(
    demo_model_path: Path, redis_server: LocalRedis
) -> None:
    prompt, options = [(7 * i) % 40_000 + 100 for i in range(640)], ("--redis", redis_server.url)
    with stack(demo_model_path, 2, *options, "--store-capacity", "1GiB") as running:
        body = {"model": running.model, "prompt": prompt, "max_tokens": 120, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            first = running.workers[route_of(answer.headers)["worker"]]
            eventually(lambda: first.metric("reprise_held_blocks", tier="store") >= (640 + 32) // 16)
            first.process.kill()
            *_, usage, done = (line.removeprefix("data: ") for line in lines if line)
        assert done == "[DONE]"
        assert json.loads(usage)["usage"]["completion_tokens"] == 120
        assert json.loads(usage)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        (other,) = (one for one in running.workers.values() if one is not first)
        # Loads come from the back, the answer's blocks first, while the front is computed until they meet.
        assert other.metric("reprise_prefix_hit_tokens_total", tier="store") >= 0.9 * 640


def test_a_draining_workers_answers_go_on_and_it_is_gone_in_seconds(tiny_model_path: Path) -> None:
    with stack(tiny_model_path, 2, *OPTIONS) as running:
        ended_s: list[float] = []

        def drain(worker: WorkerProcess) -> None:
            began_s = time.monotonic()
            worker.process.terminate()
            asyncio.get_running_loop().run_in_executor(
                None, lambda: ended_s.append(worker.process.wait(timeout=30) or time.monotonic() - began_s)
            )

        worker, answered_s = asyncio.run(disturbed(running, drain))
        assert worker.process.wait(timeout=30) == 0
        assert resumes(running, "draining") > 0
        assert ended_s[0] < max(answered_s, 5.0)


def test_a_frozen_workers_answers_go_on(tiny_model_path: Path) -> None:
    """Its connection is as good as ever: only silence tells."""
    with stack(tiny_model_path, 2, *OPTIONS) as running:
        worker, answered_s = asyncio.run(disturbed(running, send(signal.SIGSTOP)))
        assert answered_s < 4 * LEAST_S
        assert resumes(running, "stalled") + resumes(running, "worker_lost") > PLAN.streams / 4
        send(signal.SIGCONT)(worker)
        eventually(lambda: running.ready_workers() == 2)
        eventually(lambda: worker.metric("vllm:num_requests_running") == 0)


def test_chaos_in_small(tiny_model_path: Path, redis_server: LocalRedis) -> None:
    worker: tuple[Any, ...] = ("services.worker", "--model", str(tiny_model_path), "--threads", "1")
    worker += (*OPTIONS, "--redis", redis_server.url, "--store-capacity", "256MiB")
    plan = Plan(worker, workers=3, streams=24, seconds=10, kill_every_s=3, tokens=300)
    result = asyncio.run(chaos(plan))
    assert (result.failed, result.different, result.left) == ([], [], [])
    assert result.kills >= 3
    assert result.resumes >= 3
