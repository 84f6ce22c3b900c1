"""Errors as the OpenAI API writes them."""

from __future__ import annotations

from typing import Literal

import msgspec

ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class ErrorDetail(msgspec.Struct):
    """What went wrong: `param` names the field at fault, `code` is for programs."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """Body of every answer with a status of 400 or more, and of an event that ends a stream early."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with this status and error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message, type, param, code)
        self.headers = headers
        if retry_after_s is not None:
            self.headers += (("retry-after", str(retry_after_s)),)

    def body(self) -> bytes:
        """The JSON document."""
        return msgspec.json.encode(ErrorBody(self.detail))

    def event(self) -> bytes:
        """The same as a server-sent event, for streams that have begun."""
        return b"data: " + self.body() + b"\n\n"


def invalid(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """The request cannot be served as it stands."""
    return ApiError(status, message, type="invalid_request_error", param=param, code=code)


def too_long(message: str, param: str) -> ApiError:
    """Prompt and answer do not fit into the model's context."""
    return invalid(message, param, "context_length_exceeded")


def unavailable(message: str, code: str, retry_after_s: int | None = 1) -> ApiError:
    """Nobody can serve this now."""
    return ApiError(503, message, type="server_error", code=code, retry_after_s=retry_after_s)


def failed(message: str, code: str = "worker_failed") -> ApiError:
    """We broke off."""
    return ApiError(500, message, type="server_error", code=code)
