"""Blocks that leave and enter the pages of a device, and engines that share them."""

from __future__ import annotations

import time

import pytest
import torch

from kernels.kv_codec import decode, encode
from kernels.kv_payload import Codec
from services.worker import block_copies
from services.worker.block_copies import BlockCopies, Departure
from services.worker.kv import KVCache
from services.worker.models.random import random_model
from services.worker.tiers import EncodedBlock
from tests.gpu.test_engine import BLOCK, LENGTHS, agreement, model, requests
from tests.worker.stepping import MemoryStore, Stepped

DEVICE = "cuda"
SPEC = random_model().spec
codecs = pytest.mark.parametrize("codec", list(Codec))


def cache(seed: int | None = None) -> KVCache:
    kv = KVCache(SPEC, 64, BLOCK, torch.bfloat16, DEVICE)
    if seed is not None:
        kv.storage.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
    return kv


def blocks_of(departure: Departure) -> list[EncodedBlock]:
    deadline_s = time.monotonic() + 10
    while not departure.arrived():
        assert time.monotonic() < deadline_s, "it never arrived"
    seconds = departure.device_s()
    assert seconds is not None
    assert 0 < seconds < 10
    blocks = departure.blocks()
    assert None not in blocks
    return blocks  # type: ignore[return-value]


@codecs
def test_what_leaves_is_what_the_pages_held_whatever_comes_after(codec: Codec) -> None:
    kv = cache(seed=1)
    expected = encode(kv.storage.cpu(), range(64), codec)
    copies = BlockCopies(kv, codec)
    departures = []
    for first in range(0, 64, 8):  # none is waited for: memory that one gave back may be the next one's
        departures.append(copies.read(range(first, first + 8)))
        kv.storage[:, :, first : first + 8] = 7
    blocks = [block for departure in departures for block in blocks_of(departure)]
    assert all(torch.equal(block.payload, line) for block, line in zip(blocks, expected, strict=True))


@codecs
def test_what_enters_is_what_the_cpu_decodes_in_several_stages_too(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = cache()
    on_host = torch.randn(kv.storage.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    payloads = encode(on_host, range(20), codec)
    expected = torch.zeros_like(on_host)
    pages = list(range(40, 60))
    decode(payloads, expected, pages, codec)
    monkeypatch.setattr(block_copies, "_STAGED_BYTES", 3 * payloads.shape[1])
    BlockCopies(kv, codec).write(pages, [EncodedBlock(codec, payload) for payload in payloads])
    assert torch.equal(kv.storage.cpu(), expected)


@codecs
def test_engines_share_a_store_and_compile_nothing_for_it(codec: Codec) -> None:
    store = MemoryStore()
    settings = {
        "block_size": BLOCK, "pages": 256, "max_step_tokens": 600, "pipeline_depth": 2, "store_codec": codec,
    }  # fmt: skip
    one = Stepped(store, model(), **settings)
    one.engine.warm_up()
    cold = one.run(requests(), every=1)
    one.settle()
    assert {block.kv.codec for block in store.blocks.values()} == {codec}

    other = Stepped(store, model(), **settings)
    other.engine.warm_up()
    warm = other.run(requests(), every=1)
    loaded = {i: start.store_tokens for i, start in other.starts.items()}
    assert loaded == {i: length // BLOCK * BLOCK for i, length in enumerate(LENGTHS)}
    assert one.engine.counters.late_kernels == other.engine.counters.late_kernels == 0
    if codec is Codec.NONE:
        assert agreement(warm, cold) > 0.6  # random weights are sure of little
    storage = other.engine.kv.storage.cpu()
    expected = torch.zeros_like(storage[:, :, :1])
    for request in requests():
        for hash in request.hashes:
            decode(store.blocks[hash].kv.payload.unsqueeze(0), expected, [0], codec)
            assert torch.equal(storage[:, :, other.engine._pool._page_of[hash]], expected[:, :, 0])
    other.check_empty()
