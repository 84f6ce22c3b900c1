"""How often a request is tried again: what a fleet bears under load, or with a request that kills workers."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

#: A request that fails on a living worker before its first token is tried on this many workers at most.
MAX_TRIES = 2

#: Such retries as a part of all requests. Without a bound, a fleet that fails under load gets more of it.
BUDGET = 0.1

#: Retries at once after a quiet time.
BURST = 64

#: A request that never got a token is given up, and kept out, when so many workers died with it.
FIRST_LIVES = 2

#: One that has begun has shown that its prompt harms nobody, and its client has half an answer: so many
#: workers may be lost in a row without a token from any.
LIVES = 3

#: Workers that one request may lose in all. A worker lost every five seconds, four workers and streams of
#: half a minute: one in 10,000 loses more (`python -m benchmarks.chaos`).
MAX_RESUMES = 8

#: How long a request that was given up is refused when it is sent again, and how many are remembered.
QUARANTINE_S = 300.0
MAX_QUARANTINED = 1024


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


@dataclass(slots=True)
class Losses:
    """The workers that one request has lost, those that drained apart."""

    total: int = 0
    in_a_row: int = 0  # the last ones, that gave it no token

    def add(self, served: bool) -> None:
        """One more is lost; `served`: it had given the request a token."""
        self.total += 1
        self.in_a_row = 0 if served else self.in_a_row + 1

    def too_many(self, begun: bool) -> bool:
        """May it not be sent to another worker? `begun`: it has got tokens from some worker."""
        return self.total > MAX_RESUMES or self.in_a_row >= (LIVES if begun else FIRST_LIVES)


class Quarantine:
    """Prompts that workers died of. Pure: time comes in as an argument, in seconds."""

    def __init__(self) -> None:
        self._until_s: dict[bytes, float] = {}  # by digest, the oldest first

    def add(self, prompt: bytes, now_s: float) -> None:
        """Refuse this prompt for some time."""
        self._until_s.pop(_digest(prompt), None)
        if len(self._until_s) >= MAX_QUARANTINED:
            del self._until_s[next(iter(self._until_s))]
        self._until_s[_digest(prompt)] = now_s + QUARANTINE_S

    def holds(self, prompt: bytes, now_s: float) -> bool:
        """Is this prompt refused now? Costs nothing while no prompt is."""
        return bool(self._until_s) and self._until_s.get(_digest(prompt), 0.0) > now_s


def _digest(prompt: bytes) -> bytes:
    return blake2b(prompt, digest_size=16).digest()
