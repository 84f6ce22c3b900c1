from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from services.cache_store.address import Address
from services.cache_store.allocation import MAX_PIECES, piece_lengths, size_class, stored_bytes
from services.cache_store.embedded import LocalRedis
from services.cache_store.frames import HEADER_BYTES, FrameFormat
from services.cache_store.functions import FENCE_BYTES
from services.cache_store.lanes import Lanes
from services.cache_store.payloads import Payloads
from services.cache_store.pool import ConnectionPool
from services.wire.hashes import HASH_BYTES

KIB, MIB = 1 << 10, 1 << 20

#: layers * 2 * kv_heads * tokens * head_dim * bytes
MODELS = {
    "SmolLM2-135M, 16 tokens, fp16": 30 * 2 * 3 * 16 * 64 * 2,
    "SmolLM2-135M, 16 tokens, fp32": 30 * 2 * 3 * 16 * 64 * 4,
    "Qwen3-0.6B, 64 tokens, bf16": 28 * 2 * 8 * 64 * 128 * 2,
    "Llama-3.1-8B, 16 tokens, bf16": 32 * 2 * 8 * 16 * 128 * 2,
    "Llama-3.1-8B, 64 tokens, fp8": 32 * 2 * 8 * 64 * 128,
    "Qwen3-30B-A3B, 64 tokens, bf16": 48 * 2 * 4 * 64 * 128 * 2,
    "Llama-3.1-70B on four, 64 tokens, bf16": 80 * 2 * 2 * 64 * 128 * 2,
}


@given(st.integers(1, 1 << 32))
def test_a_size_class_holds_its_size_and_wastes_a_quarter_at_most(size: int) -> None:
    chosen = size_class(size)
    assert size <= chosen < size * 1.25 + 16
    assert size_class(chosen) == chosen


def test_size_classes_are_those_of_jemalloc() -> None:
    classes = sorted({size_class(size) for size in range(256 * KIB, 1024 * KIB, 1000)})
    assert classes == [size * KIB for size in (256, 320, 384, 448, 512, 640, 768, 896, 1024)]


@given(st.integers(HEADER_BYTES + 1, 1 << 28))
def test_pieces_make_up_the_frame_are_few_and_the_first_holds_the_header(frame_bytes: int) -> None:
    pieces = piece_lengths(frame_bytes)
    assert sum(pieces) == frame_bytes
    assert len(pieces) <= MAX_PIECES
    assert pieces[0] >= HEADER_BYTES
    assert min(pieces) > 0


@given(st.integers(128 * KIB, 1 << 28))  # below, a block's records and its ghost weigh more
def test_no_frame_wastes_more_than_two_percent(frame_bytes: int) -> None:
    assert stored_bytes(frame_bytes) < frame_bytes * 1.02


@given(st.integers(32 * KIB, 1 << 28))
def test_values_are_at_most_a_mebibyte_while_sixteen_hold_the_frame(frame_bytes: int) -> None:
    assert max(piece_lengths(frame_bytes)) < max(MIB, frame_bytes / 16 * 1.25)


@pytest.mark.parametrize("payload_bytes", MODELS.values(), ids=MODELS.keys())
def test_frames_of_usual_models_waste_less_than_half_a_percent(payload_bytes: int) -> None:
    frame_bytes = FrameFormat(bytes(16), 1, 16, payload_bytes).frame_bytes
    assert stored_bytes(frame_bytes) < payload_bytes * 1.005


def test_a_payload_of_a_power_of_two_would_waste_a_quarter_in_one_piece_and_nothing_in_three() -> None:
    frame_bytes = HEADER_BYTES + (2 << 20)
    assert size_class(frame_bytes) / (2 << 20) == 1.25
    assert stored_bytes(frame_bytes) / (2 << 20) < 1.001


@pytest.mark.parametrize("payload_bytes", [20_000, 360 * KIB, 512 * KIB, 2048 * KIB])
def test_redis_takes_hardly_more_memory_than_is_charged(
    redis: Redis, redis_server: LocalRedis, payload_bytes: int
) -> None:
    frame_bytes = HEADER_BYTES + payload_bytes
    pool = ConnectionPool(Address.from_url(redis_server.socket_url), 5.0)
    payloads = Payloads(pool, Lanes(), frame_bytes, timeout_s=5.0)
    payload = memoryview(os.urandom(payload_bytes))

    def put(count: int) -> None:
        for _ in range(count):
            name = os.urandom(HASH_BYTES + FENCE_BYTES)
            assert payloads.put([(name, bytes(HEADER_BYTES), payload)]) == [True]

    count = max(64, (16 << 20) // payload_bytes)
    put(1)
    before = redis.info("memory")["used_memory"]
    put(count)
    used = redis.info("memory")["used_memory"] - before
    slack = 128 * KIB + count * 5 * KIB  # connections' buffers; without jemalloc values round to pages
    assert 0.9 * count * payload_bytes < used <= count * stored_bytes(frame_bytes) + slack
    pool.close()
