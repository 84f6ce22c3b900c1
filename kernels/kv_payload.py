"""The form in which KV blocks travel: payloads, compact or as they are, and what their bytes mean.

A payload holds one block, layer after layer, so that any run of layers is one contiguous copy. Within a layer
(H heads, T tokens of a block, D elements a head; C order, little-endian):

    none    K [H, T, D] | V [H, T, D]                  the pages' own elements
    int8    K [H, T, D] | V [H, T, D] | scales [K|V, H, T]
    fp8     the same with e4m3 elements
    k8v4    K [H, T, D] int8 | V [H, T, D/2] | scales of K [H, T] | of V [step a|low a|step b|low b, H, T]

    int8, fp8   value = code * scale, codes up to 127 and 448
    4 bit       value = code * step + low, codes 0 to 15, step and low for each half of a head: byte d of a
                token holds element d (half a) in its low four bits, element d + D/2 (half b) in the high ones

Parameters are one for each token and head, so that no token changes another's values. They are bf16, at the
two bytes of fp16 with the range of fp32: pages in bf16 hold more than fp16's scales could say. Eight bits of
mantissa cost nothing, because codes are made with the rounded parameters: a scale to the nearest bf16 leaves
the largest element a quarter of a step off, lows are rounded down. int8 with scales in fp32 is 3 % larger and
no better. Four bits have a step and low for each half of a head, for 4 % more bytes than with one: at a head
of 64, where halves cost 0.15 % of perplexity and the whole 0.22 % (± 0.09), it hardly matters, but the half
of the more usual 128 is what was measured there (`python -m benchmarks.codecs --formats`, SmolLM2-135M).

A token and head (half a head) that held NaN or infinity has NaN for its parameter: `are_finite` finds it.
Encoders make no e4m3 NaN.

Source: KIVI (arXiv 2402.02750) scales values per token; keys per channel, as it has them, pay below 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

INT8_LEVELS = 127.0
FP8_LEVELS = 448.0  # the largest e4m3 number
FOUR_BIT_LEVELS = 15.0

#: Scales are at least fp32's smallest normal number: its inverse is finite.
LEAST_SCALE = 2.0**-126

PARAMETER_DTYPE = torch.bfloat16

_BF16_EXPONENT = 0x7F80  # all ones in a bf16 that is infinite or NaN
_E4M3_NAN = 0x7F  # without the sign


class Codec(StrEnum):
    """How a payload holds its block, from the most to the least exact."""

    NONE = "none"
    INT8 = "int8"
    FP8 = "fp8"
    K8V4 = "k8v4"

    def as_exact(self) -> list[Codec]:
        """The codecs that are as exact as this one or more, itself last."""
        codecs = list(Codec)
        return codecs[: codecs.index(self) + 1]


@dataclass(frozen=True)
class KVShape:
    """The blocks of one model: `tokens` a block, `dim` elements a head (even) of `dtype`."""

    layers: int
    kv_heads: int
    tokens: int
    dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, storage: torch.Tensor) -> KVShape:
        """Of pages [layer, K|V, page, kv_head, token, dim]."""
        layers, _, _, kv_heads, tokens, dim = storage.shape
        return cls(layers, kv_heads, tokens, dim, storage.dtype)

    def code_dtype(self, codec: Codec) -> torch.dtype:
        """Of a payload's elements; those of four bits lie two in one."""
        return {Codec.NONE: self.dtype, Codec.FP8: torch.float8_e4m3fn}.get(codec, torch.int8)

    def code_bytes(self, codec: Codec) -> int:
        """Bytes of the elements of one layer."""
        elements = self.kv_heads * self.tokens * self.dim
        both = elements + elements // 2 if codec is Codec.K8V4 else 2 * elements
        return both * self.code_dtype(codec).itemsize

    def parameters(self, codec: Codec) -> int:
        """Parameters of one token and head, K and V together."""
        return {Codec.NONE: 0, Codec.K8V4: 5}.get(codec, 2)

    def layer_bytes(self, codec: Codec) -> int:
        """Bytes of one layer of a payload."""
        parameters = self.parameters(codec) * self.kv_heads * self.tokens
        return self.code_bytes(codec) + parameters * PARAMETER_DTYPE.itemsize

    def payload_bytes(self, codec: Codec) -> int:
        """Bytes of one block."""
        return self.layers * self.layer_bytes(codec)


def are_finite(payloads: torch.Tensor, shape: KVShape, codec: Codec) -> list[bool]:
    """Which of the payloads uint8 [blocks, payload_bytes], on the CPU, hold finite numbers only: their
    parameters, and of fp8 the codes. Of `none` nobody looks, and all count."""
    if not len(payloads) or codec is Codec.NONE:
        return [True] * len(payloads)
    layers = payloads.view(len(payloads), shape.layers, -1)
    codes, parameters = layers.tensor_split([shape.code_bytes(codec)], dim=-1)
    finite = (parameters.view(torch.int16) & _BF16_EXPONENT).amax((1, 2)) != _BF16_EXPONENT
    if codec is Codec.FP8:
        finite &= (codes & _E4M3_NAN).amax((1, 2)) != _E4M3_NAN
    answer: list[bool] = finite.tolist()
    return answer
