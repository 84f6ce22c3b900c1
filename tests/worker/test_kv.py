from __future__ import annotations

import pytest
import torch

from services.worker.kv import KVCache, page_bytes
from services.worker.models.random import random_model
from tests.worker.driver import Driver

SPEC = random_model().spec


def cache(pages: int = 8) -> KVCache:
    return KVCache(SPEC, pages, 16, torch.float32, "cpu")


def test_a_page_written_is_the_page_read_in_every_layer() -> None:
    kv = cache()
    blocks = [torch.randn(SPEC.layers, 2, SPEC.kv_heads, 16, SPEC.head_dim) for _ in range(2)]
    kv.write_pages([5, 2], blocks)
    assert torch.equal(kv.read_page(5), blocks[0])
    assert torch.equal(kv.read_page(2), blocks[1])
    assert torch.equal(kv.k(1)[5], blocks[0][1, 0])
    assert torch.equal(kv.v(2)[2], blocks[1][2, 1])
    assert kv.storage[:, :, [0, 1, 3, 4, 6, 7]].count_nonzero() == 0


def test_a_read_page_is_a_copy_of_its_own() -> None:
    kv = cache()
    block = kv.read_page(3)
    kv.storage.fill_(1)
    assert block.count_nonzero() == 0
    assert block.is_contiguous()
    assert block.nbytes == kv.bytes_per_page == page_bytes(SPEC, 16, torch.float32)


def test_one_page_and_head_is_contiguous() -> None:
    assert cache().k(0)[3, 1].is_contiguous()


@pytest.mark.parametrize(
    "wrong", [torch.zeros(SPEC.layers, 2, SPEC.kv_heads, 32, SPEC.head_dim), torch.zeros(1), None]
)
def test_a_block_of_another_shape_or_dtype_is_refused_and_nothing_is_written(
    wrong: torch.Tensor | None,
) -> None:
    kv = cache()
    good = torch.ones(SPEC.layers, 2, SPEC.kv_heads, 16, SPEC.head_dim)
    with pytest.raises(ValueError, match="block must be"):
        kv.write_pages([0, 1], [good, good.double() if wrong is None else wrong])
    assert kv.storage.count_nonzero() == 0


def test_a_sequence_continues_the_same_from_pages_copied_to_another_cache() -> None:
    model = random_model()
    tokens = [(7 * i) % 320 for i in range(60)]
    first = Driver(model)
    expected = first.step([("a", tokens)])[0][48:]
    second = Driver(model)
    batch = second.batch([("a", tokens[:48])])  # takes three pages and computes nothing
    source = first.batch([("a", [0])]).attention.block_tables[0].tolist()
    blocks = [first.kv.read_page(page) for page in source[:3]]
    second.kv.write_pages(batch.attention.block_tables[0, :3].tolist(), blocks)
    torch.testing.assert_close(second.step([("a", tokens[48:])])[0], expected, atol=1e-4, rtol=0)
