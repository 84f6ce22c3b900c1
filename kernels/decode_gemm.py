"""Linear layer for few tokens: the weights are streamed once, and what surrounds the product costs no launch.

y = f(n(x) W^T + b) with x [T, K], W [N, K]; n is an RMS norm without gain, f nothing, SwiGLU, or the addition
to a residual stream. bf16 or fp16 (fp32 in the interpreter), fp32 accumulation, one rounding.

The operands are swapped: rows of W are the M side of the tensor core's tile and tokens its N side, so that 1
to 64 tokens fill a `wgmma` of 64 rows (of 16 or 32 rows with `mma.sync`, where there would be too few
programs otherwise). A program owns `rows` rows of W, up to `tokens` tokens and one part of K; stages of
`cp.async` keep its next tiles under way.

- Norm: every program sees its x along K anyway, so it sums the squares beside the product and scales the
  accumulator by rsqrt(mean + eps) at the end.
- SwiGLU: W holds F gate rows, then F up rows; a program owns as many of the one as the matching of the other.
- Split K: the parts of a tile leave fp32 partials; the program that arrives last adds them, always in the
  same order, so that results repeat bit for bit. It also sets the tile's counter back to zero.
- Dependent launch: what a program reads first of W is requested into the L2 cache before the wait for the
  kernels before. A request only moves lines, so it is right even if W were still being written.

Bytes: 2 N K, once; x from L2 for every program. Limit: memory bandwidth (up to some 64 tokens; at 256 the
tensor cores weigh as much).

Source: swapped operands for small batches as in FlashInfer's and SGLang's low-latency GEMMs; the arrival
counter as in NVIDIA's threadFenceReduction sample.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels.pdl import PDL, launch_dependents, wait
from kernels.tuned.gemm_sm90 import GemmTile

#: Most tiles of one product whose K is split.
_COUNTERS = 8192


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tile: GemmTile,
    *,
    norm_eps: float | None = None,
    swiglu: bool = False,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N], with `swiglu` [T, N / 2].

    `norm_eps` norms x first. The result is added to `add_to`, in place, if that is given. All tensors are
    contiguous. A product whose K is split needs one eager call on its stream before it is captured there.
    """
    tokens, k = x.shape
    n = weight.shape[0] // 2 if swiglu else weight.shape[0]
    y = x.new_empty(tokens, n) if add_to is None else add_to
    if tokens == 0:
        return y
    outputs = tile.rows // 2 if swiglu else tile.rows
    grid = (triton.cdiv(tokens, tile.tokens), triton.cdiv(n, outputs), tile.split)
    partials = counters = None
    if tile.split > 1:
        if grid[0] * grid[1] > _COUNTERS:
            raise ValueError(f"{grid[0] * grid[1]} tiles with split K; at most {_COUNTERS}: use split=1")
        blocks = grid[0] * grid[1] * grid[2]
        partials = torch.empty(blocks, tile.rows + 1, tile.tokens, dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
    launcher.launch(
        decode_gemm_kernel,
        grid,
        x,
        weight,
        bias,
        y,
        partials,
        counters,
        tokens,
        n,
        k,
        0.0 if norm_eps is None else norm_eps,
        tile.prefetch
        if k % 8 == 0 and tile.prefetch <= k
        else 0,  # requests are of 16 bytes each, and inside
        NORM=norm_eps is not None,
        SWIGLU=swiglu,
        ADD=add_to is not None,
        EVEN_N=n % outputs == 0,
        EVEN_K=k % tile.depth == 0,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        DEPTH=tile.depth,
        SPLIT=tile.split,
        PDL=PDL,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=PDL,
    )
    return y


def _counters(device: torch.device) -> torch.Tensor:
    """Zeros that every launch leaves zero. Launches that may overlap have their own: one set a stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _stream_counters(device, stream)


@functools.cache
def _stream_counters(device: torch.device, stream: int) -> torch.Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a linear layer with split K is captured on a stream that has never run one: "
            "run the step once on the stream of the capture"
        )
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["tokens", "prefetch"])
def decode_gemm_kernel(
    x,
    weight,
    bias,
    y,
    partials,  # [token tiles * row tiles, SPLIT, ROWS + 1, TOKENS]: accumulators, and sums of squares last
    counters,
    tokens,
    n,  # columns of y
    k,
    eps,
    prefetch,  # elements of each row requested before the wait; a multiple of 32
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,  # y holds what the result is added to
    EVEN_N: tl.constexpr,  # no row tile reaches over the end
    EVEN_K: tl.constexpr,  # DEPTH divides k
    ROWS: tl.constexpr,  # of W; with SWIGLU one half gate, one half up
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    row_tile = tl.program_id(1)
    split = tl.program_id(2)
    OUTPUTS: tl.constexpr = ROWS // 2 if SWIGLU else ROWS
    row = tl.arange(0, ROWS)
    feature = row_tile * OUTPUTS + row % OUTPUTS
    if not EVEN_N:
        feature = tl.minimum(feature, n - 1)  # rows beyond the end read the last one and are not stored
    weight_row = (row // OUTPUTS * n + feature).to(tl.int64)
    steps_of_all = tl.cdiv(k, DEPTH)
    steps = tl.cdiv(steps_of_all, SPLIT)
    first = split * steps
    last = tl.minimum(first + steps, steps_of_all)
    if prefetch > 0:
        request(weight + weight_row * k, first * DEPTH, k, prefetch, PDL)
    wait(PDL)
    launch_dependents(PDL)

    token_lane = tl.arange(0, TOKENS)
    token = tl.program_id(0) * TOKENS + token_lane
    real = token < tokens
    column = row_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    target = y + token[None, :].to(tl.int64) * n + column[:, None]
    stored = real[None, :] & (column < n)[:, None]
    if ADD:
        before = tl.load(target, mask=stored, other=0.0)  # its latency passes under the product
    if bias is not None:
        shift = tl.load(bias + weight_row).to(tl.float32)

    depth = first * DEPTH + tl.arange(0, DEPTH)
    weight_tile = weight + weight_row[:, None] * k + depth[None, :]
    x_tile = x + token[None, :].to(tl.int64) * k + depth[:, None]
    accumulator = tl.zeros((ROWS, TOKENS), tl.float32)
    squares = tl.zeros((DEPTH, TOKENS), tl.float32)
    for step in range(first, last):
        if EVEN_K:
            w = tl.load(weight_tile)
            columns = tl.load(x_tile, mask=real[None, :], other=0.0)
        else:
            inside = step * DEPTH + tl.arange(0, DEPTH) < k
            w = tl.load(weight_tile, mask=inside[None, :], other=0.0)
            columns = tl.load(x_tile, mask=real[None, :] & inside[:, None], other=0.0)
        accumulator = tl.dot(w, columns, accumulator)
        if NORM:
            # Triton 3.6 gives a tile with a second reader no spare stage, yet would let wgmma read on while
            # the next copy lands in that stage. A product that is used here and now is waited for.
            accumulator = tl.where(real[None, :], accumulator, 0.0)
            wide = columns.to(tl.float32)
            squares += wide * wide
        weight_tile += DEPTH
        x_tile += DEPTH
    if NORM:
        square_sum = tl.sum(squares, 0)

    if SPLIT > 1:
        tile = row_tile * tl.num_programs(0) + tl.program_id(0)
        BLOCK: tl.constexpr = (ROWS + 1) * TOKENS
        block = partials + tile.to(tl.int64) * (SPLIT * BLOCK)
        place = row[:, None] * TOKENS + token_lane[None, :]
        tl.store(block + split * BLOCK + place, accumulator)
        if NORM:
            tl.store(block + split * BLOCK + ROWS * TOKENS + token_lane, square_sum)
        tl.debug_barrier()  # the stores of all threads come before the release by one of them
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if arrived < SPLIT - 1:
            return
        accumulator = tl.zeros((ROWS, TOKENS), tl.float32)
        for part in tl.static_range(SPLIT):
            accumulator += tl.load(block + part * BLOCK + place, cache_modifier=".cg")
        if NORM:
            square_sum = tl.zeros((TOKENS,), tl.float32)
            for part in tl.static_range(SPLIT):
                square_sum += tl.load(block + part * BLOCK + ROWS * TOKENS + token_lane, cache_modifier=".cg")
        tl.store(counters + tile, 0)

    if NORM:
        accumulator *= (1.0 / tl.sqrt(square_sum / k + eps))[None, :]
    if bias is not None:
        accumulator += shift[:, None]
    if SWIGLU:
        gate, up = tl.split(accumulator.reshape(2, OUTPUTS, TOKENS).permute(1, 2, 0))
        result = gate * tl.sigmoid(gate) * up
    else:
        result = accumulator
    if ADD:
        result += before.to(tl.float32)
    tl.store(target, result.to(y.dtype.element_ty), mask=stored)


@triton.jit
def request(rows, start, k, count, PDL: tl.constexpr):
    """Ask for `count` elements of each row (of k), from `start` on, into the L2 cache."""
    if PDL:
        part = count // 4  # four requests a row: about one a thread
        offset = tl.minimum(start + tl.arange(0, 4) * part, k - part)
        address = (rows[:, None] + offset[None, :]).to(tl.int64)
        size = tl.full(address.shape, 0, tl.int32) + part * (rows.dtype.element_ty.primitive_bitwidth // 8)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [address, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
