"""Frames: `u32 little-endian length | msgpack`, written in one piece and cut out of the byte stream."""

from __future__ import annotations

import struct

import msgspec

#: What a peer may send before it has proved that it knows the secret.
HANDSHAKE_FRAME_BYTES = 64 * 1024
#: Largest frame to a worker: a Submit of three million tokens fits.
TO_WORKER_FRAME_BYTES = 16 * 1024 * 1024
#: Largest frame to a router: TextAssets (tokenizers reach 35 MB) and snapshots of four million blocks fit.
TO_ROUTER_FRAME_BYTES = 64 * 1024 * 1024

_LENGTH = struct.Struct("<I")
_encode = msgspec.msgpack.Encoder().encode


class FrameError(ValueError):
    """The peer sent something that is not a frame of this channel; the message says what."""


def encode_frame(message: msgspec.Struct) -> bytes:
    """`message` as one frame, ready to write."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frame bodies.

    Every byte is copied at most twice whatever the sizes of frames and reads: bodies are views into the
    read they came in, and an unfinished frame is looked at again only when all of it has arrived.
    """

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._partial = bytearray()
        self._needed = 0  # bytes that `_partial` must reach before it holds anything new

    def feed(self, data: bytes) -> list[memoryview]:
        """The bodies that `data` completes, in order; valid as long as the caller holds them.

        Raises FrameError as soon as a frame announces more than `max_frame_bytes`, before buffering it.
        """
        buffer: bytes | bytearray = data
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed:
                return []
            buffer = self._partial
        view = memoryview(buffer)
        end = len(buffer)
        bodies: list[memoryview] = []
        start = 0
        while True:
            body = start + _LENGTH.size
            if body > end:
                self._needed = _LENGTH.size
                break
            length = _LENGTH.unpack_from(buffer, start)[0]
            if length > self.max_frame_bytes:
                raise FrameError(f"frame of {length} bytes exceeds the limit of {self.max_frame_bytes}")
            if body + length > end:
                self._needed = _LENGTH.size + length
                break
            start = body + length
            bodies.append(view[body:start])
        self._partial = bytearray(view[start:])
        return bodies
