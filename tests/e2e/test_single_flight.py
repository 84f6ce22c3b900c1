"""A prompt that comes to two workers at once, and that neither has, is computed by one of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

from services.cache_store.embedded import LocalRedis
from tests.e2e.parts import WorkerProcess, eventually, router, worker
from tests.e2e.test_reuse import ask

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPT_TOKENS = 1600  # of the demo model: seconds, and four steps


def prompt(seed: int) -> list[int]:
    return [(7 * i + seed * 1009) % 40_000 + 100 for i in range(PROMPT_TOKENS)]


def computed(*workers: WorkerProcess) -> float:
    return sum(each.metric("reprise_computed_prompt_tokens_total") for each in workers)


def counted(each: WorkerProcess, what: str) -> float:
    return each.metric("reprise_store_tier_total", what=what)


@pytest.mark.timeout(300)
def test_two_workers_compute_it_once_and_when_one_is_killed_at_it_the_other_goes_on(
    redis_server: LocalRedis, demo_model_path: Path
) -> None:
    with worker("alone", demo_model_path) as alone, router(alone) as to_alone:
        cold = ask(to_alone, prompt(1))["text"]

    options = ("--redis", redis_server.url, "--store-capacity", "1GiB")
    with (
        worker("a", demo_model_path, *options) as a,
        worker("b", demo_model_path, *options) as b,
        router(a) as to_a,
        router(b) as to_b,
        ThreadPoolExecutor(2) as clients,
        Redis.from_url(redis_server.url) as redis,
    ):
        before = computed(a, b)
        answers = [clients.submit(ask, each, prompt(0)) for each in (to_a, to_b)]
        texts = [answer.result()["text"] for answer in answers]
        assert texts[0] == texts[1], "one of them is cold"
        # Once, and a step of one that the other overtook.
        assert PROMPT_TOKENS <= computed(a, b) - before <= 1.4 * PROMPT_TOKENS
        assert counted(a, "follows") + counted(b, "follows") >= 1
        eventually(lambda: not redis.keys("*:claim*"))

        followed = {each.name: counted(each, "followed_blocks") for each in (a, b)}
        since = {each.name: computed(each) for each in (a, b)}
        answers = [clients.submit(ask, each, prompt(1)) for each in (to_a, to_b)]
        eventually(lambda: any(counted(each, "followed_blocks") > followed[each.name] for each in (a, b)))
        keys = redis.keys("*:claim*")
        assert keys
        assert all(redis.pttl(key) > 0 for key in keys), "a claim ends by itself"
        follower, other = (a, b) if counted(a, "followed_blocks") > followed["a"] else (b, a)
        other.process.kill()
        (answer,) = [answer for answer, each in zip(answers, (a, b), strict=True) if each is follower]
        assert answer.result()["text"] == cold
        assert computed(follower) - since[follower.name] < PROMPT_TOKENS, "what came before it was killed"
        eventually(lambda: not redis.keys("*:claim*"))
