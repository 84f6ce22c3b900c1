"""What a stored block is worth: hits to expect from it per second of room, learned by class.

A class is how often a block has been used, counted beyond evictions, and what its users asked for:

    class = tier of the hint (0 below the default priority, 1 the default, 2 above it, 3 from 70 on) * 4
            + min(uses, 4) - 1

For each class two histograms over ages (time since the last use) are kept: at which age its blocks were used
again, and at which age those died that were not. The worth of a block of class c and age a is its hit density
(LHD, NSDI'18): hits beyond a, over the time that blocks which reached a went on to live. A strong prior, the
same for all classes and falling with age, makes that LRU until there is evidence. A hint is a feature and no
order: a class whose hint is wrong is worth what its blocks turned out to be worth.

Its limit: that blocks are not used again is only known when their ghosts die, so a hint that was right and
turns wrong costs until then (`benchmarks/eviction.py` has the row "right, then all wrong").

Times are in ms where a name says so, else in seconds. `functions.lua` has the same classes and ages.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.wire.messages import DEFAULT_PRIORITY

TIERS = 4
TIER_NAMES = ("low", "default", "raised", "high")
FREQUENCIES = 4
CLASSES = TIERS * FREQUENCIES
HIGH_PRIORITY = 70

#: Quarters of an octave of 1 s + age: 0.25 s wide at first, 8 minutes at the half hour.
AGES = 48

#: Uses are counted up to here: four bits of a record.
MAX_USES = 15

#: A ghost is what is remembered of an evicted block: it dies so long after its last use, or when there are
#: more than GHOSTS_PER_BLOCK a stored block and GHOSTS_AT_LEAST besides.
GHOST_LIFE_MS = 1_800_000
GHOSTS_PER_BLOCK = 1
GHOSTS_AT_LEAST = 20_000

#: Events fade by 1 % every 200 lookups: half of them after 13,800.
FADE_A_LOOKUP = 0.99 ** (1 / 200)

#: The prior weighs as much as so many events of a minute each. With less, rare classes are judged by chance;
#: from 50 to 1,000 it makes a difference of 1 to 2 % (`benchmarks/eviction.py --sensitivity`).
PRIOR_EVENTS = 200
_PRIOR_SECONDS = 60.0 * PRIOR_EVENTS


def tier(priority: int) -> int:
    """Of what a use asked for."""
    if priority == DEFAULT_PRIORITY:
        return 1
    if priority < DEFAULT_PRIORITY:
        return 0
    return 2 if priority < HIGH_PRIORITY else 3


def value_class(tier: int, uses: int) -> int:
    """0 to CLASSES - 1. `uses` >= 1."""
    return tier * FREQUENCIES + min(uses, FREQUENCIES) - 1


def age_bucket(age_ms: float) -> int:
    """0 to AGES - 1. Exact in floating point, so that every implementation agrees."""
    fraction, exponent = math.frexp(1 + max(0.0, age_ms) / 1000)
    return min(AGES - 1, (exponent - 1) * 4 + int(fraction * 8 - 4))


def _middle_s(bucket: int) -> float:
    return float(2 ** (bucket // 4) * (1 + (bucket % 4 + 0.5) / 4) - 1)


_MIDDLES_S = [_middle_s(bucket) for bucket in range(AGES)]
_PRIOR = [1 / (20 + middle_s) for middle_s in _MIDDLES_S]  # hits a second; LRU, for it falls with age


@dataclass(frozen=True)
class Weights:
    """`density[class * AGES + bucket]`: hits a second of room to expect from a block."""

    density: tuple[float, ...]

    _FORMAT = f">{CLASSES * AGES}d"

    def to_bytes(self) -> bytes:
        return struct.pack(self._FORMAT, *self.density)

    @classmethod
    def from_bytes(cls, packed: bytes) -> Weights:
        return cls(struct.unpack(cls._FORMAT, packed))


@dataclass
class Events:
    """Counts since the last fold: (class, bucket) -> events, and how many lookups they took."""

    hits: dict[tuple[int, int], float] = field(default_factory=dict)
    deaths: dict[tuple[int, int], float] = field(default_factory=dict)
    lookups: int = 0


class History:
    """The faded histograms. `fold` adds events and gives the weights that follow from all of them."""

    def __init__(self) -> None:
        self.hits = [0.0] * (CLASSES * AGES)
        self.deaths = [0.0] * (CLASSES * AGES)

    def fold(self, events: Events) -> Weights:
        """Weights from all events, the new ones at full weight; all fade afterwards."""
        _add(self.hits, events.hits)
        _add(self.deaths, events.deaths)
        weights = Weights(tuple(density for c in range(CLASSES) for density in self._densities(c)))
        fade = FADE_A_LOOKUP**events.lookups
        self.hits = [count * fade for count in self.hits]
        self.deaths = [count * fade for count in self.deaths]
        return weights

    def _densities(self, value_class: int) -> list[float]:
        start = value_class * AGES
        densities = [0.0] * AGES
        hits = reached = lived_s = 0.0  # of blocks that got to the age: uses to come, number, time beyond it
        for bucket in range(AGES - 1, -1, -1):
            if bucket < AGES - 1:
                lived_s += reached * (_MIDDLES_S[bucket + 1] - _MIDDLES_S[bucket])
            hits += self.hits[start + bucket]
            reached += self.hits[start + bucket] + self.deaths[start + bucket]
            within_s = max(1.0, 0.15 * _MIDDLES_S[bucket])  # where in the bucket an event was is not known
            densities[bucket] = (hits + _PRIOR_SECONDS * _PRIOR[bucket]) / (
                lived_s + reached * within_s + _PRIOR_SECONDS
            )
        return densities

    _FORMAT = f">{2 * CLASSES * AGES}d"

    def to_bytes(self) -> bytes:
        return struct.pack(self._FORMAT, *self.hits, *self.deaths)

    @classmethod
    def from_bytes(cls, packed: bytes) -> History:
        """What `to_bytes` gave; an empty history for anything else."""
        history = cls()
        if len(packed) == struct.calcsize(cls._FORMAT):
            counts = struct.unpack(cls._FORMAT, packed)
            history.hits, history.deaths = list(counts[: CLASSES * AGES]), list(counts[CLASSES * AGES :])
        return history


def _add(counts: list[float], new: Mapping[tuple[int, int], float]) -> None:
    for (value_class, bucket), count in new.items():
        counts[value_class * AGES + bucket] += count
