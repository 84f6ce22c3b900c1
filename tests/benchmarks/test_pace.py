import asyncio
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import pytest

from benchmarks.loadgen.http import Address, HttpClient
from benchmarks.loadgen.pace import LOOK_AHEAD, ClosedLoop, OpenLoop, Pace, Run, Scheduled
from benchmarks.loadgen.prompts import Api, RequestWriter, Vocabulary
from benchmarks.loadgen.record import Record, Sender
from benchmarks.loadgen.summary import distribution
from benchmarks.loadgen.workload import Range, Segment, Session, Span, Turn, conversation, random_prompts

from .scripted_server import Answer, ScriptedServer, serving, until


def sessions(count: int | None, output_tokens: int = 3) -> Iterator[Session]:
    return random_prompts(0, count, Range(4, 4), Range(output_tokens, output_tokens)).sessions


def run_against(server: ScriptedServer, api: Api = "completions", duration_s: float | None = None) -> Run:
    client = HttpClient(Address.parse(server.url))
    writer = RequestWriter(api, "fake", Vocabulary(0, 32_000))
    return Run(Sender(client, writer.path, 30.0, keep_text=True), writer, duration_s=duration_s)


async def play(
    server: ScriptedServer,
    sessions: Iterator[Session],
    pace: Pace,
    *,
    api: Api = "completions",
    duration_s: float | None = None,
) -> Run:
    async with serving(server):
        run = run_against(server, api, duration_s)
        async with asyncio.timeout(30):
            await run.play(sessions, pace)
        run.sender.client.close()
    return run


def ttft_s(record: Record) -> float:
    assert record.ttft_s is not None
    return record.ttft_s


def always(**fields: Any) -> ScriptedServer:
    return ScriptedServer(lambda index, body: Answer(**fields))


# ---- schedules ----


def test_poisson_arrivals_have_the_rate_and_the_spread_of_their_kind() -> None:
    times = list(islice(OpenLoop(20.0, "poisson").arrivals(0), 4001))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times[0] == 0
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.1)  # what sets an exponential distribution apart


def test_fixed_arrivals_are_evenly_spaced_and_an_infinite_rate_is_all_at_once() -> None:
    assert list(islice(OpenLoop(4.0, "fixed").arrivals(0), 4)) == [0, 0.25, 0.5, 0.75]
    for arrival in ("fixed", "poisson"):
        assert set(islice(OpenLoop(float("inf"), arrival).arrivals(0), 4)) == {0.0}


# ---- open loop ----


async def test_open_loop_counts_the_wait_in_a_slow_servers_queue() -> None:
    """The server serves one at a time, 30 ms each; requests are due every 5 ms: the queue only grows."""
    server = always(first_token_s=0.03)
    server.one_at_a_time = True
    run = await play(server, sessions(12, 1), OpenLoop(200.0, "fixed"))
    assert max(ttft_s(record) for record in run.records) >= 12 * 0.03 - 11 * 0.005


async def test_a_late_generator_does_not_shorten_latencies() -> None:
    """Requests are sent 0.2 s late through no fault of the server: their latency holds that, and says so."""

    def stalling() -> Iterator[Session]:
        for index, session in enumerate(sessions(LOOK_AHEAD + 10)):
            if index == LOOK_AHEAD + 2:
                time.sleep(0.2)
            yield session

    run = await play(always(), stalling(), OpenLoop(200.0, "fixed"))
    lags_s = [record.sent_s - record.due_s for record in run.records]
    assert max(lags_s) >= 0.15
    assert all(ttft_s(record) >= lag_s for record, lag_s in zip(run.records, lags_s, strict=True))
    assert [record.due_s - run.start_s for record in run.records] == pytest.approx(
        [index / 200 for index in range(LOOK_AHEAD + 10)]
    )


async def test_requests_due_together_are_all_sent_however_many() -> None:
    burst = LOOK_AHEAD * 2 + 5
    together = (
        Session(f"t{index}", (Turn((Segment(str(index), 4),), 1),), start_s=index // burst / 20)
        for index in range(burst * 2)
    )
    run = await play(always(), together, Scheduled())
    assert [record.session for record in run.records] == [f"t{index}" for index in range(burst * 2)]
    assert {record.outcome for record in run.records} == {"ok"}


async def test_a_trace_is_sent_at_its_own_times() -> None:
    timed = (
        Session(f"t{index}", (Turn((Segment(str(index), 4),), 1),), start_s=at_s)
        for index, at_s in enumerate((0.0, 0.01, 0.08))
    )
    run = await play(always(), timed, Scheduled())
    assert [record.due_s - run.start_s for record in run.records] == pytest.approx([0.0, 0.01, 0.08])
    assert all(record.sent_s >= record.due_s for record in run.records)


# ---- closed loop ----


async def test_closed_loop_keeps_its_number_under_way_and_never_more() -> None:
    server = always(first_token_s=0.005)
    run = await play(server, sessions(40), ClosedLoop(7))
    assert len(run.records) == 40
    assert {record.outcome for record in run.records} == {"ok"}
    assert run.peak_in_flight == server.most_live == 7
    assert run.in_flight == 0


async def test_duration_ends_a_run_without_end_and_waits_for_what_is_under_way() -> None:
    run = await play(always(first_token_s=0.02), sessions(None), ClosedLoop(3), duration_s=0.2)
    assert len(run.records) >= 3
    assert {record.outcome for record in run.records} == {"ok"}
    assert max(record.due_s for record in run.records) - run.start_s < 0.2
    assert max(record.end_s for record in run.records) - run.start_s >= 0.2


async def test_measured_percentiles_are_those_that_the_server_gave() -> None:
    """Every tenth answer begins 0.4 s late; the server notes when it really began each."""
    server = ScriptedServer(lambda index, body: Answer(first_token_s=0.4 if index % 10 == 9 else 0.02))
    run = await play(server, sessions(60), ClosedLoop(20))
    by_prompt = {str(body["prompt"]): index for index, body in enumerate(server.bodies)}
    prompts = {s.name: str(run.writer.vocabulary.ids(s.turns[0].user)) for s in sessions(60)}
    given_s, measured_s = [], []
    for record in run.records:
        given_s.append(server.first_token_sent_s[by_prompt[prompts[record.session]]] - record.due_s)
        measured_s.append(ttft_s(record))
        assert measured_s[-1] >= given_s[-1]
    given, measured = distribution(given_s), distribution(measured_s)
    assert given is not None
    assert measured is not None
    assert measured.p99 == pytest.approx(given.p99, rel=0.2)
    assert measured.mean == pytest.approx(given.mean, rel=0.2)
    assert measured.p99 >= 0.4
    assert measured.p99 > 4 * measured.p50


# ---- conversations ----


async def test_a_conversation_grows_by_what_was_said_and_answered() -> None:
    server = always()
    talk = conversation(0, 2, 3, Range(5, 5), Range(4, 4), Range(2, 2), Span(0, 0))
    run = await play(server, talk.sessions, ClosedLoop(1), api="chat")
    assert [(record.session, record.turn) for record in run.records] == [
        (f"session/{session}", turn) for session in (0, 1) for turn in (0, 1, 2)
    ]
    for start in (0, 3):
        turns = [body["messages"] for body in server.bodies[start : start + 3]]
        assert [len(messages) for messages in turns] == [2, 4, 6]
        for earlier, later in pairwise(turns):
            assert later[: len(earlier)] == earlier
            assert later[len(earlier)] == {"role": "assistant", "content": " t0 t1"}
    assert server.bodies[0]["messages"][0] == server.bodies[3]["messages"][0]
    assert server.bodies[0]["messages"][1] != server.bodies[3]["messages"][1]


async def test_a_turn_waits_for_the_answer_before_it_and_the_time_to_think() -> None:
    talk = conversation(0, 1, 3, Range(0, 0), Range(4, 4), Range(2, 2), Span(0.03, 0.03))
    run = await play(always(first_token_s=0.01), talk.sessions, OpenLoop(100.0))
    for earlier, later in pairwise(run.records):
        assert later.due_s == pytest.approx(earlier.end_s + 0.03)
        assert later.sent_s >= later.due_s


async def test_a_conversation_that_fails_ends_and_its_missing_turns_are_counted() -> None:
    server = ScriptedServer(lambda index, body: Answer(status=429) if index == 1 else Answer())
    talk = conversation(0, 2, 4, Range(0, 0), Range(4, 4), Range(2, 2), Span(0, 0))
    run = await play(server, talk.sessions, ClosedLoop(1), api="chat")
    assert [record.outcome for record in run.records] == ["ok", "shed", *["ok"] * 4]
    assert run.turns_not_sent == 2


# ---- the end ----


async def test_a_cancelled_run_records_what_was_under_way_and_hangs_up() -> None:
    server = always(token_s=0.05)
    async with serving(server):
        run = run_against(server)
        playing = asyncio.create_task(run.play(sessions(5, output_tokens=10_000), ClosedLoop(5)))
        await until(lambda: server.live == 5)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        assert [record.outcome for record in run.records] == ["cancelled"] * 5
        assert all(record.end_s >= record.sent_s for record in run.records)
        await until(lambda: server.hung_up == 5)
