"""Answers whose workers die, stall or drain: one stream, without a token lost or said twice."""

import asyncio
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router import dispatch
from services.router.config import RouterConfig
from services.router.retry import LIVES, MAX_RESUMES
from services.wire.messages import Finish
from services.worker.request import Output
from tests.fakes import FakeEngine
from tests.fakes.sampled import sampled_reply
from tests.fakes.until import until
from tests.router.serving import chat, serving

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def sampling(**fields):
    return FakeEngine(sampled_reply, **{"step_s": 0.001} | fields)


def slow(**fields):
    return FakeEngine(step_s=0.005, **fields)


def the_job(served):
    (job,) = served.router.dispatcher.on_workers.values()
    return job


def place(served):
    """Which of the workers has the one job."""
    return int(the_job(served).worker_name.removeprefix("w"))


async def events(stream):
    async for line in stream.aiter_lines():
        if line:
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


async def ask(served, path, body):
    """What the client knows in the end, however it asked: texts, reasons, log-probabilities, usage."""
    if not body.get("stream"):
        answer = await served.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        document = answer.json()
        texts = [c["message"]["content"] if path == CHAT else c["text"] for c in document["choices"]]
        reasons = [c["finish_reason"] for c in document["choices"]]
        logprobs = [flat(c["logprobs"]) for c in document["choices"]]
        return texts, reasons, logprobs, counted(document["usage"])
    n = body.get("n", 1)
    texts, reasons, logprobs, usage = [""] * n, [None] * n, [[] for _ in range(n)], None
    ids, done = set(), False
    async with served.http.stream("POST", path, json=body) as stream:
        assert stream.status_code == 200
        async for event in events(stream):
            assert not done
            if event == "[DONE]":
                done = True
                continue
            ids.add(event["id"])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                index = choice["index"]
                assert reasons[index] is None, "nothing follows a finish"
                texts[index] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
                logprobs[index] += flat(choice["logprobs"])
                reasons[index] = choice["finish_reason"]
    assert done
    assert len(ids) == 1
    return texts, reasons, logprobs, counted(usage)


def counted(usage):
    """Without the prefix hits: the second time there are more."""
    return usage and (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])


def flat(logprobs):
    """A list with an item a token, of either API."""
    if logprobs is None:
        return []
    if "content" in logprobs:
        return logprobs["content"]
    return list(zip(logprobs["tokens"], logprobs["text_offset"], logprobs["token_logprobs"], strict=True))


requests = st.fixed_dictionaries(
    {
        "path": st.sampled_from([CHAT, COMPLETIONS]),
        "seed": st.integers(0, 2**62),
        "max_tokens": st.integers(1, 80),
        "stream": st.booleans(),
        "n": st.integers(1, 3),
    },
    optional={
        "temperature": st.sampled_from([0, 0.7]),
        "min_tokens": st.integers(0, 60),
        "stop": st.lists(st.text("abcdefgh", min_size=1, max_size=2), min_size=1, max_size=3),
        "presence_penalty": st.sampled_from([-1, 1.5]),
        "frequency_penalty": st.sampled_from([0.5]),
        "logit_bias": st.just({"97": -5}),
        "logprobs": st.booleans(),
        "ignore_eos": st.booleans(),
    },
)


def body_of(request):
    path, body = request["path"], {k: v for k, v in request.items() if k != "path"}
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if path == CHAT:
        return chat("go on", **body)
    if "logprobs" in body:
        body["logprobs"] = 2 if body["logprobs"] else None
    return {"model": "fake", "prompt": "go on", **body}


async def disturb(served, end, body):
    """Have each of the workers that the one job is on fail it, as `end` says, after some tokens."""
    for tokens, how in end:
        job = None

        def there(tokens=tokens):
            nonlocal job
            job = next(iter(served.router.dispatcher.on_workers.values()), None)
            return job is not None and job.output_tokens >= tokens

        await until(there)
        worker = served.workers[int(job.worker_name.removeprefix("w"))]
        if how == "kill":
            await worker.kill()
            await worker.start()
        elif how == "break":
            for connection in list(worker.server.channel.connections):
                connection.abort()
        elif how == "fail":
            worker.engine.fail_running("a bad step")
        elif how == "drain":
            next(w for w in served.router.pool.workers.values() if w.name == worker.name).draining()


@given(
    requests,
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from(["kill", "break", "fail", "drain"])),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=25, deadline=None)
def test_whatever_happens_to_its_workers_the_answer_is_the_undisturbed_one(request, ends):
    async def run():
        path, body = request["path"], body_of(request)
        async with serving(sampling(), sampling(), sampling(), sampling()) as served:
            undisturbed = await ask(served, path, body)
            disturber = asyncio.create_task(disturb(served, sorted(ends), body))
            try:
                assert await ask(served, path, body) == undisturbed
            finally:
                disturber.cancel()

    asyncio.run(run())


# ---- what the client sees ----------------------------------------------------------------------------


async def test_the_stream_goes_on_at_once_under_one_id_and_the_metrics_tell():
    async with serving(slow(), slow()) as served:
        body = chat(stream=True, max_tokens=80)
        async with served.http.stream("POST", CHAT, json=body) as stream:
            text, roles = "", 0
            async for event in events(stream):
                if event == "[DONE]":
                    break
                delta = event["choices"][0]["delta"]
                roles += "role" in delta
                text += delta.get("content", "")
                if len(text) == 20:
                    first = place(served)
                    await served.workers[first].kill()
            assert f"worker=w{first};" in stream.headers["x-reprise-route"]
        assert text == ("The quick brown fox jumps over the lazy dog. " * 2)[:80]
        assert roles == 1
        assert served.sample("resumes_total", reason="worker_lost") == 1
        assert served.sample("retries_total", reason="worker_lost") == 0
        assert served.sample("resume_gap_seconds_count", model="fake") == 1
        assert served.sample("resume_gap_seconds_sum", model="fake") < 1
        assert served.sample("time_to_first_token_seconds_count", model="fake") == 1
        assert served.sample("prompt_tokens_total", model="fake") == len(
            served.engines[first].submitted[0].tokens
        )
        await served.workers[first].start()
        await until(lambda: served.router.pool.ready == 2)


async def test_the_header_and_the_usage_of_a_whole_answer_are_those_of_its_beginning():
    engines = [slow(), slow()]
    async with serving(*engines) as served:
        prompt = "x" * 100
        warm = await served.http.post(CHAT, json=chat(prompt, max_tokens=1))
        first = int(warm.headers["x-reprise-route"].partition("worker=w")[2][0])
        task = asyncio.create_task(served.http.post(CHAT, json=chat(prompt, max_tokens=60)))
        await until(
            lambda: any(job.output_tokens > 5 for job in served.router.dispatcher.on_workers.values())
        )
        assert place(served) == first
        await served.workers[first].kill()
        answer = await task
        assert f"worker=w{first};" in answer.headers["x-reprise-route"]
        assert "hit_gpu=112;" in answer.headers["x-reprise-route"]
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == 60
        assert usage["prompt_tokens"] == len(engines[first].submitted[0].tokens)
        assert usage["prompt_tokens_details"]["cached_tokens"] == 112
        (resumed,) = engines[1 - first].submitted
        assert 5 < resumed.generated < 60
        await served.workers[first].start()


async def test_the_only_worker_may_come_back():
    async with serving(slow()) as served:
        task = asyncio.create_task(ask(served, CHAT, chat(max_tokens=60, stream=True)))
        await until(lambda: served.router.dispatcher.on_workers and the_job(served).output_tokens > 5)
        await served.workers[0].kill()
        await until(lambda: served.router.pool.ready == 0)
        await served.workers[0].start()
        assert (await task)[1] == ["length"]


async def test_a_client_that_leaves_while_nobody_has_its_answer_is_forgotten():
    async with serving(slow()) as served:
        async with served.http.stream("POST", CHAT, json=chat(stream=True)) as stream:
            seen = events(stream)
            await anext(seen)
            await served.workers[0].kill()
            await until(lambda: len(served.router.pool.models["fake"].queue) == 1)
        await until(lambda: len(served.router.pool.models["fake"].queue) == 0)
        await served.workers[0].start()
        await until(lambda: served.router.pool.ready == 1)
        assert len(served.engines[0].submitted) == 1


async def test_an_answer_that_waits_for_a_worker_goes_before_new_requests():
    engines = [slow(max_running=2), slow(max_running=2)]
    async with serving(*engines) as served:
        asks = [asyncio.create_task(ask(served, CHAT, chat(max_tokens=300, stream=True))) for _ in range(6)]
        model = served.router.pool.models["fake"]
        await until(lambda: all(len(engine.submitted) == 3 for engine in engines))
        late = asyncio.create_task(ask(served, CHAT, chat("late", max_tokens=1)))
        await until(lambda: len(model.queue) == 1)
        served.workers[0].engine = slow(max_running=2)
        await served.workers[0].kill()
        await until(lambda: len(model.queue) >= 3)
        assert model.queue.first.began
        await served.workers[0].start()
        answers = await asyncio.gather(*asks, late)
        assert [reasons for _, reasons, *_ in answers] == [["length"]] * 7
        assert served.workers[0].engine.submitted[0].generated > 0


async def test_a_resumed_answer_may_wait_as_long_as_a_new_request_whatever_its_age():
    """The wait counts from the loss, not from the arrival."""
    async with serving(slow(), config=RouterConfig(queue_timeout_s=1.0)) as served:
        task = asyncio.create_task(ask(served, CHAT, chat(max_tokens=300, stream=True)))
        await until(lambda: served.router.dispatcher.on_workers and the_job(served).output_tokens > 5)
        job = the_job(served)
        job.waiting_since_s = job.arrival_s = job.arrival_s - 100
        await served.workers[0].kill()
        served.router.dispatcher.sweep(served.router.pool.models.values())
        await served.workers[0].start()
        assert (await task)[1] == ["length"]


async def test_another_model_of_that_name_does_not_go_on_with_the_answer():
    async with serving(slow(), slow(), config=RouterConfig(queue_timeout_s=0.3)) as served:
        task = asyncio.create_task(served.http.post(CHAT, json=chat()))
        await until(lambda: served.router.dispatcher.on_workers and the_job(served).output_tokens > 5)
        first = place(served)
        for worker in served.router.pool.workers.values():
            if worker.name == f"w{1 - first}":
                card = msgspec.structs.replace(worker.hello.model, fingerprint=bytes(16))
                worker.hello = msgspec.structs.replace(worker.hello, model=card)
        await served.workers[first].kill()
        answer = await task
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replaced")
        await served.workers[first].start()
        await until(lambda: served.router.pool.ready == 2)


# ---- workers that drain ------------------------------------------------------------------------------


async def test_a_draining_worker_gives_its_answers_to_another_and_is_done_at_once():
    async with serving(slow(), slow()) as served:
        asks = [
            asyncio.create_task(
                ask(served, CHAT, chat(str(i), max_tokens=400, n=1 + i % 2, stream=i % 3 > 0))
            )
            for i in range(8)
        ]
        await until(
            lambda: sum(job.output_tokens > 3 for job in served.router.dispatcher.on_workers.values()) == 8
        )
        longest = max(job.output_tokens for job in served.router.dispatcher.on_workers.values())
        moving = [job for job in served.router.dispatcher.on_workers.values() if job.worker_name == "w0"]
        assert await served.workers[0].server.drain(5)
        assert longest < 100, "it was over long before the answers were"
        assert all(job.worker_name == "w1" for job in served.router.dispatcher.on_workers.values())
        for texts, reasons, _, _ in await asyncio.gather(*asks):
            assert set(reasons) == {"length"}
            assert {text[:45] for text in texts} == {"The quick brown fox jumps over the lazy dog. "}
            assert {len(text) for text in texts} == {400}
        assert served.sample("resumes_total", reason="draining") == len(moving) > 0


async def test_without_room_elsewhere_a_draining_worker_finishes_what_it_has_and_gets_nothing_new():
    engines = [slow(max_running=2), slow(max_running=2)]
    async with serving(*engines) as served:
        asks = [asyncio.create_task(ask(served, CHAT, chat(max_tokens=150, stream=True))) for _ in range(6)]
        await until(lambda: all(len(engine.submitted) == 3 for engine in engines))
        drain = asyncio.create_task(served.workers[0].server.drain(10))
        await until(lambda: served.router.pool.ready == 1)
        late = asyncio.create_task(ask(served, CHAT, chat(max_tokens=2)))
        assert [reasons for _, reasons, *_ in await asyncio.gather(*asks, late)] == [["length"]] * 7
        assert await drain
        assert len(engines[0].submitted) == 3


async def test_answers_move_when_room_comes():
    engines = [slow(max_running=1), slow(max_running=1)]
    async with serving(*engines) as served:
        asks = {n: asyncio.create_task(ask(served, CHAT, chat(max_tokens=n))) for n in range(1000, 1004)}
        await until(lambda: all(len(engine.submitted) == 2 for engine in engines))
        drain = asyncio.create_task(served.workers[0].server.drain(10))
        await until(lambda: served.router.pool.ready == 1)
        served.router.dispatcher.sweep([])
        assert served.sample("resumes_total", reason="draining") == 0
        jobs = served.router.dispatcher.on_workers.values()
        (to_move, others) = ([job for job in jobs if job.worker_name == name] for name in ("w0", "w1"))
        for job in others:
            asks[job.sampling.max_tokens].cancel()
        assert await drain
        assert {job.worker_name for job in to_move} == {"w1"}
        for task in asks.values():
            task.cancel()


async def test_answers_do_not_move_to_a_worker_with_much_to_prefill():
    busy = FakeEngine(step_s=0.005, prefill_tokens_per_s=1e9)
    async with serving(slow(), busy) as served:
        chunks = asyncio.create_task(ask(served, CHAT, chat(max_tokens=200, stream=True)))
        await until(lambda: served.router.dispatcher.on_workers and the_job(served).output_tokens > 3)
        job, first = the_job(served), place(served)
        other = next(w for w in served.router.pool.workers.values() if w.name == f"w{1 - first}")
        busy_for_s = dispatch.MOVE_QUEUE_S + 0.5
        queued = int(busy_for_s * other.load.rates.prefill)
        report = msgspec.structs.replace(other.load._report, queued_prefill_tokens=queued)
        other.load.reported(report, 0.0)
        job.worker.draining()
        assert place(served) == first
        other.load.reported(msgspec.structs.replace(report, queued_prefill_tokens=0), 0.0)
        served.router.dispatcher.sweep([])
        assert place(served) == 1 - first
        assert (await chunks)[1] == ["length"]


async def test_what_a_drain_cuts_off_goes_on_elsewhere_and_counts_for_nothing():
    """A worker whose time is up ends its requests by itself."""
    engines = [slow(), slow()]
    async with serving(*engines) as served:
        task = asyncio.create_task(ask(served, CHAT, chat(max_tokens=100, stream=True)))
        await until(lambda: served.router.dispatcher.on_workers and the_job(served).output_tokens > 3)
        job, first = the_job(served), place(served)
        finish_running(
            engines[first], Finish("error", message="the engine was stopped", error_kind="draining")
        )
        await until(lambda: job.worker_name == f"w{1 - first}")
        assert job.losses.total == 0
        assert served.router.pool.ready == 1
        assert (await task)[1] == ["length"]


def finish_running(engine, finish):
    """The next step ends its requests so."""

    def decode():
        ended = [Output(key, finish=finish) for key in engine._running]
        engine._running.clear()
        return ended

    engine._decode = decode


# ---- workers that stall ------------------------------------------------------------------------------


async def test_the_answers_of_a_stalled_worker_go_on_elsewhere_until_it_gets_on_again(monkeypatch):
    monkeypatch.setattr("services.router.pulse.LEAST_S", 0.5)
    engines = [slow(), slow()]
    async with serving(*engines) as served:
        asks = [asyncio.create_task(ask(served, CHAT, chat(str(i), max_tokens=400))) for i in range(4)]
        await until(
            lambda: sum(job.output_tokens > 3 for job in served.router.dispatcher.on_workers.values()) == 4
        )
        stalled = [job for job in served.router.dispatcher.on_workers.values() if job.worker_name == "w0"]
        assert 0 < len(stalled) < 4
        engines[0].stall()
        assert {tuple(reasons) for _, reasons, *_ in await asyncio.gather(*asks)} == {("length",)}
        assert served.sample("resumes_total", reason="stalled") == len(stalled)
        assert served.sample("workers", state="stalled") == 1
        before = len(engines[0].submitted)
        await ask(served, CHAT, chat(max_tokens=2))
        assert len(engines[0].submitted) == before
        engines[0].resume()
        await until(lambda: served.router.pool.ready == 2)
        assert len(engines[0].cancelled) == len(stalled)


async def test_a_worker_that_works_for_others_has_not_stalled(monkeypatch):
    """What waits inside a worker hears nothing, however long; its load says that it gets on."""
    monkeypatch.setattr("services.router.pulse.LEAST_S", 0.3)
    engine = FakeEngine(step_s=0.01, max_running=1)
    async with serving(engine) as served:
        first = asyncio.create_task(ask(served, CHAT, chat(max_tokens=200)))
        await until(lambda: len(engine.submitted) == 1)
        waiting = asyncio.create_task(ask(served, CHAT, chat(max_tokens=2)))
        await until(lambda: len(engine.submitted) == 2)
        await asyncio.gather(first, waiting)
        assert served.sample("resumes_total", reason="stalled") == 0
        assert served.sample("retries_total", reason="stalled") == 0


# ---- requests that workers die of --------------------------------------------------------------------


def dies_at(position, served):
    """A reply that kills its worker when it is about to make token `position`."""
    loop = asyncio.get_running_loop()

    def reply(request):
        at = request.generated
        poisonous = b"poison" in bytes(token % 256 for token in request.tokens)
        while True:
            if poisonous and at == position:
                worker = next(w for w in served.workers if request in w.engine.submitted)
                loop.call_soon_threadsafe(kill, worker)
                raise SystemExit  # ends the engine's thread before the token is out
            yield 97 + at % 26
            at += 1

    kills = []

    def kill(worker):
        kills.append(loop.create_task(revive(worker)))

    async def revive(worker):
        await worker.kill()
        await worker.start()

    return reply, kills


async def poisoned(position):
    """Send a request that kills at `position` among others; (answer, second answer, deaths)."""
    engines = [FakeEngine(step_s=0.002) for _ in range(5)]
    async with serving(*engines) as served:
        reply, kills = dies_at(position, served)
        for engine in engines:
            engine.reply = reply
        others = [asyncio.create_task(ask(served, CHAT, chat(str(i), max_tokens=300))) for i in range(10)]
        await until(
            lambda: sum(bool(job.began) for job in served.router.dispatcher.on_workers.values()) == 10
        )
        answer = await served.http.post(CHAT, json=chat("poison", max_tokens=300))
        deaths = len(kills)
        again = await served.http.post(CHAT, json=chat("poison", max_tokens=300))
        assert {texts[0] for texts, *_ in await asyncio.gather(*others)} == {
            "".join(chr(97 + at % 26) for at in range(300))
        }
        await asyncio.gather(*kills)
        await until(lambda: served.router.pool.ready == 5)
        assert served.sample("quarantined_total", model="fake") == 1
        assert len(kills) == deaths
        return answer, again, deaths


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_prompt_that_kills_two_workers_is_kept_out_and_nobody_else_is_hurt():
    answer, again, deaths = await poisoned(0)
    assert deaths == LIVES == 2
    assert answer.status_code == again.status_code == 500
    assert answer.json()["error"]["code"] == again.json()["error"]["code"] == "quarantined"
    assert "workers died while they computed this prompt, the last one, w" in answer.text
    assert answer.headers["x-should-retry"] == again.headers["x-should-retry"] == "false"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_answer_that_kills_its_workers_at_the_same_token_is_kept_out_after_two_more():
    answer, again, deaths = await poisoned(20)
    assert deaths == 1 + LIVES
    assert answer.json()["error"]["code"] == again.json()["error"]["code"] == "quarantined"


async def test_no_request_outlives_more_workers_than_the_limit():
    async with serving(slow(), slow()) as served:
        task = asyncio.create_task(served.http.post(CHAT, json=chat()))
        await until(lambda: served.router.dispatcher.on_workers)
        job = the_job(served)
        for _ in range(MAX_RESUMES + 1):
            tokens = job.output_tokens
            await until(lambda tokens=tokens: job.served and job.output_tokens > tokens)
            for connection in list(served.workers[int(job.worker_name[1])].server.channel.connections):
                connection.abort()
            await until(lambda: served.router.pool.ready == 2)
        answer = await task
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_lost")
        assert f"lost {MAX_RESUMES + 1} workers" in answer.text
        assert served.sample("resumes_total", reason="worker_lost") == MAX_RESUMES


async def test_a_step_that_always_fails_ends_the_answer_after_as_many_tries():
    engines = [slow() for _ in range(3)]
    async with serving(*engines) as served:
        task = asyncio.create_task(served.http.post(CHAT, json=chat()))
        await until(lambda: served.router.dispatcher.on_workers and the_job(served).output_tokens > 3)
        for engine in engines:
            engine._prefill = lambda request, engine=engine: fail(engine, request)
            engine.fail_running("out of pages")
        answer = await task
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "worker_failed")
        assert "no memory" in answer.text
        assert sum(len(engine.submitted) for engine in engines) == 1 + LIVES
        assert served.sample("quarantined_total", model="fake") == 0


def fail(engine, request):
    del engine._running[request.key]
    return Output(request.key, finish=Finish("error", message="no memory"))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_step_moves_its_answer_to_another_worker(stream):
    engines = [slow(), slow()]
    async with serving(*engines) as served:
        task = asyncio.create_task(ask(served, CHAT, chat(max_tokens=50, stream=stream)))
        await until(lambda: served.router.dispatcher.on_workers and the_job(served).output_tokens > 3)
        first = place(served)
        engines[first].fail_running("out of pages")
        texts, reasons, *_ = await task
        assert (len(texts[0]), reasons) == (50, ["length"])
        assert [len(engines[i].submitted) for i in (first, 1 - first)] == [1, 1]
        assert served.sample("resumes_total", reason="internal") == 1
