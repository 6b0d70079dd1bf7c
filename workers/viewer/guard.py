"""What every request passes: how many at once, which host was meant, who asks, what a page may load."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workers.viewer.answers import refusal

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' blob: data:; worker-src 'self' blob:; font-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MOST_REQUESTS = 512
"""In the works at once; those beyond are told to come again."""


class Guard:
    """ASGI middleware around the whole viewer.

    Parameters
    ----------
    app
        What is guarded.
    hosts
        Names by which a browser may mean this server; empty: any. A page of another site whose name was made to point
        here (DNS rebinding) bears that site's name.
    token
        Who does not bring it is refused; empty: everybody may. Brought once in a query it stays as a cookie.
    cors
        Origin whose pages may read JSON and raw files; `*`: any; empty: none.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] = (), token: str = "", cors: str = "") -> None:
        self._app = app
        self._hosts = frozenset(h.lower() for h in hosts)
        self._token = token
        self._cors = cors
        self._cookie = "gigacam-" + hashlib.sha256(token.encode()).hexdigest()[:12]
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        shared = bool(self._cors) and _for_others(path) and self._cors in ("*", headers.get("origin"))

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._dress(MutableHeaders(scope=message), shared)
            await send(message)

        if self._inside >= MOST_REQUESTS:
            answer: ASGIApp | None = refusal(
                503, "too many requests at once; try again in a moment", {"Retry-After": "1"}
            )
        elif shared and scope["method"] == "OPTIONS":
            answer = Response(status_code=204)
        else:
            answer = self._refused(scope, headers)
        self._inside += 1
        try:
            await (answer or self._app)(scope, receive, dressed)
        finally:
            self._inside -= 1

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        """What a request is answered that gets no further."""
        if self._hosts and host_name(headers.get("host", "")) not in self._hosts:
            return refusal(
                403,
                f"this viewer answers to {', '.join(sorted(self._hosts))}; start it with --host to serve other names",
            )
        if not self._token:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        given = dict(query).get("token")
        if given is not None and self._is_token(given):
            if scope["method"] == "GET" and _is_page(scope["path"]):
                rest = urlencode([(k, v) for k, v in query if k != "token"])
                # Relative, so that a proxy's prefix stays; the token leaves the address bar and the history.
                to = (scope["path"].rpartition("/")[2] or "./") + (f"?{rest}" if rest else "")
                answer = Response(status_code=303, headers={"Location": to, "Cache-Control": "no-store"})
                answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
                return answer
            return None
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(self._from_cookie(headers)) or self._is_token(bearer):
            return None
        return refusal(401, "this viewer wants its token: open the address that `gigacam view` printed")

    def _from_cookie(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())

    def _dress(self, headers: MutableHeaders, shared: bool) -> None:
        headers["Content-Security-Policy"] = POLICY
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        headers["Cross-Origin-Resource-Policy"] = "cross-origin" if shared else "same-origin"
        headers.setdefault("Cache-Control", "no-store")
        if self._cors:
            headers.add_vary_header("Origin")
        if shared:
            headers["Access-Control-Allow-Origin"] = self._cors
            headers["Access-Control-Allow-Methods"] = "GET, HEAD"
            headers["Access-Control-Allow-Headers"] = "Range, If-None-Match, Authorization"
            headers["Access-Control-Allow-Private-Network"] = "true"
            headers["Access-Control-Expose-Headers"] = "Content-Range, Content-Length, Accept-Ranges, ETag"


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets.

    >>> host_name("[::1]:8000"), host_name("LocalHost:80")
    ('::1', 'localhost')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _for_others(path: str) -> bool:
    return path.startswith("/raw/") or (path.startswith("/api/") and not path.endswith(".jpg"))


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith("/image/")
