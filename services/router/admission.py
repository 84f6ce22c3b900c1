"""The router's queue: requests wait here, not inside workers, so that the choice is made as late as possible.

A worker is given what it can run and a little more. Everything else waits in one bounded queue a model, in
the order of `rank`, and is bound to a worker when one has room. What does not fit is refused at once, with
the time after which it is worth trying again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Generic, Protocol, TypeVar

#: Retry-After is never longer: by then the load is another.
LONGEST_RETRY_S = 60

#: Weight of a new sample of the time between two departures.
WEIGHT = 0.1


class QueueFull(Exception):
    """The queue has its limit of requests; `retry_after_s` is how long they take to leave."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests are waiting already")
        self.retry_after_s = retry_after_s


class Waiting(Protocol):
    """What the queue must know of a request."""

    @property
    def priority(self) -> int: ...

    @property
    def waiting_since_s(self) -> float: ...

    @property
    def number(self) -> int:
        """Rises with every request."""


def rank(request: Waiting) -> tuple[int, int]:
    """The order of service: higher priority class first, then first come first served."""
    return (-request.priority, request.number)


R = TypeVar("R", bound=Waiting)


class AdmissionQueue(Generic[R]):
    """Bounded, ordered by `rank`. Pure: time comes in as an argument, in seconds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: list[R] = []
        self._departure_gap_s: float | None = None  # mean, while requests were waiting
        self._last_departure_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> R | None:
        """Who is served next."""
        return self._waiting[0] if self._waiting else None

    def overdue(self, before_s: float) -> list[R]:
        """Those that have waited since before `before_s`."""
        return [request for request in self._waiting if request.waiting_since_s < before_s]

    def admit(self, request: R, now_s: float) -> None:
        """Take in a new request. Raises QueueFull."""
        if len(self._waiting) >= self._limit:
            raise QueueFull(len(self._waiting), self.retry_after_s())
        self.put_back(request, now_s)

    def put_back(self, request: R, now_s: float) -> None:
        """Take in a request that was admitted before and lost its worker, whatever the limit says."""
        if not self._waiting:
            self._last_departure_s = now_s
        insort(self._waiting, request, key=rank)

    def depart(self, request: R, now_s: float) -> None:
        """The request goes to a worker after waiting."""
        self.remove(request)
        gap = now_s - self._last_departure_s
        self._last_departure_s = now_s
        if self._departure_gap_s is None:
            self._departure_gap_s = gap
        else:
            self._departure_gap_s += WEIGHT * (gap - self._departure_gap_s)

    def remove(self, request: R) -> None:
        """The request waits no more. Requests that are not in the queue are fine."""
        at = bisect_left(self._waiting, rank(request), key=rank)
        if at < len(self._waiting) and self._waiting[at] is request:
            del self._waiting[at]

    @property
    def wait_s(self) -> float:
        """Predicted seconds until a request added now would leave, from how fast others left."""
        return len(self._waiting) * (self._departure_gap_s or 0.0)

    def retry_after_s(self) -> int:
        """`wait_s` in whole seconds for a Retry-After header, from 1 to 60."""
        return max(1, min(LONGEST_RETRY_S, round(self.wait_s)))
