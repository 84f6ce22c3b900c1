"""How fast one worker is, learned while it serves."""

from __future__ import annotations

from services.wire.messages import Hello, Stats

#: Weight of a new sample: a change of speed is followed within about twenty requests.
WEIGHT = 0.05

#: Prefills shorter than this say more about a step's fixed cost than about the rate.
SHORTEST_SAMPLE_TOKENS = 256

#: One worker's learned rate stays within this factor of the pool's median, so that a burst of odd samples
#: can neither starve it nor bury it. Fleets that mix GPUs more than 16:1 are not served well.
WIDEST_FACTOR = 4.0

#: A worker that measured nothing at warm-up, in a pool that knows nothing yet.
UNKNOWN_TOKENS_PER_S = 1000.0

#: Without any variety in the samples: so many sequences double the time of a decode step.
SEQUENCES_TO_DOUBLE = 64


class Rates:
    """Prefill tokens per second, store tokens per second, and the seconds of a decode step."""

    def __init__(self, hello: Hello, pool_median: float | None) -> None:
        self.prefill = hello.prefill_tokens_per_s or pool_median or UNKNOWN_TOKENS_PER_S
        self.store = 0.0  # 0: no store, or its circuit is open
        self._taught = False  # has a prefill of this router's told the rate?
        self._steps = _Line(hello.decode_step_s, SEQUENCES_TO_DOUBLE)

    def learn_prefill(self, uncached_tokens: int, seconds: float, pool_median: float) -> None:
        """A request's prefill took `seconds` for `uncached_tokens`; `pool_median` is over all workers."""
        if uncached_tokens < SHORTEST_SAMPLE_TOKENS or seconds <= 0:
            return
        self._taught = True
        rate = self.prefill + WEIGHT * (uncached_tokens / seconds - self.prefill)
        self.prefill = min(max(rate, pool_median / WIDEST_FACTOR), pool_median * WIDEST_FACTOR)

    def learn_stats(self, stats: Stats) -> None:
        """Take in what the worker measures itself: the rate of prefill only until a prefill has told it, for
        the worker sees its steps and not what a request waits for between them."""
        self.store = stats.store_tokens_per_s
        if stats.prefill_tokens_per_s > 0 and not self._taught:
            self.prefill = stats.prefill_tokens_per_s
        if stats.running and stats.decode_step_s > 0:
            self._steps.learn(stats.running, stats.decode_step_s)

    def decode_step_s(self, running: int) -> float:
        """Seconds that each step spends on `running` sequences that are decoding."""
        return self._steps.at(running) if running else 0.0


class _Line:
    """y = a + b·x by least squares over exponentially forgotten samples, b never negative."""

    def __init__(self, y_at_1: float, x_to_double: float) -> None:
        self._mean_x = 1.0
        self._mean_y = y_at_1
        self._var_x = 0.0
        self._covariance = 0.0
        self._x_to_double = x_to_double

    def learn(self, x: float, y: float) -> None:
        dx, dy = x - self._mean_x, y - self._mean_y
        self._mean_x += WEIGHT * dx
        self._mean_y += WEIGHT * dy
        self._var_x = (1 - WEIGHT) * (self._var_x + WEIGHT * dx * dx)
        self._covariance = (1 - WEIGHT) * (self._covariance + WEIGHT * dx * dy)

    def at(self, x: float) -> float:
        if self._var_x >= 1.0:
            slope = max(0.0, self._covariance / self._var_x)
        else:
            slope = self._mean_y / (self._mean_x + self._x_to_double)
        return max(0.0, self._mean_y + slope * (x - self._mean_x))
