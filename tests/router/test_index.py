from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.index import Hit, PrefixIndex
from services.wire.hashes import join_hashes
from services.wire.messages import Events, Snapshot

BLOCKS = [bytes([i]) * 16 for i in range(12)]
WORKERS = range(4)


class SlowIndex:
    """The same by sets: what each worker holds by tier, what is guessed until when, what the store has."""

    def __init__(self):
        self.held = {}
        self.guessed = {}
        self.store = set()

    def join(self, worker):
        self.held[worker] = defaultdict(set)
        self.guessed[worker] = {}

    def leave(self, worker):
        self.held.pop(worker, None)
        self.guessed.pop(worker, None)

    def change(self, worker, stored, removed):
        for tier, blocks in removed.items():
            (self.store if tier == "store" else self.held[worker][tier]).difference_update(blocks)
        for tier, blocks in stored.items():
            (self.store if tier == "store" else self.held[worker][tier]).update(blocks)
            if tier != "store":
                for block in blocks:
                    self.guessed[worker].pop(block, None)

    def snapshot(self, worker, held):
        self.held[worker] = defaultdict(set)
        self.change(worker, held, {})

    def match(self, prompt, worker):
        if worker not in self.held:
            local = 0
        else:
            has = self.held[worker]["gpu"] | self.held[worker]["host"] | self.guessed[worker].keys()
            local = next((i for i, block in enumerate(prompt) if block not in has), len(prompt))
        store = next(
            (i for i, block in enumerate(prompt[local:]) if block not in self.store), len(prompt) - local
        )
        return Hit(local, store)


blocks = st.lists(st.sampled_from(BLOCKS), max_size=6, unique=True)
tiers = st.dictionaries(st.sampled_from(["gpu", "host", "store"]), blocks, max_size=3)
operation = st.one_of(
    st.tuples(st.just("join"), st.sampled_from(WORKERS)),
    st.tuples(st.just("leave"), st.sampled_from(WORKERS)),
    st.tuples(st.just("events"), st.sampled_from(WORKERS), tiers, tiers),
    st.tuples(st.just("snapshot"), st.sampled_from(WORKERS), tiers),
    st.tuples(st.just("guess"), st.sampled_from(WORKERS), blocks, st.floats(0, 5)),
    st.tuples(st.just("not_in_store"), blocks),
    st.tuples(st.just("expire"), st.floats(0, 2)),
)


def packed(tiers):
    return {tier: join_hashes(found) for tier, found in tiers.items()}


@given(st.lists(operation, max_size=40), st.permutations(BLOCKS))
@settings(max_examples=300, deadline=None)
def test_agrees_with_a_dict_of_sets(operations, prompt):
    index, slow, now, seq = PrefixIndex(), SlowIndex(), 0.0, 0
    for name, *args in operations:
        if name in ("events", "snapshot", "guess") and args[0] not in slow.held:
            if name == "guess":
                index.guess(args[0], args[1], now + args[2])  # for a worker that is gone: nothing
            continue
        seq += 1
        match name:
            case "join":
                index.join(args[0], max_blocks=1000)
                slow.join(args[0])
            case "leave":
                index.leave(args[0])
                slow.leave(args[0])
            case "events":
                index.apply_events(args[0], Events(seq, packed(args[1]), packed(args[2])))
                slow.change(args[0], args[1], args[2])
            case "snapshot":
                index.apply_snapshot(args[0], Snapshot(seq, packed(args[1])))
                slow.snapshot(args[0], args[1])
            case "guess":
                index.guess(args[0], args[1], now + args[2])
                slow.guessed[args[0]].update(dict.fromkeys(args[1], now + args[2]))
            case "not_in_store":
                index.not_in_store(args[0])
                slow.store.difference_update(args[0])
            case "expire":
                now += args[0]
                index.expire(now)
                for worker, guesses in slow.guessed.items():
                    slow.guessed[worker] = {block: until for block, until in guesses.items() if until > now}
        assert index.match(prompt, WORKERS) == {worker: slow.match(prompt, worker) for worker in WORKERS}
    holders = [has for held in slow.held.values() for has in (held["gpu"], held["host"])]
    known = set().union(*holders, *slow.guessed.values())
    assert (index.local_blocks, index.store_blocks) == (len(known), len(slow.store))
    for worker in WORKERS:
        index.leave(worker)
    assert index.local_blocks == 0


def test_a_new_epoch_starts_from_nothing():
    index = PrefixIndex()
    index.join(0, 100)
    index.apply_events(0, Events(1, {"gpu": join_hashes(BLOCKS)}, {}))
    index.join(0, 100)
    assert index.match(BLOCKS, [0]) == {0: Hit(0, 0)}


def test_the_store_outlives_the_worker_that_wrote_it():
    index = PrefixIndex()
    index.join(0, 100)
    index.apply_events(0, Events(1, {"gpu": BLOCKS[0], "store": join_hashes(BLOCKS[:3])}, {}))
    index.leave(0)
    index.join(1, 100)
    assert index.match(BLOCKS, [1]) == {1: Hit(0, 3)}


def test_a_guess_that_is_confirmed_does_not_expire():
    index = PrefixIndex()
    index.join(0, 100)
    index.guess(0, BLOCKS[:4], until_s=2.0)
    index.apply_events(0, Events(1, {"gpu": join_hashes(BLOCKS[:2])}, {}))
    index.expire(1.9)
    assert index.match(BLOCKS, [0])[0].local == 4
    index.expire(2.0)
    assert index.match(BLOCKS, [0])[0].local == 2


def test_a_renewed_guess_lives_to_its_own_end():
    index = PrefixIndex()
    index.join(0, 100)
    index.guess(0, BLOCKS[:2], until_s=2.0)
    index.guess(0, BLOCKS[:1], until_s=5.0)
    index.expire(3.0)
    assert index.match(BLOCKS, [0])[0].local == 1


def test_memory_is_bounded_whatever_workers_report():
    index = PrefixIndex(max_store_blocks=50)
    index.join(0, max_blocks=100)
    for i in range(20):
        fresh = [i.to_bytes(8, "big") + n.to_bytes(8, "big") for n in range(20)]
        index.apply_events(0, Events(i + 1, {"gpu": join_hashes(fresh), "store": join_hashes(fresh)}, {}))
        index.guess(0, [block[::-1] for block in fresh], until_s=float(i))
        index.expire(float(i))
    assert index.local_blocks <= 100
    assert index.store_blocks == 50
    assert index.match(fresh, [0])[0].local == 20  # the newest stay
