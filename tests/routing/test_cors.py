"""`CORS`: which origins may read the routes of the middleware."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_sse import CORS, EventSourceResponse, HTTPError, Request, SSEMiddleware
from asgi_sse.testing import OpenStream, open_stream

pytestmark = pytest.mark.anyio

SITE = "https://example.com"


async def events() -> AsyncIterator[str]:
    yield "x"


def refuse(request: Request) -> Any:
    raise HTTPError(403)


async def foreign_app(scope: Any, receive: Any, send: Any) -> None:
    await EventSourceResponse(["foreign"])(scope, receive, send)


def app(cors: Any) -> SSEMiddleware:
    return SSEMiddleware(foreign_app, {"/": events, "/refuses": refuse}, cors=cors)


def cors_headers(stream: OpenStream) -> dict[str, str]:
    return {
        name: value for name, value in stream.headers.items() if name.startswith("access-control") or name == "vary"
    }


@pytest.mark.parametrize("cors", [[SITE], SITE, {SITE, "http://localhost:3000"}, lambda origin: origin == SITE])
async def test_only_an_allowed_origin_may_read(cors: Any) -> None:
    for path in ("/", "/refuses"):  # a script must be able to read the 403
        async with open_stream(app(cors), path, headers={"Origin": SITE}) as stream:
            assert cors_headers(stream) == {"access-control-allow-origin": SITE, "vary": "Origin"}
        async with open_stream(app(cors), path, headers={"Origin": "https://evil.example"}) as stream:
            assert cors_headers(stream) == {"vary": "Origin"}
        async with open_stream(app(cors), path) as stream:
            assert cors_headers(stream) == {"vary": "Origin"}


async def test_all_origins_or_no_origin_may_read() -> None:
    async with open_stream(app("*"), headers={"Origin": SITE}) as stream:
        assert cors_headers(stream) == {"access-control-allow-origin": "*"}
    async with open_stream(app(None), headers={"Origin": SITE}) as stream:
        assert cors_headers(stream) == {}
    async with open_stream(app("*"), "/foreign", headers={"Origin": SITE}) as stream:
        assert cors_headers(stream) == {}  # the app adds its own headers


async def test_credentials_are_allowed_by_name_of_the_origin() -> None:
    async with open_stream(app(CORS([SITE], credentials=True)), headers={"Origin": SITE}) as stream:
        assert cors_headers(stream) == {
            "access-control-allow-origin": SITE,
            "access-control-allow-credentials": "true",
            "vary": "Origin",
        }


async def test_cors_header_of_a_response_is_replaced() -> None:
    def endpoint(request: Request) -> Any:
        return EventSourceResponse(["x"], headers={"Access-Control-Allow-Origin": "*"})

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "HEAD", "path": "/", "headers": [(b"origin", SITE.encode())]}
    await SSEMiddleware(foreign_app, {"/": endpoint}, cors=SITE)(scope, receive, send)
    names = [name for name, _ in sent[0]["headers"]]
    assert names.count(b"access-control-allow-origin") == 1


async def test_preflight_lists_methods_and_headers() -> None:
    request_headers = {
        "Origin": SITE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "last-event-id",
    }
    async with open_stream(app(CORS([SITE], headers=("X-Own",))), method="OPTIONS", headers=request_headers) as stream:
        assert stream.status == 204
        assert cors_headers(stream) == {
            "access-control-allow-origin": SITE,
            "access-control-allow-methods": "GET, HEAD, POST",
            "access-control-allow-headers": "Last-Event-ID, X-Own",
            "access-control-max-age": "600",
            "vary": "Origin",
        }
    async with open_stream(
        app([SITE]), method="OPTIONS", headers={**request_headers, "Origin": "https://evil.example"}
    ) as stream:
        assert (stream.status, cors_headers(stream)) == (204, {"vary": "Origin"})
    async with open_stream(app([SITE]), method="OPTIONS", headers={"Origin": SITE}) as stream:
        assert stream.status == 405  # not a preflight request


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CORS(5), TypeError, "CORS origins must be .* got 5"),  # type: ignore[arg-type]
        (lambda: CORS(["example.com"]), ValueError, "a CORS origin must be .* got 'example.com'"),
        (
            lambda: CORS(["https://example.com/path"]),
            ValueError,
            "a CORS origin must be .* got 'https://example.com/path'",
        ),
        (lambda: CORS("https://*.example.com"), ValueError, r"a CORS origin must be .* got 'https://\*"),
        (lambda: CORS("https://example.com:443"), ValueError, "default port"),
        (lambda: CORS([5]), ValueError, "a CORS origin must be .* got 5"),  # type: ignore[list-item]
        (lambda: CORS("*", credentials=True), ValueError, "credentials"),
        (lambda: app(["nothing"]), ValueError, "a CORS origin must be .* got 'nothing'"),
    ],
)
def test_invalid_origins_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
