"""Frames: how a block's KV values look in the store, and the checks before anybody uses them.

A frame is a header of 64 bytes and the payload, which a codec made of the block's values and which is
contiguous, layer after layer: one copy to a device. Header, little-endian:

    0  magic        4s  b"RPKV"
    4  version      u8  1
    5  codec        u8  see CODEC_IDS
    6  layers       u16
    8  tokens       u16
    10 reserved     u16 0
    12 fingerprint  8s  first half of the model's fingerprint, which covers the KV dtype and layout
    20 block        16s block hash
    36 parent       16s hash of the block before it, zeros for the first
    52 raw bytes    u32 of the block's values as they are (codec none)
    56 enc. bytes   u32 of the payload in the frame
    60 crc32        u32 of the 60 bytes above and the payload (zlib's polynomial)

`open_frame` believes nothing: a frame that is not exactly the one asked for is answered with the reason, for
a counter, and the caller computes the block instead.

The codec is in the header and not in the fingerprint: the fingerprint roots the names of blocks, and a block
has one name in a GPU's pages, the router's index and the store, however it travels. So workers of different
codecs share routing and most frames, and changing the codec of a fleet, worker by worker, loses nothing. What
a reader's own codec promises holds all the same: it takes frames of codecs that are as exact or more, and
answers COARSER to others. Such a frame is then dropped like a bad one, so the next writer may store the block
anew, more exactly; frames never change the other way, so two workers cannot do this to each other for ever.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple
from zlib import crc32

from services.wire.hashes import HASH_BYTES

HEADER_BYTES = 64
MAGIC = b"RPKV"
VERSION = 1

#: By name. An id means the same bytes for ever: a codec that changes them gets another one.
CODEC_IDS = {"none": 0, "int8": 1, "fp8": 2, "k8v4": 3}
_CODEC_NAMES = {number: name for name, number in CODEC_IDS.items()}

_FIELDS = struct.Struct("<4sBBHHH8s16s16sII")
_CRC = struct.Struct("<I")
_FINGERPRINT_BYTES = 8


class BadFrame(StrEnum):
    """Why a frame is not the block that was asked for."""

    MISSING = "missing"  # no value under the name
    TRUNCATED = "truncated"  # shorter or longer than its format says
    MAGIC = "magic"
    VERSION = "version"
    CODEC = "codec"  # unknown
    COARSER = "coarser"  # known, and less exact than the reader's own
    FINGERPRINT = "fingerprint"  # another model, dtype or layout
    BLOCK = "block"  # another block
    SHAPE = "shape"  # other layers, tokens or lengths than the model has
    CRC = "crc"
    SCALES = "scales"  # numbers in the payload that make NaN or infinity of values; found by the decoder

    @property
    def taints(self) -> bool:
        """Whether blocks that follow it are wrong too.

        A frame that was lost, damaged or mixed up in the store taints nobody. Its block's values were right
        at its writer; and no other worker has ever computed from the frame, for all refuse it before. So what
        follows was computed from right values and has frames of its own that say so: it is kept, and found
        again once one writer has replaced the one bad frame. Otherwise a flipped bit in a system prompt would
        cost every conversation that begins with it.

        SCALES is the other case. The checksum is right: so it is what the writer had, in its memory, and what
        it then computed from, block after block. (Workers look before they write; this one's memory, kernels
        or release were at fault.) NaN spreads and would be noticed block by block, but what stayed finite
        beside it deserves no trust, so all that follows goes. That also loses what others may have computed
        there from right values; but who wrote what is not known, and a block less is only slower.
        """
        return self is BadFrame.SCALES


@dataclass(frozen=True)
class FrameFormat:
    """What all frames of one model have in common for one worker, which writes payloads of `payload_bytes`
    with `codec`. It also takes those of the codecs in `takes`, whose payloads have the bytes given there."""

    fingerprint: bytes
    layers: int
    tokens: int
    payload_bytes: int
    codec: str = "none"
    takes: Mapping[str, int] = field(default_factory=dict)
    raw_bytes: int | None = None  # of a block's values as they are; None = payload_bytes

    def __post_init__(self) -> None:
        if len(self.fingerprint) != HASH_BYTES:
            raise ValueError(f"fingerprint must be {HASH_BYTES} bytes, got {len(self.fingerprint)}")
        for codec in (self.codec, *self.takes):
            if codec not in CODEC_IDS:
                raise ValueError(f"codec must be one of {', '.join(CODEC_IDS)}, got {codec!r}")
        for name, value, most in (
            ("layers", self.layers, 2**16 - 1),
            ("tokens", self.tokens, 2**16 - 1),
            *(("payload_bytes", size, 2**32 - 1 - HEADER_BYTES) for size in self.payload_sizes.values()),
            ("raw_bytes", self.decoded_bytes, 2**32 - 1),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {value}")

    @property
    def frame_bytes(self) -> int:
        """Of the frames that are written."""
        return HEADER_BYTES + self.payload_bytes

    @property
    def decoded_bytes(self) -> int:
        return self.payload_bytes if self.raw_bytes is None else self.raw_bytes

    @property
    def payload_sizes(self) -> dict[str, int]:
        """Bytes of the payloads that are taken, by codec."""
        return {**self.takes, self.codec: self.payload_bytes}


class Payload(NamedTuple):
    """A payload that was checked, a view into its frame, and what it was made with."""

    codec: str
    data: memoryview


def frame_header(format: FrameFormat, block: bytes, parent: bytes, payload: memoryview) -> bytes:
    """The 64 bytes that go before `payload`, the block's KV values by the format's codec."""
    if payload.nbytes != format.payload_bytes:
        raise ValueError(f"payload must be {format.payload_bytes} bytes, got {payload.nbytes}")
    fields = _FIELDS.pack(
        MAGIC, VERSION, CODEC_IDS[format.codec], format.layers, format.tokens, 0,
        format.fingerprint[:_FINGERPRINT_BYTES], block, parent, format.decoded_bytes, payload.nbytes,
    )  # fmt: skip
    return fields + _CRC.pack(crc32(payload, crc32(fields)))


def open_frame(format: FrameFormat, block: bytes, frame: bytes | memoryview) -> Payload | BadFrame:
    """The payload in the frame of `block`, or what is wrong with it."""
    if len(frame) < HEADER_BYTES:
        return BadFrame.TRUNCATED
    whole = memoryview(frame)
    header, data = whole[:HEADER_BYTES], whole[HEADER_BYTES:]
    magic, version, number, layers, tokens, _, fingerprint, found, _, raw, encoded = _FIELDS.unpack_from(
        header
    )
    codec = _CODEC_NAMES.get(number, "")
    sizes = format.payload_sizes
    checks = (
        (magic == MAGIC, BadFrame.MAGIC),
        (version == VERSION, BadFrame.VERSION),
        (codec in CODEC_IDS, BadFrame.CODEC),
        (fingerprint == format.fingerprint[:_FINGERPRINT_BYTES], BadFrame.FINGERPRINT),
        (found == block, BadFrame.BLOCK),
        ((layers, tokens, raw) == (format.layers, format.tokens, format.decoded_bytes), BadFrame.SHAPE),
        (codec in sizes, BadFrame.COARSER),
        (encoded == sizes.get(codec), BadFrame.SHAPE),
        (len(data) == encoded, BadFrame.TRUNCATED),
    )
    for holds, reason in checks:
        if not holds:
            return reason
    crc = crc32(data, crc32(header[: _FIELDS.size]))
    return Payload(codec, data) if crc == _CRC.unpack_from(header, _FIELDS.size)[0] else BadFrame.CRC
