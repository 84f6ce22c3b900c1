from __future__ import annotations

import pytest
import torch

from kernels.kv_payload import Codec
from services.worker.block_copies import BlockCopies
from services.worker.kv import KVCache
from services.worker.models.random import random_model
from services.worker.tiers import EncodedBlock
from tests.worker.requests import make_request, prompt
from tests.worker.stepping import MemoryStore, Stepped

SPEC = random_model().spec
codecs = pytest.mark.parametrize("codec", list(Codec))


def cache(seed: int | None = None) -> KVCache:
    kv = KVCache(SPEC, 8, 16, torch.float32, "cpu")
    if seed is not None:
        kv.storage.normal_(generator=torch.Generator().manual_seed(seed))
    return kv


def read(copies: BlockCopies, pages: list[int]) -> list[EncodedBlock]:
    departure = copies.read(pages)
    assert departure.arrived()
    blocks = departure.blocks()
    assert None not in blocks
    return blocks  # type: ignore[return-value]


@codecs
def test_a_page_written_is_the_page_read_in_every_layer(codec: Codec) -> None:
    one, other = cache(seed=1), cache()
    BlockCopies(other, codec).write([5, 2], read(BlockCopies(one, codec), [0, 7]))
    tolerance = {Codec.NONE: 0.0, Codec.INT8: 0.02, Codec.FP8: 0.25, Codec.K8V4: 0.3}[codec]
    for source, target in ((0, 5), (7, 2)):
        error = (one.storage[:, :, source] - other.storage[:, :, target]).abs().max()
        assert error <= tolerance
        assert (error == 0) == (codec is Codec.NONE)
    assert other.storage[:, :, [0, 1, 3, 4, 6, 7]].count_nonzero() == 0


def test_a_block_that_was_read_is_a_copy_of_its_own() -> None:
    kv = cache(seed=1)
    (block,) = read(BlockCopies(kv, Codec.NONE), [3])
    before = block.payload.clone()
    kv.storage.fill_(1)
    assert torch.equal(block.payload, before)
    assert block.payload.nbytes == kv.bytes_per_page


def test_blocks_of_different_codecs_go_to_their_own_pages() -> None:
    one, other = cache(seed=1), cache()
    pages = [3, 0, 6, 1, 4]
    mixed = [Codec.INT8, Codec.NONE, Codec.NONE, Codec.K8V4, Codec.INT8]
    blocks = [read(BlockCopies(one, codec), [page])[0] for page, codec in zip(pages, mixed, strict=True)]
    BlockCopies(other, Codec.K8V4).write(pages, blocks)
    assert (one.storage - other.storage)[:, :, pages].abs().max() < 0.3
    assert torch.equal(one.storage[:, :, [0, 6]], other.storage[:, :, [0, 6]])
    assert other.storage[:, :, [2, 5, 7]].count_nonzero() == 0


@pytest.mark.parametrize("wrong", ["longer", "shorter", "dtype", "codec"])
def test_a_payload_that_does_not_fit_is_refused_and_nothing_is_written(wrong: str) -> None:
    kv = cache()
    copies = BlockCopies(kv, Codec.INT8)
    good = read(BlockCopies(cache(seed=1), Codec.INT8), [0])[0]
    bad = {
        "longer": EncodedBlock(Codec.INT8, torch.cat([good.payload, good.payload])),
        "shorter": EncodedBlock(Codec.INT8, good.payload[:-1]),
        "dtype": EncodedBlock(Codec.INT8, good.payload.to(torch.int16)),
        "codec": EncodedBlock(Codec.K8V4, good.payload),
    }[wrong]
    with pytest.raises(ValueError, match="payload must be uint8"):
        copies.write([0, 1], [good, bad])
    assert kv.storage.count_nonzero() == 0


@codecs
def test_a_block_that_is_not_finite_is_told_where_the_codec_can_tell(codec: Codec) -> None:
    kv = cache(seed=1)
    kv.storage[1, 1, 4, 0, 3, 2] = torch.nan
    blocks = BlockCopies(kv, codec).read([0, 4, 1]).blocks()
    assert [block is None for block in blocks] == [False, codec is not Codec.NONE, False]


# ---- in the engine --------------------------------------------------------------------------------------


@codecs
def test_engines_share_blocks_by_every_codec(codec: Codec) -> None:
    store = MemoryStore()
    requests = [make_request(i, prompt(length, seed=i), max_tokens=4) for i, length in enumerate((40, 90))]
    one = Stepped(store, store_codec=codec)
    cold = one.run(requests)
    one.settle()
    assert {block.kv.codec for block in store.blocks.values()} == {codec}
    other = Stepped(store, store_codec=codec)
    warm = other.run(requests)
    assert {key: start.store_tokens for key, start in other.starts.items()} == {0: 32, 1: 80}
    assert [len(tokens) for tokens in warm.values()] == [len(tokens) for tokens in cold.values()]
    if codec is Codec.NONE:
        assert warm == cold


def test_blocks_with_nan_are_not_offered_to_the_store() -> None:
    store = MemoryStore()
    stepped = Stepped(store, store_codec=Codec.INT8)
    stepped.run([make_request(0, prompt(40), max_tokens=1)])
    stepped.settle()
    assert len(store.blocks) == stepped.engine.counters.offered_blocks == 2
    store.blocks.clear()
    stepped.engine.kv.storage[:, :, stepped.engine._pool._page_of[make_request(0, prompt(40)).hashes[1]]] = (
        torch.nan
    )
    stepped.run([make_request(1, prompt(40), max_tokens=1)])
    stepped.settle()
    assert len(store.blocks) == 1
    assert stepped.engine.counters.unoffered_blocks == 1
