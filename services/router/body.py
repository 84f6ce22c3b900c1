"""Reading a request's body, within bounds of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from services.router.api.errors import ApiError, invalid
from services.router.relay import ClientGone

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

#: After a refusal the rest of the body is not read, so the connection cannot be used again.
_CLOSE = (("connection", "close"),)


async def read_json_body(
    headers: Mapping[bytes, bytes], receive: Receive, max_bytes: int, timeout_s: float
) -> bytes:
    """The whole body. Raises ApiError: 415 for another media type than JSON, 413 above `max_bytes`, 408
    after `timeout_s`; ClientGone when the client left."""
    media_type = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        shown = media_type.decode("latin-1")[:80]
        raise _closing(415, f"content-type must be application/json, got {shown!r}")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(receive, max_bytes)
    except TimeoutError:
        raise _closing(408, f"the body did not arrive within {timeout_s:g} s") from None


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return _closing(413, f"the body must have at most {max_bytes} bytes")


def _closing(status: int, message: str) -> ApiError:
    error = invalid(message, status=status)
    error.headers += _CLOSE
    return error
