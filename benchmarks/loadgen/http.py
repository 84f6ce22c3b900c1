"""A small HTTP/1.1 client: one asyncio.Protocol and one httptools parser a connection, kept alive in a pool.

The answer's bytes go to a callback as they are read from the socket, with the time of that read. No task
wakes up between the request and the end of its answer, which is what lets one core time thousands of events
a second without slowing what it measures.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

#: Servers close idle connections (uvicorn after 5 s). One that has rested longer than this is not used again,
#: so that no request meets a connection on its way out.
MAX_IDLE_S = 1.0


class BadUrl(ValueError):
    """The address cannot be used; the message says why."""


class ConnectionFailed(Exception):
    """No connection could be made, or it broke before the answer was complete."""


class BadAnswer(Exception):
    """What came back is not in the form that was asked for."""


class Receiver(Protocol):
    """Takes one answer. Called from the event loop; must not block."""

    def head(self, status: int, headers: dict[str, str]) -> None:
        """Status and headers, names in lower case."""

    def data(self, chunk: bytes, at_s: float) -> None:
        """A part of the body and when it was read (`time.perf_counter`)."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the endpoint is: `path` is what precedes `/v1/…`."""

    host: str
    port: int
    path: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """Accepts `http(s)://host[:port][/path]`, with or without `/v1`. Raises BadUrl."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BadUrl(f"{url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadUrl(f"{url!r} is not http://host:port or https://host:port")
        if parts.username is not None or parts.query or parts.fragment:
            raise BadUrl("user, password, query and fragment are not allowed; a key goes into OPENAI_API_KEY")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), path, tls)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"


@dataclass(slots=True)
class JsonAnswer:
    """A Receiver that keeps the whole body."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def data(self, chunk: bytes, at_s: float) -> None:
        self.body += chunk


class HttpClient:
    """Sends requests to one address. Connections are opened as needed, used again, closed by `close`."""

    def __init__(self, address: Address, api_key: str = "") -> None:
        self.address = address
        self._tls = ssl.create_default_context() if address.tls else None
        authority = str(address).split("/")[2]
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {authority}\r\nAccept: */*\r\n{authorization}".encode()
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def exchange(self, method: str, path: str, body: bytes, receiver: Receiver) -> None:
        """Send one request and hand its answer to `receiver`; returns at the answer's end.

        Raises ConnectionFailed or BadAnswer. Cancelled: the connection is closed at once, which is how a
        server learns that its client has gone.
        """
        connection = await self._connection()
        head = b"%s %s HTTP/1.1\r\n%s" % (method.encode(), (self.address.path + path).encode(), self._headers)
        if body:
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        try:
            reusable = await connection.exchange(head + b"\r\n" + body, receiver)
        except BaseException:
            connection.abort()
            raise
        if reusable:
            connection.idle_since_s = time.perf_counter()
            self._idle.append(connection)
        else:
            connection.abort()

    async def get(self, path: str) -> JsonAnswer:
        """GET `path`. Raises ConnectionFailed or BadAnswer."""
        answer = JsonAnswer()
        await self.exchange("GET", path, b"", answer)
        return answer

    def close(self) -> None:
        for connection in list(self._open):
            connection.abort()

    async def _connection(self) -> _Connection:
        oldest_s = time.perf_counter() - MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since_s >= oldest_s and connection in self._open:
                return connection
            connection.abort()
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._open), self.address.host, self.address.port, ssl=self._tls
            )
        except (OSError, UnicodeError) as error:  # UnicodeError: no name that a resolver could look up
            reason = getattr(error, "strerror", None) or error
            raise ConnectionFailed(f"cannot connect: {reason}") from None
        return connection


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, open_connections: set[_Connection]) -> None:
        self.idle_since_s = 0.0
        self._open = open_connections
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._done: asyncio.Future[bool] | None = None
        self._headers: dict[str, str] = {}
        self._read_at_s = 0.0

    async def exchange(self, request: bytes, receiver: Receiver) -> bool:
        """True if the connection can carry another request."""
        if self._transport is None:
            raise ConnectionFailed("connection closed before the request was sent")
        self._parser = httptools.HttpResponseParser(self)
        self._headers = {}
        self._receiver = receiver
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        finally:
            self._receiver = None
            self._done = None

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._open.add(self)

    def data_received(self, data: bytes) -> None:
        self._read_at_s = time.perf_counter()
        if self._done is None:  # bytes that nobody asked for
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__  # an exception of ours arrives wrapped
            self._finish(cause if isinstance(cause, BadAnswer) else BadAnswer(f"malformed HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._open.discard(self)
        ends_at_close = self._headers and not self._headers.keys() & {"content-length", "transfer-encoding"}
        if ends_at_close and exc is None:
            self._finish(False)
        else:
            self._finish(ConnectionFailed(f"connection lost: {exc or 'closed by the server'}"))

    # ---- httptools ----

    def on_message_begin(self) -> None:
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._receiver is not None and status >= 200:
            self._receiver.head(status, self._headers)

    def on_body(self, body: bytes) -> None:
        if self._receiver is not None:
            self._receiver.data(body, self._read_at_s)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self._finish(self._parser.should_keep_alive())

    def _finish(self, result: bool | Exception) -> None:
        if self._done is None or self._done.done():
            return
        if isinstance(result, bool):
            self._done.set_result(result)
        else:
            self._done.set_exception(result)
