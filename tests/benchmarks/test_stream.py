import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.loadgen.http import BadAnswer
from benchmarks.loadgen.stream import MAX_LINE_BYTES, AnswerStream, EventSplitter

STREAM = (
    b': keep-alive\r\n\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:one\ndata: two\n\nid: 7\n\ndata: [DONE]\n\n'
)
EVENTS = [b'{"a": 1}', b"one\ntwo", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_events_are_the_same_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    splitter = EventSplitter()
    pieces = [STREAM[low:high] for low, high in pairwise(edges)]
    assert [event for piece in pieces for event in splitter.feed(piece)] == EVENTS


def test_a_line_without_end_is_refused_before_it_fills_the_memory() -> None:
    splitter = EventSplitter()
    splitter.feed(b"x" * MAX_LINE_BYTES)
    with pytest.raises(BadAnswer, match="longer than"):
        splitter.feed(b"x")


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def answer(*events: Any) -> AnswerStream:
    """The stream after these events, read at 1 s, 2 s, …"""
    stream = AnswerStream()
    stream.head(200, {})
    for second, value in enumerate(events, 1):
        stream.data(event(value), float(second))
    return stream


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


def test_the_role_that_opens_a_chat_is_not_its_first_token() -> None:
    stream = answer(
        delta(role="assistant", content=""), delta(content="a"), delta(content="b"), FINISH, USAGE
    )
    assert (stream.first_s(), stream.last_s()) == (2.0, 4.0)
    assert list(stream.times_s) == [2.0, 3.0]
    assert "".join(stream.text) == "ab"


def test_reasoning_and_tool_calls_are_tokens() -> None:
    assert answer(delta(reasoning_content="hm"), FINISH).first_s() == 1.0
    assert answer(delta(role="assistant"), delta(tool_calls=[{"index": 0}]), FINISH).first_s() == 2.0


def test_a_token_without_visible_text_counts_in_completions() -> None:
    stream = answer({"choices": [{"text": ""}]}, {"choices": [{"text": "a"}]})
    assert list(stream.times_s) == [1.0, 2.0]


def test_an_answer_of_tokens_without_text_begins_when_it_finishes() -> None:
    assert answer(FINISH, USAGE).first_s() == 1.0
    assert answer(FINISH).first_s() is None


def test_usage_may_come_with_or_after_the_finish_and_tells_cached_tokens_where_it_can() -> None:
    details = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
    usage = answer(FINISH | {"usage": details}, b"[DONE]").usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (9, 3, 8)
    usage = answer(FINISH, USAGE | {"usage": details | {"prompt_tokens_details": None}}).usage
    assert usage is not None
    assert usage.cached_tokens is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"message": "worker\n lost", "code": 500}, "worker lost"),
        ("out of pages", "out of pages"),
        ({"code": 3}, '{"code":3}'),
    ],
)
def test_an_error_event_is_kept_as_one_line(error: Any, message: str) -> None:
    assert answer({"error": error}).error == message


def test_a_chunk_that_is_not_json_is_refused() -> None:
    with pytest.raises(BadAnswer, match="malformed chunk"):
        answer(b'{"choices": [')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "queue is full"}}', "queue is full"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"message": "nope"}', "nope"),
        (b"<html>\nBad Gateway</html>", "<html> Bad Gateway</html>"),
        (b"x" * 500, "x" * 199 + "…"),
    ],
)
def test_a_refusal_is_told_in_one_line_whatever_its_form(body: bytes, message: str) -> None:
    stream = AnswerStream()
    stream.head(503, {})
    for at in range(0, len(body), 7):
        stream.data(body[at : at + 7], 0.0)
    assert stream.refusal() == message
