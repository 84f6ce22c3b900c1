from collections import Counter
from random import Random

import pytest

from services.router.index import Hit
from services.router.load import Work
from services.router.routing import PredictedSeconds, RoundRobin, RouteRequest, predict, token_price
from services.wire.messages import Stats
from tests.router.workers import load


def request(tokens=1600, hits=None, sequences=1):
    return RouteRequest(tokens, max_tokens=16, sequences=sequences, hits=hits or {})


def choose(fleet, asked, policy=None, queue_s=0.0):
    return (policy or PredictedSeconds(Random(1))).choose(asked, fleet, list(fleet), queue_s)


def busy(seconds, **fields):
    """A worker with so much prefill ahead."""
    worker = load(**fields)
    worker.sent("ahead", Work(int(seconds * worker.rates.prefill), 0, 0, 1), 0.0)
    return worker


def with_store(worker, tokens_per_s):
    worker.reported(Stats(0, 0, 0, 10_000, 0.0, 0.0, tokens_per_s), 0.0)
    return worker


def test_a_cached_prefix_wins_among_equals():
    route = choose({0: load(), 1: load(), 2: load()}, request(hits={1: Hit(50, 0)}))
    assert (route.worker, route.reason) == (1, "prefix")
    assert route.prediction.local_tokens == 800
    assert route.prediction.uncached_tokens == 800
    assert route.prediction.ttft_s == pytest.approx(0.8)


def test_a_long_queue_beats_a_cached_prefix():
    fleet = {0: busy(5.0), 1: load()}
    route = choose(fleet, request(hits={0: Hit(50, 0)}))
    assert (route.worker, route.reason) == (1, "load")


def test_the_busier_the_fleet_the_more_a_prefix_weighs():
    """Worker 0 is 1.2 s further behind and saves 0.8 s of computing: worth it only when others wait too."""
    asked = request(hits={0: Hit(50, 0)})
    assert choose({0: busy(1.2), 1: load(), 2: load()}, asked).worker != 0
    assert choose({0: busy(6.2), 1: busy(5.0), 2: busy(5.0)}, asked).worker == 0


def test_slow_but_idle_gpus_are_not_shunned_under_load():
    """The externality counts tokens at the fleet's mean rate: the price of a worker's own slowness is in its
    own prefill time already."""
    fleet = {0: busy(10.0, rate=4000.0), 1: busy(8.5, rate=1000.0)}
    assert choose(fleet, request(tokens=1600)).worker == 1
    price = token_price(fleet, 0.0)
    costs = [predict(request(), worker, fleet[worker], price) for worker in fleet]
    assert costs[0].cost_s - costs[0].ttft_s == pytest.approx(costs[1].cost_s - costs[1].ttft_s)


def test_the_store_is_used_where_it_is_faster_than_computing():
    fast, slow = with_store(load(rate=1000.0), 10_000.0), with_store(load(rate=1000.0), 500.0)
    asked = request(hits={0: Hit(10, 80), 1: Hit(10, 80)})
    price = token_price({0: fast, 1: slow}, 0.0)
    there = predict(asked, 0, fast, price)
    assert (there.local_tokens, there.store_tokens, there.uncached_tokens) == (160, 1280, 160)
    assert there.ttft_s == pytest.approx(0.16 + 0.128)
    here = predict(asked, 1, slow, price)
    assert (here.local_tokens, here.store_tokens, here.uncached_tokens) == (160, 0, 1440)


def test_the_last_token_is_always_computed():
    prediction = predict(request(tokens=160, hits={0: Hit(10, 0)}), 0, load(), 0.0)
    assert (prediction.local_tokens, prediction.uncached_tokens) == (159, 1)


def test_running_sequences_and_missing_memory_cost_time():
    crowded = load(decode_step_s=0.02)
    crowded.reported(Stats(32, 0, 0, 10_000, 0.0, 0.0, 0.0), 0.0)
    full = load(gpu_blocks=1000)
    full.reported(Stats(0, 0, 0, 20, 0.0, 0.0, 0.0), 0.0)
    assert predict(request(), 0, crowded, 0.0).ttft_s == pytest.approx(1.6 + crowded.rates.decode_step_s(32))
    assert predict(request(), 0, full, 0.0).ttft_s > 1.6 + 0.5


def test_equal_workers_are_chosen_at_random():
    policy = PredictedSeconds(Random(5))
    fleet = {worker: load() for worker in range(4)}
    chosen = Counter(choose(fleet, request(), policy).worker for _ in range(400))
    assert min(chosen.values()) > 70
    assert choose(fleet, request(), policy).reason == "cold"


def test_every_reason_is_given_where_it_is_true():
    assert choose({0: load()}, request()).reason == "only"
    assert choose({0: load(), 1: load()}, request(hits={0: Hit(5, 0), 1: Hit(5, 0)})).reason == "tie"


def test_round_robin_takes_turns_and_predicts_all_the_same():
    policy = RoundRobin()
    fleet = {worker: load() for worker in range(3)}
    asked = request(hits={2: Hit(50, 0)})
    routes = [choose(fleet, asked, policy) for _ in range(6)]
    assert [route.worker for route in routes] == [0, 1, 2, 0, 1, 2]
    assert routes[2].prediction.local_tokens == 800
    assert routes[0].reason == "round-robin"


def test_the_routers_own_queue_is_part_of_the_backlog():
    fleet = {0: load(), 1: load()}
    assert token_price(fleet, queue_s=10.0) == pytest.approx(0.01)
    assert token_price(fleet, queue_s=500.0) == pytest.approx(0.02)  # 20 s at most
