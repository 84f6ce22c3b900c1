import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.load import Work
from services.wire.messages import Stats
from tests.router.workers import load


def work(uncached=100, store=0, blocks=10, sequences=1):
    return Work(uncached, store, blocks, sequences)


def report(running=0, waiting=0, queued=0, free=10_000, store=0.0):
    return Stats(running, waiting, queued, free, 0.0, 0.0, store)


def test_what_was_sent_counts_at_once_and_until_it_starts():
    worker = load(rate=1000.0)
    worker.sent("a", work(uncached=500), now_s=0.0)
    worker.sent("b", work(uncached=250), now_s=0.0)
    assert worker.queued_s == pytest.approx(0.75)
    worker.started("a")
    assert worker.queued_s == pytest.approx(0.25)
    assert worker.running == 2


def test_a_report_replaces_what_was_sent_before_it_and_not_what_was_sent_since():
    worker = load(rate=1000.0)
    worker.sent("old", work(uncached=500), now_s=0.0)
    worker.sent("new", work(uncached=100), now_s=0.995)
    worker.reported(report(running=1, queued=300), now_s=1.0)
    assert worker.queued_s == pytest.approx(0.4)


def test_other_routers_requests_count():
    worker = load(max_running=8)
    worker.reported(report(running=7, waiting=3, queued=900), now_s=0.0)
    assert worker.running == 10
    assert not worker.has_room(1)
    assert worker.queued_s == pytest.approx(0.9)


def test_fetches_cost_the_stores_time():
    worker = load(rate=1000.0)
    worker.reported(report(store=10_000.0), now_s=0.0)
    worker.sent("a", work(uncached=100, store=5000), now_s=1.0)
    assert worker.queued_s == pytest.approx(0.1 + 0.5)


def test_room_is_what_runs_and_an_eighth():
    worker = load(max_running=16)
    for i in range(17):
        assert worker.has_room(1)
        worker.sent(i, work(), 0.0)
    assert worker.has_room(1)
    assert not worker.has_room(2)


def test_a_request_larger_than_a_worker_fits_an_empty_one():
    worker = load(max_running=2)
    assert worker.has_room(8)
    worker.sent("a", work(), 0.0)
    assert not worker.has_room(8)


def test_memory_is_waited_for_in_proportion_to_what_is_missing():
    worker = load(gpu_blocks=1000)
    worker.reported(report(free=100), now_s=0.0)
    assert worker.memory_wait_s(100) == 0.0
    assert worker.memory_wait_s(600) == pytest.approx(0.5 * worker.residence_s)
    worker.sent("a", work(blocks=50), now_s=1.0)
    assert worker.memory_wait_s(100) == pytest.approx(0.05 * worker.residence_s)


def test_typical_answers_are_learned_from_those_served_to_the_end():
    worker = load()
    for i in range(200):
        worker.sent(i, work(), now_s=float(i))
        worker.ended(i, now_s=i + 2.0, output_tokens=40)
    worker.sent("cut", work(), now_s=0.0)
    worker.ended("cut", now_s=500.0)
    assert worker.output_tokens == pytest.approx(40, abs=1)
    assert worker.residence_s == pytest.approx(2.0, abs=0.1)


@given(
    st.lists(
        st.tuples(st.sampled_from(["sent", "started", "ended", "reported"]), st.integers(0, 5)), max_size=60
    )
)
@settings(max_examples=200, deadline=None)
def test_the_ledger_returns_to_zero_whatever_the_order_of_events(events):
    worker, live, now = load(), set(), 0.0
    for name, key in events:
        now += 0.01
        if name == "sent" and key not in live:
            worker.sent(key, work(sequences=key + 1), now)
            live.add(key)
        elif name == "started":
            worker.started(key)
        elif name == "ended":
            worker.ended(key, now)
            live.discard(key)
        elif name == "reported":
            worker.reported(report(), now)
        assert worker.requests == len(live)
        assert worker.sequences == sum(key + 1 for key in live)
    for key in range(6):
        worker.ended(key, now)
    assert (worker.requests, worker.sequences, worker.running, worker.queued_s) == (0, 0, 0, 0.0)
