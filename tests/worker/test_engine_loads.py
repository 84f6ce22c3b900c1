"""An engine on its own thread and a real Redis that dies, freezes or trickles in the middle of loads."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.wire.messages import Start
from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.models.random import TINY, random_model
from services.worker.request import Request, StepReport
from services.worker.store_tier import RedisStoreTier, StoreTierConfig
from tests.cache_store.proxy import SlowProxy
from tests.worker.requests import BLOCK, make_request, prompt
from tests.worker.test_engine import wait_for

LENGTH = 2000
MODEL = random_model({**TINY, "num_hidden_layers": 8, "max_position_embeddings": 4096}, max_model_len=4096)
SPEC = MODEL.spec


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    server = start_redis(find_server(), max_memory=256 << 20)
    yield server
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGCONT)
    server.stop()


class Running:
    """An engine and what it says."""

    def __init__(self, url: str | None) -> None:
        self.tier = None if url is None else _tier(url)
        self.engine = Engine(MODEL, EngineConfig(pages=600, max_step_tokens=128), self.tier)
        self.tokens: dict[object, list[int]] = {}
        self.starts: dict[object, Start] = {}
        self.reasons: dict[object, str] = {}
        self.engine.warm_up()
        self.engine.start(self._note)

    def _note(self, report: StepReport) -> None:
        for output in report.outputs:
            self.tokens.setdefault(output.key, []).extend(output.tokens)
            if output.start is not None:
                self.starts[output.key] = output.start
            if output.finish is not None:
                self.reasons[output.key] = output.finish.reason

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.engine.submit(request)
        wait_for(lambda: self.engine.idle)
        for request in requests:
            assert self.reasons[request.key] == "length"


def _tier(url: str) -> RedisStoreTier:
    shape = (SPEC.layers, 2, SPEC.kv_heads, BLOCK, SPEC.head_dim)
    return RedisStoreTier(
        StoreTierConfig(
            url=url, fingerprint=b"f" * 16, block_shape=shape, dtype=MODEL.kv_dtype, capacity=128 << 20
        )
    )


@contextmanager
def running(url: str | None) -> Iterator[Running]:
    """Stopped afterwards, nothing held and no thread left."""
    engine = Running(url)
    try:
        yield engine
        assert not engine.engine._loads
        engine.engine._pool.check()
        assert engine.engine._pool.referenced == 0
    finally:
        engine.engine.stop()
        if engine.tier is not None:
            engine.tier.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("store-")]


def requests() -> list[Request]:
    """Three prompts, the third twice."""
    prompts = [prompt(LENGTH, 1), prompt(LENGTH, 2), prompt(LENGTH, 3), prompt(LENGTH, 3)]
    return [make_request(i, tokens, max_tokens=6, ignore_eos=True) for i, tokens in enumerate(prompts)]


@pytest.fixture(scope="module")
def cold() -> dict[object, list[int]]:
    with running(None) as engine:
        engine.run(*requests())
        return engine.tokens


def fill(url: str) -> None:
    with running(url) as engine:
        engine.run(*requests())
        assert engine.tier is not None
        tier = engine.tier
        wait_for(lambda: tier.counts().get("written:stored", 0) >= 3 * (LENGTH // BLOCK))


def test_prompts_that_the_store_has_give_the_tokens_of_the_cold_run(
    server: LocalRedis, cold: dict[object, list[int]]
) -> None:
    fill(server.url)
    with running(server.url) as engine:
        engine.run(*requests())
        assert engine.tokens == cold
        assert sum(start.store_tokens for start in engine.starts.values()) > 0
        assert engine.starts[3].store_tokens == 0, "the same prompt is loaded and computed once"
        assert engine.starts[3].gpu_tokens == LENGTH // BLOCK * BLOCK


@pytest.mark.parametrize("trouble", ["killed", "frozen", "freed"])
@pytest.mark.parametrize("loaded", [0, 3])
def test_a_store_that_fails_in_the_middle_of_a_load_costs_no_token(
    server: LocalRedis, cold: dict[object, list[int]], trouble: str, loaded: int
) -> None:
    fill(server.url)
    port = int(server.url.split(":")[2].split("/")[0])
    proxy = SlowProxy(port, bytes_per_s=BLOCK_BYTES / BLOCK_S)
    with running(proxy.url) as engine:
        assert engine.tier is not None
        tier = engine.tier
        for request in requests():
            engine.engine.submit(request)
        wait_for(lambda: tier.counts().get("loads") and tier.counts().get("loaded_blocks", 0) >= loaded)
        if trouble == "killed":
            server.process.kill()
        elif trouble == "frozen":
            server.process.send_signal(signal.SIGSTOP)
        else:
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)  # so long it stands still
            server.process.send_signal(signal.SIGCONT)
        wait_for(lambda: engine.engine.idle)
        assert engine.tokens == cold
    proxy.close()


@pytest.mark.parametrize("after", ["queued", "loading", "blocks"])
def test_a_cancel_in_the_middle_of_a_load_leaves_nothing(server: LocalRedis, after: str) -> None:
    fill(server.url)
    port = int(server.url.split(":")[2].split("/")[0])
    proxy = SlowProxy(port, bytes_per_s=BLOCK_BYTES / BLOCK_S)
    conditions: dict[str, Callable[[RedisStoreTier], object]] = {
        "queued": lambda tier: True,
        "loading": lambda tier: tier.counts().get("loads"),
        "blocks": lambda tier: tier.counts().get("loaded_blocks"),
    }
    with running(proxy.url) as engine:
        assert engine.tier is not None
        tier = engine.tier
        engine.engine.submit(make_request("a", prompt(LENGTH, 1), max_tokens=6))
        wait_for(lambda: conditions[after](tier))
        engine.engine.cancel("a")
        wait_for(lambda: engine.engine.idle)
    proxy.close()


BLOCK_BYTES = SPEC.layers * 2 * SPEC.kv_heads * BLOCK * SPEC.head_dim * MODEL.kv_dtype.itemsize
BLOCK_S = 0.002
