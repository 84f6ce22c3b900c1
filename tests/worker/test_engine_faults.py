"""When something breaks: who is told, what is freed, and that the rest goes on."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from services.worker.engine import Engine, EngineConfig
from services.worker.plan import StepPlan
from services.worker.request import EngineClosed, RequestError, StepReport
from services.worker.runner import Launched
from tests.worker.requests import make_request, prompt
from tests.worker.stepping import MemoryStore, Stepped, tiny_model
from tests.worker.test_engine import alone, mixed, stored, wait_for


class FailingRunner:
    """Runs plans until `fails` says so; then the launch, or its result, raises."""

    def __init__(self, engine: Engine, fails: Callable[[StepPlan], bool], late: bool) -> None:
        self._runner = engine.runner
        self._fails = fails
        self._late = late

    def launch(self, plan: StepPlan) -> Any:
        fails = self._fails(plan)
        if fails and not self._late:
            raise RuntimeError("out of memory")
        launched = self._runner.launch(plan)
        return FailingLaunch() if fails else launched


class FailingLaunch(Launched):
    def __init__(self) -> None:
        super().__init__()

    def result(self) -> Any:
        raise RuntimeError("out of memory")


def break_step(stepped: Stepped, number: int, late: bool) -> None:
    """The engine's step `number` fails, once."""
    launches = iter(range(1_000_000))
    stepped.engine.runner = FailingRunner(  # type: ignore[assignment]
        stepped.engine, lambda plan: next(launches) == number, late
    )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("number", [0, 3, 12])
def test_a_failed_step_ends_its_requests_and_the_others_are_served(
    depth: int, late: bool, number: int
) -> None:
    stepped = Stepped(pipeline_depth=depth, max_step_tokens=100, max_running=5)
    break_step(stepped, number, late)
    stepped.run(mixed(), every=1)
    assert set(stepped.finishes) == set(range(16))
    failed = {key for key, finish in stepped.finishes.items() if finish.reason == "error"}
    assert 0 < len(failed) <= 5 + depth
    for key in set(range(16)) - failed:
        assert stepped.tokens[key] == alone()[key]
    for key in failed:
        assert stepped.finishes[key].message == "the step failed: RuntimeError: out of memory"
    assert stepped.engine.counters.failed_steps >= 1
    stepped.check_empty()
    stepped.run([make_request("after", prompt(200, seed=15), max_tokens=25, ignore_eos=True)])
    assert stepped.tokens["after"] == alone()[15]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("late", [False, True])
def test_blocks_of_a_failed_step_are_never_hit(depth: int, late: bool) -> None:
    stepped = Stepped(pipeline_depth=depth, max_step_tokens=100)
    break_step(stepped, 1, late)
    stepped.run([make_request("first", prompt(200, seed=15), max_tokens=25, ignore_eos=True)])
    assert stepped.finishes["first"].reason == "error"
    stepped.run([make_request("second", prompt(200, seed=15), max_tokens=25, ignore_eos=True)])
    assert stepped.tokens["second"] == alone()[15]
    assert stepped.starts["second"].gpu_tokens <= 96, "what the step before it computed"
    stepped.check_empty()


def test_a_failed_step_beside_a_load_leaves_the_load_alone() -> None:
    store = stored([mixed()[15]])
    store.polls = 3
    stepped = Stepped(store, max_step_tokens=100)
    break_step(stepped, 0, late=False)
    stepped.engine.submit(mixed()[15])
    stepped.run([make_request("short", prompt(10), max_tokens=2, priority=1)])
    assert stepped.finishes["short"].reason == "error"
    assert stepped.tokens[15] == alone()[15]
    assert stepped.starts[15].store_tokens == 192


def test_a_listener_that_raises_does_not_stop_the_engine() -> None:
    stepped = Stepped()
    calls = []

    def listener(report: StepReport) -> None:
        calls.append(report)
        raise RuntimeError("listener")

    stepped.engine._listener = listener
    stepped.run([make_request("a", prompt(20))])
    assert len(calls) == 8


def test_requests_are_told_when_the_engine_is_stopped() -> None:
    engine = Engine(tiny_model(), EngineConfig(pages=128))
    reports: list[StepReport] = []
    engine.start(reports.append)
    for i in range(4):
        engine.submit(make_request(i, prompt(20, seed=i), max_tokens=490, ignore_eos=True))
    wait_for(lambda: reports)
    engine.stop()
    finishes = {o.key: o.finish for report in reports for o in report.outputs if o.finish}
    assert set(finishes) == {0, 1, 2, 3}
    assert {(f.reason, f.message) for f in finishes.values()} == {("error", "the engine was stopped")}
    assert {f.error_kind for f in finishes.values()} == {"draining"}
    assert engine.idle
    with pytest.raises(EngineClosed, match="the engine was stopped"):
        engine.submit(make_request("late", prompt(5)))


def test_a_broken_engine_tells_everyone_and_is_not_healthy() -> None:
    engine = Engine(tiny_model(), EngineConfig(pages=128))
    reports: list[StepReport] = []

    def plan(now: float, busy_s: float) -> None:
        raise AssertionError("books do not balance")

    engine._scheduler.plan = plan  # type: ignore[method-assign, assignment]
    engine.submit(make_request("a", prompt(5)))
    engine.start(reports.append)
    wait_for(lambda: engine.idle)
    (output,) = [output for report in reports for output in report.outputs]
    assert output.finish is not None
    assert output.finish.message == "the engine failed: AssertionError: books do not balance"
    assert output.finish.error_kind == "worker_lost"
    wait_for(lambda: not engine.healthy())
    with pytest.raises(EngineClosed, match="books do not balance"):
        engine.submit(make_request("b", prompt(5)))


def test_an_engine_that_is_stuck_in_a_step_is_not_healthy() -> None:
    now = [0.0]
    engine = Engine(tiny_model(), EngineConfig(pages=128), clock=lambda: now[0])
    entered, leave = threading.Event(), threading.Event()

    def plan(now: float, busy_s: float) -> None:
        entered.set()
        leave.wait(30)

    engine._scheduler.plan = plan  # type: ignore[method-assign, assignment]
    engine.start(lambda report: None)
    assert entered.wait(30)
    assert engine.healthy()
    now[0] = 1000.0
    assert not engine.healthy()
    leave.set()
    engine.stop()


def test_a_draining_engine_finishes_what_it_has_and_takes_nothing_more() -> None:
    stepped = Stepped()
    stepped.engine.submit(make_request("a", prompt(20), ignore_eos=True))
    stepped.engine.drain()
    with pytest.raises(EngineClosed, match="the engine is draining"):
        stepped.engine.submit(make_request("b", prompt(20)))
    stepped.run()
    assert stepped.finishes["a"].reason == "length"


def test_a_key_names_one_live_request_and_is_free_afterwards() -> None:
    stepped = Stepped()
    stepped.engine.submit(make_request("a", prompt(20), max_tokens=2, ignore_eos=True))
    with pytest.raises(RequestError, match="'a' names a live request"):
        stepped.engine.submit(make_request("a", prompt(20)))
    stepped.run()
    stepped.finishes.clear()
    stepped.starts.clear()
    stepped.run([make_request("a", prompt(20), max_tokens=2, ignore_eos=True)])
    assert stepped.finishes["a"].reason == "length"


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_after_five_hundred_random_operations_nothing_is_held_and_everyone_was_answered(depth: int) -> None:
    """Submits, cancels, failing steps and a slow store, while the engine runs on its own thread."""
    rng = random.Random(depth)
    store = MemoryStore(polls=3, size=60)
    engine = Engine(
        tiny_model(), EngineConfig(pages=20, max_running=6, max_step_tokens=48, pipeline_depth=depth), store
    )
    engine.runner = FailingRunner(engine, lambda plan: rng.random() < 0.01, late=depth == 2)  # type: ignore[assignment]
    finishes: dict[object, int] = {}
    held: set[bytes] = set()

    def note(report: StepReport) -> None:
        for output in report.outputs:
            finishes[output.key] += output.finish is not None
        held.difference_update(report.removed.get("gpu", []))
        held.update(report.stored.get("gpu", []))

    engine.start(note)
    choices = random.Random(10 + depth)
    for number in range(500):
        if choices.random() < 0.6:
            finishes[number] = 0
            stem = choices.randrange(4)
            engine.submit(
                make_request(
                    number,
                    prompt(choices.randrange(1, 150), seed=stem),
                    max_tokens=choices.randrange(1, 40),
                    priority=choices.randrange(2),
                    temperature=float(choices.randrange(2)),
                )
            )
        elif finishes:
            engine.cancel(choices.choice(list(finishes)))
        if number % 10 == 0:
            wait_for(lambda: len(engine._inbox.live()) < 30)
    wait_for(lambda: engine.idle)
    engine.stop()
    assert set(finishes.values()) == {1}
    engine._pool.check()
    assert engine._pool.referenced == 0
    assert held == set(engine._pool._page_of)
    assert engine.counters.preemptions > 0
    assert engine.counters.failed_steps > 0
    assert engine.counters.finished["cancelled"] > 0
    assert engine.counters.hit_tokens["gpu"] > 0
