"""The eviction order, against a model that recomputes everything from the history of each block."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.wire.messages import DEFAULT_PRIORITY
from services.worker.policy import EvictionPolicy

ROOT = b"root"


def name(number: int) -> bytes:
    return number.to_bytes(4, "big")


def insert_chain(policy: EvictionPolicy, *numbers: int) -> None:
    parent = ROOT
    for number in numbers:
        policy.insert(name(number), parent)
        parent = name(number)


def release_chain(policy: EvictionPolicy, *numbers: int, now: float = 0.0) -> None:
    for number in reversed(numbers):
        policy.release(name(number), now)


def evict_all(policy: EvictionPolicy, now: float = 0.0) -> list[int]:
    order = []
    while (hash := policy.evict(now)) is not None:
        order.append(int.from_bytes(hash, "big"))
    return order


def test_the_least_recently_released_block_goes_first() -> None:
    policy = EvictionPolicy()
    for number in (1, 2, 3):
        policy.insert(name(number), ROOT)
    for number in (2, 3, 1):
        policy.release(name(number), 0.0)
    assert evict_all(policy) == [2, 3, 1]
    assert len(policy) == 0


def test_a_held_block_is_never_evicted() -> None:
    policy = EvictionPolicy()
    policy.insert(name(1), ROOT)
    assert policy.evict(0.0) is None
    policy.release(name(1), 0.0)
    policy.hold(name(1), 0.0)
    assert policy.evict(0.0) is None


def test_a_prefix_is_evicted_from_its_tail_even_if_its_head_is_older() -> None:
    policy = EvictionPolicy()
    insert_chain(policy, 1, 2, 3)
    for number in (1, 2, 3):
        policy.release(name(number), 0.0)
    assert evict_all(policy) == [3, 2, 1]


def test_a_low_priority_head_waits_for_its_high_priority_tail() -> None:
    policy = EvictionPolicy()
    insert_chain(policy, 1, 2)
    policy.grant(name(1), 5, None)
    policy.grant(name(2), 90, None)
    policy.insert(name(9), ROOT)
    policy.grant(name(9), 50, None)
    release_chain(policy, 1, 2)
    policy.release(name(9), 0.0)
    assert evict_all(policy) == [9, 2, 1]


def test_a_low_priority_reuse_does_not_demote() -> None:
    policy = EvictionPolicy()
    for number in (1, 2):
        policy.insert(name(number), ROOT)
    policy.grant(name(1), 90, None)
    policy.release(name(1), 0.0)
    policy.hold(name(1), 1.0)
    policy.grant(name(1), 0, None)
    policy.release(name(1), 1.0)
    policy.grant(name(2), 80, None)
    policy.release(name(2), 2.0)
    assert evict_all(policy, 3.0) == [2, 1]


def test_a_reuse_without_time_to_live_does_not_make_a_limited_priority_last() -> None:
    policy = EvictionPolicy()
    for number in (1, 2):
        policy.insert(name(number), ROOT)
    policy.grant(name(1), 90, 10.0)
    policy.release(name(1), 0.0)
    policy.hold(name(1), 5.0)
    policy.grant(name(1), 35, None)
    policy.release(name(1), 5.0)
    policy.release(name(2), 6.0)
    assert policy.evict(14.0) == name(2), "used at 5, kept for 10 seconds more"
    policy.insert(name(3), ROOT)
    policy.release(name(3), 14.5)
    assert policy.evict(15.0) == name(1), "its priority ended, so it is the oldest of equals"


def test_a_time_to_live_that_ended_is_not_revived_by_a_later_use() -> None:
    policy = EvictionPolicy()
    for number in (1, 2):
        policy.insert(name(number), ROOT)
    policy.grant(name(1), 90, 10.0)
    policy.release(name(1), 0.0)
    policy.hold(name(1), 20.0)
    policy.release(name(1), 20.0)
    policy.release(name(2), 21.0)
    assert evict_all(policy, 22.0) == [1, 2]


def test_the_queue_stays_small_under_endless_reuse() -> None:
    policy = EvictionPolicy()
    for number in range(8):
        policy.insert(name(number), ROOT)
        policy.grant(name(number), 60, 1e9)
        policy.release(name(number), 0.0)
    for turn in range(10_000):
        policy.hold(name(turn % 8), 0.0)
        policy.release(name(turn % 8), 0.0)
    assert len(policy._queue) < 100
    assert len(policy._expiries) < 200
    assert evict_all(policy) == [0, 1, 2, 3, 4, 5, 6, 7]


@dataclass
class ModelBlock:
    parent: int | None
    held: bool = True
    released_s: float = 0.0
    order: int = 0
    lasting: list[int] = field(default_factory=list)
    limited: list[tuple[int, float]] = field(default_factory=list)

    def priority(self, now: float) -> int:
        live = self.lasting + [p for p, ttl in self.limited if self.released_s + ttl > now]
        return max(live, default=DEFAULT_PRIORITY)


class PolicyMachine(RuleBasedStateMachine):
    """Every eviction is the minimum over all blocks of (priority now, order of release), leaves only."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = EvictionPolicy()
        self.model: dict[int, ModelBlock] = {}
        self.now = 0.0
        self.clock = 0
        self.next = 1

    def pick(self, data: st.DataObject, held: bool) -> int | None:
        numbers = [n for n, block in self.model.items() if block.held == held]
        return data.draw(st.sampled_from(numbers)) if numbers else None

    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from([None, *self.model]))
        self.policy.insert(name(self.next), ROOT if parent is None else name(parent))
        self.model[self.next] = ModelBlock(parent)
        self.next += 1

    @rule(data=st.data(), priority=st.integers(0, 100), ttl_s=st.none() | st.integers(1, 8))
    def grant(self, data: st.DataObject, priority: int, ttl_s: int | None) -> None:
        number = self.pick(data, held=True)
        if number is None:
            return
        self.policy.grant(name(number), priority, ttl_s)
        if ttl_s is None:
            self.model[number].lasting.append(priority)
        else:
            self.model[number].limited.append((priority, ttl_s))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = self.pick(data, held=True)
        if number is None:
            return
        self.policy.release(name(number), self.now)
        block = self.model[number]
        self.clock += 1
        block.held, block.released_s, block.order = False, self.now, self.clock

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        number = self.pick(data, held=False)
        if number is None:
            return
        self.policy.hold(name(number), self.now)
        block = self.model[number]
        block.limited = [(p, ttl) for p, ttl in block.limited if block.released_s + ttl > self.now]
        block.held = True

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.model)))
        self.policy.remove(name(number), self.now)
        self.forget(number)

    @rule()
    def evict(self) -> None:
        parents = {block.parent for block in self.model.values()}
        candidates = [n for n, block in self.model.items() if not block.held and n not in parents]
        hash = self.policy.evict(self.now)
        if not candidates:
            assert hash is None
            return
        expected = min(candidates, key=lambda n: (self.model[n].priority(self.now), self.model[n].order))
        assert hash == name(expected)
        self.forget(expected)

    def forget(self, number: int) -> None:
        del self.model[number]
        for block in self.model.values():
            if block.parent == number:
                block.parent = None

    @invariant()
    def sizes_agree(self) -> None:
        assert len(self.policy) == len(self.model)


TestPolicyAgainstTheModel = PolicyMachine.TestCase
TestPolicyAgainstTheModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
