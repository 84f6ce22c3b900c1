"""How many bytes of Redis' memory a stored block takes, and how to cut its frame so that few are wasted.

Redis' allocator, jemalloc, rounds up to size classes, four to a doubling: 256, 320, 384, 448, 512 KiB and so
on (https://jemalloc.net/jemalloc.3.html, "size classes"). KV blocks love powers of two: 2 MiB of payload plus
a header and Redis' own bytes land in the 2.5 MiB class, 25 % wasted. So a frame is stored as two values where
that saves more than a second key costs: the first fills a class to the brim, the second holds the rest.

    Llama-3.1-8B, 16 tokens, bf16   2,097,152 B   one value 25.0 % over, two values 0.1 %
    SmolLM2-135M, 16 tokens, fp16     368,640 B   one value  6.6 % over, two values 2.1 %: stays whole
"""

from __future__ import annotations

#: What Redis puts around a large value in the same allocation: string header (9), terminator (1), and the
#: line end (2) that it read with it; rounded up.
_VALUE_OVERHEAD_BYTES = 16

#: Key name, entries in the dictionaries of keys and of expiries, object header. Measured: 145 to 190 on Redis
#: 7.0 and Valkey 8.1 (benchmarks/store.py), by how full the dictionaries' tables are.
_KEY_BYTES = 192

#: Record, entries in the eviction queues if it is a leaf: 145 to 150; a ghost for every stored block: 105;
#: what a request asked for it, if it did: 110 (benchmarks/eviction.py --redis, on a real trace).
_METADATA_BYTES = 384

#: A cut must save this share of the frame: a second key costs about 2 µs of server time a read.
_CUT_SAVES = 1 / 16

_SMALLEST_CUT = 16 * 1024


def size_class(size: int) -> int:
    """The jemalloc size class that holds `size` bytes: four to a doubling, 16 bytes apart at least."""
    spacing = max(16, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // spacing) * spacing


def piece_lengths(frame_bytes: int) -> tuple[int, ...]:
    """The lengths of the one or two values that store a frame of `frame_bytes`."""
    whole = size_class(frame_bytes + _VALUE_OVERHEAD_BYTES)
    if frame_bytes < _SMALLEST_CUT:
        return (frame_bytes,)
    below = _class_below(whole)
    first = below - _VALUE_OVERHEAD_BYTES
    rest = frame_bytes - first
    cut = below + size_class(rest + _VALUE_OVERHEAD_BYTES) + _KEY_BYTES
    return (first, rest) if whole - cut > frame_bytes * _CUT_SAVES else (frame_bytes,)


def stored_bytes(frame_bytes: int) -> int:
    """All memory that a block with a frame of `frame_bytes` takes: what counts against the capacity."""
    values = sum(
        size_class(piece + _VALUE_OVERHEAD_BYTES) + _KEY_BYTES for piece in piece_lengths(frame_bytes)
    )
    return values + _METADATA_BYTES


def _class_below(size: int) -> int:
    """The next smaller class than the class `size`."""
    return size - max(16, 1 << ((size - 1).bit_length() - 3))
