"""Connections to one server, used again: as many as there are calls at a time, and none after `close`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from services.cache_store.address import Address
from services.cache_store.connection import PayloadConnection

_Result = TypeVar("_Result")


class ConnectionPool:
    """Thread-safe. Who calls bounds how many connections there are (see lanes.py)."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._idle: list[PayloadConnection] = []
        self._busy: set[PayloadConnection] = set()
        self._closed = False

    def run(self, call: Callable[[PayloadConnection], _Result]) -> _Result:
        """`call` with a connection that is nobody else's meanwhile.

        A connection that fails is closed. If it had been idle the server may have closed it long ago, so
        `call` is then made once more, with a new one. Raises what `call` raises, and OSError or RedisError
        when there is no connection to be had.
        """
        connection = self._take_idle()
        if connection is not None:
            try:
                return self._use(connection, call)
            except ConnectionError:
                pass
        return self._use(self._connect(), call)

    def close(self) -> None:
        """Close all connections; calls under way fail with OSError."""
        with self._lock:
            self._closed = True
            for connection in self._busy:
                connection.interrupt()
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def open(self) -> tuple[int, int]:
        """How many connections are (busy, idle)."""
        with self._lock:
            return len(self._busy), len(self._idle)

    def _use(self, connection: PayloadConnection, call: Callable[[PayloadConnection], _Result]) -> _Result:
        try:
            result = call(connection)
        except BaseException:
            with self._lock:
                self._busy.discard(connection)
            connection.close()
            raise
        with self._lock:
            self._busy.discard(connection)
            if not self._closed:
                self._idle.append(connection)
                return result
        connection.close()
        return result

    def _take_idle(self) -> PayloadConnection | None:
        with self._lock:
            if not self._idle:
                return None
            connection = self._idle.pop()
            self._busy.add(connection)
            return connection

    def _connect(self) -> PayloadConnection:
        with self._lock:
            self._check_open()
        connection = PayloadConnection(self._address, self._timeout_s)
        with self._lock:
            if not self._closed:
                self._busy.add(connection)
                return connection
        connection.close()
        raise ConnectionAbortedError("the store's client is closed")

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("the store's client is closed")
