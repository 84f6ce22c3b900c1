"""Bias, min_tokens and penalties on CUDA: the logits of the rows that have any, changed in place.

A few programs go through all rows; a row without any costs a load. Penalties count in a scratch line of V
words that is all zeros between rows: a first walk over the sequence counts into it, a second one takes every
token's count away, and who finds one changes the logit. So only the tokens that occur cost anything.

Rules: `kernels.sampling_rules`; the same operations in the same order in fp32, then rounded to the dtype of
the logits. Bytes: 24 a token of the history. Limit: the latency of atomics, some 4 us a row and thousand
tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels import sampling_table as words
from kernels.pdl import PDL, launch_dependents, wait
from kernels.sampling_table import SamplingTable
from kernels.tuned import sampling_sm90 as tuned

_PRESENCE = tl.constexpr(words.PRESENCE)
_FREQUENCY = tl.constexpr(words.FREQUENCY)
_REPETITION = tl.constexpr(words.REPETITION)
_PER_REPETITION = tl.constexpr(words.PER_REPETITION)
_PROMPT_LENGTH = tl.constexpr(words.PROMPT_LENGTH)
_BIASES = tl.constexpr(words.BIASES)
_STOPS = tl.constexpr(words.STOPS)
_MIN_TOKENS = tl.constexpr(words.MIN_TOKENS)
_EDITED = tl.constexpr(words.EDITED)
_WORDS = tl.constexpr(words.WORDS)
_LIST = tl.constexpr(words.MAX_BIASES + words.MAX_STOPS)

#: Rows that a program looks up at once.
_ROWS = tl.constexpr(16)

#: How a scratch line counts: generated occurrences below, and whether the token occurs in the prompt.
_IN_PROMPT = tl.constexpr(1 << 30)

_INFINITY = tl.constexpr(float("inf"))


def launch_edit(
    logits: torch.Tensor,
    table: SamplingTable,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Arguments as in `kernels.sampling.sample`; changes logits."""
    rows, vocab = logits.shape
    launcher.launch(
        edit_kernel,
        (min(rows, tuned.EDITORS),),
        logits,
        slots,
        lengths,
        tokens,
        table.parameters,
        table.list_tokens,
        table.list_values,
        table.scratch(tuned.EDITORS, vocab),
        rows,
        tokens.stride(0),
        VOCAB=vocab,
        LARGEST=torch.finfo(logits.dtype).max,
        TILE=tuned.EDIT_TILE,
        PDL=PDL,
        num_warps=tuned.EDIT_WARPS,
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the rules
        launch_pdl=PDL,
    )


@triton.jit(do_not_specialize=["rows", "tokens_stride"])
def edit_kernel(
    logits,
    slots,
    lengths,
    tokens,
    parameters,
    list_tokens,
    list_values,
    scratch,
    rows,
    tokens_stride,
    VOCAB: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    launch_dependents(PDL)
    editor = tl.program_id(0)
    editors = tl.num_programs(0)
    counts = scratch + editor.to(tl.int64) * VOCAB
    lane = tl.arange(0, _ROWS)
    for first in range(editor, rows, editors * _ROWS):
        row = first + lane * editors
        slot = tl.load(slots + row, mask=row < rows, other=-1)
        flag = tl.load(parameters + slot.to(tl.int64) * _WORDS + _EDITED, mask=slot >= 0, other=0)
        edited = tl.sum(flag << lane, 0)
        for i in range(_ROWS):
            if (edited >> i) & 1:
                at = (first + i * editors).to(tl.int64)
                line = tl.load(slots + at).to(tl.int64)
                _edit_row(
                    logits + at * VOCAB,
                    tl.load(lengths + at),
                    tokens + line * tokens_stride,
                    parameters + line * _WORDS,
                    list_tokens + line * _LIST,
                    list_values + line * _LIST,
                    counts,
                    VOCAB,
                    LARGEST,
                    TILE,
                )


@triton.jit
def _edit_row(
    logits,
    length,
    history,
    parameters,
    list_tokens,
    list_values,
    counts,
    VOCAB: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
):
    prompt = tl.load(parameters + _PROMPT_LENGTH)
    biases = tl.load(parameters + _BIASES)
    lane = tl.arange(0, TILE)
    for start in range(0, biases, TILE):
        inside = start + lane < biases
        token = tl.load(list_tokens + start + lane, mask=inside, other=0)
        x = tl.load(logits + token, mask=inside, other=0.0).to(tl.float32)
        edited = _bounded(x, x + tl.load(list_values + start + lane, mask=inside, other=0.0), LARGEST)
        tl.store(logits + token, edited.to(logits.dtype.element_ty), mask=inside)
    tl.debug_barrier()

    if length - prompt < tl.load(parameters + _MIN_TOKENS):
        stops = tl.load(parameters + _STOPS)
        for start in range(0, stops, TILE):
            inside = start + lane < stops
            token = tl.load(list_tokens + biases + start + lane, mask=inside, other=0)
            x = tl.load(logits + token, mask=inside, other=0.0).to(tl.float32)
            # NaN and +inf stay what they are, to be found.
            forbidden = tl.where(x < _INFINITY, -_INFINITY, x)
            tl.store(logits + token, forbidden.to(logits.dtype.element_ty), mask=inside)
    tl.debug_barrier()

    presence = float_word(parameters, _PRESENCE)
    frequency = float_word(parameters, _FREQUENCY)
    repetition = float_word(parameters, _REPETITION)
    per_repetition = float_word(parameters, _PER_REPETITION)
    begin = tl.where(repetition != 1.0, 0, prompt)  # only repetition is about the prompt as well
    end = tl.where((repetition != 1.0) | (presence != 0.0) | (frequency != 0.0), length, begin)
    for start in range(begin, end, TILE):
        place = start + lane
        token = tl.load(history + place, mask=place < end, other=-1)
        inside = (token >= 0) & (token < VOCAB)
        tl.atomic_or(counts + token, _IN_PROMPT, mask=inside & (place < prompt), sem="relaxed")
        tl.atomic_add(counts + token, 1, mask=inside & (place >= prompt), sem="relaxed")
    tl.debug_barrier()
    for start in range(begin, end, TILE):
        place = start + lane
        token = tl.load(history + place, mask=place < end, other=-1)
        inside = (token >= 0) & (token < VOCAB)
        found = tl.atomic_xchg(counts + token, 0, mask=inside, sem="relaxed")
        first = inside & (found != 0)
        times = tl.where(first, found & (_IN_PROMPT - 1), 0).to(tl.float32)
        x = tl.load(logits + token, mask=first, other=0.0).to(tl.float32)
        edited = x * tl.where(x > 0, per_repetition, repetition)
        edited = _bounded(x, edited, LARGEST)
        edited = edited - frequency * times
        edited = edited - presence * tl.where(times > 0, 1.0, 0.0)
        edited = _bounded(x, edited, LARGEST)
        tl.store(logits + token, edited.to(logits.dtype.element_ty), mask=first)
    tl.debug_barrier()  # the next row counts in the same line


@triton.jit
def _bounded(x, edited, LARGEST: tl.constexpr):
    """No finite logit becomes +inf; NaN stays."""
    return tl.where((edited > LARGEST) & (x < _INFINITY), LARGEST, edited)


@triton.jit
def float_word(parameters, WORD: tl.constexpr):
    return tl.load(parameters + WORD).to(tl.float32, bitcast=True)
