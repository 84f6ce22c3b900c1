"""How often a request is tried again: what a fleet bears under load, or with a request that kills workers."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

#: A request is given up, and kept out, when so many workers in a row were lost before they gave it a token
#: and it alone was to blame; each of two counts half. When a whole fleet dies over and over, nobody is.
LIVES = 2

#: Requests that failed on a living worker and are tried again, as a part of all. Without a bound, a fleet
#: that fails under load gets more of it.
BUDGET = 0.1

#: Retries at once after a quiet time.
BURST = 64

#: Workers that one request may lose in all. With four workers, one of them killed every five seconds, an
#: answer of a minute loses more 4 in 10,000 times (the tail of a binomial distribution).
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
    blame: float = 0.0  # its part in the last ones, that gave it no token

    def add(self, served: bool, suspects: int) -> None:
        """One more is lost. `served`: it had given the request a token, so the request did not kill it;
        `suspects`: how many requests there were of which that cannot be said."""
        self.total += 1
        self.blame = 0.0 if served else self.blame + 1 / suspects

    @property
    def guilty(self) -> bool:
        """Does it kill workers, as far as anyone can tell?"""
        return self.blame >= LIVES

    @property
    def too_many(self) -> bool:
        """May no other worker be asked?"""
        return self.total > MAX_RESUMES or self.guilty


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
