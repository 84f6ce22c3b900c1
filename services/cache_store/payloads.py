"""Payloads: frames as plain string values, read and written in batches over connections of their own.

A frame is one value or several (see allocation.piece_lengths): under its name, then under name + "+", name +
"++" and so on. They never pass through a function: a script would copy each a few times on the server's only
thread. This class is the one place that knows how bytes travel.

Reads are GETs, a few under way at a time: while one value is received and checked the server prepares the
next, and neither side ever holds more than the window. One MGET for all would have the server copy all values
together before it sends the first: half as fast on Valkey 8.1 (benchmarks/store.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from redis import Redis

from services.cache_store.allocation import MAX_PIECES, piece_lengths
from services.cache_store.connection import Buffer, PayloadConnection, ServerRefused, command
from services.cache_store.functions import LAYOUT
from services.cache_store.lanes import Lane, Lanes
from services.cache_store.pool import ConnectionPool

#: At most so many bytes are moved in one turn.
BATCH_BYTES = 8 << 20

#: Bytes asked for and not yet received, two values at least.
_WINDOW_BYTES = 1 << 20

#: A value that no record knows (its writer died at the wrong moment) goes away by itself after a day. One
#: that is known goes too: its block is found missing once and written again.
_BACKSTOP_MS = 24 * 3600 * 1000
_PX = b"$2\r\nPX\r\n$%d\r\n%d\r\n" % (len(str(_BACKSTOP_MS)), _BACKSTOP_MS)

#: Memory of a frame begins at a multiple of so many bytes: of a cache line, and of any dtype's size.
_ALIGNMENT = 64


class Payloads:
    """The payloads of one shard. Frames of `frame_bytes` are written; those read may also be as long as
    `others` says.

    Raises OSError and what redis-py raises, LaneBusy when others keep the link busy. Thread-safe.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        lanes: Lanes,
        frame_bytes: int,
        *,
        timeout_s: float,
        shard: int = 0,
        others: Sequence[int] = (),
    ) -> None:
        self._pool = pool
        self._lanes = lanes
        self._shard = shard
        self._frame_bytes = frame_bytes
        self._timeout_s = timeout_s
        self._lengths = piece_lengths(frame_bytes)
        self._window = max(2, _WINDOW_BYTES // max(self._lengths))  # values
        self._most_pieces = max(len(piece_lengths(length)) for length in (frame_bytes, *others))
        self._longest = max(frame_bytes, *others, 0)
        self.batch = max(1, BATCH_BYTES // self._longest)  # frames
        self.slot_bytes = -(-self._longest // _ALIGNMENT) * _ALIGNMENT  # memory that a frame is read into

    def put(self, items: Sequence[tuple[bytes, bytes, Buffer]]) -> list[bool]:
        """Write (name, header, payload) each, at most `batch` of them. False: Redis has no memory for it."""
        if not items:
            return []
        size = len(items) * self._frame_bytes

        def write(connection: PayloadConnection) -> list[bool]:
            connection.expect(size)
            for buffers in self._set_commands(items):
                self._lanes.give_way(Lane.PUT)
                connection.send(buffers)
            replies = [_stored(connection) for _ in range(len(items) * len(self._lengths))]
            each = len(self._lengths)
            return [all(replies[at : at + each]) for at in range(0, len(replies), each)]

        with self._lanes.turn(Lane.PUT, size, self._timeout_s):
            return self._pool.run(write)

    def get(
        self,
        names: Sequence[bytes],
        memory: memoryview,
        lane: Lane,
        take: Callable[[int, memoryview | None], bool],
    ) -> None:
        """Read frames, at most `batch`, frame i to the start of the i-th `slot_bytes` of `memory`.

        `take(i, frame)` is called for each in order while the next one is under way, with the part of memory
        that its values fill, up to the first that is missing or does not fit; None if that is the first of
        all. Whether it is the frame that it should be is for `take` to see; it returns whether to go on.
        """
        if not names:
            return
        size = len(names) * self._longest
        taken = 0

        def read(connection: PayloadConnection) -> None:
            nonlocal taken  # a second call goes on where the first was when its connection died
            connection.expect(size)
            keys = [key for name in names[taken:] for key in _keys(self._shard, name, self._most_pieces)]
            asks = [command(b"GET", key) for key in keys]
            connection.send(
                asks[:1]
            )  # alone: the server begins with it, and does not collect all answers first
            asked, answered = 1, 0
            while taken < len(names):
                start = taken * self.slot_bytes
                slot = memory[start : start + self._longest]
                length, missing, ended = 0, False, False
                for piece in range(self._most_pieces):
                    if asked < len(asks) and asked - answered <= self._window // 2:
                        self._lanes.give_way(lane)
                        more = asks[asked : answered + self._window]
                        connection.send([b"".join(more)])
                        asked += len(more)
                    received = connection.value(slot[length:])
                    answered += 1
                    if received is None or received > len(slot) - length:
                        missing |= received is None and not piece
                        ended = True
                    elif not ended:
                        length += received
                taken += 1
                if not take(taken - 1, None if missing else slot[:length]):
                    for _ in range(asked - answered):
                        connection.value(memory[:0])
                    return

        with self._lanes.turn(lane, size, self._timeout_s):
            self._pool.run(read)

    def _set_commands(self, items: Sequence[tuple[bytes, bytes, Buffer]]) -> Iterator[list[Buffer]]:
        """SET commands as buffers to send one after the other, the payloads themselves among them; some
        values at a time."""
        buffers: list[Buffer] = []
        text, size = b"", 0
        for name, header, payload in items:
            left = memoryview(payload)
            for key, length in zip(self._keys(name), self._lengths, strict=True):
                text += b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, length)
                text += header
                of_payload = length - len(header)
                buffers += [text, left[:of_payload]]
                left, header = left[of_payload:], b""
                text = b"\r\n" + _PX
                size += length
                if size >= _WINDOW_BYTES:
                    yield [*buffers, text]
                    buffers, text, size = [], b"", 0
        if buffers:
            yield [*buffers, text]

    def _keys(self, name: bytes) -> Sequence[bytes]:
        return _keys(self._shard, name, len(self._lengths))


def _stored(connection: PayloadConnection) -> bool:
    """Whether a SET was done; False when memory is short. Raises other errors."""
    try:
        connection.status()
    except ServerRefused as error:
        if error.code != "OOM":
            raise
        return False
    return True


def unlink_payloads(redis: Redis, names: Sequence[bytes], *, shard: int = 0) -> None:
    """Delete payloads of any model; unknown names are fine."""
    if names:
        redis.unlink(*(key for name in names for key in _keys(shard, name, MAX_PIECES)))


def _keys(shard: int, name: bytes, count: int) -> list[bytes]:
    key = b"reprise%d:{p%d}:%s" % (LAYOUT, shard, name)
    return [key + b"+" * piece for piece in range(count)]
