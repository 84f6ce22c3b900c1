"""The operators' HTTP API: GET /v1/cache/prefixes, POST /v1/cache/pin, DELETE /v1/cache/prefixes/{hash}.

It has a port of its own, so that a network policy can open the metrics to a Prometheus that has no business
here. Without a key there is no API. Errors have OpenAI's form; every field of a question is checked before
any server is asked.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import logging
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from services.cache_store.functions import PINNED, Prefix
from services.cache_store.operators import (
    MAX_HASHES,
    MAX_PREFIXES,
    MAX_TTL_S,
    NotStored,
    Operators,
    Position,
    Refused,
    Unreachable,
    tier_name,
)
from services.wire.hashes import HASH_BYTES
from services.wire.messages import MAX_PRIORITY

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 1024
MAX_CURSOR_CHARS = 4096
_DEFAULT_PAGE = 20

#: Requests at once; the next are told to come back. Each occupies a thread.
_MOST_AT_ONCE = 16
_KEEP_ALIVE_S = 10


class _Refusal(Exception):
    """Ends a request with an error object."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def response(self) -> Response:
        kind = {401: "authentication_error", 503: "server_error", 500: "server_error"}
        error = {
            "message": str(self),
            "type": kind.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(self.status)
        return _json({"error": error}, self.status, headers)


class PinRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`hashes` are the last blocks of prefixes; `priority` None = pinned; `ttl_s` 0 takes it back."""

    hashes: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_HASHES)]
    ttl_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_TTL_S)]
    priority: Annotated[int, msgspec.Meta(ge=0, le=MAX_PRIORITY)] | None = None


_PIN = msgspec.json.Decoder(PinRequest)
_CURSOR = msgspec.json.Decoder(dict[str, tuple[int, str] | None])
_AT = re.compile(r"(?s)(.*?) - at `\$\.?(.*)`")


def operators_app(
    operators: Operators, keys: Sequence[str], owners: Callable[[], Mapping[bytes, str]]
) -> Starlette:
    """The ASGI application. `keys` are those that may ask, at least one; `owners` names tenants by digest."""
    if not keys:
        raise ValueError("the operators' API needs a key")
    known = [_digest(key.encode()) for key in keys]

    def authenticate(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode())
        # All are compared, each in constant time: the time tells neither how much nor which matched.
        matches = [hmac.compare_digest(given, digest) for digest in known]
        if scheme.lower() != "bearer" or not any(matches):
            raise _Refusal(401, "a valid key is needed: Authorization: Bearer KEY", "invalid_api_key")

    def prefixes(request: Request, body: bytes) -> Response:
        _known_parameters(request, {"limit", "after"})
        limit = _limit(request.query_params.get("limit"))
        after = _position(request.query_params.get("after"), operators.names)
        page = operators.prefixes(limit, after)
        return _json(
            {
                "object": "list",
                "data": [_prefix(server, prefix, owners()) for server, prefix in page.prefixes],
                "has_more": page.has_more,
                "next": _cursor(page.position) if page.has_more else None,
                "deleting": [block.hex() for block in page.deleting],
                "unreachable": page.unreachable,
            }
        )

    def pin(request: Request, body: bytes) -> Response:
        _known_parameters(request, set())
        asked = _decoded(body)
        hashes = [_hash(text, f"hashes[{i}]") for i, text in enumerate(asked.hashes)]
        pinned = operators.pin(hashes, asked.ttl_s, asked.priority)
        return _json({"object": "cache.pin", **msgspec.to_builtins(pinned)})

    def delete(request: Request, body: bytes) -> Response:
        _known_parameters(request, set())
        block = _hash(request.path_params["hash"], "hash")
        server = operators.delete(block)
        log.info("an operator deletes prefix %s on %s", block.hex(), server)
        return _json({"object": "cache.deletion", "hash": block.hex(), "server": server}, 202)

    def endpoint(answer: Callable[[Request, bytes], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                authenticate(request)
                return await run_in_threadpool(answer, request, await _body(request))
            except _Refusal as refusal:
                return refusal.response()
            except NotStored as error:
                return _Refusal(404, f"not stored: {error}", "not_found", "hash").response()
            except Refused as error:
                return _Refusal(409, str(error), "refused").response()
            except Unreachable as error:
                return _Refusal(503, str(error), "store_unreachable").response()

        return handle

    async def not_there(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        message = f"{request.method} {request.url.path[:200]}: "
        message += "not allowed" if status == 405 else "no such path"
        return _Refusal(status, message, "not_found" if status == 404 else "method_not_allowed").response()

    async def failed(request: Request, error: Exception) -> Response:
        return _Refusal(500, "the service failed; its log says why", "internal_error").response()

    return Starlette(
        routes=[
            Route("/v1/cache/prefixes", endpoint(prefixes), methods=["GET"]),
            Route("/v1/cache/prefixes/{hash}", endpoint(delete), methods=["DELETE"]),
            Route("/v1/cache/pin", endpoint(pin), methods=["POST"]),
        ],
        exception_handlers={HTTPException: not_there, Exception: failed},
    )


class OperatorsServer:
    """Serves an application on a bound socket, in a thread."""

    def __init__(self, app: Starlette, listener: socket.socket) -> None:
        self._server = _Server(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                limit_concurrency=_MOST_AT_ONCE,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=5,
            )
        )
        self.port: int = listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="operators"
        )
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """The process has handlers of its own."""
        yield


# ---- inside ------------------------------------------------------------------------------------------------


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise _Refusal(413, f"the body has more than {MAX_BODY_BYTES} bytes", "body_too_large")
    except ClientDisconnect:
        raise _Refusal(400, "the body did not arrive", "invalid_json") from None
    return bytes(body)


def _decoded(body: bytes) -> PinRequest:
    try:
        return _PIN.decode(body)
    except msgspec.ValidationError as error:
        match = _AT.fullmatch(str(error))
        what, param = (match[1], match[2]) if match else (str(error), None)
        message = f"{param or 'the body'}: {what[:1].lower()}{what[1:]}"
        raise _Refusal(400, message, "invalid_value", param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Refusal(400, f"the body is not valid JSON: {error}", "invalid_json") from None


def _known_parameters(request: Request, known: set[str]) -> None:
    for name in request.query_params:
        if name not in known:
            allowed = ", ".join(sorted(known)) or "none"
            message = f"{name[:80]!r} is no parameter; there are: {allowed}"
            raise _Refusal(400, message, "unsupported_parameter")


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_PAGE
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_PREFIXES:
        message = f"limit must be from 1 to {MAX_PREFIXES}, got {text[:80]!r}"
        raise _Refusal(400, message, "invalid_value", "limit")
    return int(text)


def _hash(text: str, param: str) -> bytes:
    if len(text) != 2 * HASH_BYTES or not re.fullmatch("[0-9a-fA-F]*", text):
        message = f"{param} must be a block hash of {2 * HASH_BYTES} hexadecimal digits, got {text[:80]!r}"
        raise _Refusal(400, message, "invalid_value", param)
    return bytes.fromhex(text)


def _cursor(position: Position) -> str:
    entries = {name: at and (at[0], at[1].hex()) for name, at in position.items()}
    return base64.urlsafe_b64encode(msgspec.json.encode(entries)).decode().rstrip("=")


def _position(cursor: str | None, servers: Sequence[str]) -> Position | None:
    if cursor is None:
        return None
    try:
        if len(cursor) > MAX_CURSOR_CHARS:
            raise ValueError("too long")
        packed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        entries = _CURSOR.decode(packed)
        position = {name: at and (at[0], bytes.fromhex(at[1])) for name, at in entries.items()}
        if not position.keys() <= set(servers):
            raise ValueError("of other servers")
        if any(at and not (0 <= at[0] < 2**53 and len(at[1]) == HASH_BYTES) for at in position.values()):
            raise ValueError("out of range")
    except (ValueError, binascii.Error, msgspec.DecodeError, RecursionError):
        message = f"after must be the `next` of a page before, got {cursor[:80]!r}"
        raise _Refusal(400, message, "invalid_value", "after") from None
    return position


def _prefix(server: str, prefix: Prefix, owners: Mapping[bytes, str]) -> dict[str, Any]:
    shared = None
    if prefix.shared_last is not None:
        shared = {
            "last": prefix.shared_last.hex(),
            "blocks": prefix.shared_blocks,
            "bytes": prefix.shared_size,
        }
    return {
        "object": "cache.prefix",
        "server": server,
        "first": prefix.first.hex() if prefix.first else None,
        "last": prefix.last.hex(),
        "blocks": prefix.blocks if prefix.first else None,
        "bytes": prefix.size if prefix.first else None,
        "shared": shared,
        "uses": prefix.uses,
        "idle_s": prefix.idle_ms / 1000,
        "priority": prefix.priority if prefix.priority < PINNED else "pinned",
        "hint": tier_name(prefix.tier),
        "owner": prefix.owner.hex(),
        "tenant": owners.get(prefix.owner),
        "pinned_for_s": prefix.pinned_ms / 1000,
        "leased_for_s": prefix.leased_ms / 1000,
        "whole": prefix.whole,
    }


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
