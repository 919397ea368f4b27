"""Who may come in, and the headers that every answer carries.

A request passes when its Host is ours (no page of another name can reach us by DNS), its Origin is ours or absent, it
carries the cookie, and, where it changes something, the CSRF token in a header, which no form of another site can send. The
cookie is given for the token in the address that the studio prints at its start.
"""

from __future__ import annotations

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

from markupsafe import escape
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from . import words
from .errors import LARGE, PageError

SAFE = ("GET", "HEAD", "OPTIONS")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# A report is a page of its own with its styles in it, shown in a frame that runs nothing.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'; sandbox"
)
HEADERS = {
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin", "permissions-policy": "camera=(), microphone=(), geolocation=()",
}  # fmt: skip


class Doors:
    """ASGI middleware around the app.

    Args:
        port: that the studio listens at.
        token: of the address that it prints.
        key: what the cookie is made with.
        max_body: bytes of a request.
    """

    def __init__(self, app: Any, *, port: int, token: str, key: bytes, max_body: int) -> None:
        self.app, self.token, self.max_body = app, token, max_body
        names = ("127.0.0.1", "localhost", "[::1]")
        self.hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())
        self.origins = {f"http://{host}" for host in self.hosts}
        self.cookie = f"graftlm-studio-{port}"
        self.pass_, self.csrf = signed(key, f"cookie {port}"), signed(key, f"csrf {port}")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket; there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        scope.setdefault("state", {})["csrf"] = self.csrf
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        guarded = with_headers(send, "no-cache" if scope["path"].startswith("/static/") else "no-store")
        try:
            answer = self._welcome(scope, headers)
        except PageError as refusal:
            answer = told(refusal, headers)
        if answer is not None:
            await answer(scope, receive, guarded)
            return
        await self.app(scope, self._limited(receive), guarded)

    def _welcome(self, scope: Any, headers: dict[str, str]) -> Response | None:
        """What is answered in place of the app; None where the request may pass. PageError: it may not."""
        if headers.get("host", "") not in self.hosts:
            raise PageError(403, "This address is not the studio's. Open http://127.0.0.1 with its port.")
        if headers.get("origin", next(iter(self.origins))) not in self.origins:
            raise PageError(403, "Refused: the request comes from another site.")
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
        if site not in ("none", "same-origin") and (mode != "navigate" or scope["method"] not in SAFE):
            raise PageError(403, "Refused: the request comes from another site.")
        if scope["path"].startswith("/static/"):
            return None
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if "token" in query and scope["method"] == "GET":
            if not same(query.pop("token"), self.token):
                raise PageError(403, LOST)
            return self._let_in(scope["path"], query)
        if not same(cookie_of(headers, self.cookie), self.pass_):
            raise PageError(403, LOST)
        if scope["method"] not in SAFE and not same(headers.get("x-csrf-token", ""), self.csrf):
            raise PageError(403, "Refused: the form is not from this studio. Reload the page and try again.")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_body:
            raise PageError(413, LARGE, most=self.max_body // 2**20)
        return None

    def _let_in(self, path: str, query: dict[str, str]) -> Response:
        """The same page without the token, and the cookie. Only paths of our own: `//host` would lead away."""
        place = "/" + path.lstrip("/\\") + (f"?{urlencode(query)}" if query else "")
        answer = RedirectResponse(place, 303)
        answer.set_cookie(self.cookie, self.pass_, httponly=True, samesite="lax", path="/", max_age=60 * 60 * 24 * 30)
        return answer

    def _limited(self, receive: Any) -> Any:
        """`receive`, which refuses where a body without a length grows over the limit."""
        taken = 0

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise PageError(413, LARGE, most=self.max_body // 2**20)
            return message

        return counted


LOST = "Open the studio by the whole address that `graftlm studio` prints (it ends in ?token=…)."


def signed(key: bytes, what: str) -> str:
    return hmac.new(key, what.encode(), hashlib.sha256).hexdigest()


def same(a: str, b: str) -> bool:
    """Equality that takes the same time whatever is wrong."""
    return hmac.compare_digest(a.encode(), b.encode())


def cookie_of(headers: dict[str, str], name: str) -> str:
    """A request's cookie; "" where there is none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def told(error: PageError, headers: dict[str, str]) -> Response:
    """A refusal as a plain page; as a line where a part of a page was asked for."""
    language = words.chosen(cookie_of(headers, words.COOKIE), headers.get("accept-language", ""))
    text = words.translator(language)(error.message, **error.values)
    if "hx-request" in headers:
        return PlainTextResponse(text, error.status)
    return HTMLResponse(f"<!doctype html><title>GraftLM Studio</title><p>{escape(text)}</p>", error.status)


def with_headers(send: Any, cache: str) -> Any:
    """`send`, which adds the headers to an answer that has not its own. cache: for how long it may be kept."""

    async def guarded(message: Any) -> None:
        if message["type"] == "http.response.start":
            have = {name.lower() for name, _ in message["headers"]}
            wanted = HEADERS | {"content-security-policy": POLICY, "cache-control": cache}
            extra = [(k.encode(), v.encode()) for k, v in wanted.items() if k.encode() not in have]
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return guarded
