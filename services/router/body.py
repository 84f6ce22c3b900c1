"""Reading a request's body, within bounds of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from services.router.api.errors import ApiError, invalid
from services.router.relay import ClientGone

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

#: So much of a refused body is still read: a client that is cut off while it writes never sees the answer.
DISCARD_BYTES = 64 * 1024 * 1024


async def read_json_body(
    headers: Mapping[bytes, bytes], receive: Receive, max_bytes: int, timeout_s: float
) -> bytes:
    """The whole body. Raises ApiError: 415 for another media type than JSON, 413 above `max_bytes`, 408
    after `timeout_s`; ClientGone when the client left."""
    body = _Body(receive)
    try:
        async with asyncio.timeout(timeout_s):
            refusal = _refuse_unread(headers, max_bytes)
            if refusal is None:
                data = await body.read(max_bytes)
                if len(data) <= max_bytes:
                    return data
                refusal = _too_large(max_bytes)
            if b"expect" not in headers:  # else the client waits for our word before it sends anything
                await body.discard()
            raise refusal
    except TimeoutError:
        raise _closing(408, f"the body did not arrive within {timeout_s:g} s") from None


class _Body:
    """The body's parts as the server hands them out."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._more = True

    async def read(self, max_bytes: int) -> bytes:
        """All of it, or more than `max_bytes` of it."""
        parts: list[bytes] = []
        size = 0
        while self._more and size <= max_bytes:
            parts.append(await self._next())
            size += len(parts[-1])
        return b"".join(parts)

    async def discard(self) -> None:
        """Read what is left, up to a limit."""
        size = 0
        while self._more and size <= DISCARD_BYTES:
            size += len(await self._next())

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._more = message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part


def _refuse_unread(headers: Mapping[bytes, bytes], max_bytes: int) -> ApiError | None:
    """What the headers alone already tell."""
    media_type = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        shown = media_type.decode("latin-1")[:80]
        return _closing(415, f"content-type must be application/json, got {shown!r}")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        return _too_large(max_bytes)
    return None


def _too_large(max_bytes: int) -> ApiError:
    return _closing(413, f"the body must have at most {max_bytes} bytes")


def _closing(status: int, message: str) -> ApiError:
    """What was not read of the body would be taken for the next request."""
    error = invalid(message, status=status)
    error.headers += (("connection", "close"),)
    return error
