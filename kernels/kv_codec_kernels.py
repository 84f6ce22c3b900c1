"""`kv_codec` in Triton: one launch for all layers of many blocks, a program for each tile of a head's tokens.

Both halves of a head are loaded apart: bytes of four-bit codes hold one element of each. Compiled without
fused multiply-adds, which would round once where the reference rounds twice.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernels import kv_payload, launcher
from kernels.kv_payload import Codec, KVShape
from kernels.tuned import sm90

_INT8_LEVELS = tl.constexpr(kv_payload.INT8_LEVELS)
_FP8_LEVELS = tl.constexpr(kv_payload.FP8_LEVELS)
_FOUR_BIT_LEVELS = tl.constexpr(kv_payload.FOUR_BIT_LEVELS)
_INT8_STEP = tl.constexpr(1 / kv_payload.INT8_LEVELS)
_FP8_STEP = tl.constexpr(1 / kv_payload.FP8_LEVELS)
_FOUR_BIT_STEP = tl.constexpr(1 / kv_payload.FOUR_BIT_LEVELS)
_LEAST_SCALE = tl.constexpr(kv_payload.LEAST_SCALE)
_BF16_MIN = tl.constexpr(torch.finfo(torch.bfloat16).min)
_INFINITE = tl.constexpr(0x7F80_0000)  # fp32 bits, as int32
_NAN = tl.constexpr(0x7FC0_0000)
_ROUNDER = tl.constexpr(1.5 * 2**23)  # added and taken away again: what was below one is rounded to even


def launch_encode(storage: torch.Tensor, pages: Sequence[int], codec: Codec, payloads: torch.Tensor) -> None:
    """`kv_codec.encode` into `payloads`."""
    _launch(encode_kernel, storage, pages, codec, payloads)


def launch_decode(payloads: torch.Tensor, storage: torch.Tensor, pages: Sequence[int], codec: Codec) -> None:
    """`kv_codec.decode`."""
    _launch(decode_kernel, storage, pages, codec, payloads)


def _launch(
    kernel: Any, storage: torch.Tensor, pages: Sequence[int], codec: Codec, payloads: torch.Tensor
) -> None:
    if not len(pages):
        return
    shape = KVShape.of(storage)
    numbers = torch.tensor(pages, dtype=torch.int32)
    if storage.is_cuda:
        numbers = numbers.pin_memory().to(storage.device, non_blocking=True)
    constants = launch_constants(shape, codec)
    tiles = shape.tokens // constants["TOKENS"]
    launcher.launch(
        kernel,
        (shape.layers * 2 * shape.kv_heads * tiles, len(pages)),
        storage,
        numbers,
        payloads.view(shape.code_dtype(codec)),
        payloads.view(torch.int16),
        storage.shape[2],
        **constants,
        num_warps=sm90.KV_CODEC_WARPS,
        enable_fp_fusion=False,
    )


def launch_constants(shape: KVShape, codec: Codec) -> dict[str, Any]:
    """The constants of both kernels."""
    half = triton.next_power_of_2(shape.dim // 2)
    itemsize = shape.code_dtype(codec).itemsize
    return {
        "CODEC": codec.value,
        "LIMIT": torch.finfo(shape.dtype).max,
        "N_KV": shape.kv_heads,
        "BLOCK_SIZE": shape.tokens,
        "DIM": shape.dim,
        "HALF": half,
        "TOKENS": min(shape.tokens, sm90.KV_CODEC_ELEMENTS // (2 * half)),
        "PAYLOAD": shape.payload_bytes(codec) // itemsize,
        "LAYER": shape.layer_bytes(codec) // itemsize,
        "CODES": shape.code_bytes(codec) // itemsize,
    }


@triton.jit(do_not_specialize=["n_pages"])
def encode_kernel(
    storage,  # [layer, K|V, page, kv_head, token, dim]
    pages,  # [N] int32
    codes,  # the payloads as elements
    parameters,  # the payloads as int16
    n_pages,
    CODEC: tl.constexpr,
    LIMIT: tl.constexpr,  # the largest number of the pages' dtype
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # DIM / 2, rounded up to a power of two
    TOKENS: tl.constexpr,
    PAYLOAD: tl.constexpr,  # elements of a payload, of one of its layers, and of the codes of a layer
    LAYER: tl.constexpr,
    CODES: tl.constexpr,
):
    kv, head, token, source, layer = _place(pages, n_pages, N_KV, BLOCK_SIZE, DIM, TOKENS, PAYLOAD, LAYER)
    column = tl.arange(0, HALF)[None, :]
    inside = (token[:, None] < BLOCK_SIZE) & (column < DIM // 2)
    source = storage + source + token[:, None] * DIM + column
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + DIM // 2, mask=inside, other=0.0)
    row = head * BLOCK_SIZE + token
    target = codes + layer + (kv * N_KV * BLOCK_SIZE + row)[:, None] * DIM + column
    if CODEC == "none":
        tl.store(target, a, mask=inside)
        tl.store(target + DIM // 2, b, mask=inside)
    else:
        a, b = a.to(tl.float32), b.to(tl.float32)
        largest_a, largest_b = _largest_bits(a), _largest_bits(b)
        parameter = parameters + (layer + CODES) // 2 + row
        if CODEC == "k8v4" and kv == 1:
            code_a = _four_bits(a, largest_a, inside, parameter + N_KV * BLOCK_SIZE, N_KV * BLOCK_SIZE)
            code_b = _four_bits(b, largest_b, inside, parameter + 3 * N_KV * BLOCK_SIZE, N_KV * BLOCK_SIZE)
            target = codes + layer + N_KV * BLOCK_SIZE * DIM + row[:, None] * (DIM // 2) + column
            tl.store(target, (code_a | (code_b << 4)).to(tl.int8), mask=inside)
        else:
            if CODEC == "fp8":
                scale, inverse, finite = _scale(tl.maximum(largest_a, largest_b), _FP8_STEP)
            else:
                scale, inverse, finite = _scale(tl.maximum(largest_a, largest_b), _INT8_STEP)
            tl.store(parameter + kv * N_KV * BLOCK_SIZE, _bf16_bits(scale, finite))
            a = tl.where(finite[:, None], a * inverse[:, None], 0.0)
            b = tl.where(finite[:, None], b * inverse[:, None], 0.0)
            if CODEC != "fp8":
                a, b = _rounded(a), _rounded(b)
            tl.store(target, a.to(codes.dtype.element_ty), mask=inside)
            tl.store(target + DIM // 2, b.to(codes.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_pages"])
def decode_kernel(
    storage,
    pages,
    codes,
    parameters,
    n_pages,
    CODEC: tl.constexpr,
    LIMIT: tl.constexpr,
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    PAYLOAD: tl.constexpr,
    LAYER: tl.constexpr,
    CODES: tl.constexpr,
):
    kv, head, token, target, layer = _place(pages, n_pages, N_KV, BLOCK_SIZE, DIM, TOKENS, PAYLOAD, LAYER)
    column = tl.arange(0, HALF)[None, :]
    inside = (token[:, None] < BLOCK_SIZE) & (column < DIM // 2)
    target = storage + target + token[:, None] * DIM + column
    row = head * BLOCK_SIZE + token
    source = codes + layer + (kv * N_KV * BLOCK_SIZE + row)[:, None] * DIM + column
    parameter = parameters + (layer + CODES) // 2 + row
    if CODEC == "k8v4" and kv == 1:
        plane = N_KV * BLOCK_SIZE
        source = codes + layer + plane * DIM + row[:, None] * (DIM // 2) + column
        pair = tl.load(source, mask=inside, other=0).to(tl.int32)
        a = (pair & 15).to(tl.float32) * _parameter(parameter + plane) + _parameter(parameter + 2 * plane)
        b = ((pair >> 4) & 15).to(tl.float32) * _parameter(parameter + 3 * plane)
        b += _parameter(parameter + 4 * plane)
    else:
        a = tl.load(source, mask=inside, other=0.0)
        b = tl.load(source + DIM // 2, mask=inside, other=0.0)
        if CODEC != "none":
            scale = _parameter(parameter + kv * N_KV * BLOCK_SIZE)
            a, b = a.to(tl.float32) * scale, b.to(tl.float32) * scale
    if CODEC != "none":
        a, b = _saturated(a, LIMIT), _saturated(b, LIMIT)
    tl.store(target, a.to(storage.dtype.element_ty), mask=inside)
    tl.store(target + DIM // 2, b.to(storage.dtype.element_ty), mask=inside)


@triton.jit
def _place(
    pages,
    n_pages,
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    PAYLOAD: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Which part this program has: K or V, head, tokens; where the head's page begins in the storage, and
    where the layer begins in the payloads."""
    part = tl.program_id(0)
    block = tl.program_id(1)
    tiles: tl.constexpr = BLOCK_SIZE // TOKENS
    token = part % tiles * TOKENS + tl.arange(0, TOKENS)
    head = part // tiles % N_KV
    kv = part // (tiles * N_KV) % 2
    layer = part // (tiles * N_KV * 2)
    page = tl.load(pages + block).to(tl.int64)
    in_storage = (((layer * 2 + kv).to(tl.int64) * n_pages + page) * N_KV + head) * (BLOCK_SIZE * DIM)
    return kv, head, token, in_storage, block.to(tl.int64) * PAYLOAD + layer * LAYER


@triton.jit
def _largest_bits(x):
    """fp32 bits of the largest magnitude of each row, as integers: NaN is the largest of those."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFF_FFFF, 1)


@triton.jit
def _scale(largest, STEP: tl.constexpr):
    """(scale, its inverse, whether the row is finite) for rows whose largest magnitude has these bits."""
    finite = largest < _INFINITE
    scale = _nearest(largest.to(tl.float32, bitcast=True) * STEP)
    scale = tl.where(finite, tl.maximum(scale, _LEAST_SCALE), 1.0)
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), finite


@triton.jit
def _four_bits(x, largest, inside, parameter, plane):
    """Codes of half a head, 0 to 15; stores step and low."""
    finite = largest < _INFINITE
    x = tl.where(finite[:, None], x, 0.0)
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    bits = low.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits + 0xFFFF, bits) & -0x1_0000
    low = tl.maximum(bits.to(tl.float32, bitcast=True), _BF16_MIN)
    step = tl.maximum(_nearest(high * _FOUR_BIT_STEP - low * _FOUR_BIT_STEP), _LEAST_SCALE)
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    tl.store(parameter, _bf16_bits(step, finite))
    tl.store(parameter + plane, _bf16_bits(low, finite | True))
    code = _rounded((x - low[:, None]) * inverse[:, None])
    return tl.minimum(tl.maximum(code, 0.0), _FOUR_BIT_LEVELS).to(tl.int32)


@triton.jit
def _nearest(x):
    """The nearest bf16, of x >= 0."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x1_0000).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    """To integers, halves to even, of numbers below 2**22; larger ones become some large number."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _bf16_bits(x, finite):
    """int16 bits of x, which is a bf16, or of NaN."""
    return (tl.where(finite, x.to(tl.int32, bitcast=True), _NAN) >> 16).to(tl.int16)


@triton.jit
def _parameter(pointer):
    """A parameter of each row, as a column."""
    return (tl.load(pointer).to(tl.int32) << 16).to(tl.float32, bitcast=True)[:, None]


@triton.jit
def _saturated(x, LIMIT: tl.constexpr):
    """NaN stays NaN."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))
