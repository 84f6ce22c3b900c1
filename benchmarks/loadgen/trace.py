"""Replay of request traces in Mooncake's format.

One JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids`: one id per 512
tokens of the prompt, equal ids for equal blocks. Source: Mooncake, FAST '25, kvcache-ai/Mooncake
`FAST25-release/traces`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from .workload import Segment, Session, Turn, Workload

#: Tokens that one hash id stands for; the last id of a request stands for what is left.
TRACE_BLOCK_TOKENS = 512


class TraceError(ValueError):
    """The trace cannot be replayed: the message names the file, the line and what is wrong there."""


class TraceLine(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=1)]
    hash_ids: list[int]


def read_trace(path: Path, limit: int | None) -> list[TraceLine]:
    """The first `limit` requests of the trace, in order of arrival. Raises TraceError, OSError."""
    decoder = msgspec.json.Decoder(TraceLine)
    lines: list[TraceLine] = []
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError as error:
                raise TraceError(f"trace {path}, line {number}: {error}") from None
            needed = -(-line.input_length // TRACE_BLOCK_TOKENS)
            if len(line.hash_ids) != needed:
                raise TraceError(
                    f"trace {path}, line {number}: input_length {line.input_length} needs {needed} hash_ids "
                    f"of {TRACE_BLOCK_TOKENS} tokens, got {len(line.hash_ids)}"
                )
            lines.append(line)
    if not lines:
        raise TraceError(f"trace {path} holds no request")
    lines.sort(key=lambda line: line.timestamp)
    return lines[:limit]


def replay(lines: list[TraceLine], time_scale: float, length_scale: float) -> Workload:
    """The trace as sessions of one turn. Times and lengths are multiplied by their scale.

    A block keeps its identity at any `length_scale`: two requests that shared n blocks still share n blocks,
    of `512 × length_scale` tokens. Reuse survives in full where that is a multiple of the server's own block.
    """
    first_ms = lines[0].timestamp

    def sessions() -> Iterator[Session]:
        for index, line in enumerate(lines):
            turn = Turn(_prompt(line, length_scale), _scaled(line.output_length, length_scale))
            start_s = (line.timestamp - first_ms) / 1e3 * time_scale
            yield Session(f"trace/{index}", (turn,), start_s=start_s)

    longest_tokens = max(
        sum(segment.tokens for segment in _prompt(line, length_scale))
        + _scaled(line.output_length, length_scale)
        for line in lines
    )
    return Workload(sessions(), len(lines), longest_tokens)


def _prompt(line: TraceLine, length_scale: float) -> tuple[Segment, ...]:
    *whole, last = line.hash_ids
    block_tokens = _scaled(TRACE_BLOCK_TOKENS, length_scale)
    left = line.input_length - TRACE_BLOCK_TOKENS * len(whole)
    return (
        *(Segment(f"block/{block}", block_tokens) for block in whole),
        Segment(f"block/{last}", _scaled(left, length_scale)),
    )


def _scaled(tokens: int, length_scale: float) -> int:
    return max(1, round(tokens * length_scale))
