"""One request against a real socket: how its answer is judged and timed."""

import json
import time
from typing import Any

import pytest

from benchmarks.loadgen.http import Address, HttpClient
from benchmarks.loadgen.prompts import Prepared
from benchmarks.loadgen.record import Record, Sender, parse_route

from .scripted_server import Answer, ScriptedServer, serving, until


def prepared(max_tokens: int = 4, prompt_tokens: int = 3, **fields: Any) -> Prepared:
    body = {"prompt": list(range(prompt_tokens)), "max_tokens": max_tokens, "logprobs": 1, **fields}
    return Prepared(json.dumps(body).encode(), max_tokens, prompt_tokens)


async def send(
    answer: Answer, request: Prepared | None = None, *, timeout_s: float = 30.0, verify: bool = False
) -> Record:
    async with serving(ScriptedServer(lambda index, body: answer)) as server:
        client = HttpClient(Address.parse(server.url))
        record = Record("s", 0, due_s=time.perf_counter(), sent_s=0.0)
        await Sender(client, "/v1/completions", timeout_s, verify, keep_text=True).send(
            record, request or prepared()
        )
        client.close()
        return record


async def test_a_whole_answer_is_ok_and_carries_its_tokens_route_and_text() -> None:
    route = "worker=w1; predicted_ttft_ms=12.5; hit_gpu=64; reason=least seconds"
    record = await send(Answer(cached_tokens=2, headers={"x-reprise-route": route}))
    assert (record.outcome, record.error, record.status) == ("ok", "", 200)
    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (3, 4, 2)
    assert record.route["worker"] == "w1"
    assert record.route["reason"] == "least seconds"
    assert record.text == " t0 t1 t2 t3"
    assert len(record.times_s) == 4


async def test_times_follow_the_answer_in_order() -> None:
    record = await send(Answer(first_token_s=0.03, token_s=0.01))
    assert record.first_s is not None
    assert record.last_s is not None
    assert record.due_s <= record.sent_s < record.first_s < record.last_s <= record.end_s
    assert record.first_s - record.sent_s >= 0.03
    assert record.tpot_s is not None
    assert record.tpot_s >= 0.01
    assert sorted(record.times_s) == list(record.times_s)


async def test_one_token_has_no_time_per_token() -> None:
    record = await send(Answer(), prepared(max_tokens=1))
    assert record.ttft_s is not None
    assert record.tpot_s is None


@pytest.mark.parametrize(
    ("answer", "outcome", "error"),
    [
        (Answer(status=429, message="queue full"), "shed", "HTTP 429: queue full"),
        (Answer(status=500, message="boom"), "error", "HTTP 500: boom"),
        (Answer(status=400, message="max_tokens: too many"), "error", "HTTP 400: max_tokens: too many"),
        (Answer(ending="no_done"), "error", "the stream (text/event-stream) ended without [DONE]"),
        (Answer(ending="no_finish"), "error", "the stream ended without a finish_reason"),
        (Answer(ending="error_event"), "error", "error in the stream: worker lost"),
        (Answer(finish_reason="abort"), "error", "finish_reason 'abort'"),
    ],
)
async def test_what_is_not_a_whole_good_answer_is_no_success(
    answer: Answer, outcome: str, error: str
) -> None:
    record = await send(answer)
    assert (record.outcome, record.error) == (outcome, error)


async def test_a_connection_that_breaks_inside_an_answer_is_a_disconnect() -> None:
    record = await send(Answer(ending="cut"))
    assert record.outcome == "disconnected"
    assert "connection lost" in record.error
    assert len(record.times_s) == 2


async def test_a_server_that_is_not_there_is_a_disconnect() -> None:
    async with serving(ScriptedServer(lambda index, body: Answer())) as server:
        address = Address.parse(server.url)
    record = Record("s", 0, due_s=0.0, sent_s=0.0)
    await Sender(HttpClient(address), "/v1/completions", 30.0).send(record, prepared())
    assert record.outcome == "disconnected"
    assert record.error.startswith("cannot connect: ")


async def test_an_answer_that_does_not_end_in_time_is_an_error_and_its_connection_is_closed() -> None:
    async with serving(ScriptedServer(lambda index, body: Answer(token_s=0.02))) as server:
        client = HttpClient(Address.parse(server.url))
        record = Record("s", 0, due_s=0.0, sent_s=0.0)
        await Sender(client, "/v1/completions", 0.1).send(record, prepared(max_tokens=100_000))
        assert (record.outcome, record.error) == ("error", "timeout: no end after 0.1 s")
        await until(lambda: server.hung_up == 1)


async def test_without_usage_the_chunks_are_counted_and_the_prompt_is_what_was_sent() -> None:
    record = await send(Answer(usage=False))
    assert record.outcome == "ok"
    assert not record.has_usage
    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (3, 4, None)


@pytest.mark.parametrize("tokens_per_chunk", [1, 3])
async def test_verify_agrees_with_an_honest_server_however_it_cuts_chunks(tokens_per_chunk: int) -> None:
    answer = Answer(tokens_per_chunk=tokens_per_chunk)
    assert (await send(answer, prepared(max_tokens=7), verify=True)).outcome == "ok"


@pytest.mark.parametrize(
    ("answer", "request_", "error"),
    [
        (Answer(usage_excess=2), prepared(), "usage says 6 completion tokens, 4 were counted"),
        (Answer(usage_excess=1), prepared(), "usage says 5 completion tokens, 4 were counted"),
        (
            Answer(),
            Prepared(prepared().body, 4, prompt_tokens=8),
            "usage says 3 prompt tokens, 8 were sent",
        ),
        (
            Answer(),
            Prepared(prepared().body, 9, prompt_tokens=3),
            "stopped for length after 4 tokens, max_tokens is 9",
        ),
        (Answer(usage=False), prepared(), "the stream has no usage"),
    ],
)
async def test_verify_names_what_does_not_agree(answer: Answer, request_: Prepared, error: str) -> None:
    record = await send(answer, request_, verify=True)
    assert (record.outcome, record.error) == ("error", f"verify: {error}")
    if answer.usage:
        assert (await send(answer, request_)).outcome == "ok"


async def test_verify_lets_a_server_count_the_stop_token_that_has_no_text() -> None:
    assert (await send(Answer(finish_reason="stop", usage_excess=1), verify=True)).outcome == "ok"
    assert (await send(Answer(finish_reason="stop", usage_excess=2), verify=True)).outcome == "error"


def test_a_route_header_of_any_shape_is_read_without_complaint() -> None:
    assert parse_route("worker=a:1;hit_gpu=3 ; x=y=z;;nonsense; =") == {
        "worker": "a:1",
        "hit_gpu": "3",
        "x": "y=z",
        "": "",
    }
    assert parse_route("") == {}
