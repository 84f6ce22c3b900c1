from __future__ import annotations

from services.cache_store.breaker import CircuitBreaker


def opened_at(now: float) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for _ in range(breaker.failures):
        assert breaker.allow(now)
        breaker.failed(now)
    return breaker


def test_five_failures_within_ten_seconds_open_it() -> None:
    breaker = CircuitBreaker()
    for now in (0.0, 2.0, 4.0, 6.0):
        breaker.failed(now)
        assert breaker.allow(now)
    breaker.failed(10.0)
    assert breaker.is_open(10.0)
    assert not breaker.allow(10.0)


def test_failures_that_are_far_apart_do_not_open_it() -> None:
    breaker = CircuitBreaker()
    for now in range(0, 300, 3):
        breaker.failed(now)
        assert breaker.allow(now)


def test_a_success_forgives_earlier_failures() -> None:
    breaker = CircuitBreaker()
    for now in range(100):
        breaker.failed(now / 100)
        if now % 4 == 3:
            breaker.succeeded()
    assert breaker.allow(1.0)


def test_after_two_seconds_one_probe_may_try_and_its_success_closes_it() -> None:
    breaker = opened_at(100.0)
    assert not breaker.allow(101.9)
    assert breaker.allow(102.0)
    assert not breaker.allow(102.0), "one probe is enough"
    assert breaker.is_open(102.0)
    breaker.succeeded()
    assert not breaker.is_open(102.1)
    assert breaker.allow(102.1)


def test_a_failed_probe_opens_it_for_another_two_seconds() -> None:
    breaker = opened_at(100.0)
    assert breaker.allow(102.0)
    breaker.failed(102.5)
    assert not breaker.allow(104.4)
    assert breaker.allow(104.5)


def test_a_probe_that_never_reports_is_replaced() -> None:
    breaker = opened_at(100.0)
    assert breaker.allow(102.0)
    assert not breaker.allow(111.9)
    assert breaker.allow(112.0)
