from hypothesis import given
from hypothesis import strategies as st

from services.wire.hashes import split_hashes
from services.wire.held import HeldBlocks
from services.wire.messages import Events, Snapshot

hashes = st.lists(st.integers(0, 20).map(lambda n: bytes([n]) * 16), max_size=6, unique=True)
change = st.dictionaries(st.sampled_from(["gpu", "host", "store"]), hashes, max_size=3)


def view(held):
    return {tier: set(split_hashes(packed)) for tier, packed in held.items() if packed}


def apply(known, events: Events):
    for tier, packed in events.removed.items():
        known.setdefault(tier, set()).difference_update(split_hashes(packed))
    for tier, packed in events.stored.items():
        known.setdefault(tier, set()).update(split_hashes(packed))


@given(changes=st.lists(st.tuples(change, change), max_size=20), joined=st.integers(0, 20))
def test_a_snapshot_and_the_events_after_it_give_what_all_events_give(changes, joined):
    held = HeldBlocks()
    snapshot: Snapshot | None = None
    everything: dict[str, set[bytes]] = {}
    late: dict[str, set[bytes]] = {}
    seqs = []
    for step, (stored, removed) in enumerate(changes):
        if step == joined:
            snapshot = held.snapshot()
            late = view(snapshot.held)
        if events := held.apply(stored, removed):
            seqs.append(events.seq)
            apply(everything, events)
            if snapshot:
                assert events.seq > snapshot.seq
                apply(late, events)
    everything = {tier: blocks for tier, blocks in everything.items() if blocks}
    assert view(held.snapshot().held) == everything
    assert seqs == list(range(1, len(seqs) + 1))
    assert held.snapshot().seq == len(seqs)
    if snapshot:
        assert {tier: blocks for tier, blocks in late.items() if blocks} == everything
    assert held.count("gpu") == len(everything.get("gpu", ()))


def test_a_step_that_changed_nothing_makes_no_event():
    held = HeldBlocks()
    assert held.apply({}, {"gpu": []}) is None
    assert held.seq == 0


def test_a_block_removed_and_stored_in_one_step_is_held():
    held = HeldBlocks()
    held.apply({"gpu": [b"a" * 16]}, {})
    held.apply({"gpu": [b"a" * 16]}, {"gpu": [b"a" * 16]})
    assert held.snapshot().held == {"gpu": b"a" * 16}
