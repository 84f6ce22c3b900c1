"""One TCP connection from a router to a worker: handshake, then frames handed to sinks and listener."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, cast

import msgspec

from services.wire.framing import (
    HANDSHAKE_FRAME_BYTES,
    TO_ROUTER_FRAME_BYTES,
    FrameError,
    FrameReader,
    encode_frame,
)
from services.wire.handshake import (
    HandshakeError,
    check_peer,
    check_proof,
    new_nonce,
    router_proof,
    worker_proof,
)
from services.wire.limits import watch_for_dead_host
from services.wire.messages import (
    PROTOCOL_VERSION,
    Auth,
    Cancel,
    Challenge,
    Drain,
    Events,
    Finish,
    Hello,
    Refused,
    Snapshot,
    SnapshotRequest,
    Stats,
    Step,
    StepItem,
    TextAssets,
    TextAssetsRequest,
    ToRouter,
)

log = logging.getLogger(__name__)

_decode = msgspec.msgpack.Decoder(ToRouter).decode

#: Called with every item of one request, the last one carrying `finish`.
Sink = Callable[[StepItem], None]


class WorkerListener(Protocol):
    """What a router hears of a worker besides tokens. Called in the event loop; must not block.

    `connected` comes first, and again after every `lost`. From then until `snapshot` nothing is known of the
    worker's blocks; events in between are part of the snapshot and are not reported.
    """

    def connected(self, hello: Hello) -> None: ...

    def lost(self, reason: str) -> None:
        """The connection broke. Called before the live sinks get their `worker_lost`."""

    def snapshot(self, snapshot: Snapshot) -> None:
        """Replaces all that was known of the worker's blocks."""

    def events(self, events: Events) -> None:
        """A change that follows directly on what is known."""

    def stats(self, stats: Stats) -> None: ...

    def draining(self, reason: str) -> None:
        """No new requests please; `lost` follows when the running ones are done."""


class WorkerConnection(asyncio.Protocol):
    """Lives from connect to loss; `WorkerChannel` makes a new one for every attempt.

    `ready` becomes None when the worker accepted us, else the reason why it will not. `lost` is done when the
    connection is over, `reason` says why.
    """

    def __init__(self, secret: bytes, router_id: str, silence_s: float, listener: WorkerListener) -> None:
        self.ready: asyncio.Future[HandshakeError | None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reason = ""
        self.reads = 0  # grows while the worker speaks
        self.hello: Hello | None = None  # None until the worker accepted us, and again once it is lost
        self.sinks: dict[int, Sink] = {}
        self._secret = secret
        self._router_id = router_id
        self._silence_s = silence_s
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader(HANDSHAKE_FRAME_BYTES)
        self._nonce = new_nonce()
        self._worker_nonce = b""
        self._seq: int | None = None  # last event applied; None while a snapshot is on its way
        self._text: asyncio.Future[TextAssets | None] | None = None

    # ---- transport -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        watch_for_dead_host(transport, self._silence_s)

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        try:
            for body in self._reader.feed(data):
                if self.lost.done():
                    return
                self._received(_decode(body))
        except HandshakeError as error:
            self.abort(str(error))
        except (FrameError, msgspec.DecodeError, RecursionError) as error:
            self.abort(f"not a worker of this protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(str(exc) if exc else "connection closed by the worker")

    def waiting_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport else 0

    def write(self, message: msgspec.Struct) -> None:
        self.write_frame(encode_frame(message))

    def write_frame(self, frame: bytes) -> None:
        if self._transport and not self.lost.done():
            self._transport.write(frame)

    def abort(self, reason: str) -> None:
        """Break the connection now. The first reason given stays."""
        self._end(reason)
        if self._transport:
            self._transport.abort()

    # ---- reading ---------------------------------------------------------------------------------

    def _received(self, message: ToRouter) -> None:
        if isinstance(message, Step):
            self._step(message)
        elif isinstance(message, Challenge):
            self._challenge(message)
        elif isinstance(message, Hello):
            self._hello(message)
        elif isinstance(message, Refused):
            raise HandshakeError(f"refused by the worker: {message.reason}")
        elif self.hello is None:
            raise FrameError(f"{type(message).__name__} before Hello")
        elif isinstance(message, Stats):
            self._listener.stats(message)
        elif isinstance(message, Events):
            self._events(message)
        elif isinstance(message, Snapshot):
            self._seq = message.seq
            self._listener.snapshot(message)
        elif isinstance(message, Drain):
            self._listener.draining(message.reason)
        elif isinstance(message, TextAssets) and self._text:
            self._text.set_result(message)
            self._text = None

    def _step(self, step: Step) -> None:
        sinks = self.sinks
        for item in step.items:
            sink = sinks.get(item.request)
            if sink is None:
                continue  # cancelled while this was on its way
            if item.finish is not None:
                del sinks[item.request]
            try:
                sink(item)
            except Exception:
                log.exception("the sink of request %d failed", item.request)
                self.cancel(item.request)

    def _challenge(self, challenge: Challenge) -> None:
        if self._worker_nonce:
            raise FrameError("a second Challenge")
        check_peer(f"worker {challenge.worker_id[:100]!r}", challenge.protocol, challenge.nonce)
        self._worker_nonce = challenge.nonce
        proof = router_proof(self._secret, challenge.nonce, self._nonce)
        self.write(Auth(PROTOCOL_VERSION, self._router_id, self._nonce, proof))

    def _hello(self, hello: Hello) -> None:
        if not self._worker_nonce or self.hello:
            raise FrameError("a Hello out of turn")
        peer = f"worker {hello.worker_id[:100]!r}"
        check_proof(peer, hello.proof, worker_proof(self._secret, self._nonce, self._worker_nonce))
        if self.ready.done():
            return  # the caller's time was up
        self.hello = hello
        self._reader.max_frame_bytes = TO_ROUTER_FRAME_BYTES
        self.ready.set_result(None)
        self._listener.connected(hello)
        self.write(SnapshotRequest())

    def _events(self, events: Events) -> None:
        if self._seq is None or events.seq <= self._seq:
            return  # part of the snapshot that comes or came
        if events.seq > self._seq + 1:
            log.warning("events %d to %d are missing", self._seq + 1, events.seq - 1)
            self._seq = None
            self.write(SnapshotRequest())
            return
        self._seq = events.seq
        self._listener.events(events)

    # ---- requests --------------------------------------------------------------------------------

    def cancel(self, request: int) -> None:
        """Forget a request and tell the worker, unless it has finished."""
        if self.sinks.pop(request, None):
            self.write(Cancel(request))

    async def text_assets(self) -> TextAssets | None:
        """The tokenizer and template; None when the connection broke. Concurrent callers share an answer."""
        if self._text is None:
            self._text = asyncio.get_running_loop().create_future()
            self.write(TextAssetsRequest())
        return await asyncio.shield(self._text)

    # ---- the end ---------------------------------------------------------------------------------

    def _end(self, reason: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(None)
        self.reason = reason
        if not self.ready.done():  # it is cancelled when the caller's time was up
            self.ready.set_result(HandshakeError(reason))
        if self.hello:
            self.hello = None
            self._listener.lost(reason)
        if self._text:
            self._text.set_result(None)
        finish = Finish("error", message=f"worker lost: {reason}", error_kind="worker_lost")
        self._step(Step([StepItem(request, finish=finish) for request in self.sinks]))
