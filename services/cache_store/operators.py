"""What operators may ask of the store, over all of its servers: list prefixes, pin them, delete them.

Each question costs every server a bounded time. What is asked of one prefix is done by the server that has
it, as a whole or not at all. Nothing here knows of HTTP (`operators_http`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from services.cache_store.functions import PINNED, PinRefused, Prefix, StoreFunctions, TooManyDeletions
from services.cache_store.worth import TIER_NAMES

#: Owner of the operators' retentions: no digest of a tenant.
OPERATOR = b"operator"

#: So much of a server's capacity may be pinned: what is pinned is lost for all that the store learns to keep,
#: and writers find no room where all of it is.
MOST_PINNED = 0.25

MAX_PREFIXES = 100  # a page
MAX_HASHES = 64  # a request
MAX_TTL_S = 30 * 86_400

#: Where a list goes on: by server, behind which score and leaf; None = it has no more.
Position = dict[str, tuple[int, bytes] | None]


class NotStored(Exception):
    """No reachable server has the prefix."""


class Refused(Exception):
    """It can be done, but not now or not as asked: nothing was done."""


class Unreachable(Exception):
    """A server that would have to be asked does not answer."""


@dataclass(frozen=True)
class Server:
    """One of the store's servers. `capacity` in bytes; `is_up` says whether it is worth asking."""

    functions: StoreFunctions
    capacity: int
    is_up: Callable[[], bool] = lambda: True


@dataclass
class Page:
    prefixes: list[tuple[str, Prefix]] = field(default_factory=list)  # with the server's name
    position: Position = field(default_factory=dict)
    deleting: list[bytes] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)

    @property
    def has_more(self) -> bool:
        return any(at is not None for at in self.position.values())


@dataclass(frozen=True)
class Pinned:
    server: str
    blocks: int
    bytes: int
    pinned_bytes: int  # all that are pinned on the server
    pinned_bytes_limit: int


class Operators:
    """`servers` by name. Thread-safe."""

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self._servers = servers

    @property
    def names(self) -> Sequence[str]:
        return list(self._servers)

    def prefixes(self, limit: int, after: Position | None = None) -> Page:
        """A page of all servers' prefixes, those that rank highest first (StoreFunctions.prefixes)."""
        page = Page(position={name: (after or {}).get(name) for name in self._servers})
        found: list[tuple[str, Prefix]] = []
        ends: dict[str, int] = {}  # of servers with more: they say nothing of what ranks lower
        for name, server in self._servers.items():
            if after is not None and name in after and after[name] is None:
                continue
            try:
                if not server.is_up():
                    raise Unreachable(name)
                if after is None:
                    page.deleting += server.functions.condemned()
                prefixes, more = server.functions.prefixes(limit, page.position[name])
            except (RedisError, OSError, Unreachable):
                page.unreachable.append(name)
                page.position[name] = None
                continue
            found += [(name, prefix) for prefix in prefixes]
            if more:
                ends[name] = prefixes[-1].score if prefixes else 0
            elif not prefixes:  # nothing is left
                page.position[name] = None
        last = max(ends.values(), default=0)
        found.sort(key=lambda entry: entry[1].score, reverse=True)
        page.prefixes = [entry for entry in found if entry[1].score >= last][:limit]
        for name, prefix in page.prefixes:
            page.position[name] = prefix.score, prefix.last
        for name in {name for name, _ in found} - ends.keys():
            if sum(entry[0] == name for entry in found) == sum(entry[0] == name for entry in page.prefixes):
                page.position[name] = None
        return page

    def pin(self, lasts: Sequence[bytes], ttl_s: float, priority: int | None = None) -> Pinned:
        """Retain the prefixes that end in `lasts` for `ttl_s`, 0 takes that back: as pinned (`priority`
        None), which no eviction touches, or at a priority. Raises NotStored, Refused, Unreachable."""
        name = self._server_of(lasts)
        server = self._servers[name]
        limit = int(MOST_PINNED * server.capacity)
        rank = PINNED if priority is None else priority
        try:
            blocks, size, pinned = server.functions.pin(lasts, OPERATOR, round(ttl_s * 1000), limit, rank)
        except PinRefused as refusal:
            of = f"{refusal.block.hex()}: " if refusal.block else ""
            raise Refused(f"{of}{refusal}") from None
        except (RedisError, OSError) as error:
            raise Unreachable(f"{name} does not answer") from error
        return Pinned(name, blocks, size, pinned, limit)

    def delete(self, block: bytes) -> str:
        """Make a stored block and all that follows it go; the upkeep does it, at once no lookup finds them.
        Returns the server's name. Raises NotStored, Refused, Unreachable."""
        name = self._server_of([block])
        try:
            if self._servers[name].functions.condemn(block):
                return name
        except TooManyDeletions as refusal:
            raise Refused(str(refusal)) from None
        except (RedisError, OSError) as error:
            raise Unreachable(f"{name} does not answer") from error
        raise NotStored(block.hex())

    def _server_of(self, blocks: Sequence[bytes]) -> str:
        """The one that has all of them."""
        missing, unreachable = set(blocks), []
        having: dict[str, list[bytes]] = {}
        for name, server in self._servers.items():
            try:
                if not server.is_up():
                    raise Unreachable(name)
                stored = server.functions.stored(blocks)
            except (RedisError, OSError, Unreachable):
                unreachable.append(name)
                continue
            there = [block for block, known in zip(blocks, stored, strict=True) if known]
            if there:
                having[name] = there
                missing.difference_update(there)
        if missing:
            lost = next(block for block in blocks if block in missing).hex()
            if unreachable:
                raise Unreachable(f"{lost} may be on a server that does not answer: {', '.join(unreachable)}")
            raise NotStored(lost)
        whole = [name for name, there in having.items() if len(set(there)) == len(set(blocks))]
        if not whole:
            raise Refused("the prefixes are on different servers: ask for those of one server at a time")
        return whole[0]


def tier_name(tier: int) -> str:
    """Of a hint: what the users of a block ask for now."""
    return TIER_NAMES[tier]
