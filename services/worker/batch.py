"""The tensors of one step: a mixed batch of prefill chunks and decodes, as the decoder reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """T tokens of R rows (sequences), all tensors on the model's device.

    Row r owns the tokens query_start[r] to query_start[r + 1]; they are the last of its context_len[r]
    tokens. Tokens and rows beyond the real ones are padding: slot -1, context_len 0.
    """

    token_ids: torch.Tensor  # [T] int32 or int64
    positions: torch.Tensor  # [T] int32 or int64, from 0
    slots: torch.Tensor  # [T] int64, page * block_size + offset: where the token's K and V go
    query_start: torch.Tensor  # [R + 1] int32
    context_len: torch.Tensor  # [R] int32, tokens with KV after this step
    block_tables: torch.Tensor  # [R, max_blocks] int32, page of each block
    logit_rows: torch.Tensor  # [L] int64, the tokens (indices into T) whose logits are wanted
    max_query: int  # most tokens of one row
