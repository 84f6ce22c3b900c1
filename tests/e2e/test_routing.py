"""Conversations over two real engines: what prefix-aware routing finds again, and what round robin does."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from random import Random

import httpx
import pytest

from services.fleet import StaticFleet
from services.router.config import RouterConfig
from services.router.router import Router
from services.router.routing import Policy, PredictedSeconds, RoundRobin
from tests.e2e.parts import SECRET, route_of, worker
from tests.fakes.until import until

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SESSIONS, TURNS, TURN_TOKENS, BLOCK_SIZE = 8, 6, 150, 16


async def converse(model: Path, policy: Policy) -> tuple[float, Counter[str]]:
    """All sessions at once over two fresh workers: (share of the reusable tokens that were hit, requests by
    worker). Reusable is what the session has sent before, in whole blocks."""
    random = Random(5)
    reusable = hit = 0
    requests: Counter[str] = Counter()
    with ExitStack() as parts:
        workers = [parts.enter_context(worker(f"w{i}", model)) for i in range(2)]
        fleet = StaticFleet(",".join(w.channel for w in workers))
        async with (
            Router(RouterConfig(channel_secret=SECRET.encode()), fleet, policy) as router,
            httpx.AsyncClient(transport=httpx.ASGITransport(router), base_url="http://router") as http,
        ):
            await until(lambda: router.pool.ready == 2)

            async def session() -> None:
                nonlocal reusable, hit
                history: list[int] = []
                for _ in range(TURNS):
                    reusable += len(history) // BLOCK_SIZE * BLOCK_SIZE
                    history += [random.randrange(256) for _ in range(TURN_TOKENS)]
                    answer = await http.post(
                        "/v1/completions", json={"model": "tiny", "prompt": history, "max_tokens": 4}
                    )
                    assert answer.status_code == 200
                    hit += answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                    requests[route_of(answer.headers)["worker"]] += 1

            await asyncio.gather(*(session() for _ in range(SESSIONS)))
    return hit / reusable, requests


async def test_conversations_find_their_history_and_share_the_load(tiny_model_path: Path) -> None:
    share, requests = await converse(tiny_model_path, PredictedSeconds(Random(1)))
    blind_share, _ = await converse(tiny_model_path, RoundRobin())
    assert share >= 0.8
    assert blind_share < share - 0.1
    assert requests.total() == SESSIONS * TURNS
    assert len(requests) == 2
    assert max(requests.values()) <= 2 * min(requests.values())
