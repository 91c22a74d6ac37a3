"""The gate before the page: who has its token, or its password, passes; what other sites send does not.

loopback      the address that is printed has a token, which becomes a cookie of this browser
--host        a form asks for the password, then the same cookie
every answer  carries a policy by which the browser runs and fetches nothing from elsewhere
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BODY = 256 * 2**20  # bytes of a request: some photographs at once
MOST_FORM = 4096  # of the form that asks for the password
POLICY = (  # the page's own scripts are written into it and make functions of text
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-src 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
FORM = (
    '<form method="post" action="/login"><p><label>Password<br><input type="password" name="password" autofocus '
    'autocomplete="current-password"></label></p><p><button>Open</button></p></form>'
)
PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>difftune</title><style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;"
    "max-width:34rem;margin:15vh auto;padding:0 1rem}}input,button{{font:inherit;padding:.5rem .8rem}}</style>"
    "<h1>difftune</h1><p>{said}</p>{form}</html>"
)


@dataclass(frozen=True)
class Access:
    """Who may see the page.

    Args:
        port: which names the cookie, since browsers keep one jar for all ports of a machine.
        password: that is asked for; None on loopback, where the printed address has the token.
        token: of this start.
    """

    port: int
    password: str | None = None
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def cookie(self) -> str:
        return f"difftune_ui_{self.port}"

    def has_token(self, headers: dict[str, str]) -> bool:
        pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        return any(name == self.cookie and _same(value, self.token) for name, _, value in pairs)


class Guard:
    """An ASGI application around another one.

    Args:
        app: which is reached by who has access.
    """

    def __init__(self, app: App, access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # the page uses none
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refused = self._foreign(scope["method"], headers) or _too_large(headers)
        if refused is not None:
            await _answer(send, *refused)
        elif scope["path"] == "/login" and scope["method"] == "POST" and self.access.password is not None:
            await self._login(receive, send)
        elif self.access.has_token(headers):
            await self.app(scope, _bounded(receive), _with_headers(send))
        else:
            await self._ask(scope, send)

    def _foreign(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """What is wrong with a request that another site sent, or one that reached us by another name."""
        host = headers.get("host", "")
        if self.access.password is None and urlsplit(f"//{host}").hostname not in LOOPBACK:
            return 421, "This page answers to 127.0.0.1 and localhost only."  # a name that was pointed at us
        if method in ("GET", "HEAD"):
            return None
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none") or (origin is not None and urlsplit(origin).netloc != host):
            return 403, "This request comes from another site, and was refused."
        return None

    async def _ask(self, scope: Scope, send: Send) -> None:
        if self.access.password is not None:
            await _answer(send, 401, "This page has a password; difftune ui printed it where it was started.", FORM)
            return
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and scope["method"] == "GET" and _same(given, self.access.token):
            await self._admit(send)
            return
        await _answer(send, 403, "Open the address that difftune ui printed, with its token.")

    async def _login(self, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more and len(body) <= MOST_FORM:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        given = parse_qs(body[:MOST_FORM].decode("utf-8", "replace")).get("password", [""])[0]
        if _same(given, self.access.password or ""):
            await self._admit(send)
            return
        import asyncio  # saves it for the other verbs

        await asyncio.sleep(1.0)  # which makes guessing slow
        await _answer(send, 401, "That is not the password.", FORM)

    async def _admit(self, send: Send) -> None:
        cookie = f"{self.access.cookie}={self.access.token}; Path=/; HttpOnly; SameSite=Strict"
        head = {"location": "/", "set-cookie": cookie, "cache-control": "no-store"} | HEADERS
        await send({"type": "http.response.start", "status": 303, "headers": _encoded(head)})
        await send({"type": "http.response.body", "body": b""})


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def _too_large(headers: dict[str, str]) -> tuple[int, str] | None:
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MOST_BODY:
        return 413, f"This is more than {MOST_BODY // 2**20} MiB at once; send less."
    return None


def _bounded(receive: Receive) -> Receive:
    """A body without a length is counted as it comes, and broken off where it is too long."""
    count = 0

    async def counted() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > MOST_BODY:
            return {"type": "http.disconnect"}
        return message

    return counted


def _with_headers(send: Send) -> Send:
    """Every answer with the policy; one that has a stricter policy of its own keeps that."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message.get("headers", ())}
            more = [pair for pair in _encoded(HEADERS) if pair[0] not in own]
            message = dict(message) | {"headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sent


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def _answer(send: Send, status: int, said: str, form: str = "") -> None:
    body = PAGE.format(said=escape(said), form=form).encode()
    head = {"content-type": "text/html; charset=utf-8", "cache-control": "no-store"} | HEADERS
    await send({"type": "http.response.start", "status": status, "headers": _encoded(head)})
    await send({"type": "http.response.body", "body": body})
