"""Steps to sample: what each row asks for, as a `SamplingTable`, and the check of a result against the rules.

Shared by the interpreter's tests and by tests/gpu.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kernels.sampling import SampleResult, SamplingTable, TokenMask
from kernels.sampling_table import line


@dataclass(frozen=True)
class Asked:
    """One row. `history` is prompt and generated tokens; the prompt is its first `prompt` tokens."""

    how: Mapping[str, Any] = field(default_factory=dict)  # keywords of `sampling_table.line`
    bias: Mapping[int, float] = field(default_factory=dict)
    stops: Sequence[int] = ()
    history: Sequence[int] = (0,)
    prompt: int = 1
    padding: bool = False
    allowed: Sequence[int] | None = None  # by a grammar; None = it has none


@dataclass(frozen=True)
class Step:
    """The arguments of `sample` but for the logits."""

    table: SamplingTable
    tokens: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, asked: Sequence[Asked], device: str = "cpu", max_length: int = 64) -> Step:
        """Row r is in slot len(asked) - r, so that neither is the other; slot 0 is nobody's."""
        step = cls(
            SamplingTable.empty(len(asked) + 1, device),
            torch.full((len(asked) + 1, max_length), -7, dtype=torch.int32, device=device),
            torch.zeros(len(asked), dtype=torch.int32, device=device),
            torch.zeros(len(asked), dtype=torch.int32, device=device),
        )
        step.fill(asked)
        return step

    def fill(self, asked: Sequence[Asked]) -> None:
        """Replace what the rows ask for, in place."""
        for row, each in enumerate(asked):
            slot = len(asked) - row
            how = {"temperature": 0.0, **each.how}
            parameters = line(**how, prompt_length=each.prompt, biases=len(each.bias), stops=len(each.stops))
            self.table.parameters[slot] = torch.from_numpy(np.frombuffer(parameters, dtype=np.int32).copy())
            listed = [*each.bias.items(), *((token, -torch.inf) for token in each.stops)]
            for entry, (token, value) in enumerate(listed):
                self.table.list_tokens[slot, entry] = token
                self.table.list_values[slot, entry] = value
            self.tokens[slot, : len(each.history)] = torch.tensor(each.history, dtype=torch.int32)
            self.slots[row] = -1 if each.padding else slot
            self.lengths[row] = len(each.history)

    def to(self, device: str) -> Step:
        table = SamplingTable(
            self.table.parameters.to(device),
            self.table.list_tokens.to(device),
            self.table.list_values.to(device),
        )
        return Step(table, self.tokens.to(device), self.slots.to(device), self.lengths.to(device))

    def clone(self) -> Step:
        """Another token table, the rest the same."""
        return Step(self.table, self.tokens.clone(), self.slots, self.lengths)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.table, self.tokens, self.slots, self.lengths


def mask_of(asked: Sequence[Asked], vocab: int, device: str = "cpu") -> TokenMask | None:
    """What `sample` is told of the rows that follow a grammar; None without any."""
    rows = [row for row, each in enumerate(asked) if each.allowed is not None]
    if not rows:
        return None
    bits = np.zeros((len(rows), -(-vocab // 32) * 32), dtype=np.uint8)
    for line_bits, row in zip(bits, rows, strict=True):
        line_bits[list(asked[row].allowed or ())] = 1
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    return TokenMask(torch.tensor(rows, dtype=torch.int32, device=device), torch.from_numpy(words).to(device))


def assert_same(actual: SampleResult, expected: SampleResult, asked: Sequence[Asked]) -> None:
    """The same choices, and for those who asked log-probabilities to 1e-4 (they are sums over a vocabulary in
    fp32); equal ones in any order."""
    assert actual.finite.tolist() == expected.finite.tolist()
    assert actual.tokens.tolist() == expected.tokens.tolist()
    for row, each in enumerate(asked):
        wanted = each.how.get("logprobs", -1)
        if wanted < 0 or actual.chosen_logprob is None or not actual.finite[row]:
            continue
        assert expected.chosen_logprob is not None
        assert torch.allclose(actual.chosen_logprob[row].cpu(), expected.chosen_logprob[row].cpu(), atol=1e-4)
        assert actual.top_tokens is not None
        assert actual.top_logprobs is not None
        assert expected.top_tokens is not None
        assert expected.top_logprobs is not None
        best = min(
            wanted, int((expected.top_logprobs[row] > -torch.inf).sum())
        )  # forbidden ones are all alike
        values = actual.top_logprobs[row, :best].cpu()
        assert torch.allclose(values, expected.top_logprobs[row, :best].cpu(), atol=1e-4)
        ids = actual.top_tokens[row, :best].tolist()
        assert len(set(ids)) == best
        known = dict(zip(expected.top_tokens[row].tolist(), expected.top_logprobs[row].tolist(), strict=True))
        for token, value in zip(ids, values.tolist(), strict=True):
            assert abs(known.get(token, value) - value) <= 1e-4
