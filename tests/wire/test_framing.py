import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.wire.framing import FrameError, FrameReader, encode_frame
from services.wire.messages import Cancel, ToWorker


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def test_a_frame_is_its_length_in_four_little_endian_bytes_and_a_message():
    data = encode_frame(Cancel(7))
    assert struct.unpack("<I", data[:4])[0] == len(data) - 4
    assert msgspec.msgpack.decode(data[4:], type=ToWorker) == Cancel(7)


@given(bodies=st.lists(st.binary(max_size=40), max_size=12), data=st.data())
def test_however_the_stream_is_cut_into_reads_the_frames_are_the_same(bodies, data):
    stream = b"".join(map(frame, bodies))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader(max_frame_bytes=40)
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += [bytes(body) for body in reader.feed(stream[start:end])]
    assert got == bodies


def test_a_frame_that_arrives_byte_by_byte_is_complete_with_its_last_byte():
    reader = FrameReader(max_frame_bytes=100)
    stream = frame(b"x" * 50)
    assert [reader.feed(stream[i : i + 1]) for i in range(len(stream) - 1)] == [[]] * (len(stream) - 1)
    assert reader.feed(stream[-1:]) == [b"x" * 50]


def test_a_frame_that_announces_too_much_is_refused_before_its_body_comes():
    reader = FrameReader(max_frame_bytes=100)
    assert reader.feed(frame(b"x" * 100)) == [b"x" * 100]
    with pytest.raises(FrameError, match="101 bytes exceeds the limit of 100"):
        reader.feed(struct.pack("<I", 101))


def test_bodies_stay_valid_while_later_reads_are_fed():
    reader = FrameReader(max_frame_bytes=100)
    stream = frame(b"first") + frame(b"second") + frame(b"third")
    early = reader.feed(stream[:12])
    late = reader.feed(stream[12:])
    assert [bytes(body) for body in early + late] == [b"first", b"second", b"third"]
