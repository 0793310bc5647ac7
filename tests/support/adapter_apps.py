"""One app per framework, whose views return the response of its adapter.

Each app has /async, /sync, /failing, /channel and /post. Its /plain returns the plain response, which some frameworks
refuse. The sources record their clean-up in `seen`.
"""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import django
import fastapi
import litestar
import quart
from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path
from starlette.applications import Starlette
from starlette.routing import Route

import asgi_sse
from asgi_sse.adapters import django as django_adapter
from asgi_sse.adapters import litestar as litestar_adapter
from asgi_sse.adapters import quart as quart_adapter
from asgi_sse.adapters import sse_starlette as starlette_adapter

seen: list[str] = []
broker = asgi_sse.Broker()


async def async_events() -> AsyncIterator[Any]:
    try:
        for number in range(10**9):
            yield {"data": str(number), "id": str(number)}
            await anyio.sleep(0.03)
    finally:
        seen.append("finally")


def sync_events() -> Iterator[Any]:
    try:
        for number in range(3):
            yield {"data": f"{number} {threading.current_thread().name}"}
    finally:
        seen.append("finally")


async def failing_cleanup() -> AsyncIterator[Any]:
    try:
        yield {"data": "first"}
        await anyio.sleep_forever()
    finally:
        raise ZeroDivisionError("in the clean-up")


async def failing() -> AsyncIterator[Any]:
    yield {"data": "before"}
    await anyio.sleep(0.01)
    raise ZeroDivisionError("the source failed")


async def short(text: str) -> AsyncIterator[Any]:
    yield {"data": text}
    yield {"data": "[DONE]"}


def channel_events() -> Any:
    return broker.subscribe("a")


SOURCES: dict[str, Callable[[], Any]] = {
    "/async": async_events,
    "/sync": sync_events,
    "/failing": failing,
    "/channel": channel_events,
}


def starlette_app() -> Any:
    def returning(source: Callable[[], Any]) -> Any:
        async def view(request: Any) -> Any:
            return starlette_adapter.EventSourceResponse(source())

        return view

    async def plain(request: Any) -> Any:
        return asgi_sse.EventSourceResponse(async_events())

    async def post(request: Any) -> Any:
        return starlette_adapter.EventSourceResponse(short((await request.body()).decode()))

    class Ticks(starlette_adapter.EventSourceEndpoint):
        options: ClassVar[Any] = {"ping": 5}

        def events(self, request: Any) -> Any:
            return async_events()

    routes = [Route(path, returning(source)) for path, source in SOURCES.items()]
    more = [Route("/plain", plain), Route("/post", post, methods=["POST"]), Route("/class", Ticks)]
    return Starlette(routes=[*routes, *more])


def fastapi_app() -> Any:
    app = fastapi.FastAPI()

    @app.get("/async", response_class=starlette_adapter.EventSourceResponse)
    async def asynchronous() -> Any:
        return starlette_adapter.EventSourceResponse(async_events())

    @app.get("/sync")
    def synchronous() -> starlette_adapter.EventSourceResponse:
        return starlette_adapter.EventSourceResponse(sync_events())

    @app.get("/failing")
    async def fail() -> starlette_adapter.EventSourceResponse:
        return starlette_adapter.EventSourceResponse(failing())

    @app.post("/post")
    async def post(request: fastapi.Request) -> starlette_adapter.EventSourceResponse:
        return starlette_adapter.EventSourceResponse(short((await request.body()).decode()))

    @app.get("/channel")
    async def channel() -> starlette_adapter.EventSourceResponse:
        return starlette_adapter.EventSourceResponse(channel_events())

    @app.get("/plain")
    async def plain() -> Any:
        return asgi_sse.EventSourceResponse(async_events())

    @app.get("/generator", response_class=starlette_adapter.EventSourceResponse)
    async def generator() -> AsyncIterator[Any]:
        try:
            for number in range(10**9):
                yield {"data": str(number), "id": str(number)}
        finally:
            await anyio.lowlevel.checkpoint()
            seen.append("finally")

    return app


def litestar_app() -> Any:
    @litestar.get("/async")
    async def asynchronous() -> litestar_adapter.EventSourceResponse:
        return litestar_adapter.EventSourceResponse(async_events())

    @litestar.get("/sync", sync_to_thread=False)
    def synchronous() -> litestar_adapter.EventSourceResponse:
        return litestar_adapter.EventSourceResponse(sync_events())

    @litestar.get("/failing")
    async def fail() -> litestar_adapter.EventSourceResponse:
        return litestar_adapter.EventSourceResponse(failing())

    @litestar.post("/post")
    async def post(request: litestar.Request[Any, Any, Any]) -> litestar_adapter.EventSourceResponse:
        return litestar_adapter.EventSourceResponse(short((await request.body()).decode()), cookies={"a": "b"})

    @litestar.get("/plain")
    async def plain() -> asgi_sse.EventSourceResponse:
        return asgi_sse.EventSourceResponse(async_events())

    @litestar.get("/any")
    async def as_any() -> Any:
        return asgi_sse.EventSourceResponse(async_events())

    @litestar.get("/channel")
    async def channel() -> litestar_adapter.EventSourceResponse:
        return litestar_adapter.EventSourceResponse(channel_events())

    return litestar.Litestar([asynchronous, synchronous, fail, post, plain, as_any, channel])


def quart_app() -> Any:
    app = quart.Quart("app")
    app.config["RESPONSE_TIMEOUT"] = 0.1

    @app.get("/async")
    async def asynchronous() -> Any:
        return quart_adapter.EventSourceResponse(async_events())

    @app.get("/sync")
    async def synchronous() -> Any:
        return quart_adapter.EventSourceResponse(sync_events())

    @app.get("/failing")
    async def fail() -> Any:
        return quart_adapter.EventSourceResponse(failing())

    @app.post("/post")
    async def post() -> Any:
        return quart_adapter.EventSourceResponse(short((await quart.request.get_data()).decode()))

    @app.get("/plain")
    async def plain() -> Any:
        return asgi_sse.EventSourceResponse(async_events())

    @app.get("/channel")
    async def channel() -> Any:
        return quart_adapter.EventSourceResponse(channel_events())

    @app.get("/failing-cleanup")
    async def failing_cleanup_view() -> Any:
        return quart_adapter.EventSourceResponse(failing_cleanup())

    @app.get("/context")
    async def context() -> Any:
        async def events() -> AsyncIterator[str]:
            yield quart.request.args["name"]

        return quart_adapter.EventSourceResponse(events())

    return app


def django_app() -> Any:
    async def asynchronous(request: Any) -> Any:
        return django_adapter.EventSourceResponse(async_events())

    def synchronous(request: Any) -> Any:
        return django_adapter.EventSourceResponse(sync_events())

    async def fail(request: Any) -> Any:
        return django_adapter.EventSourceResponse(failing())

    async def failing_cleanup_view(request: Any) -> Any:
        return django_adapter.EventSourceResponse(failing_cleanup())

    async def post(request: Any) -> Any:
        return django_adapter.EventSourceResponse(short(request.body.decode()))

    async def plain(request: Any) -> Any:
        return asgi_sse.EventSourceResponse(async_events())

    def channel(request: Any) -> Any:
        return django_adapter.EventSourceResponse(channel_events())

    def publish(request: Any) -> Any:
        broker.publish_nowait("a", "of a synchronous view")
        return HttpResponse(async_to_sync(broker.publish)("a", "and through the event loop"))

    views = {
        "channel": channel,
        "publish": publish,
        "async": asynchronous,
        "sync": synchronous,
        "failing": fail,
        "post": post,
        "plain": plain,
        "failing-cleanup": failing_cleanup_view,
    }
    urls = type("urls", (), {"urlpatterns": [path(name, view) for name, view in views.items()]})
    if not settings.configured:
        settings.configure(
            ROOT_URLCONF=urls,
            ALLOWED_HOSTS=["*"],
            SECRET_KEY="x",
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
            MIDDLEWARE=[
                "django.middleware.security.SecurityMiddleware",
                "django.middleware.gzip.GZipMiddleware",
                "django.middleware.common.CommonMiddleware",
            ],
        )
        django.setup()
    return get_asgi_application()


APPS: dict[str, Callable[[], Any]] = {
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "litestar": litestar_app,
    "quart": quart_app,
    "django": django_app,
}
