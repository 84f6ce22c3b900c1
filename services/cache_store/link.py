"""How fast the store answers, learned from real loads."""

from __future__ import annotations

#: What is believed before the first load, so that a first load happens.
_FIRST_BYTES_PER_S = 1e9
_FIRST_LATENCY_S = 0.001

#: Weight of the newest observation.
_NEWEST = 0.3

#: A bad opinion that no load has confirmed is halved after so long: else a link that was slow once would
#: never be tried again.
_FORGIVE_S = 30.0


class LinkEstimate:
    """Exponentially weighted bandwidth and latency. `now` is seconds on any clock that never goes back.

    Not thread-safe, but every method is one read or one write: a race costs one observation.
    """

    def __init__(self) -> None:
        self._bytes_per_s = _FIRST_BYTES_PER_S
        self._latency_s = _FIRST_LATENCY_S
        self._read_at = 0.0
        self._asked_at = 0.0

    def observe_read(self, size: int, seconds: float, now: float) -> None:
        """`size` bytes of payload arrived, were checked and copied within `seconds`."""
        seen = size / max(seconds, 1e-9)
        # Averaged as seconds a byte: a mean of rates would let one lucky burst hide many slow reads.
        self._bytes_per_s = 1 / ((1 - _NEWEST) / self.bytes_per_s(now) + _NEWEST / max(seen, 1e-3))
        self._read_at = now

    def observe_lookup(self, seconds: float, now: float) -> None:
        """A lookup took `seconds` from question to answer."""
        self._latency_s = (1 - _NEWEST) * self.latency_s(now) + _NEWEST * seconds
        self._asked_at = now

    def bytes_per_s(self, now: float) -> float:
        """Expected bandwidth of a load that starts now."""
        forgiven = self._bytes_per_s * _forgiveness(now - self._read_at)
        return max(self._bytes_per_s, min(forgiven, _FIRST_BYTES_PER_S))

    def latency_s(self, now: float) -> float:
        """Expected time from question to answer."""
        forgiven = self._latency_s / _forgiveness(now - self._asked_at)
        return min(self._latency_s, max(forgiven, _FIRST_LATENCY_S))


def _forgiveness(idle_s: float) -> float:
    """The factor by which a bad opinion improves; bounded, because nights are long."""
    return float(2.0 ** min(idle_s / _FORGIVE_S, 64.0))
