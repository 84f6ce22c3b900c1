"""What a request says of its blocks' lifetime: explicit token ranges, or priorities of whole messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.router.api.errors import invalid
from services.router.api.requests import MAX_RANGES, Message, RetentionRange
from services.wire.messages import DEFAULT_PRIORITY, Retention


@dataclass(frozen=True)
class MessageSpan:
    """Messages `start` to `end` (exclusive) are to be kept alike."""

    start: int
    end: int
    priority: int
    ttl_s: float | None


def explicit_retention(ranges: Sequence[RetentionRange] | None, prompt_tokens: int) -> tuple[Retention, ...]:
    """The request's own ranges, sorted and disjoint. Raises ApiError (400)."""
    result: list[Retention] = []
    for i, item in sorted(enumerate(ranges or ()), key=lambda pair: pair[1].start):
        end = prompt_tokens if item.end is None else item.end
        name = f"retention[{i}]"
        if end > prompt_tokens:
            raise invalid(
                f"{name}.end must be at most the prompt's {prompt_tokens} tokens, got {end}", f"{name}.end"
            )
        if item.start >= end:
            raise invalid(
                f"{name}.start must be below the range's end, {end}, got {item.start}", f"{name}.start"
            )
        if result and item.start < (result[-1].end or 0):
            raise invalid(f"{name} overlaps another range at token {item.start}: ranges are disjoint", name)
        result.append(Retention(item.start, end, item.priority, item.ttl_s))
    return tuple(result)


def message_spans(messages: Sequence[Message]) -> list[MessageSpan]:
    """Runs of messages with the same `cache_priority` and `cache_ttl_s`; those without either are left out.
    Raises ApiError (400)."""
    spans: list[MessageSpan] = []
    for i, message in enumerate(messages):
        if message.cache_priority is None:
            if message.cache_ttl_s is not None:
                name = f"messages[{i}].cache_ttl_s"
                raise invalid(f"{name} needs a cache_priority; {DEFAULT_PRIORITY} is the usual one", name)
            continue
        span = MessageSpan(i, i + 1, message.cache_priority, message.cache_ttl_s)
        last = spans[-1] if spans else None
        if last and (last.end, last.priority, last.ttl_s) == (i, span.priority, span.ttl_s):
            spans[-1] = MessageSpan(last.start, i + 1, span.priority, span.ttl_s)
        else:
            spans.append(span)
    if len(spans) > MAX_RANGES:
        raise invalid(
            f"messages: at most {MAX_RANGES} runs of messages may have a cache_priority, got {len(spans)}",
            "messages",
        )
    return spans


def boundaries(spans: Sequence[MessageSpan]) -> list[int]:
    """The messages whose first tokens must be known to place `spans`: ascending."""
    return sorted({index for span in spans for index in (span.start, span.end)})


def span_retention(
    spans: Sequence[MessageSpan], starts: dict[int, int], prompt_tokens: int
) -> tuple[Retention, ...]:
    """`spans` in tokens: `starts` gives the first token of each message of `boundaries(spans)`. Spans that
    the template left no tokens vanish."""
    ranges = []
    for span in spans:
        start, end = starts[span.start], min(starts[span.end], prompt_tokens)
        if start < end:
            ranges.append(Retention(start, end, span.priority, span.ttl_s))
    return tuple(ranges)
