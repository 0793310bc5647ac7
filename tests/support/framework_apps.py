"""An app of each framework to be wrapped by `SSEMiddleware`: a page, an endless event stream, and lifespan hooks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from shutdown_apps import note, ticks

from asgi_sse import SSEMiddleware

PAGE = "a page " * 1000


async def events() -> AsyncIterator[str]:
    try:
        for number in count():
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.5)
    finally:
        note("finally of the app's stream")


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    note("the app starts")
    yield
    note("the app stops")


def starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    async def page(request: Any) -> Any:
        return PlainTextResponse(PAGE)

    async def stream(request: Any) -> Any:
        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/page", page), Route("/stream", stream)], lifespan=lifespan)


def fastapi() -> Any:
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse, StreamingResponse

    app = FastAPI(lifespan=lifespan)

    @app.get("/page")
    async def page() -> PlainTextResponse:
        return PlainTextResponse(PAGE)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def litestar() -> Any:
    from litestar import Litestar, MediaType, get
    from litestar.response import Stream

    @get("/page", media_type=MediaType.TEXT)
    async def page() -> str:
        return PAGE

    @get("/stream")
    async def stream() -> Stream:
        return Stream(events(), media_type="text/event-stream")

    return Litestar([page, stream], lifespan=[lifespan])


def quart() -> Any:
    from quart import Quart, Response

    app = Quart("app")

    @app.before_serving
    async def start() -> None:
        note("the app starts")

    @app.after_serving
    async def stop() -> None:
        note("the app stops")

    @app.get("/page")
    async def page() -> Response:
        return Response(PAGE, mimetype="text/plain")

    @app.get("/stream")
    async def stream() -> Response:
        response = Response(events(), mimetype="text/event-stream")
        response.timeout = None
        return response

    return app


def django() -> Any:
    """Django has no lifespan support, and so this app has no hooks."""
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    async def page(request: Any) -> HttpResponse:
        return HttpResponse(PAGE, content_type="text/plain")

    async def stream(request: Any) -> StreamingHttpResponse:
        return StreamingHttpResponse(events(), content_type="text/event-stream")

    urls = [path("page", page), path("stream", stream)]
    settings.configure(ROOT_URLCONF=type("urls", (), {"urlpatterns": urls}), ALLOWED_HOSTS=["*"], SECRET_KEY="x")
    return get_asgi_application()


def falcon() -> Any:
    import falcon.asgi

    class Page:
        async def on_get(self, request: Any, response: Any) -> None:
            response.text = PAGE
            response.content_type = "text/plain"

    class Stream:
        async def on_get(self, request: Any, response: Any) -> None:
            async def encoded() -> AsyncIterator[bytes]:
                async for event in events():
                    yield event.encode()

            response.content_type = "text/event-stream"
            response.stream = encoded()

    class Hooks:
        async def process_startup(self, scope: Any, event: Any) -> None:
            note("the app starts")

        async def process_shutdown(self, scope: Any, event: Any) -> None:
            note("the app stops")

    app = falcon.asgi.App(middleware=[Hooks()])
    app.add_route("/page", Page())
    app.add_route("/stream", Stream())
    return app


def blacksheep() -> Any:
    from blacksheep import Application, Content, Response, get
    from blacksheep.contents import StreamedContent

    app = Application()

    @app.on_start
    async def start(app: Any) -> None:
        note("the app starts")

    @app.on_stop
    async def stop(app: Any) -> None:
        note("the app stops")

    @get("/page")
    async def page() -> Response:
        return Response(200, content=Content(b"text/plain", PAGE.encode()))

    @get("/stream")
    async def stream() -> Response:
        async def encoded() -> AsyncIterator[bytes]:
            async for event in events():
                yield event.encode()

        return Response(200, content=StreamedContent(b"text/event-stream", encoded))

    return app


def sentry() -> Any:
    import sentry_sdk
    from sentry_sdk.integrations.asgi import SentryAsgiMiddleware

    sentry_sdk.init(traces_sample_rate=1.0)
    return SentryAsgiMiddleware(starlette())


def opentelemetry() -> Any:
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(starlette())


def base_http() -> Any:
    from starlette.middleware.base import BaseHTTPMiddleware

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app = starlette()
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    return app


INSIDE = {
    "starlette",
    "fastapi",
    "litestar",
    "quart",
    "django",
    "falcon",
    "blacksheep",
    "sentry",
    "opentelemetry",
    "base_http",
}


def wrapped(app: Any) -> SSEMiddleware:
    return SSEMiddleware(app, {"/ours": ticks}, ping=0.2)


def sentry_around() -> Any:
    import sentry_sdk
    from sentry_sdk.integrations.asgi import SentryAsgiMiddleware

    sentry_sdk.init(traces_sample_rate=1.0)
    return SentryAsgiMiddleware(wrapped(starlette()))


def opentelemetry_around() -> Any:
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(wrapped(starlette()))


def base_http_around() -> Any:
    from starlette.middleware.base import BaseHTTPMiddleware

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    return BaseHTTPMiddleware(BaseHTTPMiddleware(wrapped(starlette()), dispatch), dispatch)


def __getattr__(name: str) -> Any:
    """Build ``wrapped_<name>`` or ``<name>_is_around``, and import the framework of that app only."""
    if name.startswith("wrapped_") and name.removeprefix("wrapped_") in INSIDE:
        app = wrapped(globals()[name.removeprefix("wrapped_")]())
    elif name.endswith("_is_around"):
        app = globals()[name.removesuffix("_is_around") + "_around"]()
    else:
        raise AttributeError(name)
    globals()[name] = app  # uvicorn looks the name up twice
    return app
