"""Continuous batching: which tokens of which sequences the next step computes.

Decodes come first, one token each; what is left of the token budget goes to prefill chunks of the sequences
already admitted, then to new ones, by priority class and arrival. Pure: no clock, no tensor, no token value
is needed to plan, so a step can be planned while the one before it still runs.

Sharing. A block gets its name when its tokens are *planned*: launches run in order and a layer writes KV
before it attends, so other rows of the same step may read that page at once. Every chunk looks for named
blocks first, so that parallel samples of one prompt and stampedes compute each block once.

Loads. Blocks that the store has come from the back, from the moment a sequence waits, while its chunks go on
from the front; where the two meet the sequence goes on behind what was loaded. A chunk is kept short enough
to end about then, and the step with it; the next steps have what that leaves of the token budget. So if the
load fails, the same is computed in the same order as without it, in more parts.

Flights. What the store lacks and another worker computes is not computed here: the sequence takes it as it
comes, from the front, and those behind it go on meanwhile. It keeps its pages, which it would fill otherwise;
others of the same prompt wait without any.

Memory. Admission takes all pages of the known tokens; decoding takes one page a block. When none is left the
last sequence in order gives its pages back and waits: its full blocks stay cached until they are needed.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Protocol

from services.worker.pages import PagePool
from services.worker.plan import Chunk, StepPlan
from services.worker.prefixes import PrefixGroups
from services.worker.sequence import FilledBlock, Phase, Sequence

#: Share of the pages kept free at admission, so that running sequences can grow before one is preempted.
_WATERMARK = 0.01


@dataclass(frozen=True)
class Limits:
    """What one step and one engine can hold."""

    block_size: int
    max_running: int  # sequences that hold pages
    max_step_tokens: int  # decodes and prefill chunks together
    group_prefixes: bool = False  # say in plans which decodes share a prefix


class BlockLoader(Protocol):
    """Host memory and the store, as the scheduler sees them."""

    def held(self, sequence: Sequence, first_block: int) -> int:
        """How many blocks from `first_block` on are in host memory."""

    def restore(self, sequence: Sequence, first_block: int) -> int:
        """Put those into the sequence's pages; returns how many."""

    def start(self, sequence: Sequence, first_block: int, ahead_tokens: int) -> bool:
        """Begin to load blocks from `first_block` on, the last first; False when they are better computed, or
        there is no room for them now. So many tokens are computed before the sequence's."""

    def fill(self, sequence: Sequence, front: int) -> range | None:
        """Put what has come of the blocks from `front` on into the sequence's pages. Returns all that are
        there by now, an empty range while none is; None when none is and none will be."""

    def most_tokens(self, sequence: Sequence, wanted: int, plan: StepPlan, now: float, busy_s: float) -> int:
        """How many of `wanted` tokens, those up to what `fill` returned, to compute before looking again; 0
        to wait for a moment. `plan` is what the step does besides, `busy_s` what the device takes to begin
        with it."""

    def cancel(self, sequence: Sequence) -> None:
        """The sequence wants no more blocks of its load."""

    def follows(self, sequence: Sequence, front: int) -> int | None:
        """Which block the sequence, having those before `front`, is not to compute, nor any behind it,
        because another worker does; None when there is no such."""

    def receive(self, sequence: Sequence, front: int) -> int:
        """Put what has come of these, from `front` on, into the sequence's pages; returns how many."""

    def leave(self, sequence: Sequence) -> None:
        """The sequence ends, or gives its pages back: it follows nobody, and nobody should follow it unless
        its prompt is computed."""


class Scheduler:
    """Owns all sequences and the page pool. Called from one thread."""

    def __init__(self, limits: Limits, pool: PagePool, loader: BlockLoader | None = None) -> None:
        self.limits = limits
        self.pool = pool
        self.preemptions = 0
        self._block_size = limits.block_size
        self._loader = loader
        self._watermark = int(pool.pages * _WATERMARK)
        self._prefixes = PrefixGroups(pool)
        self._serials = count()
        self._waiting: list[Sequence] = []  # by order
        self._loading: dict[bytes, Sequence] = {}  # by every block that it may load or follows another for
        self._prefill: list[Sequence] = []  # by order
        self._decode: dict[Sequence, None] = {}
        self._cut_tokens = 0  # prefilled by the steps before the next one that are parts of the same one
        self._is_cut = False  # the step that is being planned is such a part
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        # What the next step's tables must learn first; kept while there is no step.
        self._placed: dict[int, Sequence] = {}
        self._changed_pages: dict[tuple[int, int], int] = {}

    # ---- sequences in and out

    def add(self, sequence: Sequence) -> None:
        sequence.order = (-sequence.request.priority, sequence.request.arrival_s, next(self._serials))
        held = len(self.pool.match(sequence.hashes))
        if self._loader is not None:
            held += self._loader.held(sequence, held)
        sequence.uncached = sequence.length - held * self._block_size
        insort(self._waiting, sequence, key=_order)
        self._start_load(sequence, held)

    def release(self, sequence: Sequence, now: float) -> None:
        """The sequence ends here, in whatever phase: everything it holds is free at once.

        Steps under way may still read and write its pages. That is harmless: whoever gets them next is
        launched after those steps.
        """
        self._leave(sequence, now)
        sequence.phase = Phase.FINISHED

    def undo(self, plan: StepPlan, now: float) -> None:
        """The step failed and its own sequences are released: no block that it was to fill may be read, and
        what it was to tell the tables is told by the next step. Other sequences that share such a block
        start over. Of several failed steps, undo the latest first."""
        wrong = set()
        for block in plan.filled:
            if self.pool.lookup(block.hash) == block.page:
                self.pool.unregister(block.page, now)
                wrong.add(block.page)
        for sequence in self._holders():
            if not wrong.isdisjoint(sequence.pages):
                self._preempt(sequence, now)
        self._placed = plan.placed | self._placed
        self._changed_pages = plan.pages | self._changed_pages

    # ---- one step

    def plan(self, now: float, busy_s: float = 0.0) -> StepPlan | None:
        """The next step, or None when there is nothing to compute. `busy_s`: predicted seconds until the
        device is done with the steps before it."""
        plan = StepPlan()
        self._make_room_for_decodes(now)
        for sequence in self._decode:
            if sequence.length < sequence.max_length:
                plan.decodes.append(sequence)
                plan.decode_starts.append(sequence.computed)
                sequence.computed += 1
                sequence.length += 1
        budget = self.limits.max_step_tokens - len(plan.decodes)
        if self._cut_tokens >= budget:  # more decodes have come
            self._cut_tokens = 0
        budget -= self._cut_tokens
        self._is_cut = False
        for sequence in self._prefill.copy():
            budget = self._admit(budget, plan, now, busy_s, above=sequence.request.priority)
            if budget:
                budget -= self._plan_chunk(sequence, budget, plan, now, busy_s)
        self._admit(budget, plan, now, busy_s)
        self._cut_tokens = self._cut_tokens + plan.prefill_tokens if self._is_cut else 0
        if not plan.decodes and not plan.chunks:
            return None
        if self.limits.group_prefixes:
            plan.prefixes = self._prefixes.of(plan.decodes)
        plan.placed, self._placed = self._placed, {}
        plan.pages, self._changed_pages = self._changed_pages, {}
        return plan

    def fill_generated(self, sequence: Sequence, index: int, now: float) -> FilledBlock | None:
        """A decode completed block `index` and its token values are known: name it.

        None if another sequence holds the same block; this one then shares that page and drops its own.
        """
        sequence.name_full_blocks()
        held = self.pool.lookup(sequence.hashes[index])
        if held is None:
            return self._register(sequence, index)
        self._share(sequence, index, held, now)
        return None

    # ---- load

    @property
    def running(self) -> int:
        return self.limits.max_running - len(self._free_slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens still to compute, as far as known: a waiting prompt's hits are those on arrival."""
        return sum(s.length - s.computed for s in self._prefill) + sum(s.uncached for s in self._waiting)

    # ---- planning

    def _admit(self, budget: int, plan: StepPlan, now: float, busy_s: float, above: float = -math.inf) -> int:
        """Admit sequences of a priority above `above` and plan their first chunks; returns what is left of
        the budget."""
        while budget and (admitted := self._admit_next(now, above)) is not None:
            budget -= self._plan_chunk(admitted, budget, plan, now, busy_s)
        return budget

    def _plan_chunk(self, sequence: Sequence, budget: int, plan: StepPlan, now: float, busy_s: float) -> int:
        """Plan up to `budget` tokens of a prefill; returns how much of the budget that takes: all of it when
        a load is expected to be done before so many are computed, or the sequence jumps."""
        self._take_held_blocks(sequence, now)
        tail = self._loaded_tail(sequence, now) if sequence.loading else None
        end = sequence.length if not tail else tail.start * self._block_size
        if (followed := self._followed(sequence, now)) is not None:
            end = min(end, followed * self._block_size)
            if end <= sequence.computed:
                return 0  # others go on
        # A prompt that is held to its last token still computes that one: its logits are needed.
        start = min(sequence.computed, sequence.length - 1)
        wanted = most = min(budget, end - start)
        if sequence.loading:
            assert self._loader is not None
            most = self._loader.most_tokens(sequence, wanted, plan, now, busy_s)
            self._is_cut |= most < wanted
            if not most:
                return budget
        end = start + most
        for index in range(sequence.computed // self._block_size, end // self._block_size):
            if self.pool.lookup(sequence.hashes[index]) is not None:
                # Left over from below a failed step's blocks: not to be written, the next chunk takes it.
                end = index * self._block_size
                break
            plan.filled.append(self._register(sequence, index))
        samples = end == sequence.length
        plan.chunks.append(Chunk(sequence, start, end - start, sequence.computed, samples))
        self._advance(sequence, end)
        if samples:
            if sequence.loading:
                self._end_load(sequence)
            sequence.length += 1
            sequence.phase = Phase.DECODE
            self._prefill.remove(sequence)
            self._decode[sequence] = None
        elif tail and end == tail.start * self._block_size:
            # What is behind the tail is for the next step; it must not wait for what others fill this with.
            self._jump(sequence, tail, now)
            self._is_cut = True
            return budget
        return end - start if most == wanted else budget

    def _take_held_blocks(self, sequence: Sequence, now: float) -> None:
        """Share the pages of blocks that others computed meanwhile, or plan to."""
        index = sequence.computed // self._block_size
        for page in self.pool.match(sequence.hashes, index):
            self._share(sequence, index, page, now)
            index += 1
        sequence.gpu_tokens += self._advance(sequence, index * self._block_size)

    def _admit_next(self, now: float, above: float) -> Sequence | None:
        """Give the first waiting sequence its slot and pages, if both suffice."""
        if not self._free_slots:
            return None
        for place, sequence in enumerate(self._waiting):
            if sequence.request.priority <= above:
                return None
            if self._is_awaited(sequence, sequence.awaits) or sequence.in_flight:
                continue  # another's load brings its next block; or a step still computes its last token
            sequence.name_full_blocks()
            held = self.pool.match(sequence.hashes)
            missing = sequence.hashes[len(held)] if len(held) < len(sequence.hashes) else None
            if self._is_awaited(sequence, missing):
                sequence.awaits = missing
                continue
            total = sequence.length // self._block_size + 1  # room for the next token too
            needed = total - len(held) + sum(map(self.pool.is_cached, held))
            if needed > self.pool.available - (self._watermark if self.running else 0):
                return None
            del self._waiting[place]
            self._place(sequence, held, total, now)
            return sequence
        return None

    def _place(self, sequence: Sequence, held: list[int], total: int, now: float) -> None:
        if sequence.first_planned_s is None:
            sequence.first_planned_s = now
        for page in held:
            self.pool.share(page, now)
        sequence.slot = self._free_slots.pop()
        self._placed[sequence.slot] = sequence
        sequence.pages = held + self.pool.allocate(total - len(held), now)
        sequence.capacity = total * self._block_size
        for index, page in enumerate(sequence.pages):
            self._changed_pages[sequence.slot, index] = page
        sequence.gpu_tokens += self._advance(sequence, len(held) * self._block_size)
        sequence.phase = Phase.PREFILL
        insort(self._prefill, sequence, key=_order)
        self._restore(sequence, len(held), now)
        self._start_load(sequence, sequence.computed // self._block_size)

    def _make_room_for_decodes(self, now: float) -> None:
        """One page more for every decode that starts a block, taken from the last in order if need be."""
        while True:
            full = [s for s in self._decode if s.computed == s.capacity and s.length < s.max_length]
            if len(full) <= self.pool.available:
                break
            self._preempt(max(self._holders(), key=_order), now)
        for sequence, page in zip(full, self.pool.allocate(len(full), now), strict=True):
            self._changed_pages[sequence.slot, len(sequence.pages)] = page
            sequence.pages.append(page)
            sequence.capacity += self._block_size

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self._leave(sequence, now)
        sequence.phase = Phase.WAITING
        sequence.computed = 0
        sequence.asked = False
        sequence.uncached = 0  # its full blocks are cached, as a rule
        sequence.preemptions += 1
        self.preemptions += 1
        insort(self._waiting, sequence, key=_order)

    # ---- loads from host memory and the store

    def _restore(self, sequence: Sequence, first: int, now: float) -> None:
        """Take the blocks from `first` on that host memory has."""
        if self._loader is None:
            return
        end = first + self._loader.restore(sequence, first)
        self._name(sequence, range(first, end), now)
        sequence.host_tokens += self._advance(sequence, end * self._block_size)

    def _name(self, sequence: Sequence, blocks: range, now: float) -> None:
        """These blocks are in the sequence's pages, and those before them are named."""
        for index in blocks:
            held = self.pool.lookup(sequence.hashes[index])
            if held is None:
                self._register(sequence, index)
            else:
                self._share(sequence, index, held, now)

    def _start_load(self, sequence: Sequence, first: int) -> None:
        """Ask the store for the blocks from `first` on, once, unless a sequence before this one does."""
        if sequence.asked or first >= len(sequence.hashes) or self._loader is None:
            return
        if self._is_awaited(sequence, sequence.hashes[first]):
            return
        ahead = sum(s.length - s.computed for s in self._prefill if s.order < sequence.order)
        ahead += sum(s.uncached for s in takewhile(lambda s: s.order < sequence.order, self._waiting))
        sequence.asked = sequence.loading = self._loader.start(sequence, first, ahead)
        if sequence.loading:
            self._await(sequence, first)

    def _await(self, sequence: Sequence, first: int) -> None:
        """Others wait for the sequence's blocks from `first` on."""
        self._loading.update(dict.fromkeys(sequence.hashes[first:], sequence))

    def _forget(self, sequence: Sequence, blocks: list[bytes]) -> None:
        for block in blocks:
            if self._loading.get(block) is sequence:
                del self._loading[block]

    def _is_awaited(self, sequence: Sequence, block: bytes | None) -> bool:
        """Whether a sequence that is served before this one computes or loads the block."""
        by = self._loading.get(block) if block is not None else None
        return by is not None and by.order < sequence.order

    def _loaded_tail(self, sequence: Sequence, now: float) -> range | None:
        """What the store has brought and computing has not met yet; where it has, the sequence goes on
        behind it."""
        assert self._loader is not None
        tail = self._loader.fill(sequence, -(-sequence.computed // self._block_size))
        if tail is None:
            self._end_load(sequence)
        elif tail and tail.start * self._block_size <= sequence.computed:
            self._jump(sequence, tail, now)
            self._take_held_blocks(sequence, now)
            return None
        return tail

    def _jump(self, sequence: Sequence, tail: range, now: float) -> None:
        """All before `tail` is computed and the tail is in the sequence's pages: name it and go on behind."""
        first = max(tail.start, sequence.computed // self._block_size)
        self._name(sequence, range(first, tail.stop), now)
        sequence.store_tokens += self._advance(sequence, tail.stop * self._block_size)
        self._end_load(sequence)

    def _end_load(self, sequence: Sequence) -> None:
        assert self._loader is not None
        self._loader.cancel(sequence)
        sequence.loading = False
        self._forget(sequence, sequence.hashes)
        if sequence.following:
            self._await(sequence, sequence.computed // self._block_size)

    def _followed(self, sequence: Sequence, now: float) -> int | None:
        """Take what another worker has computed by now of the sequence's blocks; returns the first one that
        it is to wait for, None when there is none."""
        if self._loader is None:
            return None
        while True:
            front = -(-sequence.computed // self._block_size)
            followed = self._loader.follows(sequence, front)
            if followed != front or sequence.computed % self._block_size:
                break
            came = self._loader.receive(sequence, front)
            if not came:
                break
            self._name(sequence, range(front, front + came), now)
            self._forget(sequence, sequence.hashes[front : front + came])  # they wait for no more than that
            sequence.store_tokens += self._advance(sequence, (front + came) * self._block_size)
        if sequence.following != (followed is not None):
            sequence.following = not sequence.following
            if followed is not None:
                self._await(sequence, followed)
            elif not sequence.loading:
                self._forget(sequence, sequence.hashes)
        return followed

    # ---- pages of a sequence

    def _holders(self) -> list[Sequence]:
        return [*self._prefill, *self._decode]

    def _leave(self, sequence: Sequence, now: float) -> None:
        """Take the sequence out of its phase's list, end its load and give back its pages and slot."""
        if sequence.loading:
            self._end_load(sequence)
        if self._loader is not None:
            self._loader.leave(sequence)
        if sequence.following:
            sequence.following = False
            self._forget(sequence, sequence.hashes)
        match sequence.phase:
            case Phase.WAITING:
                del self._waiting[bisect_left(self._waiting, sequence.order, key=_order)]
            case Phase.PREFILL:
                self._prefill.remove(sequence)
            case Phase.DECODE:
                del self._decode[sequence]
        for index in range(len(sequence.pages) - 1, -1, -1):
            self.pool.grant(sequence.pages[index], *sequence.retention(index))
            self.pool.release(sequence.pages[index], now)
        sequence.pages = []
        sequence.capacity = 0
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1

    def _register(self, sequence: Sequence, index: int) -> FilledBlock:
        """Name the sequence's own page of block `index`."""
        block = sequence.block(index, sequence.pages[index])
        self.pool.register(block.page, block.hash, block.parent)
        return block

    def _share(self, sequence: Sequence, index: int, page: int, now: float) -> None:
        """Use `page` for block `index` in place of the sequence's own."""
        own = sequence.pages[index]
        self.pool.share(page, now)
        self.pool.release(own, now)
        sequence.pages[index] = page
        self._changed_pages[sequence.slot, index] = page

    def _advance(self, sequence: Sequence, computed: int) -> int:
        """Move `computed` forward; returns the given tokens that this accounts for, each once in a life."""
        sequence.computed = max(sequence.computed, computed)
        fresh = min(sequence.computed, sequence.given) - min(sequence.seen, sequence.given)
        sequence.seen = max(sequence.seen, sequence.computed)
        return max(0, fresh)


def _order(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.order
