"""The HTTP server: uvicorn's, with deadlines for clients that send or take nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.router.router import Router

#: From a request's first byte to the end of its head.
HEAD_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 64 * 1024

#: A client whose receive window has been closed for so long is cut off.
WRITE_TIMEOUT_S = 30.0

#: A connection without a request is closed, at its beginning as well as between requests.
KEEP_ALIVE_S = 75


class _Protocol(HttpToolsProtocol):
    """One connection. uvicorn bounds neither the time nor the size of a request's head, nor how long a
    client may send nothing at first or read nothing later."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        self._client_reads()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_deadline is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_deadline is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head(431, f"The request's head exceeds {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        message = f"The request's head did not arrive within {HEAD_TIMEOUT_S:g} s."
        self._head_deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse_head, 408, message)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_there()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._client_reads()
        super().resume_writing()

    def _head_is_there(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _client_reads(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _refuse_head(self, status: int, message: str) -> None:
        self._head_is_there()
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and not self.transport.is_closing():
            head = f"HTTP/1.1 {status} Bad Request\r\nconnection: close\r\ncontent-length: {len(message)}\r\n"
            self.transport.write(f"{head}content-type: text/plain\r\n\r\n{message}".encode())
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves a router until `should_exit` is set: then accepts no more, lets streams finish until the
    deadline, and ends the rest with an error event. Signals are left to the caller."""

    def __init__(self, router: Router, drain_timeout_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                router,
                http=_Protocol,
                interface="asgi3",
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                backlog=2048,
            )
        )
        self._router = router
        self._drain_timeout_s = drain_timeout_s

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn would raise them again after a graceful end, which turns exit code 0 into a death."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once `should_exit` is set."""
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(self._drain_timeout_s, self._router.abort, "the router is shutting down")
        await super().shutdown(sockets)
        deadline.cancel()
