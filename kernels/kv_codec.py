"""KV blocks from the pages of all layers into payloads and back, many blocks a call.

Arithmetic is fp32, rounded once to the pages' dtype and saturated there; products of a code and a parameter
are exact. So a payload means the same values on every device, and every device makes the same payload of the
same pages. The format is `kv_payload`'s.

Bytes: the pages read and the payloads written, or the other way round. Limit: memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels import kv_codec_kernels
from kernels.kv_payload import FOUR_BIT_LEVELS, FP8_LEVELS, INT8_LEVELS, LEAST_SCALE, Codec, KVShape

#: Sign, exponent and mantissa of an e4m3 number where fp32 has them, as int32.
_E4M3_BITS = 0x87F0_0000 - (1 << 32)


def encode(storage: torch.Tensor, pages: Sequence[int], codec: Codec) -> torch.Tensor:
    """The blocks in `pages` as payloads, uint8 [blocks, payload_bytes] on storage's device.

    storage [layer, K|V, page, kv_head, token, dim] in bf16, fp16 or fp32, contiguous.
    """
    payloads = torch.empty(
        len(pages), KVShape.of(storage).payload_bytes(codec), dtype=torch.uint8, device=storage.device
    )
    run = kv_codec_kernels.launch_encode if storage.is_cuda else reference_encode
    run(storage, pages, codec, payloads)
    return payloads


def decode(payloads: torch.Tensor, storage: torch.Tensor, pages: Sequence[int], codec: Codec) -> None:
    """Put the block of `payloads[i]` into `pages[i]`, on storage's device.

    Raises ValueError, with nothing written, if the payloads are not of the codec's size for such pages.
    """
    expected = len(pages), KVShape.of(storage).payload_bytes(codec)
    if payloads.shape != expected or payloads.dtype != torch.uint8:
        raise ValueError(
            f"{codec} payloads must be uint8 {list(expected)}, got {payloads.dtype} {list(payloads.shape)}"
        )
    run = kv_codec_kernels.launch_decode if storage.is_cuda else reference_decode
    run(payloads, storage, pages, codec)


def reference_encode(
    storage: torch.Tensor, pages: Sequence[int], codec: Codec, payloads: torch.Tensor
) -> None:
    """`encode` in PyTorch. Page by page: what a page takes on the way stays in a core's cache."""
    parts = _Parts.of(payloads, KVShape.of(storage), codec)
    for i, page in enumerate(pages):
        part = parts.block(i)
        keys, values = storage[:, 0, page], storage[:, 1, page]
        if codec is Codec.NONE:
            part.keys.copy_(keys)
            part.values.copy_(values)
            continue
        _encode_scaled(keys, codec, part.keys, part.parameters[:, 0])
        if codec is Codec.K8V4:
            _encode_four_bits(values, part.values, part.parameters[:, 1:])
        else:
            _encode_scaled(values, codec, part.values, part.parameters[:, 1])


def reference_decode(
    payloads: torch.Tensor, storage: torch.Tensor, pages: Sequence[int], codec: Codec
) -> None:
    """`decode` in PyTorch."""
    parts = _Parts.of(payloads, KVShape.of(storage), codec)
    for i, page in enumerate(pages):
        part = parts.block(i)
        keys, values = storage[:, 0, page], storage[:, 1, page]
        if codec is Codec.NONE:
            keys.copy_(part.keys)
            values.copy_(part.values)
            continue
        _decode_scaled(part.keys, part.parameters[:, 0], codec, keys)
        if codec is Codec.K8V4:
            _decode_four_bits(part.values, part.parameters[:, 1:], values)
        else:
            _decode_scaled(part.values, part.parameters[:, 1], codec, values)


class _Parts(NamedTuple):
    """Views of payloads: [block, layer, ...], or of one of them: [layer, ...]."""

    keys: torch.Tensor  # [..., H, T, D]
    values: torch.Tensor  # [..., H, T, D]; four bits [..., H, T, D/2]
    parameters: torch.Tensor  # [..., 2 or 5, H, T] int16, the bits; of none [..., 0]

    @classmethod
    def of(cls, payloads: torch.Tensor, shape: KVShape, codec: Codec) -> _Parts:
        layers = payloads.view(len(payloads), shape.layers, shape.layer_bytes(codec))
        elements = shape.kv_heads * shape.tokens * shape.dim
        codes = layers[..., : shape.code_bytes(codec)].view(shape.code_dtype(codec))
        keys, values = codes[..., :elements], codes[..., elements:]
        parameters = layers[..., shape.code_bytes(codec) :].view(torch.int16)
        each = shape.kv_heads, shape.tokens
        return cls(
            keys.unflatten(-1, (*each, shape.dim)),
            values.unflatten(-1, (*each, values.shape[-1] // (shape.kv_heads * shape.tokens))),
            parameters.unflatten(-1, (shape.parameters(codec), *each))
            if codec is not Codec.NONE
            else parameters,
        )

    def block(self, i: int) -> _Parts:
        return _Parts(*(part[i] for part in self))


def _encode_scaled(x: torch.Tensor, codec: Codec, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """x [..., D] to codes [..., D] of int8 or e4m3, and scales [...]."""
    levels = FP8_LEVELS if codec is Codec.FP8 else INT8_LEVELS
    x = x.float()
    largest = x.abs().amax(-1)
    scale = _nearest(largest * (1 / levels)).clamp_min_(LEAST_SCALE)
    finite = largest.isfinite()
    if not bool(finite.all()):
        scale, x = _without_broken(finite, scale, x)
    scales.copy_(_bits(scale))
    y = x * scale.reciprocal().nan_to_num_(0.0).unsqueeze(-1)
    codes.copy_(y if codec is Codec.FP8 else y.round_())


def _decode_scaled(codes: torch.Tensor, scales: torch.Tensor, codec: Codec, out: torch.Tensor) -> None:
    levels = FP8_LEVELS if codec is Codec.FP8 else INT8_LEVELS
    scale = _parameter(scales)
    y = (_e4m3_to_float(codes) if codec is Codec.FP8 else codes) * scale.unsqueeze(-1)
    out.copy_(_saturated(y, scale.abs().max() * levels, out.dtype))


def _encode_four_bits(x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor) -> None:
    """x [L, H, T, D] to codes [L, H, T, D/2] and parameters [L, 4, H, T]."""
    x = x.unflatten(-1, (2, -1)).float()
    low, high = x.amin(-1), x.amax(-1)
    finite = low.isfinite() & high.isfinite()
    low = _rounded_down(low)
    # Each end by itself: the difference of the largest numbers is infinite.
    step = high * (1 / FOUR_BIT_LEVELS) - low * (1 / FOUR_BIT_LEVELS)
    step = _nearest(step).clamp_min_(LEAST_SCALE)
    if not bool(finite.all()):
        low = low.masked_fill(~finite, 0)
        step, x = _without_broken(finite, step, x)
    for half in (0, 1):
        parameters[:, 2 * half].copy_(_bits(step[..., half]))
        parameters[:, 2 * half + 1].copy_(_bits(low[..., half]))
    y = (x - low.unsqueeze(-1)).mul_(step.reciprocal().nan_to_num_(0.0).unsqueeze(-1))
    y = y.round_().clamp_(0, FOUR_BIT_LEVELS).to(torch.int8)
    torch.bitwise_or(y[..., 0, :], y[..., 1, :] << 4, out=codes)


def _decode_four_bits(codes: torch.Tensor, parameters: torch.Tensor, out: torch.Tensor) -> None:
    step, low = _parameter(parameters[:, 0::2]), _parameter(parameters[:, 1::2])  # [L, 2, H, T]
    bytes_ = codes.view(torch.uint8)
    limit = (step.abs() * FOUR_BIT_LEVELS + low.abs()).max()
    for half, four_bits in enumerate((bytes_ & 15, bytes_ >> 4)):
        y = (four_bits * step[:, half].unsqueeze(-1)).add_(low[:, half].unsqueeze(-1))
        out.unflatten(-1, (2, -1))[..., half, :] = _saturated(y, limit, out.dtype)


def _without_broken(
    finite: torch.Tensor, scale: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN for the scales of what is not finite, and zeros for its elements."""
    return scale.masked_fill(~finite, torch.nan), x.masked_fill(~finite.unsqueeze(-1), 0)


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    """bf16 bits of an fp32 that is one, or NaN. PyTorch's conversions have more than one NaN."""
    return parameter.contiguous().view(torch.int32) >> 16


def _parameter(bits: torch.Tensor) -> torch.Tensor:
    """fp32 of bf16 bits."""
    return (bits.to(torch.int32) << 16).view(torch.float32)


def _nearest(x: torch.Tensor) -> torch.Tensor:
    """The nearest bf16, of x >= 0 in fp32."""
    return ((x.view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32)


def _rounded_down(x: torch.Tensor) -> torch.Tensor:
    """The next bf16 that is no more; the most negative one for what is below it."""
    bits = x.view(torch.int32)
    rounded = torch.where(bits < 0, bits + 0xFFFF, bits) & ~0xFFFF
    return rounded.view(torch.float32).clamp_min(torch.finfo(torch.bfloat16).min)


def _saturated(y: torch.Tensor, limit: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """y within what `dtype` holds; no element is beyond `limit`, which spares a look at each."""
    most = torch.finfo(dtype).max
    return y if bool(limit <= most) else y.clamp_(-most, most)


def _e4m3_to_float(codes: torch.Tensor) -> torch.Tensor:
    """Of finite codes. The bits moved to where fp32 has them, sign apart, mean the number times 2**-120; ten
    times faster than PyTorch's conversion."""
    bits = codes.view(torch.int8).to(torch.int32).bitwise_left_shift_(20)
    return bits.bitwise_and_(_E4M3_BITS).view(torch.float32).mul_(2.0**120)
