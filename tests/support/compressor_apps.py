"""Apps with each compressor, inside `SSEMiddleware` and around it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from asgi_sse import EventSourceResponse, SSEMiddleware

PAGE = "a page " * 1000
EVENTS = 4


SEEN = Path(
    os.environ.get("COMPRESSOR_SEEN", os.devnull)
)  # the events that a client has reported as received, if it reports them
PAUSE = 0 if SEEN.is_file() else 0.5


def is_awaited(event: str) -> bool:
    return SEEN.is_file() and event not in SEEN.read_text()


async def times() -> AsyncIterator[str]:
    """Yield the time at intervals. For a client that reports its events, yield the next when it has the last."""
    for _ in range(EVENTS):
        now = f"{time.time()}"
        yield f"{now} {'.' * 600}"  # more than the threshold of every compressor
        while is_awaited(now):
            await asyncio.sleep(0.01)
        await asyncio.sleep(PAUSE)


async def events() -> AsyncIterator[str]:
    async for event in times():
        yield f"data: {event}\n\n"


def plain() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    async def page(request: Any) -> Any:
        return PlainTextResponse(PAGE)

    async def foreign(request: Any) -> Any:
        return StreamingResponse(events(), media_type="text/event-stream")

    async def ours(request: Any) -> Any:
        return EventSourceResponse(times())

    return Starlette(routes=[Route("/page", page), Route("/foreign", foreign), Route("/ours", ours)])


def starlette_gzip(app: Any) -> Any:
    from starlette.middleware.gzip import GZipMiddleware

    return GZipMiddleware(app)


def brotli_asgi(app: Any) -> Any:
    from brotli_asgi import BrotliMiddleware

    return BrotliMiddleware(app)


def starlette_compress(app: Any) -> Any:
    from starlette_compress import CompressMiddleware

    return CompressMiddleware(app)


def asgi_gzip(app: Any) -> Any:
    from asgi_gzip import GZipMiddleware

    return GZipMiddleware(app)


def zstd_asgi(app: Any) -> Any:
    from zstd_asgi import ZstdMiddleware

    return ZstdMiddleware(app)


def asgi_compression(app: Any) -> Any:
    from asgi_compression import CompressionMiddleware, GzipAlgorithm

    return CompressionMiddleware(app=app, algorithms=[GzipAlgorithm()])


AROUND = [starlette_gzip, brotli_asgi, starlette_compress, asgi_gzip, zstd_asgi, asgi_compression]


def litestar() -> Any:
    from litestar import Litestar, MediaType, get
    from litestar.config.compression import CompressionConfig
    from litestar.response import Stream

    @get("/page", media_type=MediaType.TEXT)
    async def page() -> str:
        return PAGE

    @get("/foreign")
    async def foreign() -> Stream:
        return Stream(events(), media_type="text/event-stream")

    return Litestar([page, foreign], compression_config=CompressionConfig(backend="gzip"))


def _django(middleware: str) -> Any:
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    async def page(request: Any) -> HttpResponse:
        return HttpResponse(PAGE, content_type="text/plain")

    async def foreign(request: Any) -> StreamingHttpResponse:
        return StreamingHttpResponse(events(), content_type="text/event-stream")

    urls = [path("page", page), path("foreign", foreign)]
    settings.configure(
        ROOT_URLCONF=type("urls", (), {"urlpatterns": urls}),
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="x",
        MIDDLEWARE=[middleware],
    )
    return get_asgi_application()


def django_gzip() -> Any:
    return _django("django.middleware.gzip.GZipMiddleware")


def django_http_compression() -> Any:
    import django_http_compression

    assert django_http_compression
    return _django("django_http_compression.middleware.HttpCompressionMiddleware")


def django_compression_middleware() -> Any:
    return _django("compression_middleware.middleware.CompressionMiddleware")


def quart_compress() -> Any:
    from quart import Quart, Response
    from quart_compress import Compress

    app = Quart("app")
    Compress(app)

    @app.get("/page")
    async def page() -> Response:
        return Response(PAGE, mimetype="text/html")

    @app.get("/foreign")
    async def foreign() -> Response:
        return Response(events(), mimetype="text/event-stream")

    return app


def blacksheep() -> Any:
    from blacksheep import Application, Content, Response, get
    from blacksheep.contents import StreamedContent
    from blacksheep.server.compression import use_gzip_compression

    app = Application()
    use_gzip_compression(app)

    @get("/page")
    async def page() -> Response:
        return Response(200, content=Content(b"text/plain", PAGE.encode()))

    @get("/foreign")
    async def foreign() -> Response:
        async def encoded() -> AsyncIterator[bytes]:
            async for event in events():
                yield event.encode()

        return Response(200, content=StreamedContent(b"text/event-stream", encoded))

    return app


OWN = [litestar, django_gzip, django_http_compression, django_compression_middleware, quart_compress, blacksheep]


def inside() -> Any:
    name, mode = os.environ["COMPRESSOR"], os.environ["COMPRESSION"]
    builder = globals()[name]
    return SSEMiddleware(builder() if builder in OWN else builder(plain()), compressors=mode)


def around() -> Any:
    def identity() -> EventSourceResponse:
        return EventSourceResponse(times(), headers={"content-encoding": "identity"})

    return globals()[os.environ["COMPRESSOR"]](SSEMiddleware(plain(), {"/route": times, "/identity": identity}))
