"""What one worker computed, another one reuses, even when the first is dead."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from services.cache_store.embedded import LocalRedis
from tests.e2e.parts import Stack, eventually, route_of, stack

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPT_TOKENS = 1500


@pytest.mark.timeout(300)
def test_a_prefix_outlives_its_worker(redis_server: LocalRedis, demo_model_path: Path) -> None:
    prompt = [(7 * i) % 40_000 + 100 for i in range(PROMPT_TOKENS)]
    options = ("--redis", redis_server.url, "--store-capacity", "1GiB")
    with stack(demo_model_path, 2, *options) as running:
        warm_up(running)
        cold = ask(running, prompt)
        first = running.workers[cold["route"]["worker"]]
        assert cold["cached_tokens"] == 0
        # Writing behind ends some time after the answer.
        eventually(lambda: first.metric("reprise_held_blocks", tier="store") >= PROMPT_TOKENS // 16)
        first.process.kill()
        eventually(lambda: running.ready_workers() == 1)

        warm = ask(running, prompt)
        assert warm["route"]["worker"] != first.name
        assert int(warm["route"]["hit_store"]) >= 0.9 * PROMPT_TOKENS
        assert int(warm["route"]["hit_gpu"]) == 0
        assert warm["cached_tokens"] >= 0.9 * PROMPT_TOKENS
        assert warm["text"] == cold["text"]
        assert warm["ttft_s"] <= cold["ttft_s"] / 4


def warm_up(running: Stack) -> None:
    """Each worker's first request pays for what is lazily loaded."""
    for seed in range(4):
        ask(running, [(11 * i + seed) % 30_000 + 100 for i in range(40)])


def ask(running: Stack, prompt: list[int]) -> dict[str, Any]:
    sent_s = time.perf_counter()
    text, ttft_s, usage = "", None, None
    with running.client.completions.with_streaming_response.create(
        model=running.model,
        prompt=prompt,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as answer:
        route = route_of(answer.headers)
        for chunk in answer.parse():
            if chunk.choices:
                ttft_s = ttft_s or time.perf_counter() - sent_s
                text += chunk.choices[0].text
            usage = chunk.usage or usage
    return {
        "text": text,
        "ttft_s": ttft_s,
        "route": route,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens,
    }
