from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_store.frames import HEADER_BYTES, BadFrame, FrameFormat, frame_header, open_frame

FORMAT = FrameFormat(fingerprint=bytes(range(16)), layers=3, tokens=16, payload_bytes=4096)
BLOCK, PARENT = b"b" * 16, b"p" * 16
PAYLOAD = os.urandom(4096)
FRAME = frame_header(FORMAT, BLOCK, PARENT, memoryview(PAYLOAD)) + PAYLOAD


def read(frame: bytes, format: FrameFormat = FORMAT, block: bytes = BLOCK) -> bytes | BadFrame:
    opened = open_frame(format, block, [frame])
    return opened if isinstance(opened, BadFrame) else b"".join(opened)


def test_a_frame_gives_its_payload_back_without_a_copy() -> None:
    opened = open_frame(FORMAT, BLOCK, [FRAME])
    assert not isinstance(opened, BadFrame)
    assert [(view.obj is FRAME, bytes(view)) for view in opened] == [(True, PAYLOAD)]


@given(st.integers(HEADER_BYTES, len(FRAME) - 1))
def test_a_frame_in_two_pieces_is_the_same_frame(cut: int) -> None:
    opened = open_frame(FORMAT, BLOCK, [FRAME[:cut], FRAME[cut:]])
    assert not isinstance(opened, BadFrame)
    assert b"".join(opened) == PAYLOAD


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
        5: BadFrame.CODEC,
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
    ],
)
def test_a_format_that_no_header_can_say_is_refused(changes: dict[str, int], message: str) -> None:
    arguments = {"fingerprint": bytes(16), "layers": 1, "tokens": 16, "payload_bytes": 64, **changes}
    with pytest.raises(ValueError, match=message):
        FrameFormat(**arguments)


def test_a_payload_of_another_length_makes_no_frame() -> None:
    with pytest.raises(ValueError, match="payload must be 4096 bytes, got 10"):
        frame_header(FORMAT, BLOCK, PARENT, memoryview(bytes(10)))
