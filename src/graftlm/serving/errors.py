"""Errors in OpenAI's form, ``{"error": {"message", "type", "param", "code"}}``, and the status that each has."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from ..errors import GraftError, QueueFullError, RequestError, ServingError, UnknownAdapterError, nearest

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

RETRY_AFTER = 2  # seconds that a client is told to wait where it may go better soon


class ApiError(Exception):
    """What a client gets in an answer's place.

    Args:
        status: of HTTP.
        message: for people.
        param: the field that is wrong.
        code: for programs, such as "model_not_found".
        retry_after: seconds after which it may go better.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message.encode("utf-8", "replace").decode()  # a body may hold half a character
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def not_valid(problems: list[dict[str, Any]], fields: list[str]) -> ApiError:
    """One error for all that pydantic found in a body.

    Args:
        problems: pydantic's list.
        fields: names that the body may have.
    """
    told, first = [], None
    for problem in problems:
        place = ".".join(str(part) for part in problem["loc"] if part != "body")
        first = first or place or None
        if problem["type"] == "extra_forbidden":
            told.append(f"unknown field {place!r}{nearest(place, fields)}")
        elif problem["type"] == "json_invalid":
            told.append(f"the body is no JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
        else:
            told.append(f"{place}: {problem['msg'].removeprefix('Value error, ')}" if place else problem["msg"])
    shown = told[:8] + ([f"and {len(told) - 8} more"] if len(told) > 8 else [])
    return ApiError(400, "; ".join(dict.fromkeys(shown)), param=first, code="invalid_value")


def of(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=RETRY_AFTER)
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="context_length_exceeded" if "together" in str(error) else None)
    if isinstance(error, ServingError):
        return ApiError(503, str(error), code="engine_failed", retry_after=RETRY_AFTER)
    if isinstance(error, GraftError):
        return ApiError(400, str(error))
    return ApiError(500, "The server failed at this request; its log says why.", code="internal_error")
