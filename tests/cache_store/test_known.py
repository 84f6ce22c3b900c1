from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.cache_store.known import KnownBlocks

names = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
changes = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(names, max_size=3)),
        st.tuples(st.just("discard"), st.lists(names, max_size=3)),
        st.tuples(st.just("clear"), st.just([])),
        st.tuples(st.just("take"), st.just([])),
    ),
    max_size=30,
)


@given(changes)
def test_whoever_applies_the_events_holds_the_same_set(steps: list[tuple[str, list[bytes]]]) -> None:
    known, held = KnownBlocks(most=3), set()
    for step, blocks in [*steps, ("take", [])]:
        if step == "add":
            known.add(blocks)
        elif step == "discard":
            known.discard(blocks)
        elif step == "clear":
            known.clear()
        else:
            stored, removed = known.take_events()
            assert set(removed) <= held
            assert not set(stored) & held
            held = held - set(removed) | set(stored)
    assert {name for name in (b"a", b"b", b"c", b"d", b"e") if name in known} == held
    assert len(held) <= 3


def test_the_least_recently_confirmed_block_is_forgotten_first() -> None:
    known = KnownBlocks(most=2)
    known.add([b"a", b"b"])
    known.add([b"a"])
    known.add([b"c"])
    assert [name in known for name in (b"a", b"b", b"c")] == [True, False, True]
    assert known.take_events() == ([b"a", b"c"], [])
