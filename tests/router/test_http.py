"""What a client sees below the API: statuses, headers, limits."""

import asyncio
import re

import pytest

from services.router.config import RouterConfig
from tests.fakes import FakeEngine
from tests.fakes.until import until
from tests.router.serving import chat, serving

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


async def test_routes_are_explained_in_a_header():
    async with serving(FakeEngine("abc"), FakeEngine("abc")) as served:
        question = chat("x" * 100)
        first = await served.http.post(CHAT, json=question)
        await until(lambda: served.router.index.local_blocks)
        second = await served.http.post(CHAT, json=question)
        pattern = (
            r"worker=(w\d); predicted_ttft_ms=\d+\.\d; predicted_hit=(\d+); hit_gpu=(\d+); hit_host=0; "
            r"hit_store=0; uncached=(\d+); reason=(\w+)"
        )
        worker, *_ = re.fullmatch(pattern, first.headers["x-reprise-route"]).groups()
        again, expected, hit, uncached, reason = re.fullmatch(
            pattern, second.headers["x-reprise-route"]
        ).groups()
        assert (again, reason) == (worker, "prefix")
        assert int(hit) == int(expected) > 90
        assert int(hit) + int(uncached) == second.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_only_post_generates(path, method):
    async with serving() as served:
        answer = await served.http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_paths_are_404_with_an_error_object():
    async with serving() as served:
        for path in ("/", "/v1/nothing", CHAT + "/"):
            answer = await served.http.get(path)
            assert answer.status_code == 404
            assert answer.json()["error"]["message"]
        assert (await served.http.post("/health")).status_code == 405


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 400),
        ({}, 400),
    ],
)
async def test_bodies_must_be_json(headers, status):
    async with serving() as served:
        answer = await served.http.post(CHAT, content=b"{", headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_bodies_above_the_limit_are_refused_however_they_are_sent():
    async with serving(config=RouterConfig(max_body_bytes=10_000)) as served:
        declared = await served.http.post(CHAT, content=b"x" * 10_001, headers=JSON)
        assert declared.status_code == 413

        async def parts():
            for _ in range(30):
                yield b"x" * 1000

        chunked = await served.http.post(CHAT, content=parts(), headers=JSON)
        assert chunked.status_code == 413
        assert "10000 bytes" in chunked.json()["error"]["message"]
        assert (await served.http.post(CHAT, json=chat(max_tokens=1))).status_code == 200


async def test_a_ten_megabyte_body_is_refused_by_default():
    async with serving() as served:
        answer = await served.http.post(CHAT, content=b"x" * 10_000_000, headers=JSON)
        assert answer.status_code == 413


async def test_a_stream_may_begin_with_a_part_of_a_character():
    async with serving(FakeEngine("🙂", step_s=0.02)) as served:  # one byte a token, one token a step
        stream = await served.openai.completions.create(model="fake", prompt="x", max_tokens=16, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "🙂"


async def test_ready_and_models_follow_the_workers():
    async with serving() as served:
        assert (await served.http.get("/ready")).status_code == 200
        await served.workers[0].stop()
        await until(lambda: not served.router.pool.ready)
        answer = await served.http.get("/ready")
        assert (answer.status_code, answer.json()["ready_workers"]) == (503, 0)
        assert (await served.http.get("/v1/models")).json()["data"] == []
        assert (await served.http.get("/health")).status_code == 200
        answer = await served.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
        assert answer.headers["retry-after"] == "1"
        assert (await served.http.post(CHAT, json=chat() | {"model": "x"})).status_code == 404


async def test_a_full_queue_is_429_with_the_time_to_come_back():
    engine = FakeEngine(step_s=0.02, max_running=1)
    async with serving(engine, config=RouterConfig(max_queue=2)) as served:
        tasks = [asyncio.create_task(served.http.post(CHAT, json=chat(max_tokens=20))) for _ in range(4)]
        model = served.router.pool.models["fake"]
        await until(lambda: len(model.queue) == 2)
        answer = await served.http.post(CHAT, json=chat())
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == "queue_full"
        assert served.sample("shed_total", model="fake") == 1
        assert {(await task).status_code for task in tasks} == {200}


async def test_higher_classes_leave_the_queue_first():
    done = []
    engine = FakeEngine("x", step_s=0.01, max_running=1)
    async with serving(engine) as served:
        engine.stall()

        async def ask(name, priority):
            await served.http.post(CHAT, json=chat(name, priority=priority))
            done.append(name)

        blockers = [asyncio.create_task(ask(f"blocker {i}", 0)) for i in range(2)]
        model = served.router.pool.models["fake"]
        await until(lambda: len(served.router.dispatcher.on_workers) == 2)
        waiting = []
        for name, priority in (("low", 0), ("high", 5), ("middle", 3)):
            waiting.append(asyncio.create_task(ask(name, priority)))
            await until(lambda: len(model.queue) == len(waiting))
        engine.resume()
        await asyncio.gather(*blockers, *waiting)
        assert [name for name in done if "blocker" not in name] == ["high", "middle", "low"]


async def test_who_waits_too_long_is_told_so():
    engine = FakeEngine(max_running=1)
    async with serving(engine, config=RouterConfig(queue_timeout_s=0.2)) as served:
        engine.stall()
        blockers = [asyncio.create_task(served.http.post(CHAT, json=chat(max_tokens=1))) for _ in range(2)]
        await until(lambda: len(served.router.dispatcher.on_workers) == 2)
        answer = await served.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert "retry-after" in answer.headers
        engine.resume()
        assert {(await task).status_code for task in blockers} == {200}


async def test_metrics_tell_what_happened():
    async with serving(FakeEngine("Hello")) as served:
        await served.http.post(CHAT, json=chat("x" * 100))
        await served.http.post(CHAT, json=chat("x" * 100))
        await served.http.post(CHAT, json={})
        text = (await served.http.get("/metrics")).text
        assert served.sample("requests_total", endpoint=CHAT, code="200") == 2
        assert served.sample("requests_total", endpoint=CHAT, code="400") == 1
        assert served.sample("completion_tokens_total", model="fake") == 10
        assert served.sample("hit_tokens_total", model="fake", tier="gpu") > 90
        assert served.sample("time_to_first_token_seconds_count", model="fake") == 2
        assert served.sample("ttft_error_seconds_count", model="fake") == 2
        assert served.sample("workers", state="ready") == 1
        names = re.findall(r"^# HELP (\w+) (.*)$", text, re.MULTILINE)
        assert len(names) > 20
        assert all(name.startswith("reprise_router_") and len(doc) > 15 for name, doc in names)


async def test_the_openapi_document_comes_from_the_structs():
    async with serving() as served:
        document = (await served.http.get("/openapi.json")).json()
        assert {CHAT, "/v1/completions", "/v1/models", "/v1/models/{name}", "/ready"} <= document[
            "paths"
        ].keys()
        request = document["components"]["schemas"]["ChatRequest"]
        assert request["additionalProperties"] is False
        assert request["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
        assert (await served.http.get("/docs")).status_code == 200


async def test_the_trace_id_reaches_the_worker():
    async with serving() as served:
        seen = []
        send = served.router.dispatcher._submit
        served.router.dispatcher._submit = lambda job, worker: (seen.append(job.trace_id), send(job, worker))
        trace = "0af7651916cd43dd8448eb211c80319c"
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        await served.http.post(CHAT, json=chat(max_tokens=1), headers=headers)
        await served.http.post(CHAT, json=chat(max_tokens=1), headers={"traceparent": "nonsense"})
        assert seen == [trace, ""]
