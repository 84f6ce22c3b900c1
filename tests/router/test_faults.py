"""Workers that fail, clients that leave: everyone is told, and the books balance (`serving` checks them)."""

import asyncio
import contextlib
import json

import openai
import pytest

from services.router.config import RouterConfig
from tests.fakes import FakeEngine
from tests.fakes.until import until
from tests.router.serving import chat, serving

CHAT = "/v1/chat/completions"


async def events(stream):
    """The JSON events of an SSE response, [DONE] as a string."""
    async for line in stream.aiter_lines():
        if line:
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def place(served):
    """Which of the workers has the one job."""
    (job,) = served.router.dispatcher.on_workers.values()
    return int(job.worker_name.removeprefix("w"))


def slow(**fields):
    return FakeEngine(step_s=0.01, **fields)


# ---- workers -----------------------------------------------------------------------------------------


async def test_a_stream_that_nobody_goes_on_with_ends_with_an_error_event():
    async with serving(slow(), config=RouterConfig(queue_timeout_s=0.2)) as served:
        async with served.http.stream("POST", CHAT, json=chat(stream=True)) as stream:
            seen = []
            async for event in events(stream):
                seen.append(event)
                if len(seen) == 5:
                    await served.workers[0].stop()
        assert stream.status_code == 200
        assert seen[-1]["error"]["code"] == "queue_timeout"
        assert seen[-1]["error"]["type"] == "server_error"
        assert all("error" not in event for event in seen[:-1])
        assert served.sample("broken_streams_total", model="fake", code="queue_timeout") == 1
        await served.workers[0].start()
        await until(lambda: served.router.pool.ready == 1)


async def test_the_official_client_raises_on_that_event():
    async with serving(slow(), config=RouterConfig(queue_timeout_s=0.2)) as served:
        stream = await served.openai.chat.completions.create(**chat(stream=True))
        await anext(chunks := aiter(stream))
        await served.workers[0].stop()
        with pytest.raises(openai.APIError, match="no worker of model fake had room within"):
            [chunk async for chunk in chunks]


async def test_a_whole_answer_that_breaks_is_an_error_status():
    async with serving(slow(), config=RouterConfig(queue_timeout_s=0.2)) as served:
        task = asyncio.create_task(served.http.post(CHAT, json=chat()))
        await until(lambda: any(job.began for job in served.router.dispatcher.on_workers.values()))
        await served.workers[0].stop()
        answer = await task
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")


async def test_before_the_first_token_another_worker_takes_over():
    engines = [FakeEngine("fine"), FakeEngine("fine")]
    async with serving(*engines) as served:
        for engine in engines:
            engine.stall()
        task = asyncio.create_task(served.http.post(CHAT, json=chat(seed=5)))
        await until(lambda: served.router.dispatcher.on_workers)
        lost = place(served)
        engines[1 - lost].resume()
        await served.workers[lost].stop()
        answer = await task
        assert answer.json()["choices"][0]["message"]["content"] == "fine"
        assert f"worker=w{1 - lost};" in answer.headers["x-reprise-route"]
        assert served.sample("retries_total", reason="worker_lost") == 1
        seeds = [request.sampling.seed for engine in engines for request in engine.submitted]
        assert seeds == [5, 5]


async def test_the_only_worker_may_come_back_in_time():
    engine = FakeEngine("fine")
    async with serving(engine) as served:
        engine.stall()
        task = asyncio.create_task(served.http.post(CHAT, json=chat()))
        await until(lambda: served.router.dispatcher.on_workers)
        await served.workers[0].stop()
        served.workers[0].engine = FakeEngine("fine")
        await served.workers[0].start()
        assert (await task).json()["choices"][0]["message"]["content"] == "fine"


async def test_a_failed_step_is_tried_elsewhere_once_and_then_given_up():
    engines = [FakeEngine("x"), FakeEngine("x"), FakeEngine("x")]
    async with serving(*engines) as served:
        for engine in engines:
            fail_before_the_first_token(engine)
        answer = await served.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "worker_failed")
        assert "no memory" in answer.json()["error"]["message"]
        assert sum(len(engine.submitted) for engine in engines) == 2
        assert served.sample("retries_total", reason="internal") == 1


def fail_before_the_first_token(engine):
    from services.wire.messages import Finish
    from services.worker.request import Output

    def prefill(request):
        del engine._running[request.key]
        return Output(request.key, finish=Finish("error", message="no memory"))

    engine._prefill = prefill


async def test_what_the_worker_refuses_is_the_clients_error_and_not_retried():
    engines = [FakeEngine(max_model_len=64), FakeEngine(max_model_len=64)]
    async with serving(*engines) as served:
        for worker in served.router.pool.workers.values():
            worker.model.card = worker.model.card.__class__(
                **{name: getattr(worker.model.card, name) for name in worker.model.card.__struct_fields__}
                | {"max_model_len": 8192}
            )
        answer = await served.http.post(CHAT, json=chat("x" * 100))
        assert answer.status_code == 400
        assert "prompt must have 1 to 63 tokens" in answer.json()["error"]["message"]
        assert served.sample("retries_total", reason="invalid_request") == 0


async def test_a_worker_that_falls_silent_about_a_request_loses_it():
    engines = [FakeEngine("fine"), FakeEngine("fine")]
    async with serving(*engines, config=RouterConfig(stall_timeout_s=0.5)) as served:
        for engine in engines:
            engine.stall()
        task = asyncio.create_task(served.http.post(CHAT, json=chat()))
        await until(lambda: served.router.dispatcher.on_workers)
        first = place(served)
        engines[1 - first].resume()
        assert (await task).json()["choices"][0]["message"]["content"] == "fine"
        assert len(engines[first].cancelled) == 1
        engines[first].resume()


# ---- clients -----------------------------------------------------------------------------------------


async def test_a_client_that_leaves_mid_stream_frees_the_worker():
    async with serving(slow()) as served:
        async with served.http.stream("POST", CHAT, json=chat(stream=True)) as stream:
            await anext(events(stream))
        await until(lambda: len(served.engines[0].cancelled) == 1)
        assert served.sample("disconnects_total", model="fake") == 1


async def test_a_client_that_leaves_while_waiting_for_a_whole_answer_frees_the_worker():
    async with serving(slow()) as served:
        task = asyncio.create_task(served.http.post(CHAT, json=chat(n=3)))
        await until(lambda: len(served.engines[0].submitted) == 3)
        task.cancel()
        await until(lambda: len(served.engines[0].cancelled) == 3)


async def test_a_client_that_leaves_the_queue_is_forgotten():
    engine = FakeEngine(max_running=1)
    async with serving(engine) as served:
        engine.stall()
        tasks = [asyncio.create_task(served.http.post(CHAT, json=chat(max_tokens=1))) for _ in range(5)]
        model = served.router.pool.models["fake"]
        await until(lambda: len(model.queue) == 3)
        for task in tasks[2:]:
            task.cancel()
        await until(lambda: len(model.queue) == 0)
        engine.resume()
        assert {(await task).status_code for task in tasks[:2]} == {200}
        assert len(engine.submitted) == 2


async def test_hundreds_of_clients_that_come_and_go_leave_nothing_behind():
    engines = [slow(max_running=16), slow(max_running=16)]
    async with serving(*engines) as served:
        places = asyncio.Semaphore(40)

        async def leaves_mid_stream(i):
            body = chat(f"client {i}", stream=True, n=1 + i % 3)
            async with served.http.stream("POST", CHAT, json=body) as stream:
                lines = stream.aiter_lines()
                for _ in range(1 + i % 7):
                    await anext(lines)

        async def leaves_some_time(i):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01 * (i % 25)):
                    await served.http.post(CHAT, json=chat(f"client {i}", n=1 + i % 3, max_tokens=50))

        async def stays(i):
            answer = await served.http.post(CHAT, json=chat(f"client {i}", max_tokens=1 + i % 5))
            assert answer.status_code == 200

        async def one(i):
            async with places:
                await (leaves_mid_stream, leaves_some_time, stays)[i % 3](i)

        await asyncio.gather(*(one(i) for i in range(180)))
        await served.paid_back()
        assert served.sample("disconnects_total", model="fake") >= 60
