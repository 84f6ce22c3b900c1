"""What crosses from callers' threads to the engine's: requests, cancels, and who is still owed a finish."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable

from services.worker.request import EngineClosed, RequestError
from services.worker.sequence import Sequence


class Inbox:
    """Requests taken and not yet finished. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._live: dict[Hashable, Sequence] = {}
        self._submitted: list[Sequence] = []
        self._cancelled: list[Hashable] = []
        self._delivering = False
        self._refusal = ""  # why nothing is taken any more

    def submit(self, sequence: Sequence) -> None:
        """Raises EngineClosed after `close`, RequestError when the key is in use."""
        key = sequence.request.key
        with self._changed:
            if self._refusal:
                raise EngineClosed(self._refusal)
            if key in self._live:
                raise RequestError(f"key {key!r} names a live request already")
            self._live[key] = sequence
            self._submitted.append(sequence)
            self._changed.notify()

    def cancel(self, key: Hashable) -> None:
        with self._changed:
            if key in self._live:
                self._cancelled.append(key)
                self._changed.notify()

    def close(self, reason: str) -> None:
        """Take nothing more. The first reason given stays."""
        with self._changed:
            self._refusal = self._refusal or reason
            self._changed.notify()

    @property
    def idle(self) -> bool:
        """Nobody is owed anything: all have finished and the report that says so has been delivered."""
        with self._changed:
            return not self._live and not self._delivering

    # ---- for the engine's thread

    def take(self) -> tuple[list[Sequence], list[Sequence]]:
        """(submitted, cancelled) since the last call; submitted before cancelled."""
        with self._changed:
            submitted, self._submitted = self._submitted, []
            cancelled = [self._live[key] for key in dict.fromkeys(self._cancelled) if key in self._live]
            self._cancelled = []
        return submitted, cancelled

    def wait(self, timeout_s: float) -> None:
        """Until something may have come in."""
        with self._changed:
            if not self._submitted and not self._cancelled:
                self._changed.wait(timeout_s)

    def live(self) -> list[Sequence]:
        with self._changed:
            return list(self._live.values())

    def begin_delivery(self, finished: Iterable[Hashable]) -> None:
        """These requests are over: their keys are free again. Not idle before `end_delivery`."""
        with self._changed:
            for key in finished:
                del self._live[key]
            self._delivering = True

    def end_delivery(self) -> None:
        with self._changed:
            self._delivering = False
