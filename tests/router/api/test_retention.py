import pytest

from services.router.api.errors import ApiError
from services.router.api.requests import ChatRequest, Message, RetentionRange
from services.router.api.retention import (
    MessageSpan,
    boundaries,
    explicit_retention,
    message_spans,
    span_retention,
)
from services.router.prompt import PromptBuilder
from services.router.text.model_text import ModelText
from services.wire.messages import Retention
from tests.fakes import byte_text_assets
from tests.router.workers import CARD


def span(start, end=None, priority=35, ttl_s=None):
    return RetentionRange(start, end, priority, ttl_s)


def test_ranges_are_sorted_and_open_ends_closed():
    given = explicit_retention([span(50, priority=10), span(0, 20, 90, 60.0)], 100)
    assert given == (Retention(0, 20, 90, 60.0), Retention(50, 100, 10))
    assert explicit_retention(None, 100) == ()


@pytest.mark.parametrize(
    ("ranges", "param", "words"),
    [
        ([span(0, 101)], "retention[0].end", ["100", "101"]),
        ([span(0, 5), span(7, 7)], "retention[1].start", ["7"]),
        ([span(100)], "retention[0].start", ["100"]),
        ([span(10, 30), span(0, 11)], "retention[0]", ["overlaps", "10"]),
    ],
)
def test_ranges_outside_the_prompt_or_each_other_are_refused(ranges, param, words):
    with pytest.raises(ApiError) as error:
        explicit_retention(ranges, 100)
    assert error.value.detail.param == param
    assert all(word in error.value.detail.message for word in words)


def message(priority=None, ttl_s=None):
    return Message("user", "x", cache_priority=priority, cache_ttl_s=ttl_s)


def test_messages_alike_become_one_span():
    messages = [message(90), message(90), message(), message(90), message(90, 5.0), message(10, 5.0)]
    spans = message_spans(messages)
    assert spans == [
        MessageSpan(0, 2, 90, None),
        MessageSpan(3, 4, 90, None),
        MessageSpan(4, 5, 90, 5.0),
        MessageSpan(5, 6, 10, 5.0),
    ]
    assert boundaries(spans) == [0, 2, 3, 4, 5, 6]


def test_spans_without_tokens_vanish():
    spans = [MessageSpan(0, 1, 90, None), MessageSpan(1, 2, 10, None)]
    assert span_retention(spans, {0: 0, 1: 40, 2: 40}, 100) == (Retention(0, 40, 90),)


def test_a_time_to_live_needs_a_priority():
    with pytest.raises(ApiError, match=r"messages\[0\].cache_ttl_s needs"):
        message_spans([message(ttl_s=5.0)])


def test_the_number_of_spans_is_bounded():
    with pytest.raises(ApiError, match="at most 64"):
        message_spans([message(i % 2) for i in range(65)])


async def build(**fields):
    builder = PromptBuilder()
    request = ChatRequest(model="m", **fields)
    try:
        return await builder.build(request, 100, ModelText(byte_text_assets(), 260), CARD, 16, b"")
    finally:
        builder.close()


async def test_a_messages_priority_covers_its_tokens_in_the_prompt():
    messages = [Message("system", "S" * 30, cache_priority=90, cache_ttl_s=60.0), Message("user", "hello")]
    prompt = await build(messages=messages)
    (kept,) = prompt.retention
    assert (kept.start, kept.priority, kept.ttl_s) == (0, 90, 60.0)
    assert bytes(token for token in prompt.tokens[kept.start : kept.end] if token < 256) == (
        b"system\n" + b"S" * 30 + b"\n"
    )


async def test_a_priority_on_the_last_message_reaches_to_the_end():
    prompt = await build(messages=[Message("user", "a"), Message("user", "b", cache_priority=5)])
    (kept,) = prompt.retention
    assert kept.end == len(prompt.tokens)


async def test_both_ways_at_once_are_refused():
    with pytest.raises(ApiError, match="cannot be combined"):
        await build(messages=[message(90)], retention=[span(0, 5)])
