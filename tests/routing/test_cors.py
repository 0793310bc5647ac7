"""Cross-origin requests for our routes."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_sse import CORS, EventSourceResponse, HTTPError, Request, SSEMiddleware
from asgi_sse.testing import OpenStream, open_stream

pytestmark = pytest.mark.anyio

SITE = "https://example.com"


async def events() -> AsyncIterator[str]:
    yield "x"


def refuses(request: Request) -> Any:
    raise HTTPError(403)


async def theirs(scope: Any, receive: Any, send: Any) -> None:
    await EventSourceResponse(["theirs"])(scope, receive, send)


def app(cors: Any) -> SSEMiddleware:
    return SSEMiddleware(theirs, {"/": events, "/refuses": refuses}, cors=cors)


def cors_headers(stream: OpenStream) -> dict[str, str]:
    return {
        name: value for name, value in stream.headers.items() if name.startswith("access-control") or name == "vary"
    }


@pytest.mark.parametrize("cors", [[SITE], SITE, {SITE, "http://localhost:3000"}, lambda origin: origin == SITE])
async def test_an_origin_that_may_read(cors: Any) -> None:
    for path in ("/", "/refuses"):  # or a script could not even see the 403
        async with open_stream(app(cors), path, headers={"Origin": SITE}) as stream:
            assert cors_headers(stream) == {"access-control-allow-origin": SITE, "vary": "Origin"}
        async with open_stream(app(cors), path, headers={"Origin": "https://evil.example"}) as stream:
            assert cors_headers(stream) == {"vary": "Origin"}
        async with open_stream(app(cors), path) as stream:
            assert cors_headers(stream) == {"vary": "Origin"}


async def test_all_origins_and_none() -> None:
    async with open_stream(app("*"), headers={"Origin": SITE}) as stream:
        assert cors_headers(stream) == {"access-control-allow-origin": "*"}
    async with open_stream(app(None), headers={"Origin": SITE}) as stream:
        assert cors_headers(stream) == {}
    async with open_stream(app("*"), "/theirs", headers={"Origin": SITE}) as stream:
        assert cors_headers(stream) == {}  # that is the app's own affair


async def test_credentials() -> None:
    async with open_stream(app(CORS([SITE], credentials=True)), headers={"Origin": SITE}) as stream:
        assert cors_headers(stream) == {
            "access-control-allow-origin": SITE,
            "access-control-allow-credentials": "true",
            "vary": "Origin",
        }


async def test_headers_of_the_route_s_own_do_not_stand_twice() -> None:
    def endpoint(request: Request) -> Any:
        return EventSourceResponse(["x"], headers={"Access-Control-Allow-Origin": "*"})

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "HEAD", "path": "/", "headers": [(b"origin", SITE.encode())]}
    await SSEMiddleware(theirs, {"/": endpoint}, cors=SITE)(scope, receive, send)
    names = [name for name, _ in sent[0]["headers"]]
    assert names.count(b"access-control-allow-origin") == 1


async def test_preflight() -> None:
    asks = {"Origin": SITE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "last-event-id"}
    async with open_stream(app(CORS([SITE], headers=("X-Own",))), method="OPTIONS", headers=asks) as stream:
        assert stream.status == 204
        assert cors_headers(stream) == {
            "access-control-allow-origin": SITE,
            "access-control-allow-methods": "GET, HEAD, POST",
            "access-control-allow-headers": "Last-Event-ID, X-Own",
            "access-control-max-age": "600",
            "vary": "Origin",
        }
    async with open_stream(app([SITE]), method="OPTIONS", headers={**asks, "Origin": "https://evil.example"}) as stream:
        assert (stream.status, cors_headers(stream)) == (204, {"vary": "Origin"})
    async with open_stream(app([SITE]), method="OPTIONS", headers={"Origin": SITE}) as stream:
        assert stream.status == 405  # no preflight


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: CORS(5), TypeError, "origins=5"),  # type: ignore[arg-type]
        (lambda: CORS(["example.com"]), ValueError, "'example.com' is no origin"),
        (lambda: CORS(["https://example.com/path"]), ValueError, "is no origin"),
        (lambda: CORS("https://*.example.com"), ValueError, "is no origin"),
        (lambda: CORS("https://example.com:443"), ValueError, "default port"),
        (lambda: CORS([5]), ValueError, "5 is no origin"),  # type: ignore[list-item]
        (lambda: CORS("*", credentials=True), ValueError, "credentials"),
        (lambda: app(["nothing"]), ValueError, "is no origin"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        make()
