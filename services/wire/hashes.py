"""Block hashes: one 16-byte name for a block of tokens, the same in GPU, host memory, store and router.

A block is `block_size` consecutive tokens of one prefix. Its hash chains from its parent's, so equal hashes
mean equal prefixes, and from a root that holds everything the KV values depend on besides the tokens:

    root      = BLAKE2b-128(fingerprint, key=salt digest)
    hash[0]   = BLAKE2b-128(token ids of block 0, key=root)
    hash[i]   = BLAKE2b-128(token ids of block i, key=hash[i-1])

BLAKE2b (RFC 7693) takes the parent as its key, which costs the same number of compressions as prefixing it
and leaves the block's bytes at a fixed offset. 128 bits: two different prefixes collide with probability
2**-64 only after 2**32 blocks of one deployment, and an attacker who does not know the root (it holds the
tenant's secret salt) cannot search for collisions offline.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

HASH_BYTES = 16
MIN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 128

#: Four bytes a token id, little endian, wherever tokens cross a process or become a hash.
TOKEN_BYTES = 4


def check_block_size(block_size: int) -> int:
    """Return `block_size` if it is a power of two from 16 to 128, else raise ValueError naming it."""
    if block_size & (block_size - 1) or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(
            f"block_size must be a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}, got {block_size}"
        )
    return block_size


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian u32, the form hashed and sent. Raises OverflowError outside 0…2**32-1."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> array[int]:
    """Inverse of `pack_tokens`. Raises ValueError if `data` is not a whole number of tokens."""
    if len(data) % TOKEN_BYTES:
        raise ValueError(f"packed tokens must be a multiple of {TOKEN_BYTES} bytes, got {len(data)}")
    tokens = array("I")
    tokens.frombytes(data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def root_hash(fingerprint: bytes, salt: bytes = b"") -> bytes:
    """The chain's root for one model and one tenant salt.

    `fingerprint` is the 16-byte digest of weights, adapter, rope and position config, KV dtype and layout
    version (`services.worker.fingerprint`). Two things that may not share KV never share a root.
    """
    if len(fingerprint) != HASH_BYTES:
        raise ValueError(f"fingerprint must be {HASH_BYTES} bytes, got {len(fingerprint)}")
    key = blake2b(salt, digest_size=32, person=b"reprise-salt").digest()
    return blake2b(fingerprint, digest_size=HASH_BYTES, key=key, person=b"reprise-root").digest()


def chain_hashes(parent: bytes, packed_tokens: bytes, block_size: int) -> list[bytes]:
    """Hashes of every full block in `packed_tokens`, whose first token follows the block named `parent`.

    A trailing partial block has no name. Cost: about 1 µs a block of 64 tokens.
    """
    step = block_size * TOKEN_BYTES
    hashes: list[bytes] = []
    for start in range(0, len(packed_tokens) - step + 1, step):
        parent = blake2b(packed_tokens[start : start + step], digest_size=HASH_BYTES, key=parent).digest()
        hashes.append(parent)
    return hashes


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    """Hashes back to back, the form in which frames carry them."""
    return b"".join(hashes)


def split_hashes(data: bytes) -> list[bytes]:
    """Inverse of `join_hashes`. Raises ValueError if `data` is not a whole number of hashes."""
    if len(data) % HASH_BYTES:
        raise ValueError(f"packed hashes must be a multiple of {HASH_BYTES} bytes, got {len(data)}")
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]
