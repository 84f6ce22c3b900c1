"""Payloads: frames as plain string values, read and written in pipelined batches.

A payload is one or two values (see allocation.piece_lengths): under its name, and the rest under name + "+".
They never pass through a function: a script would copy each a few times on the server's only thread. This
class is the one place that knows how bytes travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.exceptions import OutOfMemoryError, ResponseError

from services.cache_store.allocation import piece_lengths
from services.cache_store.frames import HEADER_BYTES
from services.cache_store.functions import LAYOUT

#: At most so many bytes are asked for in one command, or sent in one pipeline.
BATCH_BYTES = 8 << 20

#: A value that no record knows (its writer died at the wrong moment) goes away by itself after a day. One
#: that is known goes too: its block is found missing once and written again.
_BACKSTOP_MS = 24 * 3600 * 1000


class Payloads:
    """The payloads of one shard whose frames are all `frame_bytes` long. Raises what redis-py raises."""

    def __init__(self, redis: Redis, frame_bytes: int, *, shard: int = 0) -> None:
        self._redis = redis
        self._shard = shard
        self._lengths = piece_lengths(frame_bytes)
        self.batch = max(1, BATCH_BYTES // frame_bytes)  # frames

    def put(self, items: Sequence[tuple[bytes, bytes, memoryview]]) -> list[bool]:
        """Write (name, header, payload) each, at most `batch` of them. False: Redis has no memory for it."""
        pipeline = self._redis.pipeline(transaction=False)
        for name, header, payload in items:
            first = self._lengths[0] - HEADER_BYTES
            values: list[bytes | memoryview] = [b"".join((header, payload[:first]))]
            if len(self._lengths) > 1:
                values.append(payload[first:])
            for key, value in zip(self._keys(name), values, strict=True):
                pipeline.set(key, value, px=_BACKSTOP_MS)
        replies = pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, ResponseError) and not isinstance(reply, OutOfMemoryError):
                raise reply
        values_each = len(self._lengths)
        return [
            all(reply is True for reply in replies[at : at + values_each])
            for at in range(0, len(replies), values_each)
        ]

    def get(self, names: Sequence[bytes]) -> list[list[bytes] | None]:
        """The pieces of at most `batch` frames, None where one is missing."""
        values: list[Any] = self._redis.mget([key for name in names for key in self._keys(name)])
        values_each = len(self._lengths)
        pieces = [values[at : at + values_each] for at in range(0, len(values), values_each)]
        return [None if None in frame else frame for frame in pieces]

    def _keys(self, name: bytes) -> Sequence[bytes]:
        return _keys(self._shard, name)[: len(self._lengths)]


def unlink_payloads(redis: Redis, names: Sequence[bytes], *, shard: int = 0) -> None:
    """Delete payloads of any model; unknown names are fine."""
    if names:
        redis.unlink(*(key for name in names for key in _keys(shard, name)))


def _keys(shard: int, name: bytes) -> tuple[bytes, bytes]:
    key = b"reprise%d:{p%d}:%s" % (LAYOUT, shard, name)
    return key, key + b"+"
