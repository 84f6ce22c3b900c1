"""How much of the traffic may be tried twice."""

from __future__ import annotations

#: A request is tried on this many workers at most.
MAX_TRIES = 2

#: Retries as a part of all requests. Without a bound, a fleet that fails under load gets more of it.
BUDGET = 0.1

#: Retries at once after a quiet time: what one lost worker may have had waiting.
BURST = 64


class RetryBudget:
    """Every request earns a tenth of a retry; up to `BURST` are kept."""

    def __init__(self) -> None:
        self._tokens = float(BURST)

    def earn(self) -> None:
        """A new request came in."""
        self._tokens = min(BURST, self._tokens + BUDGET)

    def spend(self) -> bool:
        """May one more request be retried?"""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
