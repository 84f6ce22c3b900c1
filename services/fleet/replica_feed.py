"""Where Ray Serve's news of replicas reaches the fleets of this process.

Serve builds our request router (`replica_observer`) itself, from a pickle of its class, in a thread of its
own and without a reference to anything of ours. A module is the only place where the two can meet; hence the
one process-wide object of this package.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from services.fleet.base import Address

#: What a replica's `record_replica_metadata` must say.
HOST, PORT = "host", "port"

Listener = Callable[[frozenset[Address]], None]

logger = logging.getLogger(__name__)


class ReplicaFeed:
    """The replicas of each deployment, named (app, deployment), and who wants to hear of them.

    Thread-safe: Serve publishes from its router thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._addresses: dict[tuple[str, str], frozenset[Address]] = {}
        self._listeners: dict[tuple[str, str], list[Listener]] = {}

    def publish(self, deployment: tuple[str, str], replicas: Iterable[Mapping[str, Any]]) -> None:
        """`replicas`: the metadata of every running replica. Calls listeners on the caller's thread."""
        addresses = set()
        for metadata in replicas:
            host, port = metadata.get(HOST), metadata.get(PORT)
            if isinstance(host, str) and isinstance(port, int):
                addresses.add(Address(host, port))
            else:
                logger.error("a replica of %s publishes no host and port: %s", "/".join(deployment), metadata)
        with self._lock:
            self._addresses[deployment] = frozenset(addresses)
            for listener in self._listeners.get(deployment, ()):
                listener(self._addresses[deployment])

    def subscribe(self, deployment: tuple[str, str], listener: Listener) -> None:
        """Call `listener` at once with what is known, if anything is, and again after every change."""
        with self._lock:
            self._listeners.setdefault(deployment, []).append(listener)
            if deployment in self._addresses:
                listener(self._addresses[deployment])

    def unsubscribe(self, deployment: tuple[str, str], listener: Listener) -> None:
        with self._lock:
            self._listeners[deployment].remove(listener)


FEED = ReplicaFeed()
