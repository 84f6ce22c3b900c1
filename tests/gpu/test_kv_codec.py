"""The KV codec's kernels on the device against the reference on the CPU, byte by byte."""

from __future__ import annotations

import pytest
import torch

from kernels.kv_codec import decode, encode
from kernels.kv_payload import Codec, KVShape
from tests.kernels import cases
from tests.kernels.codec_cases import meaning, random_pages

DEVICE = "cuda"
PAGES = [6, 0, 3, 5]
codecs = pytest.mark.parametrize("codec", list(Codec))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
sizes = pytest.mark.parametrize(
    ("kv_heads", "tokens", "dim"), [(3, 16, 64), (8, 64, 128), (2, 128, 96), (1, 256, 128), (2, 16, 16)]
)


def pages(kv_heads: int, tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """With zeros, the largest numbers, NaN and infinity among them."""
    storage = random_pages(KVShape(3, kv_heads, tokens, dim, dtype), 7, seed=dim)
    storage[0, :, 3, 0, 3] = 0
    storage[0, :, 3, 0, 4] = torch.finfo(dtype).max
    storage[0, :, 3, 0, 5, 1:] = torch.nan
    storage[0, :, 3, 0, 6, 1:] = -torch.inf
    return storage


@codecs
@dtypes
@sizes
def test_the_device_makes_the_same_payloads_as_the_cpu(
    codec: Codec, dtype: torch.dtype, kv_heads: int, tokens: int, dim: int
) -> None:
    storage = pages(kv_heads, tokens, dim, dtype)
    with cases.poisoned_memory():
        payloads = encode(storage.to(DEVICE), PAGES, codec)
    assert torch.equal(payloads.cpu(), encode(storage, PAGES, codec))


@codecs
@dtypes
@sizes
def test_a_payload_means_the_same_on_the_device_as_on_the_cpu(
    codec: Codec, dtype: torch.dtype, kv_heads: int, tokens: int, dim: int
) -> None:
    payloads = encode(pages(kv_heads, tokens, dim, dtype), PAGES, codec)
    out = torch.full((3, 2, 7, kv_heads, tokens, dim), 7, dtype=dtype)
    on_device = out.to(DEVICE)
    decode(payloads, out, [1, 6, 2, 0], codec)
    decode(payloads.to(DEVICE), on_device, [1, 6, 2, 0], codec)
    assert torch.equal(on_device.cpu().nan_to_num(123.0), out.nan_to_num(123.0))


@codecs
def test_pages_beyond_two_billion_elements_are_found(codec: Codec) -> None:
    count = 2**31 // (2 * 64 * 128) + 2  # of one head: the last page's elements have numbers above 2**31
    storage = torch.zeros(2, 2, count, 1, 64, 128, dtype=torch.bfloat16, device=DEVICE)
    shape = KVShape.of(storage)
    block = random_pages(shape, 1, seed=1, device=DEVICE)
    storage[:, :, -1] = block[:, :, 0]
    payloads = encode(storage, [count - 1], codec)
    decode(payloads, storage, [count - 2], codec)
    assert torch.equal(storage[:, :, -2].cpu(), meaning(payloads[0].cpu(), shape, codec).to(torch.bfloat16))
    assert not storage[:, :, :-2].any()
