import pytest

from services.router.rates import Rates
from services.wire.messages import Stats
from tests.router.workers import hello


def stats(running=0, decode_step_s=0.0, store=0.0, prefill=0.0):
    return Stats(running, 0, 0, 100, prefill, decode_step_s, store)


def test_starts_from_the_warm_up_then_from_the_pool():
    assert Rates(hello(rate=5000.0), pool_median=100.0).prefill == 5000.0
    assert Rates(hello(rate=0.0), pool_median=100.0).prefill == 100.0
    assert Rates(hello(rate=0.0), pool_median=None).prefill > 0


def test_converges_to_the_true_rate():
    rates = Rates(hello(rate=6000.0), None)
    for _ in range(100):
        rates.learn_prefill(1000, 1000 / 3000.0, pool_median=4000.0)
    assert rates.prefill == pytest.approx(3000, rel=0.02)


def test_believes_the_worker_until_a_prefill_tells_better():
    rates = Rates(hello(rate=100.0), None)
    rates.learn_stats(stats(prefill=400.0))
    assert rates.prefill == 400.0
    rates.learn_prefill(1000, 1000 / 600.0, pool_median=400.0)
    learned = rates.prefill
    assert learned == pytest.approx(410.0)
    rates.learn_stats(stats(prefill=100.0))
    assert rates.prefill == learned


def test_ignores_short_prefills():
    rates = Rates(hello(rate=6000.0), None)
    rates.learn_prefill(255, 10.0, pool_median=6000.0)
    rates.learn_prefill(1000, 0.0, pool_median=6000.0)
    assert rates.prefill == 6000.0


def test_stays_within_four_times_the_pools_median():
    rates = Rates(hello(rate=1000.0), None)
    for _ in range(200):
        rates.learn_prefill(1000, 1e-9, pool_median=1000.0)
    assert rates.prefill == 4000.0
    for _ in range(200):
        rates.learn_prefill(1000, 1e9, pool_median=1000.0)
    assert rates.prefill == 250.0


def test_learns_how_a_decode_step_grows_with_what_runs():
    rates = Rates(hello(decode_step_s=0.010), None)
    assert rates.decode_step_s(0) == 0.0
    for i in range(400):
        running = 1 + i % 50
        rates.learn_stats(stats(running, 0.010 + 0.0002 * running))
    assert rates.decode_step_s(100) == pytest.approx(0.030, rel=0.05)


def test_without_variety_a_step_grows_gently():
    rates = Rates(hello(decode_step_s=0.010), None)
    assert rates.decode_step_s(1) == pytest.approx(0.010)
    assert 0.010 < rates.decode_step_s(32) < rates.decode_step_s(64) < 0.025


def test_a_closed_store_is_known_from_the_next_report():
    rates = Rates(hello(), None)
    rates.learn_stats(stats(store=5e4))
    assert rates.store == 5e4
    rates.learn_stats(stats(store=0.0))
    assert rates.store == 0.0
