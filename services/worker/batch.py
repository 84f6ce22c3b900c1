"""The tensors of one step: a mixed batch of decodes and prefill chunks, as the decoder reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention import AttentionBatch


@dataclass(frozen=True)
class Batch:
    """T tokens of R rows (sequences), all tensors on the model's device.

    The rows and what they attend to are `attention`'s; its page table also says where the tokens' K and V go.
    """

    slots: torch.Tensor  # [T] int32, line of the tables; -1 = padding
    positions: torch.Tensor  # [T] int32, from 0
    write_from: torch.Tensor  # [T] int32, first position of the token's sequence whose KV this step writes
    tokens: torch.Tensor  # [S, max_length] int32: token ids, a line a slot
    attention: AttentionBatch
    logit_rows: torch.Tensor | None  # [L] int32, indices of the tokens whose logits are wanted; None = all
