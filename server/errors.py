"""Errors as clients see them: one exception with a status, and handlers that answer in the OpenAI shape.

    {"error": {"message", "type", "param", "code"}}

Owns the mapping from any exception to a status. Does not decide when something is wrong.
"""

from __future__ import annotations

import errno
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlite_utils.utils import sqlite3
from starlette.exceptions import HTTPException

from server.logs import places
from store.errors import DiskFull, NotFound, StoreError

log = structlog.get_logger("plaudit")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "body_too_large",
    415: "not_json",
    429: "too_many_requests",
    503: "unavailable",
    504: "deadline_exceeded",
    507: "disk_full",
}


class StartupError(Exception):
    """The server cannot start; the message is the one line that says why and what to do."""


class ApiError(HTTPException):
    """An answer other than success, with what the client needs to do better."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else None
        if status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        super().__init__(status, message, headers)
        self.param = param
        self.code = code or CODES.get(status)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The OpenAI error object for `status`."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def error_response(error: ApiError) -> JSONResponse:
    """The response for `error`."""
    body = error_body(error.status_code, str(error.detail), error.param, error.code)
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk or the quota is used up."""
    if isinstance(error, DiskFull):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error)


def as_api_error(error: BaseException) -> ApiError:
    """`error` as an answer. What nobody foresaw is logged by type, without its text, and becomes a 500."""
    if isinstance(error, ApiError):
        return error
    if is_disk_full(error):
        return ApiError(507, "the server's disk is full; nothing was recorded. Free space and try again")
    if isinstance(error, NotFound):
        return ApiError(404, str(error))
    if isinstance(error, StartupError):  # keys.json, damaged since: nobody is let in on what it may have said
        log.error("cannot_read", reason=str(error))
        return ApiError(503, "the server's settings are damaged; its log says which", retry_after_s=60)
    if isinstance(error, StoreError):
        log.error("store_error", kind=type(error).__name__)
        return ApiError(503, "the database could not answer; try again", retry_after_s=1)
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return ApiError(503, "the database is busy; try again", retry_after_s=1)
    log.error("internal_error", kind=type(error).__name__, where=places(error))
    return ApiError(500, "an internal error; the server's log names its place", code="internal_error")


def validation_message(error: RequestValidationError) -> tuple[str, str | None]:
    """The first problem of an invalid body in one line, and the field it is about. Never repeats the input."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "the body is not valid JSON", None
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        return "the body must be a JSON object", None
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(path) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return (f"{param}: {message}" if param else message), param


def install(app: FastAPI) -> None:
    """Make every failure of `app` answer in the OpenAI shape."""

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error_response(error)
        status = 400 if error.status_code == 422 else error.status_code
        text = {400: "the body cannot be read as JSON", 404: f"there is no {request.url.path}", 405: f"{request.method} is not offered here"}
        body = error_body(status, text.get(status, str(error.detail)))
        return JSONResponse(body, status, headers=dict(error.headers or {}))

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = validation_message(error)
        return JSONResponse(error_body(400, message, param), 400)

    async def on_any(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    for kind in (StartupError, StoreError, sqlite3.Error, OSError):  # typed, so that Starlette does not re-raise them as it does a 500
        app.add_exception_handler(kind, on_any)
    app.add_exception_handler(Exception, on_any)
