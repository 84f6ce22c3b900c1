"""Workers as a test runs them: the real client, one command to the server at a time, killed between any two.

Each worker is a thread that waits before every command until the test lets it go on. A killed one sends
nothing more, as after kill -9: no abort, no release, no goodbye. The server's clock is the test's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from services.cache_store.client import BlockStore
from services.cache_store.connection import Buffer, PayloadConnection
from services.cache_store.frames import FrameFormat
from services.cache_store.functions import StoreFunctions
from tests.cache_store.harness import TURNABLE

_Result = TypeVar("_Result")
_TIMEOUT_S = 20.0


class _Killed(BaseException):
    """Not an Exception: the client handles those."""


class Worker:
    """`work` with a client of its own. The test calls `step` and `kill`, and reads `result` at the end."""

    def __init__(
        self, url: str, format: FrameFormat, capacity: int, work: Callable[[BlockStore], object]
    ) -> None:
        self.result: Any = None
        self.commands = 0
        self._work = work
        self._killed = self._ended = False
        self._error: Exception | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._store = BlockStore(url, format, capacity=capacity, timeout_s=_TIMEOUT_S)
        self._store._functions = StoreFunctions(self._store._redis, source=TURNABLE)
        self._between_commands(self._store)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def step(self) -> None:
        """Let one command through."""
        if not self.done:
            self._go.release()
            self._wait()

    def finish(self) -> None:
        while not self.done:
            self.step()

    def kill(self) -> None:
        """Before its next command."""
        self._killed = True
        self.step()
        self._store.close()
        assert self.done

    def _wait(self) -> None:
        assert self._waits.acquire(timeout=_TIMEOUT_S), "neither a command nor the end"
        if self._ended:
            self._thread.join(_TIMEOUT_S)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._gate()
            self.result = self._work(self._store)
        except _Killed:
            pass
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._waits.release()

    def _gate(self) -> None:
        if self._killed:
            raise _Killed
        self._waits.release()
        self._go.acquire()
        if self._killed:
            raise _Killed
        self.commands += 1

    def _between_commands(self, store: BlockStore) -> None:
        ask, run = store._redis.execute_command, store._pool.run

        def gated_ask(*words: Any, **options: Any) -> Any:
            self._gate()
            return ask(*words, **options)

        def gated_run(call: Callable[[PayloadConnection], _Result]) -> _Result:
            return run(lambda connection: call(_GatedConnection(connection, self._gate)))  # type: ignore[arg-type]

        store._redis.execute_command = gated_ask  # type: ignore[method-assign]
        store._pool.run = gated_run  # type: ignore[method-assign]


class _GatedConnection:
    """A connection that sends what it is given in pieces as small as its user makes them."""

    def __init__(self, connection: PayloadConnection, gate: Callable[[], None]) -> None:
        self._connection = connection
        self._gate = gate

    def send(self, buffers: Sequence[Buffer]) -> None:
        self._gate()
        self._connection.send(buffers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)
