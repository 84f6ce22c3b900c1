"""Whether a worker gets on: how long it may be silent, and how long it has been.

A sign of life is a token for any of our requests or a change in the load that the worker tells once a second:
the engine's measured rates change with every step, whoever it is for. So a request that waits in a busy
worker, or was preempted there, is no reason to take it away; a worker whose engine hangs is, even while its
connection lives.
"""

from __future__ import annotations

from services.wire.messages import Hello, Stats

#: A worker is given up after the time of so many of its longest steps. One step is what an engine needs to be
#: heard of again; long contexts make it some times longer than the mean rates say, a busy machine once more.
STEPS = 10

#: And never before: pauses of seconds happen to healthy processes.
LEAST_S = 5.0

#: One look counts as silence for no longer: a router whose own loop stood still has not read the news yet.
LONGEST_LOOK_S = 1.0


class Pulse:
    """Of one worker. Pure: time comes in as an argument, in seconds."""

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        self._stats: Stats | None = None
        self._alive = True  # since the last look
        self._looked_s = 0.0
        self._silent_s = 0.0

    def beat(self) -> None:
        """A token came, or the worker has had nothing to do for us."""
        self._alive = True

    def reported(self, stats: Stats) -> bool:
        """The load was told. Returns whether that is a sign of life."""
        changed = stats != self._stats
        self._stats = stats
        self._alive |= changed
        return changed

    def look(self, now_s: float) -> float:
        """Seconds of silence before this look; call it about twice a second while the worker has work."""
        if self._alive:
            self._silent_s = 0.0
        else:
            self._silent_s += min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._alive = False
        self._looked_s = now_s
        return self._silent_s

    def limit_s(self, most_s: float) -> float:
        """The longest silence that may be an honest step's, `most_s` at most."""
        hello, stats = self._hello, self._stats
        rate = (stats.prefill_tokens_per_s if stats else 0.0) or hello.prefill_tokens_per_s
        if not rate:
            return most_s
        decode_s = max(hello.decode_step_s, stats.decode_step_s if stats else 0.0)
        return min(most_s, max(LEAST_S, STEPS * (hello.max_step_tokens / rate + decode_s)))
