"""A row's draw under top_k, top_p and min_p on CUDA, without a sort; part of `kernels.sampling_kernels`.

The maxima of groups of tokens give a bound that no token below can pass: k groups hold at least k tokens as
good as the k-th best maximum, and the tokens that are maxima have at least their own mass. What is as good as
the bound is listed (tens of tokens, where the distribution has a peak), and the threshold is found among it
two bits of the logit at a time, from the highest on. A list that would be too long stays a list of groups:
slower, same result.

Source: the search is that of radix select (Alabi et al., "Fast k-selection algorithms for graphics processing
units", ACM JEA 2012), with masses beside counts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import triton
import triton.language as tl

from kernels.philox import uniform_in_kernel

_INFINITY = tl.constexpr(float("inf"))

#: top_p keeps a token at least, however small it is; the best one weighs 1.
_LEAST_MASS = tl.constexpr(1e-30)


@triton.jit
def draw_restricted(
    logits,
    group_best,
    list_,
    highest,
    mass,
    inverse,
    top_p,
    min_p,
    top_k,
    seed,
    position,
    VOCAB: tl.constexpr,
    SHIFT: tl.constexpr,  # a group is 2^SHIFT tokens
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
):
    """The token drawn among those that min_p, top_k and top_p leave; `mass` is that of all tokens."""
    lane = tl.arange(0, TILE)
    floor = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), -_INFINITY)
    by_k = (top_k > 0) & (top_k < VOCAB)
    only_p = (min_p == 0.0) & (by_k == 0)

    # No token below `bound` can win, as the groups' maxima tell.
    bound = floor
    if by_k | only_p:
        target = tl.where(by_k, top_k.to(tl.float32), tl.maximum(top_p * mass, _LEAST_MASS))
        key = _largest_key(
            group_best, list_, GROUPS, 0, highest, inverse, floor, target, only_p, GROUPS, True, TILE, BITS
        )
        bound = tl.maximum(floor, _scaled(_logit(key, BITS), highest, inverse))

    # The groups that reach it, and then, if they are few enough, their tokens that do.
    count = 0
    for start in range(0, GROUPS, TILE):
        group = start + lane
        x = tl.load(group_best + group, mask=group < GROUPS, other=-_INFINITY)
        reaches = (group < GROUPS) & (_scaled(x, highest, inverse) >= bound)
        tl.store(list_ + count + tl.cumsum(reaches.to(tl.int32), 0) - 1, group, mask=reaches)
        count += tl.sum(reaches.to(tl.int32), 0)
    tl.debug_barrier()
    shift = SHIFT
    count = count << SHIFT
    if count > TILE:
        listed = 0
        for start in range(0, count, TILE):
            token, x, inside = _entries(logits, list_, start, count, SHIFT, VOCAB, False, TILE)
            reaches = inside & (_scaled(x, highest, inverse) >= bound)
            place = listed + tl.cumsum(reaches.to(tl.int32), 0) - 1
            tl.store(list_ + GROUPS + place, token, mask=reaches & (place < TILE))
            listed += tl.sum(reaches.to(tl.int32), 0)
        tl.debug_barrier()
        if listed <= TILE:
            list_ += GROUPS
            shift = 0
            count = listed

    for stage in range(2):
        by_p = stage == 1
        if (by_p & (top_p < 1.0)) | ((stage == 0) & by_k):
            if by_p & (only_p == 0):
                mass = _mass(logits, list_, count, shift, highest, inverse, floor, VOCAB, TILE)
            target = tl.where(by_p, tl.maximum(top_p * mass, _LEAST_MASS), top_k.to(tl.float32))
            key = _largest_key(
                logits, list_, count, shift, highest, inverse, floor, target, by_p, VOCAB, False, TILE, BITS
            )
            floor = tl.maximum(floor, _scaled(_logit(key, BITS), highest, inverse))
    floor = tl.maximum(floor, bound)  # where rounding kept the mass below top_p

    best = tl.full((), -_INFINITY, tl.float32)
    drawn = tl.full((), VOCAB, tl.int32)
    for start in range(0, count, TILE):
        token, x, inside = _entries(logits, list_, start, count, shift, VOCAB, False, TILE)
        scaled = _scaled(x, highest, inverse)
        kept = inside & (scaled >= floor)
        if tl.max(kept.to(tl.int32), 0) > 0:
            score = tl.where(kept, scaled + gumbel(uniform_in_kernel(seed, position, token)), -_INFINITY)
            here = tl.max(score, 0)
            first = tl.min(tl.where(score == here, token, VOCAB), 0)
            # Lists are in the order of token ids: of equal scores the first one stays.
            drawn = tl.where(here > best, first, drawn)
            best = tl.maximum(best, here)
    return drawn


@triton.jit
def _largest_key(
    values,
    list_,
    count,
    shift,
    highest,
    inverse,
    floor,
    target,
    by_mass,
    LIMIT: tl.constexpr,
    DIRECT: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
):
    """The largest key such that the entries that have it or a larger one reach `target`: their number, or
    their mass. Entries below `floor` count for nothing. If not even all are enough, the lowest key, which is
    no logit's."""
    key = tl.full((), -(1 << (BITS - 1)), tl.int32)
    for step in range(BITS // 2):
        place = BITS - 2 - 2 * step
        from_1 = tl.zeros([TILE], tl.float32)
        from_2 = tl.zeros([TILE], tl.float32)
        from_3 = tl.zeros([TILE], tl.float32)
        for start in range(0, count, TILE):
            _, x, inside = _entries(values, list_, start, count, shift, LIMIT, DIRECT, TILE)
            scaled = _scaled(x, highest, inverse)
            weight = tl.where(by_mass, tl.exp(scaled), 1.0)
            weight = tl.where(inside & (scaled >= floor), weight, 0.0)
            at = _key(x, BITS)
            from_1 += tl.where(at >= key + (1 << place), weight, 0.0)
            from_2 += tl.where(at >= key + (2 << place), weight, 0.0)
            from_3 += tl.where(at >= key + (3 << place), weight, 0.0)
        digit = (
            (tl.sum(from_1, 0) >= target).to(tl.int32)
            + (tl.sum(from_2, 0) >= target).to(tl.int32)
            + (tl.sum(from_3, 0) >= target).to(tl.int32)
        )
        key += digit << place
    return key


@triton.jit
def _mass(values, list_, count, shift, highest, inverse, floor, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """What the entries from `floor` on weigh together."""
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        _, x, inside = _entries(values, list_, start, count, shift, LIMIT, False, TILE)
        scaled = _scaled(x, highest, inverse)
        mass += tl.where(inside & (scaled >= floor), tl.exp(scaled), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _entries(
    values, list_, start, count, shift, LIMIT: tl.constexpr, DIRECT: tl.constexpr, TILE: tl.constexpr
):
    """Entries `start` to `start + TILE` of `count`: (id, value, whether there is one). A list names runs of
    2^shift ids; DIRECT = all ids from 0 on, without a list."""
    place = start + tl.arange(0, TILE)
    inside = place < count
    if DIRECT:
        id = place
    else:
        run = tl.load(list_ + (place >> shift), mask=inside, other=0)
        id = (run << shift) | (place & ((1 << shift) - 1))
        inside = inside & (id < LIMIT)
    return id, tl.load(values + id, mask=inside, other=-_INFINITY).to(tl.float32), inside


@triton.jit
def _scaled(x, highest, inverse):
    return (x - highest) * inverse


@triton.jit
def _key(x, BITS: tl.constexpr):
    """An int32 that orders like x; with 16 bits, for x whose lower 16 are zero, from -2^15 on."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)


@triton.jit
def _logit(key, BITS: tl.constexpr):
    """The x of a key; -inf for the lowest one."""
    wide = key << (32 - BITS)
    wide = tl.where(key < 0, wide | ((1 << (32 - BITS)) - 1), wide)
    x = (wide ^ ((wide >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key > -(1 << (BITS - 1)), x, -_INFINITY)


@triton.jit
def gumbel(uniform):
    """Noise of the Gumbel distribution."""
    return -tl.log(-tl.log(uniform))
