"""What grammars allow on CUDA: all other logits of their rows become -inf, in place.

A mask travels packed, a bit a token, for the rows that have one; a step without any does not launch this.

Rules: `kernels.sampling_rules`. Bytes: the logits of the masked rows, read and as good as written, 2 N V
elements. Limit: memory bandwidth; for few rows the launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels.pdl import PDL, launch_dependents, wait
from kernels.sampling_rules import TokenMask
from kernels.tuned import sampling_sm90 as tuned

_INFINITY = tl.constexpr(float("inf"))


def launch_mask(logits: torch.Tensor, mask: TokenMask) -> None:
    """Forbid in logits [L, V], in place, what `mask` does not allow. All tensors are contiguous."""
    vocab = logits.shape[1]
    launcher.launch(
        mask_kernel,
        (len(mask.rows), triton.cdiv(vocab, tuned.MASK_TILE)),
        logits,
        mask.rows,
        mask.words,
        VOCAB=vocab,
        TILE=tuned.MASK_TILE,
        PDL=PDL,
        num_warps=tuned.MASK_WARPS,
        launch_pdl=PDL,
    )


@triton.jit
def mask_kernel(logits, rows, words, VOCAB: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    launch_dependents(PDL)
    masked = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + masked).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < VOCAB
    word = tl.load(words + masked * tl.cdiv(VOCAB, 32) + (token >> 5), mask=inside, other=0)
    forbidden = inside & (((word >> (token & 31)) & 1) == 0)
    place = logits + row * VOCAB + token
    x = tl.load(place, mask=forbidden, other=0.0).to(tl.float32)
    # NaN and +inf stay what they are, to be found.
    tl.store(place, tl.full([TILE], -_INFINITY, logits.dtype.element_ty), mask=forbidden & (x < _INFINITY))
