"""The worker's end of the token channel: many routers, one frame an engine step to each.

`ChannelServer` owns the listening socket, the connections and the account of held blocks. What requests mean
is the business of its `RequestHandler`; what a step did comes in through `publish`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import msgspec

from services.wire.framing import (
    HANDSHAKE_FRAME_BYTES,
    TO_WORKER_FRAME_BYTES,
    FrameError,
    FrameReader,
    encode_frame,
)
from services.wire.handshake import (
    HandshakeError,
    check_bind,
    check_peer,
    check_proof,
    new_nonce,
    router_proof,
    worker_proof,
)
from services.wire.held import HeldBlocks
from services.wire.limits import ChannelLimits, watch_for_dead_host
from services.wire.messages import (
    PROTOCOL_VERSION,
    Auth,
    Cancel,
    Challenge,
    Drain,
    ErrorKind,
    Finish,
    Hello,
    Refused,
    SnapshotRequest,
    Stats,
    Step,
    StepItem,
    Submit,
    TextAssets,
    TextAssetsRequest,
    Tier,
    ToWorker,
)

log = logging.getLogger(__name__)

_decode = msgspec.msgpack.Decoder(ToWorker).decode


@dataclass(eq=False, slots=True)
class Stream:
    """One live request of one router, compared by identity: the engine's key for it."""

    connection: RouterConnection | None  # None once nobody waits for its tokens any more
    request: int


class SubmitError(Exception):
    """The worker does not take this request; the router is told why."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RequestHandler(Protocol):
    """What the server does with requests. Called in the event loop; must not block."""

    def submit(self, stream: Stream, message: Submit) -> None:
        """Serve it: its StepItems go to `ChannelServer.publish`. Raises SubmitError."""

    def cancel(self, stream: Stream) -> None:
        """Nobody waits for `stream` any more."""


def bind(host: str, port: int, secret: bytes) -> socket.socket:
    """A bound socket that does not listen yet, so that a taken port is known before a model is loaded.

    Raises ValueError when `host` is not loopback and there is no secret, OSError when it cannot be bound.
    """
    check_bind(host, secret)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return sock


class ChannelServer:
    """Serves routers on one socket. All methods belong to the event loop's thread.

    `hello` is what every router is told; its `proof` is filled in for each.
    """

    def __init__(
        self,
        hello: Hello,
        text: TextAssets,
        handler: RequestHandler,
        secret: bytes,
        limits: ChannelLimits | None = None,
    ) -> None:
        self.hello = hello
        self.handler = handler
        self.secret = secret
        self.limits = limits or ChannelLimits()
        self.held = HeldBlocks()
        self.connections: set[RouterConnection] = set()  # authenticated ones
        self.text_frame = encode_frame(text)
        self.drain_frame = b""  # sent to routers that come during a drain
        self._pending: set[RouterConnection] = set()  # not authenticated yet
        self._server: asyncio.Server | None = None

    async def serve(self, sock: socket.socket) -> None:
        """Listen on a bound socket. Returns once routers can connect. Raises OSError when another process
        that bound the same port listens by now."""
        try:
            sock.listen()  # the loop would do it, but uvloop keeps the error to itself
        except OSError as error:
            host, port = sock.getsockname()[:2]
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: RouterConnection(self), sock=sock)

    def publish(
        self,
        items: Iterable[tuple[Stream, StepItem]],
        stored: Mapping[Tier, Collection[bytes]],
        removed: Mapping[Tier, Collection[bytes]],
        stats: Stats | None,
    ) -> None:
        """Send what one engine step did: to every router its streams, to all of them blocks and load."""
        for stream, item in items:
            connection = stream.connection
            if connection is not None:
                connection.add(stream, item)
        events = self.held.apply(stored, removed)
        news = encode_frame(events) if events else b""
        if stats is not None:
            news += encode_frame(stats)
        for connection in list(self.connections):
            connection.flush(news)

    def drain(self, reason: str) -> None:
        """Ask every router, also those still to come, for no new requests."""
        self.drain_frame = encode_frame(Drain(reason))
        for connection in list(self.connections):
            connection.write(self.drain_frame)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Stop listening, let the routers take what is written for them, and break off after `timeout_s`."""
        if self._server:
            self._server.close()
        connections = self.connections | self._pending
        for connection in connections:
            connection.close()
        lost = [connection.lost for connection in connections]
        if lost:
            await asyncio.wait(lost, timeout=timeout_s)
        for connection in connections:
            connection.abort()

    def arrived(self, connection: RouterConnection) -> None:
        self._pending.add(connection)

    def accepted(self, connection: RouterConnection) -> None:
        self._pending.discard(connection)
        self.connections.add(connection)

    def left(self, connection: RouterConnection) -> None:
        self._pending.discard(connection)
        self.connections.discard(connection)


class RouterConnection(asyncio.Protocol):
    """One router. Its request numbers are its own; its streams end with it."""

    lost: asyncio.Future[None]

    def __init__(self, server: ChannelServer) -> None:
        self.peer = "router"
        self._server = server
        self._limits = server.limits
        self._reader = FrameReader(HANDSHAKE_FRAME_BYTES)
        self._nonce = new_nonce()
        self._streams: dict[int, Stream] = {}
        self._items: list[StepItem] = []
        self._authenticated = False
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None

    # ---- transport -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self.lost = self._loop.create_future()
        peer = transport.get_extra_info("peername") or ("?", 0)  # None when it has gone again already
        self._address = "{}:{}".format(*peer[:2])
        self.peer = f"router at {self._address}"
        watch_for_dead_host(transport, self._limits.silence_s)
        self._server.arrived(self)
        self._timer = self._loop.call_later(
            self._limits.handshake_s, self.refuse, f"no Auth within {self._limits.handshake_s:g} s"
        )
        self.write(encode_frame(Challenge(PROTOCOL_VERSION, self._server.hello.worker_id, self._nonce)))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                if self._transport.is_closing():
                    return
                self._received(_decode(body))
        except (FrameError, HandshakeError, msgspec.DecodeError, RecursionError) as error:
            self.refuse(str(error))

    def pause_writing(self) -> None:
        self._paused = True
        if self._authenticated and not self._transport.is_closing():
            self._timer = self._loop.call_later(
                self._limits.silence_s, self._drop, f"behind for {self._limits.silence_s:g} s"
            )

    def resume_writing(self) -> None:
        self._paused = False
        if self._authenticated and not self._transport.is_closing():
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        if not self.lost.done():
            self.lost.set_result(None)

    # ---- reading ---------------------------------------------------------------------------------

    def _received(self, message: ToWorker) -> None:
        if isinstance(message, Auth):
            self._auth(message)
        elif not self._authenticated:
            raise FrameError(f"{type(message).__name__} before Auth")
        elif isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            if stream := self._streams.pop(message.request, None):  # unknown: it has just finished
                stream.connection = None
                self._server.handler.cancel(stream)
        elif isinstance(message, SnapshotRequest):
            self.write(encode_frame(self._server.held.snapshot()))
        elif isinstance(message, TextAssetsRequest):
            self.write(self._server.text_frame)

    def _auth(self, auth: Auth) -> None:
        if self._authenticated:
            raise FrameError("a second Auth")
        server = self._server
        name = f"router {auth.router_id[:100]!r}"
        self.peer = f"{name} at {self._address}"
        check_peer(name, auth.protocol, auth.nonce)
        check_proof(name, auth.proof, router_proof(server.secret, self._nonce, auth.nonce))
        self._stop_timer()
        self._authenticated = True
        self._reader.max_frame_bytes = TO_WORKER_FRAME_BYTES
        proof = worker_proof(server.secret, auth.nonce, self._nonce)
        server.accepted(self)
        self.write(encode_frame(msgspec.structs.replace(server.hello, proof=proof)) + server.drain_frame)
        log.info("%s connected", self.peer)

    def _submit(self, message: Submit) -> None:
        request = message.request
        if request in self._streams:
            raise FrameError(f"request {request} submitted twice")
        stream = self._streams[request] = Stream(self, request)
        try:
            self._server.handler.submit(stream, message)
        except SubmitError as error:
            finish = Finish("error", message=str(error), error_kind=error.kind)
        except Exception as error:
            log.exception("could not submit request %d of %s", request, self.peer)
            finish = Finish("error", message=f"worker failed to take the request: {error}")
        else:
            return
        self.add(stream, StepItem(request, finish=finish))
        self.flush(b"")

    # ---- writing ---------------------------------------------------------------------------------

    def add(self, stream: Stream, item: StepItem) -> None:
        """Put `item` into the frame that the next `flush` sends."""
        self._items.append(item)
        if item.finish is not None:
            stream.connection = None
            del self._streams[stream.request]

    def flush(self, news: bytes) -> None:
        """Send the collected items and the encoded events and stats in one piece."""
        if self._items:
            news = encode_frame(Step(self._items)) + news
            self._items = []
        if news:
            self.write(news)

    def write(self, data: bytes) -> None:
        self._transport.write(data)
        if self._paused:
            waiting = self._transport.get_write_buffer_size()
            if waiting > self._limits.max_buffered_bytes:
                self._drop(f"{waiting} bytes wait for it, the limit is {self._limits.max_buffered_bytes}")

    # ---- ending ----------------------------------------------------------------------------------

    def refuse(self, reason: str) -> None:
        """Tell the router what is wrong with it and close."""
        log.warning("%s refused: %s", self.peer, reason)
        self.write(encode_frame(Refused(reason)))
        self.close()
        # A peer that does not read must not keep the connection by it.
        self._timer = self._loop.call_later(self._limits.handshake_s, self.abort)

    def close(self) -> None:
        """Close when what is written has been taken; its streams end now."""
        self._end()
        self._transport.close()

    def abort(self) -> None:
        self._end()
        self._transport.abort()

    def _drop(self, reason: str) -> None:
        log.warning("%s dropped: %s", self.peer, reason)
        self.abort()

    def _end(self) -> None:
        self._stop_timer()
        self._server.left(self)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.connection = None
            self._server.handler.cancel(stream)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
