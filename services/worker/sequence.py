"""A sequence: one request on its way through the engine, and what it holds there."""

from __future__ import annotations

from array import array
from enum import Enum
from itertools import islice
from typing import NamedTuple

from services.wire.hashes import chain_hashes, pack_tokens
from services.wire.messages import DEFAULT_PRIORITY
from services.worker.request import Request


class Phase(Enum):
    WAITING = "waiting"  # holds nothing: new, or preempted
    PREFILL = "prefill"  # known tokens are left to compute
    DECODE = "decode"  # one token a step
    FINISHED = "finished"


class FilledBlock(NamedTuple):
    """A full block in its page, wherever it goes from there."""

    hash: bytes
    parent: bytes
    first: bytes  # hash of its prefix's first block
    depth: int
    page: int
    priority: int
    ttl_s: float | None
    tenant: str


class Sequence:
    """State of one request. The scheduler owns it; others read.

    Three counts tell where it stands: `computed` <= `length`, and `len(tokens)` <= `length`.
        tokens    prompt and generated tokens whose values are known here
        length    the same and those that planned steps will sample: values still on the device
        computed  leading tokens whose KV is in its pages, or will be when all planned steps have run
    """

    __slots__ = (
        "_block_size",
        "asked",
        "awaits",
        "capacity",
        "computed",
        "first_planned_s",
        "following",
        "given",
        "gpu_tokens",
        "hashes",
        "host_tokens",
        "length",
        "loading",
        "matcher",
        "max_length",
        "order",
        "pages",
        "phase",
        "preemptions",
        "prompt_length",
        "request",
        "seen",
        "slot",
        "stalled_s",
        "stop_ids",
        "store_tokens",
        "tokens",
        "uncached",
        "wishes",
    )

    def __init__(
        self, request: Request, *, block_size: int, max_length: int, stop_ids: frozenset[int]
    ) -> None:
        self.request = request
        self.order: tuple[int, float, int]  # lower is served first; set when it joins the queue
        self.tokens = array("I", request.tokens)
        self.given = len(self.tokens)  # to prefill: the prompt, and what another worker generated
        self.prompt_length = request.prompt_length  # the rest is answer, whoever made it
        self.max_length = max_length  # prompt and generated tokens at most
        self.stop_ids = stop_ids
        self.matcher = request.matcher
        self.hashes = list(request.hashes)  # of the full blocks of `tokens`, in order
        self.phase = Phase.WAITING
        self.length = self.given
        self.computed = 0
        self.seen = 0  # leading tokens counted as hit or computed already: recomputing counts for nothing
        self.pages: list[int] = []
        self.capacity = 0  # tokens that `pages` hold
        self.slot = -1  # row of the runner's tables; -1 = none
        self.asked = False  # the store was asked for its blocks, since it waits
        self.loading = False  # a load is under way, or has brought what computing has not met yet
        self.following = False  # another worker computes its next blocks
        self.stalled_s = 0.0  # that it let pass without computing, for a load to end
        self.awaits: bytes | None = None  # block that another sequence is loading for both
        self.uncached = self.given  # tokens to compute at admission, estimated on arrival
        self.gpu_tokens = 0  # prefix hits by tier
        self.host_tokens = 0
        self.store_tokens = 0
        self.preemptions = 0
        self.first_planned_s: float | None = None
        self._block_size = block_size
        self.wishes = _wishes(request, block_size)  # block index -> (priority, ttl_s), where it has any

    @property
    def in_flight(self) -> int:
        """Tokens that steps under way will sample."""
        return self.length - len(self.tokens)

    @property
    def generated(self) -> int:
        """Generated tokens, those in flight included."""
        return self.length - self.prompt_length

    def parent(self, index: int) -> bytes:
        """Hash of the block before block `index`."""
        return self.hashes[index - 1] if index else self.request.root

    def name_full_blocks(self) -> None:
        """Extend `hashes` to every full block of the known tokens."""
        named = len(self.hashes)
        if len(self.tokens) >= (named + 1) * self._block_size:
            rest = pack_tokens(islice(self.tokens, named * self._block_size, None))
            self.hashes += chain_hashes(self.parent(named), rest, self._block_size)

    def block(self, index: int, page: int) -> FilledBlock:
        """Block `index`, which is full and in `page`."""
        priority, ttl_s = self.retention(index)
        return FilledBlock(
            hash=self.hashes[index],
            parent=self.parent(index),
            first=self.hashes[0],
            depth=index,
            page=page,
            priority=priority,
            ttl_s=ttl_s,
            tenant=self.request.tenant,
        )

    def retention(self, index: int) -> tuple[int, float | None]:
        """(priority, ttl_s) that the request asks for block `index`; blocks it does not mention: default."""
        return self.wishes.get(index, (DEFAULT_PRIORITY, None))


def _wishes(request: Request, block_size: int) -> dict[int, tuple[int, float | None]]:
    """Retention by block; a block that several ranges touch takes the highest priority of them."""
    by_block: dict[int, tuple[int, float | None]] = {}
    for item in request.retention:
        end = request.prompt_length if item.end is None else item.end
        for index in range(item.start // block_size, -(-end // block_size)):
            if index not in by_block or by_block[index][0] < item.priority:
                by_block[index] = (item.priority, item.ttl_s)
    return by_block
