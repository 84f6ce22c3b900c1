"""What the device knows of every running sequence: one row a slot, so that a step sends only what is new.

Tokens live here and not on the host: a step reads its input ids from the table and writes what it samples
into it, so the next step can be launched before anybody has seen a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from kernels.sampling import Bias, History, SamplingBatch
from services.worker.sequence import Sequence

#: Rows of the parameter tables, in the order of `_floats` and `_ints`.
_TEMPERATURE, _TOP_P, _MIN_P, _PRESENCE, _FREQUENCY, _REPETITION = range(6)
_TOP_K, _SEED, _PROMPT_LENGTH = range(3)


class Tables:
    """Rows for `slots` sequences of up to `max_length` tokens."""

    def __init__(self, slots: int, max_length: int, block_size: int, device: torch.device) -> None:
        blocks = -(-max_length // block_size)
        self.device = device
        self.tokens = torch.zeros(slots, max_length, dtype=torch.int32, device=device)
        self.pages = torch.zeros(slots, blocks, dtype=torch.int32, device=device)
        self._floats = torch.zeros(6, slots, device=device)
        self._ints = torch.zeros(3, slots, dtype=torch.int64, device=device)
        # The few that need more than a column; empty for most steps.
        self._biased: dict[int, Sequence] = {}  # logit_bias or min_tokens
        self._penalised: dict[int, Sequence] = {}
        self._explained: dict[int, Sequence] = {}  # logprobs

    def place(self, placed: Mapping[int, Sequence]) -> None:
        """New occupants of slots, with all the tokens they have."""
        for slot, sequence in placed.items():
            tokens = torch.from_numpy(np.array(sequence.tokens).astype(np.int32))
            self.tokens[slot, : len(tokens)] = tokens.to(self.device)
            p = sequence.request.sampling
            floats = (
                p.temperature,
                p.top_p,
                p.min_p,
                p.presence_penalty,
                p.frequency_penalty,
                p.repetition_penalty,
            )
            self._floats[:, slot] = torch.tensor(floats).to(self.device)
            self._ints[:, slot] = torch.tensor((p.top_k, p.seed, sequence.prompt_length)).to(self.device)
            penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1
            _mark(self._biased, slot, sequence, bool(p.logit_bias) or p.min_tokens > 0)
            _mark(self._penalised, slot, sequence, bool(penalised))
            _mark(self._explained, slot, sequence, p.logprobs >= 0)

    def set_pages(self, changes: Mapping[tuple[int, int], int]) -> None:
        """(slot, block index) -> page."""
        if changes:
            where = torch.tensor(list(changes), device=self.device)
            pages = torch.tensor(list(changes.values()), dtype=torch.int32, device=self.device)
            self.pages[where[:, 0], where[:, 1]] = pages

    def sampling(self, slots: list[int], on_device: torch.Tensor, lengths: torch.Tensor) -> SamplingBatch:
        """Parameters of the rows in `slots` (`on_device`: the same as a tensor), which have `lengths[r]`
        tokens before the one to sample."""
        floats = self._floats[:, on_device]
        ints = self._ints[:, on_device]
        position = lengths - ints[_PROMPT_LENGTH]
        return SamplingBatch(
            temperature=floats[_TEMPERATURE],
            top_p=floats[_TOP_P],
            top_k=ints[_TOP_K],
            min_p=floats[_MIN_P],
            presence=floats[_PRESENCE],
            frequency=floats[_FREQUENCY],
            repetition=floats[_REPETITION],
            seed=ints[_SEED],
            position=position,
            bias=self._bias(slots),
            history=self._history(slots, on_device, ints[_PROMPT_LENGTH], lengths),
        )

    def logprobs(self, slots: list[int]) -> list[int] | None:
        """How many top log-probabilities each row asks for, -1 = none; None if no row does."""
        if not any(slot in self._explained for slot in slots):
            return None
        return [
            self._explained[slot].request.sampling.logprobs if slot in self._explained else -1
            for slot in slots
        ]

    def _bias(self, slots: list[int]) -> Bias | None:
        if not self._biased:
            return None
        entries: list[tuple[int, int, float]] = []
        for row, slot in enumerate(slots):
            sequence = self._biased.get(slot)
            if sequence is None:
                continue
            sampling = sequence.request.sampling
            entries += [(row, token, value) for token, value in sampling.logit_bias.items()]
            # The token of this launch is counted as generated already.
            if sequence.generated <= sampling.min_tokens:
                entries += [(row, token, -torch.inf) for token in sequence.stop_ids]
        if not entries:
            return None
        rows, tokens, values = zip(*entries, strict=True)
        return Bias(
            torch.tensor(rows, device=self.device),
            torch.tensor(tokens, device=self.device),
            torch.tensor(values, dtype=torch.float32, device=self.device),
        )

    def _history(
        self, slots: list[int], on_device: torch.Tensor, prompt_length: torch.Tensor, lengths: torch.Tensor
    ) -> History | None:
        if not self._penalised:
            return None
        chosen = [row for row, slot in enumerate(slots) if slot in self._penalised]
        if not chosen:
            return None
        rows = torch.tensor(chosen, device=self.device)
        return History(rows, self.tokens[on_device[rows]], prompt_length[rows], lengths[rows])


def _mark(marked: dict[int, Sequence], slot: int, sequence: Sequence, yes: bool) -> None:
    if yes:
        marked[slot] = sequence
    else:
        marked.pop(slot, None)
