"""The server around a fake engine, heard by a true router end."""

import asyncio
import itertools
import random
import threading

import numpy as np
import pytest
from prometheus_client import generate_latest

from services.wire.hashes import chain_hashes, pack_tokens, root_hash
from services.wire.messages import SamplingParams, Submit
from services.worker import server as server_module
from services.worker.grammar import masks
from tests.fakes import FakeEngine, FakeWorker
from tests.fakes.until import until
from tests.wire.peers import RawPeer
from tests.worker.server.clients import routing_to


def metric(worker, name, **labels):
    """The value of one sample of the worker's metrics."""
    return worker.registry.get_sample_value(name, {"model_name": "fake", "engine": "0"} | labels)


async def test_a_prompt_goes_in_and_its_tokens_come_out_with_where_its_prefix_came_from():
    async with FakeWorker(FakeEngine("hello")) as worker, routing_to(worker) as router:
        first = await router.ask(range(50)).finished()
        assert bytes(first.tokens) == b"hello"
        assert (first.finish.reason, first.finish.stop_token) == ("stop", 257)
        assert (first.start.prompt_tokens, first.start.gpu_tokens) == (50, 0)
        again = await router.ask(range(50)).finished()
        assert again.start.gpu_tokens == 48
        assert all(item.start is None for item in again.items[1:])


async def test_a_request_that_the_engine_refuses_is_the_clients_fault_and_says_why():
    async with FakeWorker() as worker, routing_to(worker) as router:
        answer = await router.ask([300]).finished()
        assert answer.finish.error_kind == "invalid_request"
        assert answer.finish.message == "token id must be below 260, got 300"
        assert metric(worker, "reprise_requests_refused_total", kind="invalid_request") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": b"\1\0\0"}, "packed tokens must be a multiple of 4 bytes, got 3"),
        ({"hashes": b"x" * 20}, "packed hashes must be a multiple of 16 bytes, got 20"),
        ({"tokens": b""}, "prompt must have 1 to 8191 tokens, got 0"),
    ],
)
async def test_packed_values_that_are_not_whole_are_refused_by_name(fields, message):
    async with FakeWorker() as worker:
        peer = await RawPeer.router(worker.port)
        await peer.authenticate(secret=b"")
        request = {"tokens": b"\1\0\0\0", "root": b"r" * 16, "hashes": b"", "sampling": SamplingParams(1)}
        peer.send(Submit(1, **request | fields))
        while not hasattr(answer := await peer.receive(), "items"):
            pass
        finish = answer.items[0].finish
        assert (finish.error_kind, finish.message) == ("invalid_request", message)


async def test_a_router_that_came_late_knows_what_one_that_was_there_from_the_start_knows():
    engine = FakeEngine(gpu_blocks=40)  # evicts all the time
    async with FakeWorker(engine) as worker, routing_to(worker) as early:
        rng = random.Random(1)

        async def load(requests):
            answers = [
                early.ask([rng.randrange(256)] * 30 + [rng.randrange(256) for _ in range(70)], max_tokens=40)
                for _ in range(requests)
            ]
            for answer in answers:
                await answer.finished()

        await load(20)
        under_load = asyncio.create_task(load(20))
        async with routing_to(worker) as late:
            await under_load
            await until(lambda: late.held == early.held)
            assert late.held["gpu"] == worker.server.channel.held._held["gpu"] == set(engine._cache)
            assert len(late.held["gpu"]) == 40


async def test_a_conversations_next_turn_finds_prompt_and_answer():
    async with FakeWorker() as worker, routing_to(worker) as router:
        prompt = list(range(100))
        first = await router.ask(prompt, max_tokens=60).finished()
        second = await router.ask(prompt + first.tokens + [1] * 10).finished()
        assert second.start.gpu_tokens == 160
        root = root_hash(router.channel.hello.model.fingerprint)
        named = chain_hashes(root, pack_tokens(prompt + first.tokens), 16)
        assert set(named) <= router.held["gpu"]


async def test_a_cancel_and_a_lost_router_both_reach_the_engine():
    async with FakeWorker(FakeEngine(step_s=0.005)) as worker:
        async with routing_to(worker) as router:
            one = router.ask([1], max_tokens=10_000)
            two = router.ask([2], max_tokens=10_000)
            await until(lambda: one.items and two.items)
            router.channel.cancel(one.request)
            await until(lambda: worker.engine.stats().running == 1)
            heard = len(one.items)
            await until(lambda: len(two.items) > len(one.items) + 5)
            assert len(one.items) == heard
        await until(lambda: worker.engine.idle)
        assert len(worker.engine.cancelled) == 2
        await until(lambda: metric(worker, "vllm:request_success_total", finished_reason="abort") == 2)


async def test_draining_refuses_new_requests_and_finishes_the_running_ones():
    async with FakeWorker(FakeEngine(step_s=0.005)) as worker, routing_to(worker) as router:
        running = router.ask([1], max_tokens=30)
        await until(lambda: running.items)
        drain = asyncio.create_task(worker.server.drain(10, "upgrade"))
        await until(lambda: router.drained == "upgrade")
        refused = await router.ask([2]).finished()
        assert refused.finish.error_kind == "draining"
        assert metric(worker, "reprise_requests_refused_total", kind="draining") == 1
        assert await drain is True
        await running.finished()
        assert running.finish.reason == "length"
        assert len(running.tokens) == 30


async def test_a_drain_gives_up_after_its_time():
    async with FakeWorker(FakeEngine(step_s=0.005)) as worker, routing_to(worker) as router:
        router.ask([1], max_tokens=8000)
        await until(lambda: worker.engine.stats().running)
        assert await worker.server.drain(0.05) is False


async def test_stopping_hands_out_what_was_computed_then_tells_routers_by_closing():
    worker = FakeWorker(FakeEngine("x" * 500))
    await worker.start()
    async with routing_to(worker) as router:
        answers = [router.ask([n], max_tokens=1000) for n in range(20)]
        await until(lambda: len(worker.engine.submitted) == 20)
        await until(lambda: worker.engine.idle)
        await worker.stop()
        await until(lambda: router.lost_reason)
        assert [bytes(answer.tokens) for answer in answers] == [b"x" * 500] * 20
        assert {answer.finish.reason for answer in answers} == {"stop"}


async def test_the_load_is_told_once_a_second_even_when_nothing_happens(monkeypatch):
    monkeypatch.setattr(server_module, "BEAT_S", 0.01)
    async with FakeWorker() as worker, routing_to(worker) as router:
        await until(lambda: len(router.seen_stats) >= 5)
        assert {stats.running for stats in router.seen_stats} == {0}


async def test_an_engine_that_dies_is_reported_and_fails_the_worker(monkeypatch):
    monkeypatch.setattr(server_module, "BEAT_S", 0.01)
    async with FakeWorker() as worker:
        assert worker.server.trouble() == ""
        assert not worker.server.failed.is_set()
        worker.engine.crash()
        await asyncio.wait_for(worker.server.failed.wait(), 10)
        assert worker.server.trouble() == "the engine does not step"


async def test_an_engine_that_recovers_in_time_does_not_fail_the_worker(monkeypatch):
    monkeypatch.setattr(server_module, "BEAT_S", 0.05)
    async with FakeWorker() as worker, routing_to(worker) as router:
        worker.engine.stall()
        assert worker.server.trouble() == "the engine does not step"
        heard = len(router.seen_stats)
        await until(lambda: len(router.seen_stats) == heard + 2)
        worker.engine.resume()
        await until(lambda: len(router.seen_stats) == heard + 10)
        assert not worker.server.failed.is_set()


async def test_a_stuck_event_loop_is_visible_to_other_threads():
    now = [0.0]
    async with FakeWorker() as worker:
        worker.server._clock = lambda: now[0]
        worker.server._last_beat_s = 0.0
        now[0] = 4.0
        assert worker.server.trouble() == ""
        now[0] = 7.0
        assert worker.server.trouble() == "the event loop has not run for 7 s"


async def test_five_hundred_requests_from_two_routers_with_random_cancels_leave_nothing_behind():
    rng = random.Random(7)
    engine = FakeEngine(lambda request: itertools.repeat(65, rng.randrange(1, 30)), max_running=8)
    async with FakeWorker(engine) as worker, routing_to(worker) as one, routing_to(worker) as two:
        asked, cancelled = [], set()
        for n in range(500):
            router = rng.choice((one, two))
            asked.append((router, router.ask([n % 256] * rng.randrange(1, 80), max_tokens=20)))
            if rng.random() < 0.4:
                victim, answer = rng.choice(asked)
                if not answer.finish:
                    cancelled.add(id(answer))
                    victim.channel.cancel(answer.request)
            if rng.random() < 0.2:
                await asyncio.sleep(0.001)
        for _, answer in asked:
            if id(answer) not in cancelled:
                assert (await answer.finished()).finish.reason in ("stop", "length")
        await until(lambda: engine.idle)
        await until(lambda: not worker.server.metrics._live)
        for connection in worker.server.channel.connections:
            assert not connection._streams
        assert one.channel.live_requests == two.channel.live_requests == 0
        assert sum(len(answer.tokens) for _, answer in asked) <= metric(
            worker, "vllm:generation_tokens_total"
        )


async def test_the_metrics_of_a_served_worker_parse_and_carry_the_model():
    async with FakeWorker(FakeEngine("hello")) as worker, routing_to(worker) as router:
        await router.ask(range(50)).finished()
        await until(lambda: metric(worker, "vllm:request_success_total", finished_reason="stop") == 1)
        assert metric(worker, "vllm:prompt_tokens_total") == 50
        assert metric(worker, "vllm:generation_tokens_total") == 5
        assert metric(worker, "reprise_connected_routers") == 1
        assert metric(worker, "reprise_held_blocks", tier="gpu") == 3
        assert b'model_name="fake"' in generate_latest(worker.registry)


# ---- grammars


async def test_a_grammar_is_compiled_before_the_engine_sees_the_request():
    async with FakeWorker(FakeEngine("abc")) as worker, routing_to(worker) as router:
        answer = await router.ask([1], grammar='start: "abc" | "abd"').finished()
        assert bytes(answer.tokens) == b"abc"
        matcher = worker.engine.submitted[0].matcher
        for token in b"ab":
            matcher.accept(token)
        assert bytes(np.flatnonzero(_bits(matcher)).tolist()) == b"cd"


def _bits(matcher):
    return np.unpackbits(masks([matcher], 260).view(np.uint8), bitorder="little")


async def test_a_grammar_that_cannot_be_followed_is_the_clients_fault_and_says_why():
    async with FakeWorker() as worker, routing_to(worker) as router:
        answer = await router.ask([1], grammar="start: nothing").finished()
        assert answer.finish.error_kind == "invalid_request"
        assert "unknown name" in answer.finish.message
        assert not worker.engine.submitted
        assert metric(worker, "reprise_requests_refused_total", kind="invalid_request") == 1


async def test_what_the_engine_refuses_is_told_after_the_grammar_is_compiled_too():
    async with FakeWorker() as worker, routing_to(worker) as router:
        answer = await router.ask([300], grammar='start: "a"').finished()
        assert answer.finish.message == "token id must be below 260, got 300"


class Gate:
    """Grammars that are compiled when the test says so."""

    def __init__(self, grammars):
        self.grammars = grammars
        self.open = threading.Event()
        self.asked = threading.Event()

    def matcher(self, grammar, generated):
        self.asked.set()
        assert self.open.wait(10)
        return self.grammars.matcher(grammar, generated)


async def test_a_request_whose_grammar_is_being_compiled_can_be_cancelled_and_holds_up_nobody():
    async with FakeWorker(FakeEngine("ab")) as worker, routing_to(worker) as router:
        gate = worker.server._grammars = Gate(worker.server._grammars)
        one = router.ask([1], grammar='start: "ab"')
        two = router.ask([1], grammar='start: "ab"')
        await until(gate.asked.is_set)
        assert (await router.ask([2]).finished()).finish.reason == "stop"
        router.channel.cancel(one.request)
        await until(lambda: len(worker.server._compiling) == 1)
        drained = asyncio.create_task(worker.server.drain(10))
        await until(lambda: router.drained is not None)
        assert not drained.done()
        gate.open.set()
        await two.finished()
        assert two.finish.error_kind == "draining", "another worker will take it"
        assert await drained
        assert not one.items
        assert len(worker.engine.submitted) == 1
