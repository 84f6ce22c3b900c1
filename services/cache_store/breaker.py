"""A circuit breaker: when the store keeps failing, stop asking it for a while."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class CircuitBreaker:
    """Closed: everything may try. `failures` failures within `window_s` open it: nothing may try for
    `open_s`. Then one probe may; its success closes the breaker, its failure opens it again.

    Knows no clock: `now` is seconds on any clock that never goes back. Not thread-safe.
    """

    failures: int = 5
    window_s: float = 10.0
    open_s: float = 2.0
    _failed_at: deque[float] = field(default_factory=deque)
    _open_until: float | None = None
    _probing_since: float | None = None

    def is_open(self, now: float) -> bool:
        """Whether tries are refused, a probe that is due aside. Changes nothing."""
        return self._open_until is not None and (now < self._open_until or self._probing_since is not None)

    def allow(self, now: float) -> bool:
        """Whether to try. True while open means: you are the probe, and must report how it went."""
        if self._open_until is None:
            return True
        if now < self._open_until:
            return False
        # A probe that never reported (its thread died) may not lock the store out for ever.
        if self._probing_since is not None and now - self._probing_since < self.window_s:
            return False
        self._probing_since = now
        return True

    def succeeded(self) -> None:
        """A try worked."""
        self._failed_at.clear()
        self._open_until = self._probing_since = None

    def failed(self, now: float) -> None:
        """A try failed."""
        if self._open_until is not None:
            self._open_until, self._probing_since = now + self.open_s, None
            return
        self._failed_at.append(now)
        while self._failed_at[0] < now - self.window_s:
            self._failed_at.popleft()
        if len(self._failed_at) >= self.failures:
            self._failed_at.clear()
            self._open_until = now + self.open_s

    def abandoned(self) -> None:
        """A try ended before the store could answer: if it was the probe, another one may go."""
        self._probing_since = None
