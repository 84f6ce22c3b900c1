"""Payloads: frames as plain string values, read and written in pipelined batches.

A payload is one or two values (see allocation.piece_lengths): under its name, and the rest under name + "+".
They never pass through a function: a script would copy each a few times on the server's only thread. This
class is the one place that knows how bytes travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Connection, Redis
from redis.exceptions import OutOfMemoryError

from services.cache_store.allocation import piece_lengths
from services.cache_store.functions import LAYOUT

#: At most so many bytes are asked for in one command, or sent in one pipeline.
BATCH_BYTES = 8 << 20

#: A value that no record knows (its writer died at the wrong moment) goes away by itself after a day. One
#: that is known goes too: its block is found missing once and written again.
_BACKSTOP_MS = 24 * 3600 * 1000
_PX = b"$2\r\nPX\r\n$%d\r\n%d\r\n" % (len(str(_BACKSTOP_MS)), _BACKSTOP_MS)


class Payloads:
    """The payloads of one shard. Frames of `frame_bytes` are written; those read may also be as long as
    `others` says. Raises what redis-py raises."""

    def __init__(self, redis: Redis, frame_bytes: int, *, shard: int = 0, others: Sequence[int] = ()) -> None:
        self._redis = redis
        self._shard = shard
        self._lengths = piece_lengths(frame_bytes)
        self._most_pieces = max(len(piece_lengths(length)) for length in (frame_bytes, *others))
        self.batch = max(1, BATCH_BYTES // frame_bytes)  # frames

    def put(self, items: Sequence[tuple[bytes, bytes, memoryview]]) -> list[bool]:
        """Write (name, header, payload) each, at most `batch` of them. False: Redis has no memory for it.

        The commands are written here and not by redis-py, which copies every value three times on its way:
        2.4 against 0.4 GB/s for frames of 360 KiB.
        """
        if not items:
            return []
        connection = self._redis.connection_pool.get_connection()
        try:
            connection.send_packed_command(self._set_commands(items))
            replies = [_reply(connection) for _ in range(len(items) * len(self._lengths))]
        except BaseException:
            connection.disconnect()  # replies may be under way that nobody will read
            raise
        finally:
            self._redis.connection_pool.release(connection)
        each = len(self._lengths)
        return [all(replies[at : at + each]) for at in range(0, len(replies), each)]

    def _set_commands(self, items: Sequence[tuple[bytes, bytes, memoryview]]) -> list[bytes | memoryview]:
        """SET commands as buffers to send one after the other, the payloads themselves among them."""
        buffers: list[bytes | memoryview] = []
        text = b""
        for name, header, payload in items:
            at = 0
            for key, length in zip(_keys(self._shard, name), self._lengths, strict=False):
                text += b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, length)
                if at == 0:
                    text += header
                    length -= len(header)
                buffers += [text, payload[at : at + length]]
                at += length
                text = b"\r\n" + _PX
        return [*buffers, text]

    def get(self, names: Sequence[bytes]) -> list[list[bytes] | None]:
        """The pieces of at most `batch` frames, None where there is none."""
        each = self._most_pieces
        keys = [key for name in names for key in _keys(self._shard, name)[:each]]
        values: list[Any] = self._redis.mget(keys)
        frames = [values[at : at + each] for at in range(0, len(values), each)]
        return [
            None if frame[0] is None else [value for value in frame if value is not None] for frame in frames
        ]


def _reply(connection: Connection) -> bool:
    """Whether a SET was done; False when memory is short. Raises other errors."""
    try:
        return bool(connection.read_response())
    except OutOfMemoryError:
        return False


def unlink_payloads(redis: Redis, names: Sequence[bytes], *, shard: int = 0) -> None:
    """Delete payloads of any model; unknown names are fine."""
    if names:
        redis.unlink(*(key for name in names for key in _keys(shard, name)))


def _keys(shard: int, name: bytes) -> tuple[bytes, bytes]:
    key = b"reprise%d:{p%d}:%s" % (LAYOUT, shard, name)
    return key, key + b"+"
