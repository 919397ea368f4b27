"""Before a request is read: keys, and how large a body may be. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from .errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = frozenset({"/health", "/ready"})
ADMIN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Doors:
    """Around an app.

    Args:
        keys: of which a request needs one, where there are any.
        admin_key: what `ADMIN` paths need; None: they are closed.
        max_body: bytes.
    """

    def __init__(self, app: Any, keys: frozenset[str], admin_key: str | None, max_body: int) -> None:
        self.app, self.keys, self.admin_key, self.max_body = app, keys, admin_key, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            taken = await self._bounded(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, taken, send)

    def _check(self, scope: Scope) -> None:
        path, given = scope["path"], bearer(scope["headers"])
        if path in ADMIN:
            if self.admin_key is None:
                raise ApiError(403, "This server was started without --admin-key: adapters cannot be loaded or unloaded.")
            if not among(given, {self.admin_key}):
                raise ApiError(401, "Loading and unloading of adapters needs the admin key as a bearer token.")
        elif self.keys and path not in OPEN:
            admin = {self.admin_key} if self.admin_key else set()
            if not among(given, self.keys | admin):
                raise ApiError(401, "This server needs an API key as a bearer token.", code="invalid_api_key")

    async def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """The body, read up to the limit; what comes after it (a disconnect) is the client's."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = ApiError(413, f"The body is over {self.max_body} bytes.", code="body_too_large")
        if length.isdigit() and int(length) > self.max_body:
            raise too_large
        read, more, last = b"", scope["method"] in ("POST", "PUT", "PATCH", "DELETE"), None
        while more:
            last = await receive()
            if last["type"] != "http.request":
                break
            read += last.get("body", b"")
            more = last.get("more_body", False)
            if len(read) > self.max_body:
                raise too_large
        first: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": read, "more_body": False}]
        if last is not None and last["type"] != "http.request":
            first.append(last)

        async def again() -> MutableMapping[str, Any]:
            return first.pop(0) if first else await receive()

        return again


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The token of an Authorization header, or the empty string."""
    value = dict(headers).get(b"authorization", b"").decode("latin-1")
    kind, _, token = value.partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def among(given: str, keys: Iterable[str]) -> bool:
    """Whether a key is one of these, in a time that tells nothing of them."""
    same = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    return any(same)
