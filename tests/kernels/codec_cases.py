"""Pages for the KV codec, and what a payload means: written down anew from the format's description, in fp64
and byte by byte. Shared with tests/gpu."""

from __future__ import annotations

import numpy as np
import torch

from kernels.kv_payload import Codec, KVShape


def random_pages(shape: KVShape, pages: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Storage in which tokens and heads differ in magnitude by factors of a thousand."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.layers, 2, pages, shape.kv_heads, shape.tokens, shape.dim)
    magnitude = torch.exp(2 * torch.randn(*size[:-1], 1, generator=generator))
    return (torch.randn(size, generator=generator) * magnitude).to(shape.dtype).to(device)


def meaning(payload: torch.Tensor, shape: KVShape, codec: Codec) -> torch.Tensor:
    """What a payload, uint8 [payload_bytes], holds: fp64 [layer, K|V, head, token, dim]."""
    data = payload.cpu().numpy().tobytes()
    heads, tokens, dim = shape.kv_heads, shape.tokens, shape.dim
    at = 0

    def take(count: int, each: int) -> bytes:
        nonlocal at
        at += count * each
        return data[at - count * each : at]

    def bf16(count: int) -> np.ndarray:
        bits = np.frombuffer(take(count, 2), dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)

    layers = []
    for _ in range(shape.layers):
        if codec is Codec.NONE:
            raw = take(2 * heads * tokens * dim, shape.dtype.itemsize)
            layers.append(torch.frombuffer(bytearray(raw), dtype=shape.dtype).double().numpy())
        elif codec in (Codec.INT8, Codec.FP8):
            codes = take(2 * heads * tokens * dim, 1)
            numbers = np.array([e4m3(code) if codec is Codec.FP8 else signed(code) for code in codes])
            layers.append(numbers.reshape(-1, dim) * bf16(2 * heads * tokens)[:, None])
        else:
            keys = np.array([signed(code) for code in take(heads * tokens * dim, 1)]).reshape(-1, dim)
            pairs = np.frombuffer(take(heads * tokens * dim // 2, 1), dtype=np.uint8).reshape(-1, dim // 2)
            scales = bf16(heads * tokens)[:, None]
            step_a, low_a, step_b, low_b = (bf16(heads * tokens)[:, None] for _ in range(4))
            values = np.concatenate([pairs % 16 * step_a + low_a, pairs // 16 * step_b + low_b], axis=1)
            layers.append(np.concatenate([keys * scales, values]))
    assert at == len(data)
    return torch.from_numpy(np.stack(layers)).view(shape.layers, 2, heads, tokens, dim)


def signed(byte: int) -> float:
    return byte - 256 if byte > 127 else byte


def e4m3(byte: int) -> float:
    """OCP 8-bit floating point, E4M3: bias 7, no infinities, all ones is NaN."""
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def most_error(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """The error that the codec promises not to exceed for x [layer, K|V, ..., dim] in fp64: half a step, of
    scales that are up to 2**-7 larger than they need be. Then the rounding to the pages' dtype comes."""
    largest = x.abs().amax(-1, keepdim=True)
    int8 = (largest / 127 / 2).expand_as(x)
    if codec is Codec.NONE:
        return torch.zeros_like(x)
    if codec is Codec.FP8:
        return torch.maximum(x.abs() / 16, largest / 448 / 2**9 / 2) * (1 + 2**-6)
    bound = int8.clone()
    if codec is Codec.K8V4:
        halves = x[:, 1].unflatten(-1, (2, -1))
        low, high = halves.amin(-1, keepdim=True), halves.amax(-1, keepdim=True)
        four_bits = (high - low + low.abs() / 128) / 15 / 2
        bound[:, 1] = four_bits.expand_as(halves).flatten(-2)
    return bound * (1 + 2**-6)
