from __future__ import annotations

import torch

from services.worker.kv import KVCache, page_bytes
from services.worker.models.random import random_model
from tests.worker.driver import Driver

SPEC = random_model().spec


def cache(pages: int = 8) -> KVCache:
    return KVCache(SPEC, pages, 16, torch.float32, "cpu")


def test_the_pages_take_what_is_said_of_them() -> None:
    kv = cache()
    assert kv.storage.nbytes == 8 * kv.bytes_per_page == 8 * page_bytes(SPEC, 16, torch.float32)


def test_one_page_and_head_is_contiguous() -> None:
    assert cache().k(0)[3, 1].is_contiguous()


def test_a_sequence_continues_the_same_from_pages_copied_to_another_cache() -> None:
    model = random_model()
    tokens = [(7 * i) % 320 for i in range(60)]
    first = Driver(model)
    expected = first.step([("a", tokens)])[0][48:]
    second = Driver(model)
    batch = second.batch([("a", tokens[:48])])  # takes three pages and computes nothing
    source = first.batch([("a", [0])]).attention.block_tables[0].tolist()
    target = batch.attention.block_tables[0].tolist()
    second.kv.storage[:, :, target[:3]] = first.kv.storage[:, :, source[:3]]
    torch.testing.assert_close(second.step([("a", tokens[48:])])[0], expected, atol=1e-4, rtol=0)
