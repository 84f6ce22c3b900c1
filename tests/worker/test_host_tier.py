"""Host memory between the pages and the store: what it keeps, gives back, and passes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_payload import Codec
from services.cache_store.embedded import find_server, start_redis
from services.wire.messages import DEFAULT_PRIORITY, Start
from services.worker.block_copies import BlockCopies
from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.host_index import HostBlock, HostIndex, Wish
from services.worker.host_tier import HostTier
from services.worker.kv import KVCache
from services.worker.request import StepReport
from services.worker.store_tier import RedisStoreTier, StoreTierConfig
from services.worker.tiers import EncodedBlock, OfferedBlock
from tests.cache_store.harness import chain
from tests.worker.requests import make_request, prompt
from tests.worker.stepping import MemoryStore, Stepped, tiny_model

BLOCK = 16
ROOT = b"r" * 16
DEFAULT = Wish(DEFAULT_PRIORITY, None)


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


# ---- the index ------------------------------------------------------------------------------------------


def add(
    index: HostIndex, hashes: list[bytes], depth: int, now_ms: int = 0, wish: Wish = DEFAULT
) -> tuple[HostBlock | None, list[tuple[HostBlock, float]]]:
    parent = hashes[depth - 1] if depth else ROOT
    block, leaving = index.add(hashes[depth], parent, hashes[0], depth, "t", wish, now_ms)
    if block is not None:
        block.filled = True
    return block, leaving


def test_a_block_is_kept_only_after_the_one_before_it() -> None:
    index = HostIndex(4)
    hashes = chain("a", 3)
    assert add(index, hashes, 1) == (None, [])
    assert add(index, hashes, 0)[0] is not None
    assert add(index, hashes, 2)[0] is None
    assert add(index, hashes, 1)[0] is not None
    assert [block.hash for block in index.run(hashes)] == hashes[:2]


def test_a_block_whose_payload_is_not_there_yet_is_not_found() -> None:
    index = HostIndex(4)
    hashes = chain("a", 3)
    blocks = [add(index, hashes, depth)[0] for depth in range(3)]
    assert blocks[1] is not None
    blocks[1].filled = False
    assert [block.hash for block in index.run(hashes)] == hashes[:1]


def test_what_was_used_stays_and_the_tail_goes_first() -> None:
    index = HostIndex(4)
    old, used, new = chain("a", 2), chain("b", 2), chain("c", 1)
    for depth in range(2):
        add(index, old, depth, 0)
        add(index, used, depth, 0)
    index.use(used, 1000)
    _, leaving = add(index, new, 0, 2000)
    assert [block.hash for block, _ in leaving] == [old[1]]


def test_a_prefix_longer_than_the_memory_keeps_its_head() -> None:
    index = HostIndex(3)
    hashes = chain("a", 6)
    kept = [add(index, hashes, depth)[0] is not None for depth in range(6)]
    assert kept == [True] * 3 + [False] * 3
    assert [block.hash for block in index.run(hashes)] == hashes[:3]


def test_a_block_waits_for_a_reason_to_cross_the_link() -> None:
    index = HostIndex(8)
    hashes = chain("a", 3)
    first, _ = add(index, hashes, 0)
    second, _ = add(index, hashes, 1, wish=Wish(80, None))
    third, _ = add(index, hashes, 2)
    assert first is not None
    assert second is not None
    assert third is not None
    assert index.for_store(first, 0.0) is first, "the store has room"
    assert index.for_store(first, 0.01) is None
    assert index.for_store(second, 0.01) is second, "its request wants it kept"
    index.use(hashes, 1000)
    assert index.for_store(third, 0.01) is None, "to be used again is no reason"


def test_what_two_blocks_continue_is_for_the_store() -> None:
    index = HostIndex(8)
    one = chain("a", 4)
    other = [*one[:2], *chain("b", 2)]
    blocks = [add(index, one, depth)[0] for depth in range(4)]
    assert all(block is None or index.for_store(block, 0.01) is None for block in blocks)
    fork, _ = add(index, other, 2)
    assert fork is not None
    assert index.for_store(fork, 0.01) is blocks[1]


def test_what_the_store_wants_comes_with_what_it_lacks_before_it() -> None:
    index = HostIndex(8)
    hashes = chain("a", 5)
    blocks = [add(index, hashes, depth)[0] for depth in range(5)]
    has = set(hashes[:2])
    last = blocks[4]
    assert last is not None
    path = index.path(last, lambda block: block.hash not in has)
    assert [block.hash for block in path] == hashes[2:]


def test_a_wish_for_less_changes_nothing() -> None:
    index = HostIndex(2)
    hashes = chain("a", 1)
    block, _ = add(index, hashes, 0, wish=Wish(80, 60.0))
    index.retain(hashes, Wish(10, None))
    assert block is not None
    assert block.wish == Wish(80, 60.0)
    index.retain([*hashes, b"x" * 16], Wish(90, None))
    assert block.wish == Wish(90, None)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    calls=st.lists(
        st.tuples(st.sampled_from(["add", "use", "retain"]), st.integers(0, 4), st.integers(0, 5)),
        max_size=120,
    ),
)
def test_rows_are_never_shared_nor_lost_and_events_tell_what_is_there(
    rows: int, calls: list[tuple[str, int, int]]
) -> None:
    index = HostIndex(rows)
    prefixes = [chain(f"p{number}", 6) for number in range(5)]
    parents = {h: p[d - 1] if d else None for p in prefixes for d, h in enumerate(p)}
    there: dict[bytes, int] = {}
    told: set[bytes] = set()
    for now_ms, (call, number, depth) in enumerate(calls):
        hashes = prefixes[number]
        if call == "use":
            index.use(hashes[: depth + 1], now_ms)
        elif call == "retain":
            index.retain(hashes[: depth + 1], Wish(depth * 20, None))
        elif hashes[depth] not in index:
            block, leaving = add(index, hashes, depth, now_ms)
            for gone, _ in leaving:
                assert there.pop(gone.hash) == gone.row
            if block is not None:
                assert block.row not in there.values()
                there[block.hash] = block.row
        assert len(index) == len(there) <= rows
        assert all(parents[block] is None or parents[block] in there for block in there)
        stored, removed = index.take_events()
        assert told.isdisjoint(stored)
        assert told.issuperset(removed)
        told = (told | set(stored)) - set(removed)
        assert told == set(there)


# ---- the tier -------------------------------------------------------------------------------------------


@pytest.fixture
def tiers() -> Iterator[Callable[..., HostTier]]:
    made: list[HostTier] = []

    def make(rows: int, store: MemoryStore | None = None, codec: Codec = Codec.NONE) -> HostTier:
        copies = BlockCopies(pages(), codec)
        size = copies.shape.payload_bytes(codec)
        made.append(HostTier(rows * size + size // 2, copies, store, clock=lambda: 1.0))
        return made[-1]

    yield make
    for tier in made:
        tier.close()
        assert not tier._thread.is_alive()


def pages() -> KVCache:
    return KVCache(tiny_model().spec, 8, BLOCK, torch.float32, torch.device("cpu"))


def offers(tier: HostTier, hashes: list[bytes], priority: int = DEFAULT_PRIORITY) -> list[OfferedBlock]:
    size = tier._block_bytes
    return [
        OfferedBlock(
            hash=hash_,
            parent=parent,
            first=hashes[0],
            depth=depth,
            kv=EncodedBlock(tier._copies.codec, torch.full((size,), hash_[0], dtype=torch.uint8)),
            priority=priority,
            ttl_s=None,
            tenant="t",
        )
        for depth, (hash_, parent) in enumerate(zip(hashes, [ROOT, *hashes], strict=False))
    ]


def settle(tier: HostTier) -> None:
    wait_until(lambda: tier.idle and tier._jobs.empty())
    tier.close()  # the last job may still run


def test_its_bytes_are_no_more_than_it_was_given(tiers: Callable[..., HostTier]) -> None:
    tier = tiers(3)
    assert len(tier._rows) == 3
    bases = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in tier._rows}
    assert sum(bases.values()) == 3 * tier._block_bytes


def test_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="host_bytes must hold at least one block of 12288 B, got 100"):
        HostTier(100, BlockCopies(pages(), Codec.NONE))


def test_blocks_come_back_bit_by_bit_as_a_leading_run(tiers: Callable[..., HostTier]) -> None:
    tier = tiers(4)
    hashes = chain("a", 3)
    blocks = offers(tier, hashes)
    assert list(tier.wants(hashes, hashes[0])) == [True] * 3
    assert tier.offer(blocks) == 3
    assert list(tier.wants(hashes, hashes[0])) == [False] * 3
    wait_until(lambda: tier.idle)
    assert tier.held([*hashes, b"x" * 16]) == 3
    assert tier.held([b"x" * 16, *hashes]) == 0
    assert tier.load([*hashes, b"x" * 16], [5, 1, 2, 3]) == 3
    back = tier._copies.read([5, 1, 2]).blocks()
    for got, block in zip(back, blocks, strict=True):
        assert got is not None
        assert torch.equal(got.payload, block.kv.payload)


def test_what_waits_to_be_copied_is_bounded(
    tiers: Callable[..., HostTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = tiers(8)
    monkeypatch.setattr(tier, "_most_waiting", 2)
    monkeypatch.setattr(tier, "_filled", -1)  # as if a copy took its time
    hashes = chain("a", 3)
    assert list(tier.wants(hashes, hashes[0])) == [True, False, False]
    assert tier.offer(offers(tier, hashes)) == 1


def test_alone_it_offers_to_nobody_and_loads_from_nowhere(tiers: Callable[..., HostTier]) -> None:
    tier = tiers(1)
    for name in ("a", "b"):
        assert tier.offer(offers(tier, chain(name, 1))) == 1
    tier.retain(chain("b", 1), 90, None, "t", ROOT)
    tier.use(chain("b", 1))
    assert tier.start_load(chain("c", 1), [1.0], "t", ROOT, 1) is None
    assert tier.take_events() == ([], [])
    assert tier.tokens_per_s() == 0.0


def test_a_store_with_room_gets_blocks_at_first_sight(tiers: Callable[..., HostTier]) -> None:
    store = MemoryStore()
    tier = tiers(4, store)
    hashes = chain("a", 3)
    tier.offer(offers(tier, hashes))
    settle(tier)
    assert list(store.blocks) == hashes
    assert all(bool((block.kv.payload == hash_[0]).all()) for hash_, block in store.blocks.items())


def test_a_full_store_gets_what_two_prompts_share_and_nothing_else(tiers: Callable[..., HostTier]) -> None:
    store = MemoryStore()
    store.worth_at_least = 1e9
    tier = tiers(8, store)
    one = chain("a", 3)
    other = [*one[:2], *chain("b", 1)]
    tier.offer(offers(tier, one))
    tier.use(one)
    wait_until(lambda: tier.idle)
    assert not store.blocks
    tier.offer(offers(tier, other)[2:])
    settle(tier)
    assert list(store.blocks) == one[:2]


def test_a_store_that_was_emptied_gets_its_blocks_again_when_they_are_used(
    tiers: Callable[..., HostTier],
) -> None:
    store = MemoryStore()
    tier = tiers(4, store)
    hashes = chain("a", 3)
    tier.offer(offers(tier, hashes))
    wait_until(lambda: len(store.blocks) == 3)
    store.blocks.clear()
    tier.use(hashes)
    settle(tier)
    assert list(store.blocks) == hashes


def test_a_full_store_gets_what_its_request_wants_kept_with_what_is_before_it(
    tiers: Callable[..., HostTier],
) -> None:
    store = MemoryStore()
    store.worth_at_least = 1e9
    tier = tiers(4, store)
    hashes = chain("a", 3)
    blocks = offers(tier, hashes)
    blocks[1] = offers(tier, hashes, priority=80)[1]
    tier.offer(blocks)
    settle(tier)
    assert list(store.blocks) == hashes[:2]
    assert store.blocks[hashes[1]].priority == 80


def test_a_full_store_gets_what_another_worker_waits_for(tiers: Callable[..., HostTier]) -> None:
    store = MemoryStore()
    store.worth_at_least = 1e9
    tier = tiers(8, store)
    hashes = chain("a", 5)
    store.awaited = frozenset(hashes[:2])
    tier.offer(offers(tier, hashes)[:4])
    wait_until(lambda: tier.idle)
    assert list(store.blocks) == hashes[:2], "as they come"
    tier.give(frozenset(hashes[1:]))
    settle(tier)
    assert list(store.blocks) == hashes[:4], "and when somebody begins to wait; the last is not here"


@pytest.mark.parametrize("worth", [1e-9, 1e9])
def test_what_leaves_goes_to_the_store_if_it_is_worth_more_than_what_goes_there(
    tiers: Callable[..., HostTier], worth: float
) -> None:
    store = MemoryStore()
    store.worth_at_least = worth
    tier = tiers(2, store)
    hashes = chain("a", 2)
    tier.use([])  # from the first request on there are weights
    tier.offer(offers(tier, hashes))
    tier.offer(offers(tier, chain("b", 1)))
    settle(tier)
    given = hashes if worth < 1 else []
    assert list(store.blocks) == given
    assert all(bool((store.blocks[hash_].kv.payload == hash_[0]).all()) for hash_ in given)
    assert tier.counts().get("withheld_blocks", 0) == (0 if worth < 1 else 1)


def test_what_a_request_wants_is_passed_on(tiers: Callable[..., HostTier]) -> None:
    store = MemoryStore()
    tier = tiers(2, store)
    hashes = chain("a", 1)
    tier.retain(hashes, 90, 60.0, "t", hashes[0])
    assert store.retained == [(hashes, 90, 60.0, "t")]


# ---- in the engine --------------------------------------------------------------------------------------

HOST_BYTES = 1 << 24


@pytest.fixture
def stepped() -> Iterator[Callable[..., Stepped]]:
    made: list[Stepped] = []

    def make(store: MemoryStore | None = None, **config: object) -> Stepped:
        made.append(Stepped(store, host_bytes=HOST_BYTES, **config))
        return made[-1]

    yield make
    for one in made:
        assert one.engine._host is not None
        one.engine._host.close()


@pytest.fixture
def any_store() -> Iterator[str]:
    server = start_redis(find_server(), max_memory=256 << 20)
    yield server.url
    server.stop()


def keep_all(one: Stepped) -> None:
    one.settle()
    host = one.engine._host
    assert host is not None
    wait_until(lambda: host.idle)
    one.turn()


def push_out(one: Stepped, pages: int) -> None:
    """Have other blocks take all pages."""
    for number in range(-(-pages // 16)):
        one.run([make_request(f"other {number}", prompt(256, seed=100 + number), max_tokens=1)])


@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_that_left_the_pages_come_back_from_host_memory(
    stepped: Callable[..., Stepped], depth: int
) -> None:
    one = stepped(pages=40, pipeline_depth=depth)
    asked = prompt(200, seed=1)
    cold = one.run([make_request(0, asked, max_tokens=8)])[0]
    keep_all(one)
    push_out(one, 40)
    keep_all(one)
    assert not one.held["gpu"] & set(make_request(0, asked).hashes)
    assert one.run([make_request(1, asked, max_tokens=8)])[1] == cold
    assert one.starts[1].host_tokens == 192
    assert one.starts[1].gpu_tokens == one.starts[1].store_tokens == 0
    assert one.engine.counters.hit_tokens["host"] == 192
    assert one.held["host"] >= set(make_request(0, asked).hashes)
    one.check_empty()


def test_the_store_is_asked_only_for_what_follows(stepped: Callable[..., Stepped]) -> None:
    store = MemoryStore()
    asked = prompt(200, seed=1)
    filler = Stepped(store)
    cold = filler.run([make_request(0, asked, max_tokens=8)])[0]
    filler.settle()

    one = stepped(store, pages=40)
    one.run([make_request(1, asked[:100], max_tokens=1)])
    keep_all(one)
    push_out(one, 40)
    keep_all(one)
    store.recompute_s.clear()
    assert one.run([make_request(2, asked, max_tokens=8)])[2] == cold
    assert one.starts[2].host_tokens == 96
    assert one.starts[2].store_tokens == 96
    assert len(store.recompute_s[0]) == 6
    one.check_empty()


def test_blocks_from_host_memory_are_shared_by_requests_of_one_step(
    stepped: Callable[..., Stepped],
) -> None:
    one = stepped(pages=60)
    asked = prompt(200, seed=1)
    cold = one.run([make_request(0, asked, max_tokens=8)])[0]
    keep_all(one)
    push_out(one, 60)
    keep_all(one)
    tokens = one.run([make_request(i, asked, max_tokens=8) for i in (1, 2)])
    assert tokens[1] == tokens[2] == cold
    assert one.starts[1].host_tokens == 192
    assert one.starts[2].gpu_tokens == 192
    one.check_empty()


def test_the_first_owner_of_a_shared_prefix_gives_it_to_a_full_store_at_its_second_prompt(
    stepped: Callable[..., Stepped],
) -> None:
    store = MemoryStore()
    store.worth_at_least = 1e9
    one = stepped(store)
    shared = prompt(64, seed=1)
    one.run([make_request(0, shared + prompt(40, seed=2), max_tokens=1)])
    keep_all(one)
    assert not store.blocks
    one.run([make_request(1, shared + prompt(40, seed=3), max_tokens=1)])
    keep_all(one)
    wait_until(lambda: len(store.blocks) == 4)
    assert list(store.blocks) == make_request(0, shared).hashes


def test_with_a_real_store_nothing_is_lost_and_every_thread_ends(any_store: str) -> None:
    """Two workers one after the other: what the first kept in host memory and gave, the second loads."""
    spec, model = tiny_model().spec, tiny_model()
    asked = prompt(200, seed=1)

    def tier() -> RedisStoreTier:
        shape = (spec.layers, 2, spec.kv_heads, BLOCK, spec.head_dim)
        settings = {"fingerprint": b"f" * 16, "block_shape": shape, "capacity": 64 << 20}
        return RedisStoreTier(StoreTierConfig(url=any_store, dtype=model.kv_dtype, **settings))  # type: ignore[arg-type]

    cold: dict[object, list[int]] = {}
    for number in range(2):
        store = tier()
        engine = Engine(model, EngineConfig(pages=128, max_step_tokens=64, host_bytes=HOST_BYTES), store)
        starts: list[Start] = []
        tokens: list[int] = []

        def note(report: StepReport, starts: list[Start] = starts, tokens: list[int] = tokens) -> None:
            for output in report.outputs:
                tokens.extend(output.tokens)
                if output.start is not None:
                    starts.append(output.start)

        engine.start(note)
        engine.submit(make_request(number, asked, max_tokens=8))
        wait_until(lambda: engine.idle)  # noqa: B023  same round
        cold[number] = tokens
        if number == 0:
            wait_until(lambda: store.counts().get("written:stored", 0) >= 12)  # noqa: B023  same round
        else:
            assert starts[0].store_tokens > 0
            wait_until(lambda: engine.host_counts().get("kept_blocks", 0) >= 12)  # noqa: B023  same round
        engine.stop()
        store.close()
    assert cold[0] == cold[1]
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("store-")]


def test_cancelled_and_preempted_requests_leave_nothing_behind(stepped: Callable[..., Stepped]) -> None:
    one = stepped(pages=30, max_running=8)
    asked = prompt(200, seed=1)
    one.run([make_request(0, asked, max_tokens=4)])
    keep_all(one)
    push_out(one, 30)
    keep_all(one)
    requests = [make_request(i, asked[: 120 + i] + prompt(8, seed=i), max_tokens=60) for i in range(1, 7)]
    for request in requests:
        one.engine.submit(request)
    one.turn(3)
    one.engine.cancel(1)
    one.engine.cancel(4)
    one.run()
    assert all(one.finishes[i].reason != "error" for i in range(1, 7))
    one.check_empty()
