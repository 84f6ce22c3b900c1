from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission import LONGEST_RETRY_S, AdmissionQueue, QueueFull
from services.router.retry import BURST, RetryBudget


@dataclass(frozen=True, eq=False)
class Waiter:
    number: int
    priority: int = 0
    waiting_since_s: float = 0.0


def drain(queue):
    order = []
    while queue.first is not None:
        order.append(queue.first)
        queue.depart(queue.first, 0.0)
    return order


@given(st.lists(st.integers(0, 3), max_size=30), st.data())
@settings(max_examples=200, deadline=None)
def test_serves_by_class_then_arrival_and_forgets_who_left(priorities, data):
    queue = AdmissionQueue(100)
    waiters = [Waiter(i, priority) for i, priority in enumerate(priorities)]
    for waiter in data.draw(st.permutations(waiters)):
        queue.admit(waiter, 0.0)
    gone = [waiter for waiter in waiters if data.draw(st.booleans())]
    for waiter in gone * 2:
        queue.remove(waiter)
    expected = sorted(
        (waiter for waiter in waiters if waiter not in gone), key=lambda one: (-one.priority, one.number)
    )
    assert drain(queue) == expected
    assert len(queue) == 0


def test_a_full_queue_refuses_with_the_time_that_it_takes_to_drain():
    queue = AdmissionQueue(10)
    for i in range(10):
        queue.admit(Waiter(i), 0.0)
    for second in range(1, 6):
        queue.depart(queue.first, 2.0 * second)
        queue.admit(Waiter(10 + second), 2.0 * second)
    with pytest.raises(QueueFull, match="10 requests are waiting") as full:
        queue.admit(Waiter(99), 11.0)
    assert full.value.retry_after_s == 20
    assert len(queue) == 10


@pytest.mark.parametrize(("gap", "retry"), [(0.001, 1), (1000.0, LONGEST_RETRY_S)])
def test_retry_after_is_from_one_second_to_a_minute(gap, retry):
    queue = AdmissionQueue(5)
    for i in range(5):
        queue.admit(Waiter(i), 0.0)
    queue.depart(queue.first, gap)
    assert queue.retry_after_s() == retry


def test_nothing_waits_in_a_queue_of_zero_but_what_is_put_back():
    queue = AdmissionQueue(0)
    with pytest.raises(QueueFull):
        queue.admit(Waiter(0), 0.0)
    queue.put_back(Waiter(1), 0.0)
    assert len(queue) == 1


def test_the_overdue_are_those_that_came_before():
    queue = AdmissionQueue(5)
    for i in range(4):
        queue.admit(Waiter(i, waiting_since_s=float(i)), float(i))
    assert [waiter.number for waiter in queue.overdue(2.0)] == [0, 1]


def test_retries_are_a_tenth_of_the_traffic_after_the_burst():
    budget = RetryBudget()
    assert sum(budget.spend() for _ in range(10 * BURST)) == BURST
    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 98 <= spent <= 100
