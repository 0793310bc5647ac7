"""The page's files, with headers that keep other content out of the page."""

from importlib.resources import files
from typing import Final

from asgi_sse.protocol.asgi import Receive, Scope, Send
from asgi_sse.routing.endpoint import send_text
from asgi_sse.routing.request import HTTPError

_TYPES: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", _POLICY),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class PageFile:
    """An ASGI app that serves one file of the page.

    Args:
        name: The name of the file, in this folder.
    """

    def __init__(self, name: str) -> None:
        self._body = files("asgi_sse.cli.demo").joinpath(name).read_bytes()
        self._headers = [
            (b"content-type", f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8".encode()),
            (b"content-length", str(len(self._body)).encode()),
            *_HEADERS,
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Answer one request."""
        if scope["method"] not in ("GET", "HEAD"):
            await send_text(scope, send, HTTPError(405, headers={"allow": "GET, HEAD"}))
            return
        body = b"" if scope["method"] == "HEAD" else self._body
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
