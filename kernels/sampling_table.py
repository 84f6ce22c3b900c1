"""How every slot samples, on the device: what `kernels.sampling` reads of a row, one line a slot.

A line of `parameters` is 18 words of 4 bytes: floats by their bits, the seed in two words. Reciprocals are
taken here once, so that no kernel divides.
What needs more than a word stands beside it, in lists of at most MAX_BIASES + MAX_STOPS tokens.
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass, field

import torch

#: The words of a line of `parameters`.
TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(6)  # fp32
TOP_K, PROMPT_LENGTH = 6, 7  # int32, like all that follow
SEED = 8  # two words, the low one first
LOGPROBS = 10  # -1 = none
BIASES, STOPS = 11, 12  # how many tokens the lists hold: first those with a bias, then the forbidden ones
MIN_TOKENS = 13  # generated tokens before which the STOPS are forbidden
EDITED = 14  # 1 = bias, min_tokens or a penalty may change logits
PER_TEMPERATURE, PER_REPETITION = 15, 16  # fp32: 1 / what they are named after
WORDS = 18

_LINE = struct.Struct("<6f2iq5i2f4x")
assert _LINE.size == 4 * WORDS

#: Lists of a slot. 1,024 is what the router allows; OpenAI allows 300.
MAX_BIASES = 1024
MAX_STOPS = 128

#: What a temperature above 0 counts as at least: its reciprocal is finite, and it is greedy all the same.
LEAST_TEMPERATURE = 1e-30

_MAX_FLOAT = float(torch.finfo(torch.float32).max)
_MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class SamplingTable:
    """One line a slot; the tensors are allocated once and never move, so that graphs may hold them."""

    parameters: torch.Tensor  # [S, WORDS] int32
    list_tokens: torch.Tensor  # [S, MAX_BIASES + MAX_STOPS] int32
    list_values: torch.Tensor  # [S, MAX_BIASES + MAX_STOPS] fp32, what to add; -inf for the forbidden ones
    _scratch: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, slots: int, device: torch.device | str) -> SamplingTable:
        """Greedy lines."""
        width = MAX_BIASES + MAX_STOPS
        return cls(
            parameters=torch.zeros(slots, WORDS, dtype=torch.int32, device=device),
            list_tokens=torch.zeros(slots, width, dtype=torch.int32, device=device),
            list_values=torch.zeros(slots, width, dtype=torch.float32, device=device),
        )

    def scratch(self, lines: int, vocab: int) -> torch.Tensor:
        """[lines, vocab] int32 that whoever uses it leaves all zeros. Made by the first call, which must not
        come in the capture of a graph."""
        if (lines, vocab) not in self._scratch:
            device = self.parameters.device
            self._scratch[lines, vocab] = torch.zeros(lines, vocab, dtype=torch.int32, device=device)
        return self._scratch[lines, vocab]


def line(
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    seed: int = 0,
    prompt_length: int,
    logprobs: int = -1,
    biases: int = 0,
    stops: int = 0,
    min_tokens: int = 0,
) -> bytes:
    """One line of `SamplingTable.parameters`; fields as in `kernels.sampling_rules.SamplingBatch`.

    `seed` is a signed 64-bit number. Numbers too large for a word become its largest.
    """
    penalised = presence != 0 or frequency != 0 or repetition != 1
    return _LINE.pack(
        min(temperature, _MAX_FLOAT),
        top_p,
        min_p,
        presence,
        frequency,
        min(repetition, _MAX_FLOAT),
        top_k,
        prompt_length,
        seed,
        logprobs,
        biases,
        stops,
        min(min_tokens, _MAX_INT),
        penalised or biases > 0 or stops > 0,
        _reciprocal(max(temperature, LEAST_TEMPERATURE)),
        _reciprocal(repetition),
    )


def _reciprocal(value: float) -> float:
    """1 / value, as fp32 has both; a double between them changes no bit of it."""
    rounded = ctypes.c_float(value).value
    inverse = 1 / rounded if rounded else math.inf
    return inverse if inverse <= _MAX_FLOAT else math.inf
