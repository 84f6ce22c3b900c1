"""The sampler on CUDA: three kernels, whose grids depend on shapes only. Rules: `kernels.sampling_rules`.

    edit     bias, min_tokens and penalties (`kernels.sampling_edit`)
    mask     only where a row of the step has a grammar (`kernels.sampling_mask`)
    chunks   over (row, 4,096 tokens): maximum and first token that has it; for rows that draw from everything
             the winner of the chunk; for the others the maxima of groups of 128 tokens
    rows     combines the chunks of a row and is done, unless the row has top_k, top_p or min_p
             (`kernels.sampling_draw`) or wants log-probabilities. Writes the result and the token table

Equal to the rules but for rounding: the mass of top_p is summed in fp32 in another order, logarithms may
differ in the last bit, and edited logits are rounded to their dtype. Choices agree unless two scores, or a
mass and top_p, are that close.

Bytes: the logits once, L V elements; rows with restrictions read again what the groups' maxima leave. Limit:
memory bandwidth; for few rows the launches; for rows that draw from everything the 60 instructions of a
token's noise.
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
from kernels.philox import uniform_run_in_kernel
from kernels.sampling_draw import draw_restricted, gumbel
from kernels.sampling_edit import float_word, launch_edit
from kernels.sampling_mask import launch_mask
from kernels.sampling_rules import SampleResult, TokenMask
from kernels.sampling_table import SamplingTable
from kernels.tuned import sampling_sm90 as tuned

_TEMPERATURE = tl.constexpr(words.TEMPERATURE)
_PER_TEMPERATURE = tl.constexpr(words.PER_TEMPERATURE)
_TOP_P = tl.constexpr(words.TOP_P)
_MIN_P = tl.constexpr(words.MIN_P)
_TOP_K = tl.constexpr(words.TOP_K)
_PROMPT_LENGTH = tl.constexpr(words.PROMPT_LENGTH)
_SEED = tl.constexpr(words.SEED)
_LOGPROBS = tl.constexpr(words.LOGPROBS)
_WORDS = tl.constexpr(words.WORDS)
_INFINITY = tl.constexpr(float("inf"))


def launch(
    logits: torch.Tensor,
    table: SamplingTable,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    logprobs: int = -1,
    mask: TokenMask | None = None,
) -> SampleResult:
    """`kernels.sampling.sample` in Triton."""
    rows, vocab = logits.shape
    device = logits.device
    best = max(0, min(logprobs, vocab))
    explain = logprobs >= 0
    result = SampleResult(
        tokens=torch.empty(rows, dtype=torch.int32, device=device),
        finite=torch.empty(rows, dtype=torch.bool, device=device),
        chosen_logprob=torch.empty(rows, device=device) if explain else None,
        top_tokens=torch.empty(rows, best, dtype=torch.int32, device=device) if explain else None,
        top_logprobs=torch.empty(rows, best, device=device) if explain else None,
    )
    if not rows:
        return result
    chunks = triton.cdiv(vocab, tuned.CHUNK)
    slotted = triton.next_power_of_2(chunks)
    groups = chunks * (tuned.CHUNK // tuned.GROUP)
    # Strides are powers of two or multiples of 16, whatever the number of rows: pointers stay aligned.
    chunk_floats = torch.empty(rows, 4, slotted, device=device)
    chunk_tokens = torch.empty(rows, 2, slotted, dtype=torch.int32, device=device)
    group_best = torch.empty(rows, groups, device=device)
    lists = torch.empty(rows, groups + tuned.TILE, dtype=torch.int32, device=device)

    launch_edit(logits, table, tokens, slots, lengths)
    if mask is not None:
        launch_mask(logits, mask)
    launcher.launch(
        chunk_kernel,
        (rows, chunks),
        logits,
        slots,
        lengths,
        table.parameters,
        chunk_floats,
        chunk_tokens,
        group_best,
        VOCAB=vocab,
        CHUNK=tuned.CHUNK,
        GROUP=tuned.GROUP,
        CHUNKS=chunks,
        SLOTTED=slotted,
        PART=tuned.PART,
        EXPLAIN=explain,
        PDL=PDL,
        num_warps=tuned.CHUNK_WARPS,
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the rules
        launch_pdl=PDL,
    )
    launcher.launch(
        row_kernel,
        (rows,),
        logits,
        slots,
        lengths,
        table.parameters,
        chunk_floats,
        chunk_tokens,
        group_best,
        lists,
        tokens,
        result.tokens,
        result.finite.view(torch.uint8),
        result.chosen_logprob,
        result.top_tokens,
        result.top_logprobs,
        tokens.stride(0),
        tokens.shape[1],
        best,
        VOCAB=vocab,
        SHIFT=tuned.GROUP.bit_length() - 1,
        GROUPS=groups,
        CHUNKS=chunks,
        SLOTTED=slotted,
        TILE=tuned.TILE,
        BITS=16 if logits.dtype == torch.bfloat16 else 32,
        EXPLAIN=explain,
        PDL=PDL,
        num_warps=tuned.ROW_WARPS,
        enable_fp_fusion=False,
        launch_pdl=PDL,
    )
    return result


@triton.jit
def chunk_kernel(
    logits,
    slots,
    lengths,
    parameters,
    chunk_floats,  # [L, 4, SLOTTED]: maximum, the drawn token's noise, mass at temperature, mass at 1
    chunk_tokens,  # [L, 2, SLOTTED]: first token that has the maximum, the drawn token
    group_best,  # [L, GROUPS]
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTTED: tl.constexpr,
    PART: tl.constexpr,
    EXPLAIN: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * VOCAB + token, mask=token < VOCAB, other=-_INFINITY).to(tl.float32)
    slot = tl.load(slots + row)
    line = parameters + slot.to(tl.int64) * _WORDS
    real = slot >= 0
    temperature, top_p, min_p, top_k = _how(line, real)

    # One logit that is NaN or +inf makes the maximum +inf: `row_kernel` finds it there.
    x = tl.where(x < _INFINITY, x, _INFINITY)
    highest = tl.max(x, 0)
    floats = chunk_floats + row * 4 * SLOTTED + chunk
    ids = chunk_tokens + row * 2 * SLOTTED + chunk
    tl.store(floats, highest)
    tl.store(ids, tl.min(tl.where(x == highest, token, VOCAB), 0))

    wanted = -1
    if EXPLAIN:
        wanted = tl.load(line + _LOGPROBS, mask=real, other=-1)
    restricted = _restricted(top_p, min_p, top_k, VOCAB)
    base = tl.where(highest > -_INFINITY, highest, 0.0)
    if ((temperature > 0) & restricted) | (wanted > 0):
        best = tl.max(tl.reshape(x, [CHUNK // GROUP, GROUP]), 1)
        group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        tl.store(group_best + row * (CHUNKS * (CHUNK // GROUP)) + group, best)
    if wanted >= 0:
        tl.store(floats + 3 * SLOTTED, tl.sum(tl.exp(x - base), 0))
    if temperature > 0:
        inverse = float_word(line, _PER_TEMPERATURE)
        if restricted:
            tl.store(floats + 2 * SLOTTED, tl.sum(tl.exp((x - base) * inverse), 0))
        else:
            position = tl.load(lengths + row) - tl.load(line + _PROMPT_LENGTH)
            noise, drawn = _draw_from_all(
                logits + row * VOCAB,
                chunk * CHUNK,
                base,
                inverse,
                _seed(line),
                position,
                VOCAB,
                CHUNK,
                PART,
            )
            tl.store(floats + SLOTTED, noise)
            tl.store(ids + SLOTTED, drawn)


@triton.jit
def _draw_from_all(
    logits,
    first,
    base,
    inverse,
    seed,
    position,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    """The token with the best score of the CHUNK from `first` on, and its noise: (noise, token). In parts,
    which take the fewest registers: those decide how many programs read at the same time."""
    best = tl.full([PART], -_INFINITY, tl.float32)
    drawn = tl.full([PART], VOCAB, tl.int32)
    noise = tl.full([PART], 0.0, tl.float32)
    for start in range(first, first + CHUNK, PART):
        token = start + tl.arange(0, PART)
        x = tl.load(logits + token, mask=token < VOCAB, other=-_INFINITY).to(tl.float32)
        here = gumbel(uniform_run_in_kernel(seed, position, start, PART))
        score = (x - base) * inverse + here
        better = score > best
        best = tl.where(better, score, best)
        drawn = tl.where(better, token, drawn)
        noise = tl.where(better, here, noise)
    winner = tl.min(tl.where(best == tl.max(best, 0), drawn, VOCAB), 0)
    return tl.max(tl.where(drawn == winner, noise, -_INFINITY), 0), winner


@triton.jit
def _how(line, real):
    """temperature, top_p, min_p, top_k; padding is greedy."""
    temperature = tl.load(line + _TEMPERATURE, mask=real, other=0).to(tl.float32, bitcast=True)
    top_p = tl.load(line + _TOP_P, mask=real, other=0).to(tl.float32, bitcast=True)
    min_p = tl.load(line + _MIN_P, mask=real, other=0).to(tl.float32, bitcast=True)
    top_k = tl.load(line + _TOP_K, mask=real, other=0)
    return temperature, top_p, min_p, top_k


@triton.jit
def _restricted(top_p, min_p, top_k, VOCAB: tl.constexpr):
    return (top_p < 1.0) | (min_p > 0.0) | ((top_k > 0) & (top_k < VOCAB))


@triton.jit
def _seed(line):
    low = tl.load(line + _SEED).to(tl.int64) & 0xFFFFFFFF
    return (tl.load(line + _SEED + 1).to(tl.int64) << 32) | low


@triton.jit(do_not_specialize=["tokens_stride", "max_length", "best"])
def row_kernel(
    logits,
    slots,
    lengths,
    parameters,
    chunk_floats,
    chunk_tokens,
    group_best,
    lists,  # [L, GROUPS + TILE]: groups that may hold a winner, then tokens
    tokens,
    out_tokens,
    out_finite,
    out_logprob,
    out_top_tokens,
    out_top_logprobs,
    tokens_stride,
    max_length,
    best,
    VOCAB: tl.constexpr,
    SHIFT: tl.constexpr,  # groups are of 2^SHIFT tokens
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTTED: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,  # that tell logits apart, once ordered as integers
    EXPLAIN: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, SLOTTED)
    there = chunk < CHUNKS
    floats = chunk_floats + row * 4 * SLOTTED + chunk
    ids = chunk_tokens + row * 2 * SLOTTED + chunk
    highest_of = tl.load(floats, mask=there, other=-_INFINITY)
    first_of = tl.load(ids, mask=there, other=VOCAB)
    slot = tl.load(slots + row)
    length = tl.load(lengths + row)
    real = slot >= 0
    line = parameters + slot.to(tl.int64) * _WORDS
    temperature, top_p, min_p, top_k = _how(line, real)

    highest = tl.max(highest_of, 0)
    finite = real & (highest > -_INFINITY) & (highest < _INFINITY)
    token = tl.min(tl.where(highest_of == highest, first_of, VOCAB), 0)
    logits += row * VOCAB
    group_best += row * GROUPS
    if finite & (temperature > 0):
        seed = _seed(line)
        position = length - tl.load(line + _PROMPT_LENGTH)
        inverse = float_word(line, _PER_TEMPERATURE)
        if _restricted(top_p, min_p, top_k, VOCAB):
            masses = tl.load(floats + 2 * SLOTTED, mask=there, other=0.0)
            mass = tl.sum(tl.where(there, tl.exp((highest_of - highest) * inverse) * masses, 0.0), 0)
            token = draw_restricted(
                logits,
                group_best,
                lists + row * (GROUPS + TILE),
                highest,
                mass,
                inverse,
                top_p,
                min_p,
                top_k,
                seed,
                position,
                VOCAB,
                SHIFT,
                GROUPS,
                TILE,
                BITS,
            )
        else:
            drawn = tl.load(ids + SLOTTED, mask=there, other=0)
            noise = tl.load(floats + SLOTTED, mask=there, other=0.0)
            x = tl.load(logits + drawn, mask=there & (drawn < VOCAB), other=-_INFINITY).to(tl.float32)
            score = (x - highest) * inverse + noise
            token = tl.min(tl.where(score == tl.max(score, 0), drawn, VOCAB), 0)
    token = tl.where(finite, token, 0)
    tl.store(out_tokens + row, token)
    tl.store(out_finite + row, finite.to(tl.uint8))
    tl.store(tokens + slot.to(tl.int64) * tokens_stride + length, token, mask=real & (length < max_length))

    if EXPLAIN:
        wanted = tl.load(line + _LOGPROBS, mask=real, other=-1)
        if finite & (wanted >= 0):
            masses = tl.load(floats + 3 * SLOTTED, mask=there, other=0.0)
            log_mass = tl.log(tl.sum(tl.where(there, tl.exp(highest_of - highest) * masses, 0.0), 0))
            chosen = tl.load(logits + token).to(tl.float32)
            tl.store(out_logprob + row, chosen - highest - log_mass)
            _best(
                logits,
                group_best,
                tl.minimum(wanted, best),
                highest,
                log_mass,
                out_top_tokens + row * best,
                out_top_logprobs + row * best,
                VOCAB,
                1 << SHIFT,
                GROUPS,
            )


@triton.jit
def _best(
    logits,
    group_best,
    count,
    highest,
    log_mass,
    out_tokens,
    out_logprobs,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The `count` most likely tokens, of equal ones the lowest ids first: each time the best of the group
    whose maximum is highest, which then takes the next below as its maximum."""
    group = tl.arange(0, triton.next_power_of_2(GROUPS))
    maxima = tl.load(group_best + group, mask=(group < GROUPS) & (count > 0), other=-_INFINITY)
    member = tl.arange(0, GROUP)
    last_value = tl.full((), _INFINITY, tl.float32)
    last_token = tl.full((), -1, tl.int32)
    for i in range(count):
        value = tl.max(maxima, 0)
        home = tl.min(tl.where(maxima == value, group, GROUPS), 0)
        token = home * GROUP + member
        x = tl.load(logits + token, mask=token < VOCAB, other=-_INFINITY).to(tl.float32)
        # Groups come in the order of their ids as well, so what equals the last one is later than it.
        left = (x < last_value) | (token > last_token)
        chosen = tl.min(tl.where((x == value) & left, token, VOCAB), 0)
        rest = (x < value) | ((x == value) & (token > chosen))
        maxima = tl.where(group == home, tl.max(tl.where(rest, x, -_INFINITY), 0), maxima)
        tl.store(out_tokens + i, tl.where(value > -_INFINITY, chosen, 0))  # forbidden ones are all alike
        tl.store(out_logprobs + i, value - highest - log_mass)
        last_value = value
        last_token = chosen
