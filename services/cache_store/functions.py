"""The store's Redis Functions, typed: metadata of blocks, never their payloads.

Keys of shard k, all in one slot by the hash tag (N = layout version, `LAYOUT`):

    repriseN:{sK}:blocks    HASH  block hash -> record, 58 bytes: state, tier and uses, last use, effective
                                  priority, held bit, retained and condemned bits, readers, children,
                                  size, lease, fence, owner, parent
    repriseN:{sK}:leaves    ZSET  leaves, score = (effective priority * 16 + class) * 2**42 + last use in ms
    repriseN:{sK}:owned     ZSET  the same by owner: owner + score + block hash, ordered as strings
    repriseN:{sK}:writing   ZSET  reservations -> deadline in ms
    repriseN:{sK}:retained  HASH  block hash -> its explicit retentions: owner, priority, ttl, expiry; up to 8
    repriseN:{sK}:expiring  ZSET  block hash -> earliest expiry among its retentions
    repriseN:{sK}:bytes     HASH  owner -> bytes; `total`; `pinned`
    repriseN:{sK}:ghosts    ZSET  first 8 bytes of an evicted block's hash -> last use * 64 + tier and uses
    repriseN:{sK}:events    HASH  h or d, class, age -> hits or deaths since the last fold; n -> lookups
    repriseN:{sK}:learned   HASH  history and weights (worth.py), their version, when they were learned
    repriseN:{sK}:config    HASH  capacity; quota:<owner>, floor:<owner>; identity of the contents; the fence
                                  counter
    repriseN:{sK}:dropped   SET   names of payloads that no record needs, until somebody has unlinked them
    repriseN:{sK}:counts    HASH  counters for the metrics
    repriseN:{sK}:condemned SET   blocks that operators deleted, or whose writers had wrong values, until they
                                  and what follows them are gone
    repriseN:{sK}:lost      ZSET  blocks without a payload that others follow -> until when these wait for it
    repriseN:{sK}:trace     STREAM what is looked up and written, there while somebody records (recorder.py)
    repriseN:{pJ}:<name>    STRING payload (see payloads.py); name = block hash + fence

A fence is 7 bytes, new with every reservation. It is part of a payload's name, so a writer that comes too
late can neither overwrite nor unlink what another wrote, and a reader that was overtaken finds nothing
instead of something else. Block ids are chained hashes (services.wire.hashes): a parent never changes.

What is evicted: leaves only, least worth first (`worth`; `eviction` is the same policy without a server). The
functions count what happens to blocks of a class; whoever calls `events`, folds them and calls `learn` (the
service does) gives the weights. With none, or none for ten minutes, it is (effective priority, last use).
Libraries of different sources, and stores of different layouts, live side by side in one Redis, so releases
can be rolled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files
from os import urandom
from typing import Any, Literal, TypeVar

from redis import Redis
from redis.exceptions import ResponseError

from services.cache_store.worth import Events
from services.wire.hashes import HASH_BYTES, split_hashes
from services.wire.messages import DEFAULT_PRIORITY, MAX_PRIORITY

#: Of the keys and records. Anything that reads them differently needs another number.
LAYOUT = 3
SOURCE = files("services.cache_store").joinpath("functions.lua").read_text(encoding="utf-8")

#: The parent of a prefix's first block.
ROOT = bytes(HASH_BYTES)
FENCE_BYTES = 7
NAME_BYTES = HASH_BYTES + FENCE_BYTES
OWNER_BYTES = 8
#: Hashes in one call at most: Lua unpacks them onto its stack, and the server does nothing else meanwhile.
MAX_BLOCKS = 1024
MAX_BLOCK_BYTES = 2**32 - 1
#: A priority that no request can ask for: such a block is not evicted, nor what it continues. For `retain`,
#: with a time to live.
PINNED = MAX_PRIORITY + 1
_NEVER_MS = 2**48 - 1

#: WRITE it; another writer is at it: FOLLOW; HAVE it already; its parent is not stored: ORPHAN; every block
#: that would have to go ranks higher: NO_ROOM.
Status = Literal["W", "F", "H", "O", "N"]
WRITE: Status = "W"
FOLLOW: Status = "F"
HAVE: Status = "H"
ORPHAN: Status = "O"
NO_ROOM: Status = "N"


_Item = TypeVar("_Item")


class Unconfigured(Exception):
    """The store has no capacity yet, or lost it in a restart."""


@dataclass(frozen=True)
class NewBlock:
    """A block to be written. `parent` is the hash of the block before it, ROOT for a prefix's first block;
    `size` counts against the capacity (see allocation.stored_bytes); `ttl_ms` None = no limit."""

    hash: bytes
    parent: bytes
    size: int
    owner: bytes
    priority: int = DEFAULT_PRIORITY
    ttl_ms: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_BLOCK_BYTES:
            raise ValueError(f"size must be 1 to {MAX_BLOCK_BYTES} bytes, got {self.size}")
        _check_priority(self.priority)


@dataclass(frozen=True)
class Reserved:
    statuses: list[Status]  # one a block
    fence: bytes  # names this reservation in commit and abort, and the payloads written for it
    dropped: list[bytes]  # names of payloads to unlink
    more_room: bool  # victims a call are bounded: calling again can make room for NO_ROOM blocks


@dataclass(frozen=True)
class Margin:
    """What writing one more block means."""

    total: int  # bytes
    capacity: int  # 0 = not configured
    density: float | None  # hits a second (see worth.py) of the block to lose first; None = not learned


@dataclass(frozen=True)
class Usage:
    capacity: int  # bytes; 0 = not configured
    total: int
    pinned: int  # bytes of blocks that may not be evicted
    blocks: int
    leaves: int
    reservations: int
    dropped: int  # payloads waiting to be unlinked
    ghosts: int  # evicted blocks that are remembered
    lost: int  # blocks without a payload, kept for those that follow them
    owners: dict[bytes, int]  # bytes by owner digest
    quotas: dict[bytes, int]
    floors: dict[bytes, int]
    counts: dict[str, int]
    events: Events  # not yet learned from

    def evicted(self, reason: str) -> int:
        """Blocks evicted for this reason."""
        return sum(n for name, n in self.counts.items() if name.startswith(f"evicted:{reason}:"))


@dataclass(frozen=True)
class Prefix:
    """A stored prefix, by the leaf that ends it. `shared_*` are of its leading blocks that other stored
    prefixes have too. What is too long to be read in one call has `first` None and no blocks."""

    score: int  # ranks it: the group of the leaf's queue, then its time there
    last: bytes
    first: bytes | None
    blocks: int
    size: int  # bytes
    shared_last: bytes | None
    shared_blocks: int
    shared_size: int
    idle_ms: int  # since the last use of the leaf
    priority: int
    tier: int  # see worth.tier
    uses: int  # of the leaf, evictions survived included; counted up to worth.MAX_USES
    pinned_ms: int  # until the last pin of any of its blocks ends
    whole: bool  # no block on the way is lost or being deleted
    leased_ms: int
    owner: bytes

    _FORMAT = ">7s16s16sI7s16sI7s6sBBB6sB6s8s"

    @classmethod
    def unpack(cls, packed: bytes) -> Prefix:
        (score, last, first, blocks, size, shared, shared_blocks, shared_size, idle, priority, tier, uses,
         pinned, whole, leased, owner) = struct.unpack(cls._FORMAT, packed)  # fmt: skip

        def number(part: bytes) -> int:
            return int.from_bytes(part, "big")

        return cls(
            number(score), last, None if first == ROOT else first, blocks, number(size),
            None if shared == ROOT else shared, shared_blocks, number(shared_size), number(idle), priority,
            tier, uses, number(pinned), bool(whole), number(leased), owner,
        )  # fmt: skip


class PinRefused(Exception):
    """Nothing was pinned. `block` is the one at fault, None if it is the bytes."""

    def __init__(self, message: str, block: bytes | None = None) -> None:
        super().__init__(message)
        self.block = block


class TooManyDeletions(Exception):
    """As many prefixes are being deleted as may be at once."""


@dataclass(frozen=True)
class Learning:
    """A basis to learn from; `counts` by event as functions.lua names them."""

    version: int
    history: bytes
    counts: dict[bytes, int]

    @property
    def lookups(self) -> int:
        return self.counts.get(b"n", 0)

    def events(self) -> Events:
        events = Events(lookups=self.lookups)
        for event, count in self.counts.items():
            if len(event) == 3:
                happened = events.hits if event[:1] == b"h" else events.deaths
                happened[event[1], event[2]] = count
        return events


def owner_digest(tenant: str) -> bytes:
    """The 8 bytes under which a tenant's blocks and retentions are kept."""
    return blake2b(tenant.encode(), digest_size=OWNER_BYTES, person=b"reprise-owner").digest()


class StoreFunctions:
    """Calls of one shard. Raises what redis-py raises; loads the functions into a server that lacks them.

    `source` is replaced only by tests that need to turn the clock.
    """

    def __init__(self, redis: Redis, *, shard: int = 0, source: str = SOURCE) -> None:
        self.redis = redis
        digest = blake2b(source.encode(), digest_size=4).hexdigest()
        self._version = f"{LAYOUT}_{digest}"
        self._source = source.replace("VERSION", self._version)
        names = (
            "blocks",
            "leaves",
            "writing",
            "retained",
            "expiring",
            "bytes",
            "config",
            "dropped",
            "counts",
            "owned",
            "ghosts",
            "events",
            "learned",
            "condemned",
            "trace",
            "lost",
        )
        self.key = {name: b"reprise%d:{s%d}:%s" % (LAYOUT, shard, name.encode()) for name in names}
        self._head = (len(names), *self.key.values())  # every call declares all keys, in the Lua file's order

    def lookup(self, hashes: Sequence[bytes], owner: bytes, lease_ms: int) -> list[bytes]:
        """Fences of the leading run that is READY, which this use by `owner` refreshes.

        `lease_ms` > 0 keeps the whole run from eviction for so long (at most 30 s) or until `release` of its
        last block, which the caller owes for every such lookup that found something.
        """
        if not hashes:
            return []
        fences: bytes = self._call("lookup", owner, lease_ms, *_bounded(hashes))
        return [fences[at : at + FENCE_BYTES] for at in range(0, len(fences), FENCE_BYTES)]

    def peek(self, hashes: Sequence[bytes]) -> int:
        """Length of the leading run that is READY. Touches nothing; a replica can answer it."""
        if not hashes:
            return 0
        length: int = self._call("peek", *_bounded(hashes))
        return length

    def release(self, last: bytes, fence: bytes, saved_s: float = 0.0) -> None:
        """End the lease that a lookup took, named by the last block it found. `saved_s`: seconds of prefill
        that the blocks have saved, for the metrics."""
        self._call("release", last, fence, max(0, round(saved_s * 1e6)))

    def reserve(self, blocks: Sequence[NewBlock], life_ms: int) -> Reserved:
        """Ask to write `blocks`, parents before children; evicts to make room, at most 64 blocks a call.

        What is not committed within `life_ms` (at most 60 s) is void. Raises Unconfigured.
        """
        if not blocks:
            return Reserved([], bytes(FENCE_BYTES), [], False)
        packed = [
            struct.pack(">16s16s8sIB", b.hash, b.parent, b.owner, b.size, b.priority) + _ttl(b.ttl_ms)
            for b in _bounded(blocks)
        ]
        statuses, fence, dropped, more = self._call("reserve", life_ms, *packed)
        return Reserved([chr(status) for status in statuses], fence, _names(dropped), bool(more))  # type: ignore[misc]

    def commit(self, fence: bytes, hashes: Sequence[bytes]) -> list[bool]:
        """Make blocks readable whose payloads are in place. False: the reservation is void, unlink yours."""
        if not hashes:
            return []
        done: bytes = self._call("commit", fence, *_bounded(hashes))
        return [flag == ord("1") for flag in done]

    def abort(self, fence: bytes, hashes: Sequence[bytes]) -> list[bytes]:
        """Give reservations back. Returns names of payloads to unlink."""
        return _names(self._call("abort", fence, *_bounded(hashes)))

    def quarantine(self, block: bytes, fence: bytes, reason: str, taints: bool = False) -> list[bytes]:
        """Report that the payload of a READY block is missing or bad: nobody will find it, nor what follows
        it, until a writer has written it again. What follows waits ten minutes for that and then goes
        (`deletion`); if the block `taints` it, it goes without, and until then the block is not written.
        Returns names of payloads to unlink."""
        return _names(self._call("quarantine", block, fence, reason, int(taints)))

    def retain(self, hashes: Sequence[bytes], owner: bytes, priority: int, ttl_ms: int | None) -> int:
        """Add `owner`'s retention to stored blocks, as `reserve` does. Returns how many were known. PINNED
        needs a time to live: there is no other end to it."""
        if priority != PINNED:
            _check_priority(priority)
        elif ttl_ms is None:
            raise ValueError("a pinned block needs a time to live, got ttl_ms=None")
        if not hashes:
            return 0
        packed = [block + struct.pack(">B", priority) + _ttl(ttl_ms) for block in _bounded(hashes)]
        known: int = self._call("retain", owner, *packed)
        return known

    def evict(self, target_bytes: int, reason: str = "watermark") -> tuple[list[bytes], int, bool]:
        """Evict towards a total of `target_bytes`, at most 64 blocks; `reason` names the counter. Returns
        (names of payloads to unlink, the total now, whether a further call could go on)."""
        dropped, total, more = self._call("evict", target_bytes, reason)
        return _names(dropped), total, bool(more)

    def upkeep(self, limit: int) -> tuple[int, int, list[bytes]]:
        """Void overdue reservations and end overdue retentions, at most `limit` of each. Returns how many of
        each there were and the names of payloads to unlink."""
        reaped, expired, dropped = self._call("upkeep", limit)
        return reaped, expired, _names(dropped)

    def govern(self, owner: bytes, *, quota: int | None = None, floor: int | None = None) -> None:
        """Bound the bytes of `owner`: it never has more than `quota`, and what it has goes for others only
        beyond `floor`. None = no bound. The floors of all should leave room in the capacity."""
        for name, value in (("quota", quota), ("floor", floor)):
            if value is None:
                self.redis.hdel(self.key["config"], f"{name}:".encode() + owner)
            elif value < 0 or (name == "floor" and quota is not None and value > quota):
                raise ValueError(f"{name} must be 0 bytes or more, a floor at most the quota, got {value}")
            else:
                self.redis.hset(self.key["config"], f"{name}:".encode() + owner, value)

    def prefixes(self, limit: int, after: tuple[int, bytes] | None = None) -> tuple[list[Prefix], bool]:
        """Stored prefixes, those that rank highest first: by effective priority, what their users ask for,
        uses, last use. At most `limit` behind the one of this score and leaf, fewer where they are long; and
        whether there are more. One that is used between two calls may come twice or never."""
        score, leaf = ("", b"") if after is None else after
        packed, more = self._call("prefixes", limit, score, leaf)
        return [Prefix.unpack(prefix) for prefix in packed], bool(more)

    def pin(
        self, lasts: Sequence[bytes], owner: bytes, ttl_ms: int, most_bytes: int, priority: int = PINNED
    ) -> tuple[int, int, int]:
        """Retain the prefixes that end in the blocks `lasts`, all of their blocks, for `ttl_ms`; 0 takes it
        back. Returns (blocks, their bytes, bytes of all pinned blocks). Raises PinRefused, and then has done
        nothing, for a prefix that is not stored or being deleted, for more than 1,024 blocks, and where more
        than `most_bytes` would be pinned."""
        if priority != PINNED:
            _check_priority(priority)
        status, *values = self._call("pin", owner, priority, ttl_ms, most_bytes, *_bounded(lasts))
        if status == b"ok":
            blocks, size, pinned = values
            return blocks, size, pinned
        refusals = {
            b"missing": "the prefix is not stored as a whole",
            b"deleting": "the prefix is being deleted",
            b"many": f"a call pins at most {MAX_BLOCKS} blocks",
        }
        if status in refusals:
            raise PinRefused(refusals[status], values[0])
        raise PinRefused(f"{int(values[0])} bytes would be pinned, {most_bytes} may be")

    def condemn(self, block: bytes) -> bool:
        """From now on no lookup finds a stored block, nor what follows it; `deletion` makes them go. False:
        it is not stored. Raises TooManyDeletions."""
        answer = self._call("condemn", block)
        if answer < 0:
            raise TooManyDeletions("too many prefixes are being deleted")
        return bool(answer)

    def condemned(self) -> set[bytes]:
        """Blocks that are to go, with what follows them."""
        return set(self.redis.smembers(self.key["condemned"]))  # type: ignore[arg-type]

    def doomed(self) -> tuple[set[bytes], set[bytes]]:
        """Condemned blocks, which are to go with what follows them; and lost ones that nobody has written
        again in time, some at least: what follows them is to go, and they with the last of it."""
        condemned, lost = self._call("doomed")
        return set(split_hashes(condemned)), set(split_hashes(lost))

    def drop(self, blocks: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Remove condemned blocks, or what follows them or lost ones, children before parents, whatever their
        rank.
        Returns those that have to wait, for a reader or a child, and names of payloads to unlink."""
        gone, dropped = self._call("drop", *_bounded(blocks))
        waiting = [block for block, flag in zip(blocks, gone, strict=True) if flag == ord("0")]
        return waiting, _names(dropped)

    def stored(self, blocks: Sequence[bytes]) -> list[bool]:
        """Whether there is a record of each."""
        return [record is not None for record in self.redis.hmget(self.key["blocks"], list(_bounded(blocks)))]

    def parents(self, cursor: int, count: int) -> tuple[int, dict[bytes, bytes]]:
        """The cursor of the next slice, 0 at the end; about `count` of all records, block -> parent."""
        records: dict[bytes, bytes]
        cursor, records = self.redis.hscan(self.key["blocks"], cursor, count=count)  # type: ignore[assignment]
        return cursor, {block: record[-HASH_BYTES:] for block, record in records.items()}

    def events(self) -> Learning:
        """What has happened since somebody learned last, and what had been learned by then."""
        learning, _ = self._events()
        return learning

    def learn(self, learning: Learning, history: bytes, weights: bytes) -> bool:
        """Make `weights` the ones to evict by, for ten minutes. False if somebody else has learned since
        `learning`: then nothing has changed."""
        counts = [part for event in learning.counts.items() for part in event]
        return bool(self._call("learn", learning.version, history, weights, *counts))

    def configure(self, capacity: int) -> None:
        """Set the capacity in bytes."""
        self.redis.hset(self.key["config"], "capacity", _checked_capacity(capacity))

    def attach(self, capacity: int | None) -> bytes:
        """The identity of the store's contents: another one means that the store has been emptied or
        restarted since. Sets `capacity`, if given, where none is set."""
        pipeline = self.redis.pipeline(transaction=False)
        if capacity is not None:
            pipeline.hsetnx(self.key["config"], "capacity", _checked_capacity(capacity))
        pipeline.hsetnx(self.key["config"], "identity", urandom(8))
        pipeline.hget(self.key["config"], "identity")
        identity: bytes = pipeline.execute()[-1]
        return identity

    def margin(self) -> Margin:
        """How full the store is, and what the block is worth that goes next. Touches nothing."""
        total, capacity, density = self._call("margin")
        return Margin(total, capacity, float(density) if density else None)

    def usage(self) -> Usage:
        """Sizes and counters as they are now."""
        learning, counts = self._events()
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.hgetall(self.key["config"])
        pipeline.hlen(self.key["blocks"])
        pipeline.zcard(self.key["leaves"])
        pipeline.zcard(self.key["writing"])
        pipeline.scard(self.key["dropped"])
        pipeline.zcard(self.key["ghosts"])
        pipeline.zcard(self.key["lost"])
        pipeline.hgetall(self.key["bytes"])
        config, blocks, leaves, reservations, dropped, ghosts, lost, used = pipeline.execute()
        owners = {owner: int(size) for owner, size in used.items()}

        def limits(name: bytes) -> dict[bytes, int]:
            return {key[len(name) :]: int(size) for key, size in config.items() if key.startswith(name)}

        return Usage(
            capacity=int(config.get(b"capacity", 0)),
            total=owners.pop(b"total", 0),
            pinned=owners.pop(b"pinned", 0),
            blocks=blocks,
            leaves=leaves,
            reservations=reservations,
            dropped=dropped,
            ghosts=ghosts,
            lost=lost,
            owners=owners,
            quotas=limits(b"quota:"),
            floors=limits(b"floor:"),
            counts={name.decode(): value for name, value in counts.items()},
            events=learning.events(),
        )

    def unlinked(self, names: Sequence[bytes]) -> None:
        """Say that these dropped payloads are gone."""
        self.redis.srem(self.key["dropped"], *names)

    def some_dropped(self, count: int) -> list[bytes]:
        """Dropped payloads that nobody has unlinked yet: their evictor died, or is about to do it."""
        return list(self.redis.srandmember(self.key["dropped"], count))  # type: ignore[arg-type]

    def load(self) -> None:
        """Load the functions; also done by the first call that misses them."""
        self.redis.execute_command("FUNCTION", "LOAD", "REPLACE", self._source)

    def _events(self) -> tuple[Learning, dict[bytes, int]]:
        """And the counters, of the same moment: no event is in both, or in neither."""
        events, (version, history), counts = self._call("events")
        return Learning(int(version or 0), history or b"", _counts(events)), _counts(counts)

    def _call(self, function: str, *arguments: Any) -> Any:
        command = ("FCALL", f"reprise_{self._version}_{function}", *self._head, *arguments)
        try:
            return self._execute(command)
        except ResponseError as error:
            if "Function not found" not in str(error):
                raise
        self.load()
        return self._execute(command)

    def _execute(self, command: tuple[Any, ...]) -> Any:
        try:
            return self.redis.execute_command(*command)
        except ResponseError as error:
            if str(error).startswith("UNCONFIGURED"):
                raise Unconfigured(str(error)) from error
            raise


def _bounded(items: Sequence[_Item]) -> Sequence[_Item]:
    if len(items) > MAX_BLOCKS:
        raise ValueError(f"at most {MAX_BLOCKS} blocks in a call, got {len(items)}")
    return items


def _check_priority(priority: int) -> None:
    if not 0 <= priority <= MAX_PRIORITY:
        raise ValueError(f"priority must be 0 to {MAX_PRIORITY}, got {priority}")


def _checked_capacity(capacity: int) -> int:
    if capacity <= 0:
        raise ValueError(f"capacity must be positive, got {capacity} bytes")
    return capacity


def _ttl(ttl_ms: int | None) -> bytes:
    return (_NEVER_MS if ttl_ms is None else max(0, min(ttl_ms, _NEVER_MS - 1))).to_bytes(6, "big")


def _counts(pairs: Sequence[bytes]) -> dict[bytes, int]:
    """What HGETALL answers to a function."""
    return {name: int(count) for name, count in zip(pairs[::2], pairs[1::2], strict=True)}


def _names(joined: bytes) -> list[bytes]:
    return [joined[at : at + NAME_BYTES] for at in range(0, len(joined), NAME_BYTES)]
