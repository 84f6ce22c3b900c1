"""How many bytes of Redis' memory a stored block takes, and how to cut its frame so that few are wasted.

Redis' allocator, jemalloc, rounds up to size classes, four to a doubling: 256, 320, 384, 448, 512 KiB and so
on (https://jemalloc.net/jemalloc.3.html, "size classes"). KV blocks love powers of two: 2 MiB of payload plus
a header and Redis' own bytes land in the 2.5 MiB class, 25 % wasted. So a frame is stored as several values,
of which all but the last fill a class to the brim. No value is larger than 1 MiB while 16 of them hold the
frame: beyond, throughput falls, and whoever else uses the server waits for whole values.

    Llama-3.1-8B, 16 tokens, bf16   2,097,152 B   in one value 25.0 % over, in three 0.03 %
    SmolLM2-135M, 16 tokens, fp16     368,640 B   in one value  6.6 % over, in three 0.19 %
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement

#: What Redis puts around a large value in the same allocation: string header (9), terminator (1), and the
#: line end (2) that it read with it; rounded up.
_VALUE_OVERHEAD_BYTES = 16

#: Key name, entries in the dictionaries of keys and of expiries, object header. Measured: 145 to 190 on Redis
#: 7.0 and Valkey 8.1 (benchmarks/store.py), by how full the dictionaries' tables are.
_KEY_BYTES = 192

#: Record, entries in the eviction queues if it is a leaf: 145 to 150; a ghost for every stored block: 105;
#: what a request asked for it, if it did: 110 (benchmarks/eviction.py --redis, on a real trace).
_METADATA_BYTES = 384

#: A frame is cut into as few values as waste no more than this share of it: each costs about 2 µs of server
#: time a read.
_MOST_WASTED = 0.015

#: Below, a key costs more than a cut saves.
_SMALLEST_CUT = 16 * 1024

_LARGEST_VALUE = 1 << 20
_MOST_LARGEST = 16  # values of the largest size in a frame; larger frames have larger values
_MOST_CUTS = 2  # of what is left after those

#: Values of one frame at most, whatever its size: so many keys are deleted for a block of unknown size.
MAX_PIECES = _MOST_LARGEST + _MOST_CUTS + 1


def size_class(size: int) -> int:
    """The jemalloc size class that holds `size` bytes: four to a doubling, 16 bytes apart at least."""
    spacing = max(16, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // spacing) * spacing


@lru_cache(maxsize=64)
def piece_lengths(frame_bytes: int) -> tuple[int, ...]:
    """The lengths of the values that store a frame of `frame_bytes`, `MAX_PIECES` at most."""
    if frame_bytes < _SMALLEST_CUT:
        return (frame_bytes,)
    largest = max(_LARGEST_VALUE, size_class(frame_bytes // _MOST_LARGEST)) - _VALUE_OVERHEAD_BYTES
    whole, rest = divmod(frame_bytes, largest)
    head = (largest,) * whole
    if not rest:
        return head
    return head + _cut(rest, most_wasted=int(frame_bytes * _MOST_WASTED))


def stored_bytes(frame_bytes: int) -> int:
    """All memory that a block with a frame of `frame_bytes` takes: what counts against the capacity."""
    return _values_bytes(piece_lengths(frame_bytes)) + _METADATA_BYTES


def _cut(length: int, most_wasted: int) -> tuple[int, ...]:
    """`length` in as few values as waste no more than `most_wasted`, else in those that waste least."""
    brims = [size - _VALUE_OVERHEAD_BYTES for size in _classes_up_to(length)]
    best: tuple[int, ...] = (length,)
    for cuts in range(_MOST_CUTS + 1):
        for firsts in combinations_with_replacement(reversed(brims), cuts):
            rest = length - sum(firsts)
            if rest > 0 and _values_bytes((*firsts, rest)) < _values_bytes(best):
                best = (*firsts, rest)
        if _values_bytes(best) - length <= most_wasted:
            break
    return best


def _classes_up_to(length: int) -> list[int]:
    """Size classes from 4 KiB on, ascending."""
    classes = [4096]
    while classes[-1] < length:
        classes.append(size_class(classes[-1] + 1))
    return classes


def _values_bytes(lengths: tuple[int, ...]) -> int:
    return sum(size_class(length + _VALUE_OVERHEAD_BYTES) + _KEY_BYTES for length in lengths)
