"""A whole worker, with a model of a few thousand weights, inside this test's event loop."""

import asyncio
import socket
import urllib.error
import urllib.request

import pytest
import torch

from services.cache_store.embedded import find_server, start_redis
from services.wire.channel_server import bind
from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.process import Worker, WorkerConfig
from tests.fakes.checkpoint import write_tiny_checkpoint
from tests.fakes.until import until
from tests.worker.server.clients import routing_to


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def redis_url():
    server = start_redis(find_server(), max_memory=256 << 20)
    yield server.socket_url
    server.stop()


def config(model, **fields):
    return WorkerConfig(**{"model": model, "name": "w0", "engine": EngineConfig(pages=100)} | fields)


class At:
    def __init__(self, worker):
        self.host, self.port = worker.config.host, worker.port


async def probe(worker, path):
    def get():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{worker.metrics_port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(get)


async def test_a_worker_tells_routers_its_model_and_serves_it_the_same_every_time(model):
    worker = Worker(config(model))
    await worker.start()
    try:
        async with routing_to(At(worker)) as router:
            hello = router.channel.hello
            assert (hello.worker_id, hello.model.name, hello.block_size, hello.gpu_blocks) == (
                "w0",
                "tiny",
                16,
                100,
            )
            assert hello.model.max_model_len == 1024
            assert hello.prefill_tokens_per_s > 0
            assert hello.decode_step_s > 0
            text = await router.channel.text_assets()
            assert text.chat_template
            prompt = [n % 256 for n in range(100)]
            first = await router.ask(prompt, temperature=0, max_tokens=20, ignore_eos=True).finished()
            second = await router.ask(prompt, temperature=0, max_tokens=20, ignore_eos=True).finished()
            assert len(first.tokens) == 20
            assert first.tokens == second.tokens
            assert (first.start.gpu_tokens, second.start.gpu_tokens) == (0, 96)
            assert len(router.held["gpu"]) >= 6
    finally:
        await worker.stop()


async def test_probes_follow_the_life_of_the_worker(model):
    worker = Worker(config(model))
    starting = asyncio.create_task(worker.start())
    await until(lambda: worker.metrics_port)
    status, reason = await probe(worker, "/ready")
    assert (status, reason) in ((503, "starting\n"), (200, "ok\n"))
    assert await probe(worker, "/health") == (200, "ok\n")
    await starting
    try:
        assert await probe(worker, "/ready") == (200, "ok\n")
        status, metrics = await probe(worker, "/metrics")
        assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in metrics
        assert 'reprise_step_seconds_count{engine="0",model_name="tiny"} 0.0' in metrics
        assert "process_resident_memory_bytes" in metrics
        assert worker.stats().running == 0
        assert await worker.drain(1) is True
        assert await probe(worker, "/ready") == (503, "draining\n")
        assert await probe(worker, "/health") == (200, "ok\n")
    finally:
        await worker.stop()


async def test_two_workers_live_in_one_process(model):
    workers = [Worker(config(model, name=f"w{n}")) for n in range(2)]
    await asyncio.gather(*(worker.start() for worker in workers))
    try:
        async with routing_to(At(workers[0])) as one, routing_to(At(workers[1])) as two:
            answers = [router.ask([1, 2, 3], temperature=0) for router in (one, two)]
            first, second = [(await answer.finished()).tokens for answer in answers]
            assert first == second
            assert one.channel.hello.epoch != two.channel.hello.epoch
    finally:
        for worker in workers:
            await worker.stop()


async def test_after_stop_both_ports_are_free(model):
    worker = Worker(config(model))
    await worker.start()
    await worker.stop()
    for port in (worker.port, worker.metrics_port):
        bind("127.0.0.1", port, b"").close()


@pytest.mark.parametrize("taken", ["port", "metrics_port"])
async def test_a_taken_port_is_known_before_the_model_is_touched_and_leaves_nothing_behind(taken):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        worker = Worker(config("/no/such/model", **{taken: port}))
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await worker.start()
    bind("127.0.0.1", worker.metrics_port, b"").close()


async def test_a_model_that_cannot_be_served_leaves_nothing_behind():
    worker = Worker(config("/no/such/model"))
    with pytest.raises(ValueError, match="/no/such/model does not exist"):
        await worker.start()
    for port in (worker.port, worker.metrics_port):
        bind("127.0.0.1", port, b"").close()


async def test_more_kv_memory_than_there_is_is_a_clear_error(model):
    worker = Worker(config(model, engine=EngineConfig(kv_bytes=1 << 60)))
    with pytest.raises(ValueError, match="kv_bytes"):
        await worker.start()


async def test_memory_that_runs_out_in_the_warm_up_is_a_clear_error(model, monkeypatch):
    def warm_up(engine):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(Engine, "warm_up", warm_up)
    worker = Worker(config(model))
    with pytest.raises(ValueError, match=r"lower gpu_memory or max_running: CUDA out of memory\.$"):
        await worker.start()
    bind("127.0.0.1", worker.port, b"").close()


async def test_what_one_worker_computed_another_finds_in_the_store(model, redis_url):
    prompt = [n % 256 for n in range(200)]
    store = {"redis_url": redis_url, "store_bytes": 64 << 20, "threads": 1}
    first, second = (Worker(config(model, name=f"w{n}", **store)) for n in range(2))
    try:
        await first.start()
        async with routing_to(At(first)) as router:
            cold = await router.ask(prompt, temperature=0, ignore_eos=True).finished()
            assert cold.start.store_tokens == 0
            await until(lambda: len(router.held.get("store", ())) >= 12)
        await second.start()
        async with routing_to(At(second)) as router:
            warm = await router.ask(prompt, temperature=0, ignore_eos=True).finished()
            assert warm.tokens == cold.tokens
            assert warm.start.store_tokens in (0, 192)  # the gate may find computing cheaper
        _, metrics = await probe(second, "/metrics")
        decided = ("loads", "gate_closed")
        names = [
            f'reprise_store_tier_total{{engine="0",model_name="tiny",what="{what}"}}' for what in decided
        ]
        assert any(name in metrics for name in names)
    finally:
        await first.stop()
        await second.stop()


async def test_a_worker_whose_store_is_down_serves_without(model):
    with bind("127.0.0.1", 0, b"") as nobody:  # a port where nothing answers
        worker = Worker(config(model, redis_url=f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"))
        await worker.start()
        try:
            async with routing_to(At(worker)) as router:
                answer = await router.ask([1, 2, 3], ignore_eos=True).finished()
                assert len(answer.tokens) == 8
                assert answer.start.store_tokens == 0
        finally:
            await worker.stop()


async def test_a_store_that_is_no_address_is_a_clear_error(model):
    worker = Worker(config(model, redis_url="localhost:6379"))
    with pytest.raises(ValueError, match="scheme"):
        await worker.start()
