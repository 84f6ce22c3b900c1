from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kv_codec_kernels
from kernels.kv_codec import decode, encode, reference_decode
from kernels.kv_payload import Codec, KVShape, are_finite
from tests.kernels import cases
from tests.kernels.codec_cases import meaning, most_error, random_pages

codecs = pytest.mark.parametrize("codec", list(Codec))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
PAGES = 4


@st.composite
def shapes(draw: st.DrawFn) -> KVShape:
    """Sizes that are odd where they may be."""
    dim = draw(st.sampled_from([16, 64, 96, 128]))
    tokens = draw(st.sampled_from([16, 32, 64, 256])) if dim <= 64 else 16
    return KVShape(draw(st.integers(1, 3)), draw(st.integers(1, 3)), tokens, dim, torch.float32)


def launch_encode(storage: torch.Tensor, pages: list[int], codec: Codec) -> torch.Tensor:
    """`encode` as a GPU does it, in the interpreter."""
    size = KVShape.of(storage).payload_bytes(codec)
    payloads = torch.full((len(pages), size), 77, dtype=torch.uint8)
    kv_codec_kernels.launch_encode(storage, pages, codec, payloads)
    return payloads


def round_trip(block: torch.Tensor, codec: Codec) -> torch.Tensor:
    """A block [layer, K|V, head, token, dim] encoded and decoded."""
    storage = block.unsqueeze(2).contiguous()
    out = torch.full_like(storage, 7)
    decode(encode(storage, [0], codec), out, [0], codec)
    return out[:, :, 0]


@codecs
@dtypes
@given(shape=shapes(), seed=st.integers(0, 99))
@settings(max_examples=6)
def test_a_payload_means_the_block_within_half_a_step(
    codec: Codec, dtype: torch.dtype, shape: KVShape, seed: int
) -> None:
    shape = KVShape(shape.layers, shape.kv_heads, shape.tokens, shape.dim, dtype)
    storage = random_pages(shape, PAGES, seed)
    payloads = encode(storage, [2, 0], codec)
    assert payloads.shape == (2, shape.payload_bytes(codec))
    for page, payload in zip([2, 0], payloads, strict=True):
        x = storage[:, :, page].double()
        assert bool(((meaning(payload, shape, codec) - x).abs() <= most_error(x, codec)).all())


@codecs
@dtypes
@given(shape=shapes(), seed=st.integers(0, 99))
@settings(max_examples=4)
def test_decoding_is_the_meaning_rounded_once_and_touches_no_other_page(
    codec: Codec, dtype: torch.dtype, shape: KVShape, seed: int
) -> None:
    shape = KVShape(shape.layers, shape.kv_heads, shape.tokens, shape.dim, dtype)
    payloads = encode(random_pages(shape, PAGES, seed), [2, 0, 3], codec)
    runs: list[Callable[..., None]] = [reference_decode]
    if dtype is not torch.bfloat16 or codec is Codec.NONE:  # the interpreter truncates to bf16
        runs.append(kv_codec_kernels.launch_decode)
    for run in runs:
        pages = torch.full((shape.layers, 2, PAGES, *_page(shape)), torch.nan, dtype=dtype)
        run(payloads, pages, [1, 3, 0], codec)
        for page, payload in zip([1, 3, 0], payloads, strict=True):
            assert torch.equal(pages[:, :, page], meaning(payload, shape, codec).to(dtype))
        assert pages[:, :, 2].isnan().all()


@pytest.mark.parametrize(
    "codec", [Codec.NONE, Codec.INT8, Codec.K8V4]
)  # e4m3: tests/gpu, for the interpreter
@dtypes  # rounds to it wrongly
@given(shape=shapes(), seed=st.integers(0, 99))
@settings(max_examples=4)
def test_kernel_and_reference_make_the_same_bytes(
    codec: Codec, dtype: torch.dtype, shape: KVShape, seed: int
) -> None:
    shape = KVShape(shape.layers, shape.kv_heads, shape.tokens, shape.dim, dtype)
    storage = random_pages(shape, PAGES, seed)
    storage[0, :, 1, 0, 3] = 0
    storage[0, :, 1, 0, 4] = torch.finfo(dtype).max
    storage[0, :, 1, 0, 5, 1:] = torch.nan
    storage[0, :, 1, 0, 6, 1:] = -torch.inf
    with cases.poisoned_memory():
        assert torch.equal(launch_encode(storage, [1, 2], codec), encode(storage, [1, 2], codec))


@codecs
@dtypes
def test_zeros_stay_zeros(codec: Codec, dtype: torch.dtype) -> None:
    block = torch.zeros(2, 2, 1, 16, 64, dtype=dtype)
    assert torch.equal(round_trip(block, codec), block)


@codecs
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        *((torch.float16, magnitude) for magnitude in (1e-3, 1e4, 6e4)),
        *((torch.bfloat16, magnitude) for magnitude in (1e-30, 1e-6, 6e4, 1e30, 1e38)),
        *((torch.float32, magnitude) for magnitude in (1e-30, 1e-6, 6e4, 1e30, 1e38)),
    ],
)
def test_tiny_and_huge_values_keep_their_precision(
    codec: Codec, dtype: torch.dtype, magnitude: float
) -> None:
    x = random_pages(KVShape(1, 1, 16, 64, torch.float32), 1, 0)[:, :, 0]
    block = (x / x.abs().amax(-1, keepdim=True) * magnitude).to(dtype)
    rounding = torch.finfo(dtype).eps * magnitude
    error = (round_trip(block, codec).double() - block.double()).abs()
    assert bool((error <= most_error(block.double(), codec) + rounding).all())


@codecs
@dtypes
def test_the_largest_numbers_of_a_dtype_do_not_become_infinite(codec: Codec, dtype: torch.dtype) -> None:
    block = torch.full((1, 2, 1, 16, 64), torch.finfo(dtype).max, dtype=dtype)
    block[..., ::3] *= -1
    result = round_trip(block, codec)
    assert result.isfinite().all()
    assert torch.equal(result.sign(), block.sign())


@codecs
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_told_and_spreads_to_no_other_token_or_head(
    codec: Codec, broken: float
) -> None:
    shape = KVShape(2, 2, 16, 64, torch.float32)
    storage = random_pages(shape, 3, seed=1)
    whole = encode(storage, [0, 1, 2], codec)
    storage[1, :, 1, 1, 5, 7] = broken
    payloads = encode(storage, [0, 1, 2], codec)
    assert are_finite(whole, shape, codec) == [True] * 3
    assert are_finite(payloads, shape, codec) == [True, codec is Codec.NONE, True]

    pages, expected = torch.zeros_like(storage), torch.zeros_like(storage)
    decode(payloads, pages, [0, 1, 2], codec)
    decode(whole, expected, [0, 1, 2], codec)
    assert not pages[1, :, 1, 1, 5, 7].isfinite().any()
    pages[1, :, 1, 1, 5] = expected[1, :, 1, 1, 5] = 0
    assert torch.equal(pages, expected)


@codecs
@dtypes
@given(seed=st.integers(0, 9999), finite=st.booleans())
@settings(max_examples=10)
def test_whatever_a_payload_holds_it_decodes_and_to_numbers_if_it_is_told_finite(
    codec: Codec, dtype: torch.dtype, seed: int, finite: bool
) -> None:
    shape = KVShape(2, 2, 16, 16, dtype)
    generator = torch.Generator().manual_seed(seed)
    payloads = torch.randint(256, (3, shape.payload_bytes(codec)), generator=generator, dtype=torch.uint8)
    if finite and codec is not Codec.NONE:
        layers = payloads.view(3, shape.layers, -1)
        codes, parameters = layers.tensor_split([shape.code_bytes(codec)], dim=-1)
        bits = parameters.view(torch.int16)
        bits[..., ::2] |= 0x7F00  # half of them among the largest numbers, of either sign
        bits[(bits & 0x7F80) == 0x7F80] &= ~0x0080
        if codec is Codec.FP8:
            codes &= 0xFE
    told = are_finite(payloads, shape, codec)
    if finite:
        assert told == [True] * 3
    runs: list[Callable[..., None]] = [reference_decode]
    if dtype is not torch.bfloat16:
        runs.append(kv_codec_kernels.launch_decode)
    for run in runs:
        pages = torch.zeros(shape.layers, 2, 3, *_page(shape), dtype=dtype)
        run(payloads, pages, [0, 1, 2], codec)
        for page, good in enumerate(told):
            if good and codec is not Codec.NONE:
                assert pages[:, :, page].isfinite().all()


@codecs
@dtypes
def test_a_block_that_travels_again_arrives_the_same(codec: Codec, dtype: torch.dtype) -> None:
    """What one worker loaded and the store has lost is stored again, and again."""
    block = random_pages(KVShape(2, 2, 64, 64, dtype), 1, seed=3)[:, :, 0]
    once = round_trip(block, codec)
    again = once
    for _ in range(5):
        again = round_trip(again, codec)
    if codec is Codec.K8V4 and dtype is torch.bfloat16:  # its rounding may move the ends of four bits' range
        assert (again != once).float().mean() < 1e-3
        error = (again.double() - block.double()).abs()
        assert bool((error <= 2.5 * most_error(block.double(), codec)).all())
    else:
        assert torch.equal(again, once)


def test_payloads_are_as_small_as_promised_and_their_layers_aligned() -> None:
    shape = KVShape(32, 8, 64, 128, torch.bfloat16)
    sizes = {codec: shape.payload_bytes(codec) / (8 << 20) for codec in Codec}
    assert sizes == {
        Codec.NONE: 1.0,
        Codec.INT8: pytest.approx(0.508, abs=5e-4),
        Codec.FP8: pytest.approx(0.508, abs=5e-4),
        Codec.K8V4: pytest.approx(0.395, abs=5e-4),
    }
    for tokens in (16, 256):
        for dim in (16, 64, 96, 128):
            odd = KVShape(3, 3, tokens, dim, torch.float16)
            assert all(odd.layer_bytes(codec) % 16 == odd.code_bytes(codec) % 16 == 0 for codec in Codec)


@codecs
@pytest.mark.parametrize("wrong", ["short", "long", "fewer", "dtype"])
def test_payloads_of_another_size_are_refused_and_nothing_is_written(codec: Codec, wrong: str) -> None:
    storage = torch.zeros(2, 2, 3, 1, 16, 16)
    good = encode(random_pages(KVShape.of(storage), 3, 0), [0, 1], codec)
    payloads = {
        "short": good[:, :-1],
        "long": torch.cat([good, good], 1),
        "fewer": good[:1],
        "dtype": good.to(torch.int16),
    }[wrong]
    with pytest.raises(ValueError, match=f"{codec} payloads must be uint8"):
        decode(payloads, storage, [1, 2], codec)
    assert not storage.any()


@codecs
def test_no_blocks_are_no_work(codec: Codec) -> None:
    storage = torch.zeros(2, 2, 3, 1, 16, 16)
    for payloads in (encode(storage, [], codec), launch_encode(storage, [], codec)):
        decode(payloads, storage, [], codec)
        assert are_finite(payloads, KVShape.of(storage), codec) == []


def _page(shape: KVShape) -> tuple[int, int, int]:
    return shape.kv_heads, shape.tokens, shape.dim
