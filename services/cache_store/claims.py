"""Claims: who is computing what the store lacks, so that others can wait for it and not compute it again.

    reprise2:{sK}:claim<codec>:<hash>   STRING  claimer, whether somebody follows, when it begins, when all
                                                will be stored, then 8 bytes of each claimed block's hash

The key names the first block of the run that was missing when it was claimed. As the run's blocks get
stored later callers miss a later one first; they find the claim by the blocks before that. A claim lives
for a second and is renewed while its worker means it, so a dead worker's claims are gone by themselves and
nothing else needs to know of them. They are no part of the books: a claim that is lost, or wrong, costs
time and never data.

Claims of different codecs are apart: a worker waits only for frames that it takes (see frames.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from services.cache_store.functions import LAYOUT, MAX_BLOCKS

SOURCE = files("services.cache_store").joinpath("claims.lua").read_text(encoding="utf-8")

CLAIMER_BYTES = 8
#: How long a claim outlives the last sign of its worker.
LIFE_S = 1.0
_ID_BYTES = 8


@dataclass(frozen=True)
class Times:
    """What a worker expects of a missing run, in seconds from now. For the run's first blocks each is as much
    nearer to `begins_s` as they are fewer."""

    begins_s: float  # until it would begin to compute the run
    waits_s: float  # it rather waits for another if that has stored the run by then
    due_s: float  # until it would have stored the run itself


@dataclass(frozen=True)
class Followed:
    """Another worker computes the first `blocks` of the run and should have stored them in `expected_s`; no
    claimer: it is done."""

    blocks: int
    expected_s: float
    key: bytes
    claimer: bytes


@dataclass(frozen=True)
class Claimed:
    """The run is the caller's to compute: under this key it says so to others, None = somebody else does."""

    key: bytes | None


class Claims:
    """Claims of one claimer in one shard, on blocks that travel by one codec. Raises what redis-py raises."""

    def __init__(self, redis: Redis, claimer: bytes, codec: int = 0, *, shard: int = 0) -> None:
        if len(claimer) != CLAIMER_BYTES:
            raise ValueError(f"a claimer has {CLAIMER_BYTES} bytes, got {len(claimer)}")
        self._redis = redis
        self._claimer = claimer
        self._prefix = b"reprise%d:{s%d}:claim%d:" % (LAYOUT, shard, codec)
        version = blake2b(SOURCE.encode(), digest_size=4).hexdigest()
        self._name = f"reprise_claims_{version}_"
        self._source = SOURCE.replace("VERSION", version)

    def claim(
        self, before: Sequence[bytes], run: Sequence[bytes], times: Times, least: int
    ) -> Claimed | Followed:
        """Claim the missing blocks `run`, or learn who computes at least `least` of them in time. `before`:
        the hashes of the blocks before them, of which the last 1,023 are looked at.

        What is missing must be looked up again after it was claimed: who had claimed it before may have just
        stored it.
        """
        if not run:
            raise ValueError("a run of no blocks cannot be claimed")
        keys = [self._prefix + block for block in (*before[-(MAX_BLOCKS - 1) :], run[0])]
        ids = b"".join(block[:_ID_BYTES] for block in run)
        in_ms = [_milliseconds(seconds) for seconds in (times.begins_s, times.waits_s, times.due_s)]
        answer, *rest = self._call("claim", keys, self._claimer, _milliseconds(LIFE_S), *in_ms, least, ids)
        if answer == b"F":
            blocks, expected_ms, place, claimer = rest
            return Followed(blocks, expected_ms / 1000, keys[place - 1], claimer)
        return Claimed(keys[-1] if answer == b"C" else None)

    def holds(self, followed: Followed) -> bool:
        """Whether the one that was followed still computes it. Ask before what is stored is looked up: it
        stores first and then lets go."""
        if not followed.claimer:
            return False
        return self._redis.getrange(followed.key, 0, CLAIMER_BYTES - 1) == followed.claimer

    def renew(self, keys: Sequence[bytes]) -> list[tuple[bool, bool]]:
        """For each claim of ours: whether it still is, and whether somebody follows."""
        if not keys:
            return []
        held: bytes = self._call("renew", keys, self._claimer, _milliseconds(LIFE_S))
        return [(state != ord("0"), state == ord("2")) for state in held]

    def release(self, keys: Sequence[bytes]) -> None:
        """Give claims up, those that are ours."""
        if keys:
            self._call("release", keys, self._claimer)

    def _call(self, function: str, keys: Sequence[bytes], *arguments: Any) -> Any:
        command = ("FCALL", self._name + function, len(keys), *keys, *arguments)
        try:
            return self._redis.execute_command(*command)
        except ResponseError as error:
            if "Function not found" not in str(error):
                raise
        self._redis.execute_command("FUNCTION", "LOAD", "REPLACE", self._source)
        return self._redis.execute_command(*command)


def _milliseconds(seconds: float) -> int:
    return max(0, math.ceil(seconds * 1000))
