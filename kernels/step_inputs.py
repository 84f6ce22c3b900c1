"""The first thing of a step: what the device's own tables know of its tokens.

A step names its tokens by (slot, position); their ids lie in the token table, where earlier steps wrote what
they sampled, and the page that takes a token's K and V stands in the page table. One pass reads both and
copies the embeddings, so that no token id has to travel and the host can plan a step before it knows them.

Bytes: 2 T H elements. Limit: for the few tokens of a decode, the launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels.pdl import PDL, launch_dependents, wait


def step_inputs(
    slots: torch.Tensor,
    positions: torch.Tensor,
    write_from: torch.Tensor,
    tokens: torch.Tensor,
    pages: torch.Tensor,
    embedding: torch.Tensor,
    *,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [T, H] of a step's tokens and where their K and V go [T].

    slots, positions, write_from [T] int32: line of the tables, place in the sequence, and the first position
    of that sequence that this step writes (earlier tokens only attend: their KV is there already); slot -1 is
    padding. tokens [S, max_length] int32; pages [S, max_blocks] int32, the page of each block; embedding
    [V, H]. The second result is int64: page * block_size + offset, -1 = written nowhere. Padding gets the
    embedding of token 0.
    """
    run = launch if slots.is_cuda else reference
    return run(slots, positions, write_from, tokens, pages, embedding, block_size=block_size)


def reference(
    slots: torch.Tensor,
    positions: torch.Tensor,
    write_from: torch.Tensor,
    tokens: torch.Tensor,
    pages: torch.Tensor,
    embedding: torch.Tensor,
    *,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`step_inputs` in PyTorch."""
    real = slots >= 0
    lines = slots.clamp(min=0)
    ids = torch.where(real, tokens[lines, positions], 0)
    page = pages[lines, positions // block_size].long()
    kv_slots = page * block_size + positions % block_size
    return embedding[ids], torch.where(real & (positions >= write_from), kv_slots, -1)


def launch(
    slots: torch.Tensor,
    positions: torch.Tensor,
    write_from: torch.Tensor,
    tokens: torch.Tensor,
    pages: torch.Tensor,
    embedding: torch.Tensor,
    *,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`step_inputs` in Triton: one program a token. All tensors are contiguous."""
    count, hidden = len(slots), embedding.shape[1]
    x = embedding.new_empty(count, hidden)
    kv_slots = torch.empty(count, dtype=torch.int64, device=slots.device)
    if count:
        launcher.launch(
            inputs_kernel,
            (count,),
            slots,
            positions,
            write_from,
            tokens,
            pages,
            embedding,
            x,
            kv_slots,
            tokens.stride(0),
            pages.stride(0),
            BLOCK_SIZE=block_size,
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            PDL=PDL,
            num_warps=4,
            launch_pdl=PDL,
        )
    return x, kv_slots


@triton.jit(do_not_specialize=["tokens_stride", "pages_stride"])
def inputs_kernel(
    slots,
    positions,
    write_from,
    tokens,
    pages,
    embedding,
    x,
    kv_slots,
    tokens_stride,
    pages_stride,
    BLOCK_SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    position = tl.load(positions + row)
    line = tl.maximum(slot, 0).to(tl.int64)
    real = slot >= 0
    token = tl.load(tokens + line * tokens_stride + position, mask=real, other=0).to(tl.int64)
    writes = real & (position >= tl.load(write_from + row))
    page = tl.load(pages + line * pages_stride + position // BLOCK_SIZE, mask=writes, other=0).to(tl.int64)
    tl.store(kv_slots + row, tl.where(writes, page * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    tl.store(
        x + row * HIDDEN + column,
        tl.load(embedding + token * HIDDEN + column, mask=inside, other=0.0),
        mask=inside,
    )
