"""Tiles of the sampler for H100 and H200.

CHUNK must not depend on the number of rows: which of two scores a rounding error apart wins is decided within
a chunk, and must not change with the batch around a row.
"""

from __future__ import annotations

#: Tokens of one program of the first pass: 38 programs a row at 152k. With 8 warps, 16 logits a thread.
CHUNK = 4096
CHUNK_WARPS = 8
PART = 1024  # of it that gets its noise together

#: Tokens that share one maximum, by which the second pass knows what it need not read.
GROUP = 128

#: Tokens that the second pass looks at together, and the longest list it makes.
TILE = 2048
ROW_WARPS = 8

#: Programs that edit logits; each owns a scratch line of V int32 (64 at 152k: 39 MB).
EDITORS = 64
EDIT_TILE = 1024
EDIT_WARPS = 8

#: Tokens of one program of a grammar's mask; like CHUNK, 16 logits a thread.
MASK_TILE = 4096
MASK_WARPS = 8
