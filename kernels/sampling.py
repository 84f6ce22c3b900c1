"""The next token of every row of a step, chosen where its logits are and written into the token table.

The rules are those of `kernels.sampling_rules`; what a row asks for stands in the line of its slot in a
`SamplingTable`, so nothing of it travels with a step and a CUDA graph serves every mix of requests. CUDA runs
`kernels.sampling_kernels`, the CPU the rules themselves on the lines gathered.
"""

from __future__ import annotations

import torch

from kernels import sampling_table as words
from kernels.sampling_kernels import launch
from kernels.sampling_rules import Bias, History, SampleResult, SamplingBatch, TokenMask, sample_rows
from kernels.sampling_table import MAX_BIASES, MAX_STOPS, SamplingTable

__all__ = [
    "MAX_BIASES",
    "MAX_STOPS",
    "SampleResult",
    "SamplingTable",
    "TokenMask",
    "launch",
    "reference",
    "sample",
]


def sample(
    logits: torch.Tensor,
    table: SamplingTable,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    logprobs: int = -1,
    mask: TokenMask | None = None,
) -> SampleResult:
    """Choose the next token of every row and write it to tokens[slot, length].

    logits [L, V] fp32, fp16 or bf16, contiguous; on CUDA they are changed in place, in their dtype: bias and
    penalties are as fine as the logits themselves. tokens [S, max_length] int32 holds each sequence's prompt
    and generated tokens; slots [L] int32, -1 = padding, which yields token 0, not finite, and writes nothing;
    lengths [L] int32, tokens that the row's sequence has so far. `logprobs`: -1 = no row asks for any; else
    how many best tokens a row asks for at most (what a row did not ask for is undefined in the result).
    `mask` says what the rows that follow a grammar may say; none of them is padding.

    The first call for a vocabulary allocates scratch memory: not in the capture of a graph.
    """
    run = launch if logits.is_cuda else reference
    return run(logits, table, tokens, slots, lengths, logprobs=logprobs, mask=mask)


def reference(
    logits: torch.Tensor,
    table: SamplingTable,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    logprobs: int = -1,
    mask: TokenMask | None = None,
) -> SampleResult:
    """`sample` by the rules in PyTorch; leaves logits unchanged and waits for the device."""
    real = (slots >= 0).nonzero().squeeze(-1)
    rows = len(slots)
    padded = len(real) < rows
    if padded:
        logits, slots, lengths = logits[real], slots[real], lengths[real]
        if mask is not None:
            mask = TokenMask(torch.searchsorted(real, mask.rows.long()), mask.words)
    batch = _gathered(table, tokens, slots, lengths, mask)
    chosen = sample_rows(logits.float(), batch, logprobs=logprobs)
    tokens[slots, lengths] = chosen.tokens.int()
    if not padded:
        return chosen

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(rows, *values.shape[1:]).index_copy(0, real, values)

    explained = (chosen.chosen_logprob, chosen.top_tokens, chosen.top_logprobs)
    return SampleResult(
        spread(chosen.tokens),
        spread(chosen.finite),
        *(None if values is None else spread(values) for values in explained),
    )


def _gathered(
    table: SamplingTable,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    mask: TokenMask | None,
) -> SamplingBatch:
    """The lines of `slots` as the rules take them."""
    lines = table.parameters[slots]
    ints = lines.long().unbind(-1)
    floats = lines.view(torch.float32).unbind(-1)
    position = lengths.long() - ints[words.PROMPT_LENGTH]

    place = torch.arange(table.list_tokens.shape[1], device=slots.device)
    biased = place < ints[words.BIASES].unsqueeze(-1)
    forbidden = ~biased & (place < (ints[words.BIASES] + ints[words.STOPS]).unsqueeze(-1))
    forbidden &= (position < ints[words.MIN_TOKENS]).unsqueeze(-1)
    rows, places = (biased | forbidden).nonzero(as_tuple=True)
    bias = Bias(rows, table.list_tokens[slots[rows], places].long(), table.list_values[slots[rows], places])

    presence, frequency, repetition = (
        floats[word] for word in (words.PRESENCE, words.FREQUENCY, words.REPETITION)
    )
    penalised = ((presence != 0) | (frequency != 0) | (repetition != 1)).nonzero().squeeze(-1)
    history = History(
        penalised, tokens[slots[penalised]], ints[words.PROMPT_LENGTH][penalised], lengths[penalised]
    )
    return SamplingBatch(
        temperature=floats[words.TEMPERATURE],
        top_p=floats[words.TOP_P],
        top_k=ints[words.TOP_K],
        min_p=floats[words.MIN_P],
        presence=presence,
        frequency=frequency,
        repetition=repetition,
        seed=lines[:, words.SEED : words.SEED + 2].contiguous().view(torch.int64).squeeze(-1),
        position=position,
        bias=bias if len(rows) else None,
        history=history if len(penalised) else None,
        mask=mask,
    )
