"""The router's end of the token channel: a worker, connected to for as long as it is wanted.

    channel = WorkerChannel(host, port, secret=…, router_id=…, listener=…)
    task = asyncio.create_task(channel.run())          # connects and reconnects; cancel it to stop
    request = channel.submit(sink, tokens=…, root=…, hashes=…, sampling=…)

A sink is called in the event loop with every StepItem of its request until one carries a `finish`: exactly
one does, whatever happens to the worker, unless the request is cancelled first.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from services.wire.framing import encode_frame
from services.wire.handshake import HandshakeError
from services.wire.limits import ChannelLimits
from services.wire.messages import Hello, Retention, SamplingParams, Submit, TextAssets
from services.wire.worker_connection import Sink, WorkerConnection, WorkerListener

__all__ = ["ChannelLimits", "Sink", "WorkerChannel", "WorkerListener", "WorkerUnavailable"]

log = logging.getLogger(__name__)

#: The n-th pause between attempts is a random part of 0.1 s · 2ⁿ, at most 2 s: a restarted worker is found
#: at once, and a hundred routers do not knock in step.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0

#: Looks for a sign of life this often within `silence_s`. Counting looks instead of measuring time keeps a
#: router whose own loop stood still from taking all its workers for dead.
LOOKS_FOR_LIFE = 5


class WorkerUnavailable(Exception):
    """There is no connection to this worker, or it does not read what it is sent."""


class WorkerChannel:
    """One worker as one router sees it. All methods belong to the event loop's thread."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        secret: bytes,
        router_id: str,
        listener: WorkerListener,
        limits: ChannelLimits | None = None,
        random_part: Callable[[], float] = random.random,
    ) -> None:
        self.host = host
        self.port = port
        self.last_error = "not connected yet"
        self._secret = secret
        self._router_id = router_id
        self._listener = listener
        self._limits = limits or ChannelLimits()
        self._random_part = random_part
        self._connection: WorkerConnection | None = None
        self._last_request = 0  # numbers are never reused, not even on a new connection

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def hello(self) -> Hello | None:
        """What the worker said of itself; None while there is no connection."""
        return self._connection.hello if self._connection else None

    @property
    def live_requests(self) -> int:
        return len(self._connection.sinks) if self._connection else 0

    async def run(self) -> None:
        """Keep a connection until cancelled; every reason for being without one is logged once."""
        pause_s = FIRST_PAUSE_S
        while True:
            connection = WorkerConnection(
                self._secret, self._router_id, self._limits.silence_s, self._listener
            )
            self._connection = connection
            try:
                await self._connect(connection)
                pause_s = FIRST_PAUSE_S
                self.last_error = ""
                await self._watch(connection)
            except (OSError, UnicodeError, HandshakeError) as error:  # UnicodeError: no possible host name
                connection.abort(str(error))
            finally:
                connection.abort("the router closed the channel")
            if connection.reason != self.last_error:
                log.warning("worker %s: %s", self, connection.reason)
                self.last_error = connection.reason
            await asyncio.sleep(pause_s * self._random_part())
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _connect(self, connection: WorkerConnection) -> None:
        """Raises OSError or HandshakeError saying why there is no connection."""
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                await asyncio.get_running_loop().create_connection(lambda: connection, self.host, self.port)
                error = await connection.ready
        except TimeoutError:
            raise HandshakeError(f"no answer within {self._limits.handshake_s:g} s") from None
        if error:
            raise error

    async def _watch(self, connection: WorkerConnection) -> None:
        """Wait until the connection is over; end it when the worker has fallen silent."""
        silent_looks = 0
        while silent_looks < LOOKS_FOR_LIFE:
            reads = connection.reads
            over, _ = await asyncio.wait([connection.lost], timeout=self._limits.silence_s / LOOKS_FOR_LIFE)
            if over:
                return
            silent_looks = silent_looks + 1 if connection.reads == reads else 0
        connection.abort(f"silent for {self._limits.silence_s:g} s")

    def submit(
        self,
        sink: Sink,
        *,
        tokens: bytes,
        root: bytes,
        hashes: bytes,
        sampling: SamplingParams,
        retention: tuple[Retention, ...] = (),
        priority: int = 0,
        tenant: str = "",
        trace_id: str = "",
        generated: int = 0,
    ) -> int:
        """Send a request (fields as in `messages.Submit`) and return its number.

        Raises WorkerUnavailable when there is no connection or the worker does not read; the sink is then
        never called.
        """
        connection = self._open_connection()
        request = self._last_request + 1
        frame = encode_frame(
            Submit(request, tokens, root, hashes, sampling, retention, priority, tenant, trace_id, generated)
        )
        waiting = connection.waiting_bytes()
        if waiting + len(frame) > self._limits.max_buffered_bytes:
            raise WorkerUnavailable(f"worker {self} does not read: {waiting} bytes wait for it")
        self._last_request = request
        connection.sinks[request] = sink
        connection.write_frame(frame)
        return request

    def cancel(self, request: int) -> None:
        """Forget `request`: its sink is not called again. Finished and unknown numbers are fine."""
        if self._connection:
            self._connection.cancel(request)

    async def text_assets(self) -> TextAssets:
        """The worker's tokenizer and chat template. Raises WorkerUnavailable when the connection breaks."""
        text = await self._open_connection().text_assets()
        if text is None:
            raise WorkerUnavailable(f"worker {self}: connection lost while it sent its tokenizer")
        return text

    def _open_connection(self) -> WorkerConnection:
        if self._connection is None or self._connection.hello is None:
            reason = self._connection.reason if self._connection else ""
            raise WorkerUnavailable(f"worker {self} is not connected: {reason or self.last_error}")
        return self._connection
