"""Both ends of a channel for tests: recorders behind the true ones, and raw peers that may misbehave."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager

import msgspec

from services.wire.channel import WorkerChannel
from services.wire.channel_server import ChannelServer, bind
from services.wire.framing import encode_frame
from services.wire.handshake import new_nonce, router_proof, worker_proof
from services.wire.limits import ChannelLimits
from services.wire.messages import (
    PROTOCOL_VERSION,
    Auth,
    Challenge,
    Hello,
    ModelCard,
    SamplingParams,
    StepItem,
    TextAssets,
    ToRouter,
    ToWorker,
)

SECRET = b"a secret"
CARD = ModelCard("model", b"f" * 16, b"t" * 16, 1000, 4096, (2,))
HELLO = Hello("w0", 1, b"", CARD, 16, 64, 8, 1e4, 0.01)
TEXT = TextAssets(b"{}", "template")


class Handler:
    """Records what routers ask for; `fail` is raised by the next submit."""

    def __init__(self) -> None:
        self.submitted = []  # (stream, message)
        self.cancelled = []  # streams
        self.fail: Exception | None = None

    def submit(self, stream, message):
        if self.fail:
            raise self.fail
        self.submitted.append((stream, message))

    def cancel(self, stream):
        self.cancelled.append(stream)


class Listener:
    """Records what a router hears, as (what, value)."""

    def __init__(self) -> None:
        self.heard = []

    def __getattr__(self, what):
        return lambda value: self.heard.append((what, value))

    def what(self):
        return [what for what, _ in self.heard]

    def of(self, wanted):
        return [value for what, value in self.heard if what == wanted]


@asynccontextmanager
async def served(secret=SECRET, limits=None, hello=HELLO, port=0):
    """A listening ChannelServer; `.port` and `.handler` are set on it."""
    server = ChannelServer(hello, TEXT, Handler(), secret, limits)
    sock = bind("127.0.0.1", port, secret)
    server.port = sock.getsockname()[1]
    await server.serve(sock)
    try:
        yield server
    finally:
        await server.close(timeout_s=1)


@asynccontextmanager
async def connected(port, secret=SECRET, limits=None, host="127.0.0.1"):
    """A running WorkerChannel; `.listener` is set on it. Not waited for."""
    listener = Listener()
    channel = WorkerChannel(
        host,
        port,
        secret=secret,
        router_id="r0",
        listener=listener,
        limits=limits or ChannelLimits(),
        random_part=lambda: 0.1,
    )
    channel.listener = listener
    task = asyncio.create_task(channel.run())
    try:
        yield channel
    finally:
        task.cancel()
        await asyncio.wait([task])


def submit(channel, sink, **fields):
    """Submit a small request."""
    request = {
        "tokens": b"\1\0\0\0",
        "root": b"r" * 16,
        "hashes": b"",
        "sampling": SamplingParams(max_tokens=5),
    }
    return channel.submit(sink, **request | fields)


def publish(server, *items, stored=None, removed=None, stats=None):
    """One engine step: items are (stream, tokens) or (stream, tokens, finish)."""
    step = [
        (stream, StepItem(stream.request, tuple(tokens), finish=finish[0] if finish else None))
        for stream, tokens, *finish in items
    ]
    server.publish(step, stored or {}, removed or {}, stats)


class RawPeer:
    """One end of a TCP connection that sends and reads frames, or whatever bytes it is told to."""

    def __init__(self, reader, writer, union) -> None:
        self.reader = reader
        self.writer = writer
        self._decode = msgspec.msgpack.Decoder(union).decode

    @classmethod
    async def router(cls, port):
        return cls(*await asyncio.open_connection("127.0.0.1", port), ToRouter)

    def send(self, message) -> None:
        self.writer.write(message if isinstance(message, bytes) else encode_frame(message))

    async def receive(self):
        """The next message; None at the end of the connection."""
        try:
            async with asyncio.timeout(5):
                (length,) = struct.unpack("<I", await self.reader.readexactly(4))
                return self._decode(await self.reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def authenticate(self, secret=SECRET, protocol=PROTOCOL_VERSION):
        """Play the router's handshake and return the worker's answer."""
        challenge = await self.receive()
        nonce = new_nonce()
        proof = router_proof(secret, challenge.nonce, nonce)
        self.send(Auth(protocol, "raw", nonce, proof))
        return await self.receive()

    async def accept(self, secret=SECRET, protocol=PROTOCOL_VERSION, hello=HELLO):
        """Play the worker's handshake up to Hello."""
        nonce = new_nonce()
        self.send(Challenge(protocol, hello.worker_id, nonce))
        auth = await self.receive()
        if auth is not None:
            proof = worker_proof(secret, auth.nonce, nonce)
            self.send(msgspec.structs.replace(hello, proof=proof))
        return auth

    def close(self) -> None:
        self.writer.close()


@asynccontextmanager
async def raw_worker(play):
    """A server that plays `await play(RawPeer)` for every connection. Yields its port."""
    tasks = set()

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            await play(RawPeer(reader, writer, ToWorker))
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
