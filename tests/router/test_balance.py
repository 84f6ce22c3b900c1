"""Where requests go, over the true channel: load is even, conversations stay, round robin does neither."""

import asyncio
from random import Random

import pytest

from services.router.index import PrefixIndex
from services.router.routing import PredictedSeconds, RoundRobin, RouteRequest
from services.wire.hashes import chain_hashes, pack_tokens
from services.wire.messages import Stats
from tests.fakes import FakeEngine
from tests.router.serving import serving
from tests.router.workers import load


async def complete(served, prompt, **fields):
    body = {"model": "fake", "prompt": prompt, "max_tokens": 2, **fields}
    answer = await served.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    return answer.json()


@pytest.mark.slow
async def test_two_thousand_requests_with_one_shared_prefix_spread_over_eight_workers():
    engines = [FakeEngine(prefill_tokens_per_s=200_000.0, block_size=64) for _ in range(8)]
    async with serving(*engines, policy=PredictedSeconds(Random(3))) as served:
        random = Random(1)
        shared = [random.randrange(256) for _ in range(4000)]
        places = asyncio.Semaphore(64)

        async def one():
            async with places:
                await complete(served, [*shared, *(random.randrange(256) for _ in range(40))])

        await asyncio.gather(*(one() for _ in range(2000)))
        counts = [len(engine.submitted) for engine in engines]
        assert sum(counts) == 2000
        assert max(counts) / (sum(counts) / 8) <= 1.3
        hit = served.sample("hit_tokens_total", model="fake", tier="gpu")
        assert hit / served.sample("prompt_tokens_total", model="fake") > 0.9


async def converse(policy, sessions=9, turns=6):
    """Sessions that grow by 200 tokens a turn over 4 workers: (reusable prompt tokens, hit, requests by
    worker, hits as predicted)."""
    engines = [FakeEngine(prefill_tokens_per_s=50_000.0, step_s=0.001) for _ in range(4)]
    random = Random(4)
    reusable = hit = 0
    async with serving(*engines, policy=policy) as served:

        async def session():
            nonlocal reusable, hit
            history: list[int] = []
            for _ in range(turns):
                reusable += len(history) // 16 * 16
                history += [random.randrange(256) for _ in range(200)]
                usage = (await complete(served, history))["usage"]
                hit += usage["prompt_tokens_details"]["cached_tokens"]

        await asyncio.gather(*(session() for _ in range(sessions)))
        predicted = served.sample("predicted_hit_tokens_total", model="fake", tier="gpu")
        return reusable, hit, [len(engine.submitted) for engine in engines], predicted


async def test_conversations_stay_where_their_history_is():
    reusable, hit, requests, predicted = await converse(PredictedSeconds(Random(2)))
    assert sum(requests) == 54
    assert hit >= 0.8 * reusable
    assert max(requests) <= 2 * 54 / 4
    assert predicted == pytest.approx(hit, rel=0.05)


async def test_round_robin_loses_them():
    reusable, hit, requests, _ = await converse(RoundRobin())
    assert hit < 0.7 * reusable
    assert max(requests) - min(requests) <= 1


def test_a_hot_prefix_spreads_to_a_new_worker_when_that_is_sooner():
    """Seven workers hold a hot prefix of half a second and are two seconds behind; the eighth is new."""
    policy, index = PredictedSeconds(Random(1)), PrefixIndex()
    tokens = [1] * 2048
    hashes = chain_hashes(bytes(16), pack_tokens(tokens), 64)
    fleet = {worker: load(rate=4096.0, block_size=64) for worker in range(8)}
    for worker in range(8):
        index.join(worker, 10_000)
    for worker in range(7):
        index.guess(worker, hashes, until_s=1e9)
        fleet[worker].reported(Stats(20, 8, 8192, 10_000, 0.0, 0.0, 0.0), now_s=0.0)
    hits = index.match(hashes, range(8))
    route = policy.choose(RouteRequest(2048, 16, 1, hits), fleet, range(8), 0.0)
    assert (route.worker, route.reason) == (7, "load")
