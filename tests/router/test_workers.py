"""The worker pool: a fleet that changes, workers that come back changed, tokenizers asked for once."""

import asyncio

import msgspec
import pytest

from services.fleet import Address
from services.router.config import RouterConfig
from services.router.router import Router
from services.wire.messages import ModelCard, TextAssets
from tests.fakes import FakeEngine, FakeWorker
from tests.fakes.until import until
from tests.router.serving import chat, serving

CHAT = "/v1/chat/completions"


class ScriptedFleet:
    """Reports what the test sets."""

    def __init__(self):
        self.report = None

    async def run(self, on_change):
        self.report = on_change
        await asyncio.Event().wait()

    def set(self, *workers, terminating=()):
        addresses = [Address(one.host, one.port) for one in workers]
        addresses += [Address(one.host, one.port, terminating=True) for one in terminating]
        self.report(frozenset(addresses))


@pytest.fixture
async def fleet():
    """A fleet, a router that follows it, and two workers not in it yet."""
    scripted = ScriptedFleet()
    async with (
        Router(RouterConfig(), scripted) as router,
        FakeWorker(name="a") as a,
        FakeWorker(name="b") as b,
    ):
        await until(lambda: scripted.report)
        yield scripted, router.pool, a, b


def states(pool):
    return {worker.name: worker.state for worker in pool.workers.values()}


async def test_workers_that_appear_are_used_and_those_that_vanish_are_not(fleet):
    scripted, pool, a, b = fleet
    scripted.set(a)
    await until(lambda: states(pool) == {"a": "ready"})
    scripted.set(a, b)
    await until(lambda: states(pool) == {"a": "ready", "b": "ready"})
    scripted.set(b)
    assert list(pool.find("fake").workers.values()) == [next(iter(pool.workers.values()))]
    await until(lambda: states(pool) == {"b": "ready"} and not pool._retiring)
    scripted.set(a, b)
    await until(lambda: pool.ready == 2)
    assert {worker.slot for worker in pool.workers.values()} == {0, 1}


async def test_terminating_workers_get_nothing_new(fleet):
    scripted, pool, a, b = fleet
    scripted.set(a, b)
    await until(lambda: pool.ready == 2)
    scripted.set(b, terminating=[a])
    assert states(pool) == {"a": "draining", "b": "ready"}
    assert [worker.name for worker in pool.find("fake").workers.values()] == ["b"]


async def test_a_worker_that_terminates_before_it_is_ready_never_is(fleet):
    scripted, pool, a, _ = fleet
    scripted.set(terminating=[a])
    await until(lambda: states(pool) == {"a": "draining"})
    assert pool.ready == 0


async def test_a_fleet_that_fails_is_asked_again(monkeypatch):
    monkeypatch.setattr("services.router.workers.FLEET_PAUSE_S", 0.01)
    scripted = ScriptedFleet()
    failures = iter([RuntimeError("api server away"), OSError("no route")])
    run = scripted.run

    async def sometimes(on_change):
        for error in failures:
            raise error
        await run(on_change)

    scripted.run = sometimes
    async with Router(RouterConfig(), scripted) as router, FakeWorker(name="a") as a:
        await until(lambda: scripted.report)
        scripted.set(a)
        await until(lambda: router.pool.ready == 1)


async def test_a_stream_on_a_worker_that_left_the_fleet_runs_to_its_end():
    async with serving(FakeEngine(step_s=0.005)) as served:
        pool = served.router.pool
        async with served.http.stream("POST", CHAT, json=chat(stream=True, max_tokens=40)) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            pool._follow(frozenset())
            assert pool.ready == 0
            assert len(pool._retiring) == 1
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        await until(lambda: not pool._retiring)


async def test_one_tokenizer_serves_all_workers_that_have_it(monkeypatch):
    made = []
    from services.router import workers as module

    true = module.ModelText
    monkeypatch.setattr(module, "ModelText", lambda *assets: made.append(1) or true(*assets))
    async with serving(*(FakeEngine() for _ in range(4))) as served:
        assert len(made) == 1
        assert served.router.pool.ready == 4


async def test_a_worker_whose_tokenizer_is_broken_says_why_and_others_serve(monkeypatch):
    async with serving(FakeEngine()) as served:
        broken = TextAssets(tokenizer=b"{}", chat_template=None)
        monkeypatch.setattr("tests.fakes.fake_worker.byte_text_assets", lambda words: broken)
        async with FakeWorker(name="broken", model="other") as other:
            fleet = frozenset(Address(worker.host, worker.port) for worker in (*served.workers, other))
            served.router.pool._follow(fleet)
            address = f"{other.host}:{other.port}"
            problems = served.router.pool.workers[other.host, other.port]
            await until(lambda: "tokenizer" in problems.problem)
            answer = (await served.http.get("/ready")).json()
            assert answer["ready_workers"] == 1
            assert "tokenizer cannot be read" in answer["problems"][address]
            assert (await served.http.post(CHAT, json=chat(max_tokens=1))).status_code == 200


async def test_ready_says_why_workers_are_not_connected():
    scripted = ScriptedFleet()
    async with (
        Router(RouterConfig(channel_secret=b"wrong"), scripted) as router,
        FakeWorker(name="a", secret=b"right") as a,
    ):
        await until(lambda: scripted.report)
        scripted.set(a)
        (worker,) = router.pool.workers.values()
        await until(lambda: "refused" in worker.problem)
        assert router.pool.ready == 0


async def test_aliases_name_the_same_model(monkeypatch):
    from tests.fakes import fake_worker as module

    true = module.fake_card
    monkeypatch.setattr(
        module, "fake_card", lambda *args: msgspec.structs.replace(true(*args), aliases=("latest",))
    )
    async with serving() as served:
        answer = await served.http.post(CHAT, json=chat(max_tokens=1) | {"model": "latest"})
        assert (answer.status_code, answer.json()["model"]) == (200, "latest")
        listed = (await served.http.get("/v1/models")).json()["data"]
        assert [(model["id"], model["aliases"]) for model in listed] == [("fake", ["latest"])]


async def test_two_models_are_served_side_by_side():
    async with serving(FakeEngine("first")) as served:
        async with FakeWorker(FakeEngine("second"), name="other", model="second-model") as other:
            fleet = frozenset(Address(worker.host, worker.port) for worker in (*served.workers, other))
            served.router.pool._follow(fleet)
            await until(lambda: served.router.pool.ready == 2)
            for model, text in (("fake", "first"), ("second-model", "second")):
                answer = await served.http.post(CHAT, json=chat() | {"model": model})
                assert answer.json()["choices"][0]["message"]["content"] == text
        await until(lambda: served.router.pool.ready == 1)
        assert (await served.http.get("/v1/models/second-model")).status_code == 200
        answer = await served.http.post(CHAT, json=chat() | {"model": "second-model"})
        assert answer.status_code == 503


async def test_what_was_tokenised_for_another_tokenizer_is_not_served():
    async with serving(FakeEngine(max_running=1)) as served:
        served.engines[0].stall()
        tasks = [asyncio.create_task(served.http.post(CHAT, json=chat(max_tokens=1))) for _ in range(3)]
        await until(lambda: len(served.router.pool.models["fake"].queue) == 1)
        await served.workers[0].stop()
        served.workers[0].words = ("hello",)
        await served.workers[0].start()
        answers = [await task for task in tasks]
        assert {answer.status_code for answer in answers} == {503}
        assert {answer.json()["error"]["code"] for answer in answers} == {"replaced"}
        assert (await served.http.post(CHAT, json=chat(max_tokens=1))).status_code == 200


async def test_an_updated_model_is_known_by_its_newest_card():
    async with serving(FakeEngine("old", max_model_len=1000)) as served:
        model = served.router.pool.find("fake")
        assert isinstance(model.card, ModelCard)
        assert model.card.max_model_len == 1000
        await served.workers[0].stop()
        served.workers[0].engine = FakeEngine("new", max_model_len=2000)
        await served.workers[0].start()
        await until(lambda: model.card.max_model_len == 2000)
        await until(lambda: served.router.pool.ready == 1)
        answer = await served.http.post(CHAT, json=chat())
        assert answer.json()["choices"][0]["message"]["content"] == "new"
