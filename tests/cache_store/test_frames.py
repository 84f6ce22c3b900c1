from __future__ import annotations

import os
import struct
from typing import Any
from zlib import crc32

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.cache_store.frames import (
    CODEC_IDS,
    HEADER_BYTES,
    BadFrame,
    FrameFormat,
    frame_header,
    open_frame,
)

FORMAT = FrameFormat(fingerprint=bytes(range(16)), layers=3, tokens=16, payload_bytes=4096)
BLOCK, PARENT = b"b" * 16, b"p" * 16
PAYLOAD = os.urandom(4096)
FRAME = frame_header(FORMAT, BLOCK, PARENT, memoryview(PAYLOAD)) + PAYLOAD


def read(frame: bytes, format: FrameFormat = FORMAT, block: bytes = BLOCK) -> bytes | BadFrame:
    opened = open_frame(format, block, frame)
    return opened if isinstance(opened, BadFrame) else bytes(opened.data)


def test_a_frame_gives_its_payload_back_without_a_copy() -> None:
    opened = open_frame(FORMAT, BLOCK, FRAME)
    assert not isinstance(opened, BadFrame)
    assert opened.codec == "none"
    assert opened.data.obj is FRAME
    assert opened.data == PAYLOAD


def test_the_header_takes_64_bytes() -> None:
    assert len(FRAME) - len(PAYLOAD) == HEADER_BYTES == 64
    assert FORMAT.frame_bytes == len(FRAME)


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("at", [*range(HEADER_BYTES), HEADER_BYTES, 1000, len(FRAME) - 1])
def test_no_bit_can_flip_unnoticed(at: int, bit: int) -> None:
    frame = bytearray(FRAME)
    frame[at] ^= 1 << bit
    expected = {
        **dict.fromkeys(range(0, 4), BadFrame.MAGIC),
        4: BadFrame.VERSION,
        5: BadFrame.COARSER if bit == 0 else BadFrame.CODEC,
        **dict.fromkeys(range(6, 10), BadFrame.SHAPE),
        **dict.fromkeys(range(12, 20), BadFrame.FINGERPRINT),
        **dict.fromkeys(range(20, 36), BadFrame.BLOCK),
        **dict.fromkeys(range(52, 60), BadFrame.SHAPE),
    }
    assert read(bytes(frame)) is expected.get(at, BadFrame.CRC)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(FRAME) - 1, len(FRAME) + 1])
def test_a_frame_of_another_length_is_refused(length: int) -> None:
    assert read((FRAME + b"more")[:length]) is BadFrame.TRUNCATED


def test_a_frame_of_another_model_is_refused() -> None:
    other = FrameFormat(b"x" * 16, FORMAT.layers, FORMAT.tokens, FORMAT.payload_bytes)
    assert read(FRAME, format=other) is BadFrame.FINGERPRINT


def test_the_frame_of_another_block_is_refused() -> None:
    assert read(FRAME, block=b"c" * 16) is BadFrame.BLOCK


# ---- codecs ---------------------------------------------------------------------------------------------

#: Lengths of a block's payload by codec, as they might be.
SIZES = {"none": 4096, "int8": 2112, "fp8": 2112, "k8v4": 1700}


def format_of(codec: str, *takes: str) -> FrameFormat:
    others = {name: SIZES[name] for name in takes}
    return FrameFormat(bytes(range(16)), 3, 16, SIZES[codec], codec, others, raw_bytes=SIZES["none"])


def frame_of(codec: str) -> bytes:
    payload = os.urandom(SIZES[codec])
    return frame_header(format_of(codec), BLOCK, PARENT, memoryview(payload)) + payload


def forged(frame: bytes, at: int, value: bytes) -> bytes:
    """A frame that says otherwise at one place, its checksum right."""
    header = bytearray(frame[:60])
    header[at : at + len(value)] = value
    return bytes(header) + struct.pack("<I", crc32(frame[64:], crc32(header))) + frame[64:]


@pytest.mark.parametrize("codec", CODEC_IDS)
def test_a_frame_says_its_codec_and_every_reader_that_takes_it_gets_the_payload(codec: str) -> None:
    frame = frame_of(codec)
    assert frame[5] == CODEC_IDS[codec]
    for reader in (format_of(codec), format_of("k8v4", "none", "int8", "fp8")):
        opened = open_frame(reader, BLOCK, frame)
        assert not isinstance(opened, BadFrame)
        assert opened.codec == codec
        assert opened.data == frame[HEADER_BYTES:]


def test_a_frame_of_a_codec_that_the_reader_does_not_take_is_refused_as_coarser() -> None:
    assert read(frame_of("k8v4"), format_of("int8", "none")) is BadFrame.COARSER
    assert read(frame_of("fp8"), format_of("int8", "none")) is BadFrame.COARSER, "of the same length"


@pytest.mark.parametrize("number", [len(CODEC_IDS), 100, 255])
def test_an_unknown_codec_is_refused(number: int) -> None:
    assert read(forged(FRAME, 5, bytes([number]))) is BadFrame.CODEC


@pytest.mark.parametrize("codec", CODEC_IDS)
def test_lengths_that_do_not_match_the_codec_are_refused(codec: str) -> None:
    reader = format_of("k8v4", "none", "int8", "fp8")
    frame = frame_of(codec)
    for other in {*SIZES.values(), 0, 2**32 - 1} - {SIZES[codec]}:
        assert read(forged(frame, 56, struct.pack("<I", other)), reader) is BadFrame.SHAPE
    assert read(forged(frame, 52, struct.pack("<I", SIZES["none"] - 1)), reader) is BadFrame.SHAPE
    for length in (40, HEADER_BYTES, len(frame) - 1):
        assert read(frame[:length], reader) is BadFrame.TRUNCATED
    assert read(frame + b"0", reader) is BadFrame.TRUNCATED


def test_one_codec_in_anothers_clothes_is_of_the_wrong_length() -> None:
    reader = format_of("k8v4", "none", "int8", "fp8")
    for codec in ("none", "int8", "fp8"):
        assert read(forged(frame_of(codec), 5, bytes([CODEC_IDS["k8v4"]])), reader) is BadFrame.SHAPE


#: Where the header's fields begin and end, and what a reader says of another's. The codec is above.
#: Nobody looks at what is reserved, nor at the parent: a block's hash is made from it.
FIELDS = {
    BadFrame.MAGIC: [(0, 4)],
    BadFrame.VERSION: [(4, 5)],
    BadFrame.FINGERPRINT: [(12, 20)],
    BadFrame.BLOCK: [(20, 36)],
    BadFrame.SHAPE: [(6, 8), (8, 10), (52, 56), (56, 60)],
}


@given(st.sampled_from([(why, at) for why, places in FIELDS.items() for at in places]), st.data())
def test_a_field_that_says_otherwise_is_refused_by_name_even_under_a_right_checksum(
    field: tuple[BadFrame, tuple[int, int]], data: st.DataObject
) -> None:
    reason, (start, end) = field
    value = data.draw(st.binary(min_size=end - start, max_size=end - start))
    assume(value != FRAME[start:end])
    assert read(forged(FRAME, start, value)) is reason


@given(st.dictionaries(st.integers(0, len(FRAME) - 1), st.integers(1, 255), min_size=1, max_size=40))
def test_no_damage_goes_unnoticed(damage: dict[int, int]) -> None:
    frame = bytearray(FRAME)
    for at, bits in damage.items():
        frame[at] ^= bits
    assert isinstance(read(bytes(frame)), BadFrame)


@given(st.integers(0, len(FRAME) - 1), st.binary(max_size=100))
def test_a_frame_that_is_cut_anywhere_is_truncated_whatever_comes_after_it(end: int, rest: bytes) -> None:
    assert read(FRAME[:end]) is BadFrame.TRUNCATED
    assume(FRAME[:end] + rest != FRAME)
    assert isinstance(read(FRAME[:end] + rest), BadFrame)


@given(st.binary(max_size=200))
def test_any_garbage_is_a_reason(garbage: bytes) -> None:
    assert isinstance(read(garbage), BadFrame)


@given(st.binary(min_size=len(FRAME), max_size=len(FRAME)))
def test_garbage_is_never_a_frame(garbage: bytes) -> None:
    assert isinstance(read(garbage), BadFrame)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": b"short"}, "fingerprint must be 16 bytes, got 5"),
        ({"layers": 0}, "layers must be 1 to 65535, got 0"),
        ({"tokens": 1 << 16}, "tokens must be 1 to 65535, got 65536"),
        ({"payload_bytes": 1 << 32}, "payload_bytes must be 1 to"),
        ({"raw_bytes": 0}, "raw_bytes must be 1 to"),
        ({"codec": "zip"}, "codec must be one of none, int8, fp8, k8v4, got 'zip'"),
        ({"takes": {"zip": 3}}, "codec must be one of none, int8, fp8, k8v4, got 'zip'"),
        ({"takes": {"int8": 0}}, "payload_bytes must be 1 to"),
    ],
)
def test_a_format_that_no_header_can_say_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"fingerprint": bytes(16), "layers": 1, "tokens": 16, "payload_bytes": 64, **changes}
    with pytest.raises(ValueError, match=message):
        FrameFormat(**arguments)


def test_a_payload_of_another_length_makes_no_frame() -> None:
    with pytest.raises(ValueError, match="payload must be 4096 bytes, got 10"):
        frame_header(FORMAT, BLOCK, PARENT, memoryview(bytes(10)))
