"""Where a request goes: to the worker that costs the least, in predicted seconds.

For every worker i that has room:

    cost = W + o + D + M + κ·B·u/r̄

    W   seconds of prefill ahead of it there
    o   its own prefill: tokens to compute at the worker's rate, tokens in the store at the store's rate
        where that is faster
    D   decode interference: the step under way has to end, and shares the machine
    M   wait for KV pages
    B   mean backlog of the fleet in seconds, the router's own queue included, at most 20
    u   tokens it makes the fleet compute there (store hits at their cost in tokens)
    r̄   the fleet's mean prefill rate

W + o + D + M is the predicted time to the first token. The last term is what the request costs the others:
the longer they wait, the more a recomputed token weighs, so affinity to a cached prefix grows with load by
itself. It counts tokens at the fleet's mean rate, not seconds at the worker's own, which would shun slow but
idle GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Protocol

from services.router.index import Hit
from services.router.load import Work, WorkerLoad

#: How much the others' waiting counts against one's own. 0.25 to 1 differ by 3 % on the Mooncake
#: conversation trace at three quarters of capacity, by 13 % at overload (simulated); 1 was best.
KAPPA = 1.0
LONGEST_BACKLOG_S = 20.0

#: Costs this close are one cost: better a random choice than one by noise.
TIE = 0.01

#: No prefix hit reaches the last prompt token: its logits are wanted.
LEAST_UNCACHED_TOKENS = 1


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What routing must know of a request."""

    prompt_tokens: int
    max_tokens: int
    sequences: int
    hits: Mapping[int, Hit]  # by worker


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one worker would do with the request; tokens by where they come from sum to the prompt's."""

    local_tokens: int
    store_tokens: int
    uncached_tokens: int
    work: Work
    ttft_s: float
    cost_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """The choice and why: `only` worker with room; `prefix`: has more of the prompt than any other;
    `load`: another has more, but would answer later; `cold`: nobody has any of it; `tie`: several have as
    much; `round-robin`."""

    worker: int
    prediction: Prediction
    reason: str


class Policy(Protocol):
    def choose(
        self, request: RouteRequest, fleet: Mapping[int, WorkerLoad], room: Sequence[int], queue_s: float
    ) -> Route:
        """Choose one of `room`, workers of `fleet` that can take the request now. `queue_s`: seconds that
        the router's own queue holds."""


class PredictedSeconds:
    """The cost above; random among the best."""

    def __init__(self, random: Random, kappa: float = KAPPA) -> None:
        self._random = random
        self._kappa = kappa

    def choose(
        self, request: RouteRequest, fleet: Mapping[int, WorkerLoad], room: Sequence[int], queue_s: float
    ) -> Route:
        price = self._kappa * token_price(fleet, queue_s)
        predictions = {worker: predict(request, worker, fleet[worker], price) for worker in room}
        limit = min(prediction.cost_s for prediction in predictions.values()) * (1 + TIE)
        best = [worker for worker, prediction in predictions.items() if prediction.cost_s <= limit]
        chosen = self._random.choice(best)
        return Route(chosen, predictions[chosen], _reason(predictions, chosen))


class RoundRobin:
    """One after the other, whatever they hold: what everything else is measured against."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(
        self, request: RouteRequest, fleet: Mapping[int, WorkerLoad], room: Sequence[int], queue_s: float
    ) -> Route:
        chosen = sorted(room)[self._turn % len(room)]
        self._turn += 1
        return Route(
            chosen, predict(request, chosen, fleet[chosen], token_price(fleet, queue_s)), "round-robin"
        )


def token_price(fleet: Mapping[int, WorkerLoad], queue_s: float) -> float:
    """Seconds that one token to compute costs everybody else: B / r̄."""
    backlog = fmean(load.queued_s for load in fleet.values()) + queue_s
    return min(LONGEST_BACKLOG_S, backlog) / fmean(load.rates.prefill for load in fleet.values())


def predict(request: RouteRequest, worker: int, load: WorkerLoad, price: float) -> Prediction:
    """Time to first token and cost of the request on one worker."""
    rates = load.rates
    hit = request.hits.get(worker, Hit(0, 0))
    size = load.block_size
    most = request.prompt_tokens - LEAST_UNCACHED_TOKENS
    local = min(hit.local * size, most)
    store = min(hit.store * size, most - local) if rates.store > rates.prefill else 0
    uncached = request.prompt_tokens - local - store
    own_s = uncached / rates.prefill + (store / rates.store if store else 0.0)
    blocks = math.ceil((request.prompt_tokens - local) / size)
    blocks += request.sequences * math.ceil(min(request.max_tokens, load.output_tokens) / size)
    ttft_s = load.queued_s + own_s + rates.decode_step_s(load.running) + load.memory_wait_s(blocks)
    return Prediction(
        local_tokens=local,
        store_tokens=store,
        uncached_tokens=uncached,
        work=Work(uncached, store, blocks, request.sequences),
        ttft_s=ttft_s,
        cost_s=ttft_s + price * own_s * rates.prefill,
    )


def _reason(predictions: Mapping[int, Prediction], chosen: int) -> str:
    if len(predictions) == 1:
        return "only"
    mine = predictions[chosen].local_tokens
    others = max(prediction.local_tokens for worker, prediction in predictions.items() if worker != chosen)
    if mine > others:
        return "prefix"
    if mine < others:
        return "load"
    return "tie" if mine else "cold"
