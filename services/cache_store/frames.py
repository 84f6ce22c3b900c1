"""Frames: how a block's KV values look in the store, and the checks before anybody uses them.

A frame is a header of 64 bytes and the payload, [layer][K|V][head][token][dim] in C order, so that one frame
is one contiguous copy to a device. Header, little-endian:

    0  magic        4s  b"RPKV"
    4  version      u8  1
    5  codec        u8  0 = the values as they are
    6  layers       u16
    8  tokens       u16
    10 reserved     u16 0
    12 fingerprint  8s  first half of the model's fingerprint, which covers the KV dtype and layout
    20 block        16s block hash
    36 parent       16s hash of the block before it, zeros for the first
    52 raw bytes    u32 of the decoded payload
    56 enc. bytes   u32 of the payload in the frame
    60 crc32        u32 of the 60 bytes above and the payload (zlib's polynomial)

`open_frame` believes nothing: a frame that is not exactly the one asked for is answered with the reason, for
a counter, and the caller computes the block instead.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from zlib import crc32

from services.wire.hashes import HASH_BYTES

HEADER_BYTES = 64
MAGIC = b"RPKV"
VERSION = 1
CODEC_RAW = 0

_FIELDS = struct.Struct("<4sBBHHH8s16s16sII")
_CRC = struct.Struct("<I")
_FINGERPRINT_BYTES = 8


class BadFrame(StrEnum):
    """Why a frame is not the block that was asked for."""

    MISSING = "missing"  # no value under the name
    TRUNCATED = "truncated"  # shorter or longer than its format says
    MAGIC = "magic"
    VERSION = "version"
    CODEC = "codec"
    FINGERPRINT = "fingerprint"  # another model, dtype or layout
    BLOCK = "block"  # another block
    SHAPE = "shape"  # other layers, tokens or lengths than the model has
    CRC = "crc"


@dataclass(frozen=True)
class FrameFormat:
    """What all frames of one model have in common. `payload_bytes` are those of one block."""

    fingerprint: bytes
    layers: int
    tokens: int
    payload_bytes: int

    def __post_init__(self) -> None:
        if len(self.fingerprint) != HASH_BYTES:
            raise ValueError(f"fingerprint must be {HASH_BYTES} bytes, got {len(self.fingerprint)}")
        for name, value, most in (
            ("layers", self.layers, 2**16 - 1),
            ("tokens", self.tokens, 2**16 - 1),
            ("payload_bytes", self.payload_bytes, 2**32 - 1 - HEADER_BYTES),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {value}")

    @property
    def frame_bytes(self) -> int:
        return HEADER_BYTES + self.payload_bytes


def frame_header(format: FrameFormat, block: bytes, parent: bytes, payload: memoryview) -> bytes:
    """The 64 bytes that go before `payload`, the block's KV values as contiguous bytes."""
    if payload.nbytes != format.payload_bytes:
        raise ValueError(f"payload must be {format.payload_bytes} bytes, got {payload.nbytes}")
    fields = _FIELDS.pack(
        MAGIC, VERSION, CODEC_RAW, format.layers, format.tokens, 0, format.fingerprint[:_FINGERPRINT_BYTES],
        block, parent, payload.nbytes, payload.nbytes,
    )  # fmt: skip
    return fields + _CRC.pack(crc32(payload, crc32(fields)))


def open_frame(
    format: FrameFormat, block: bytes, pieces: Sequence[bytes | memoryview]
) -> list[memoryview] | BadFrame:
    """The payload of `block` as views into `pieces`, which make up its frame, or what is wrong with it."""
    if sum(map(len, pieces)) != format.frame_bytes or len(pieces[0]) < HEADER_BYTES:
        return BadFrame.TRUNCATED
    first = memoryview(pieces[0])
    header = first[:HEADER_BYTES]
    magic, version, codec, layers, tokens, _, fingerprint, found, _, raw, encoded = _FIELDS.unpack_from(
        header
    )
    payload = [first[HEADER_BYTES:], *(memoryview(piece) for piece in pieces[1:])]
    checks = (
        (magic == MAGIC, BadFrame.MAGIC),
        (version == VERSION, BadFrame.VERSION),
        (codec == CODEC_RAW, BadFrame.CODEC),
        (fingerprint == format.fingerprint[:_FINGERPRINT_BYTES], BadFrame.FINGERPRINT),
        (found == block, BadFrame.BLOCK),
        ((layers, tokens) == (format.layers, format.tokens), BadFrame.SHAPE),
        (raw == encoded == format.payload_bytes, BadFrame.SHAPE),
    )
    for holds, reason in checks:
        if not holds:
            return reason
    crc = crc32(header[: _FIELDS.size])
    for piece in payload:
        crc = crc32(piece, crc)
    return payload if crc == _CRC.unpack_from(header, _FIELDS.size)[0] else BadFrame.CRC
