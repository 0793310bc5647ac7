"""The responses of the adapters in views of every framework: they stream, or an error names the one to return."""

import gc
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import adapter_apps
import anyio
import asgiref.sync
import django.core.signals
import django.db
import fastapi
import pytest
from adapter_apps import APPS, seen
from starlette.testclient import TestClient

import asgi_sse
from asgi_sse import Request, SSEMiddleware, StreamRegistry, create_app
from asgi_sse.adapters import django as django_adapter
from asgi_sse.adapters import litestar as litestar_adapter
from asgi_sse.adapters import quart as quart_adapter
from asgi_sse.adapters import sse_starlette as starlette_adapter
from asgi_sse.testing import open_stream

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,  # Django runs views and sources in threads
    # Django 5.2 does not close the request's body after a response that failed.
    pytest.mark.filterwarnings(r"ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning"),
]

ASYNCIO_ONLY = {"quart", "django"}
HINT = "return the EventSourceResponse of asgi_sse.adapters"
made: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def clear_seen(request: pytest.FixtureRequest) -> Iterator[None]:
    seen.clear()
    yield
    if "django" in request.node.name:
        gc.collect()  # otherwise the warning would come in a test of another file


@pytest.fixture
def app(framework: str, anyio_backend: Any) -> Any:
    if framework in ASYNCIO_ONLY and "trio" in anyio_backend:
        pytest.skip(f"{framework} runs on asyncio only")
    if framework not in made:
        made[framework] = APPS[framework]()
    return made[framework]


every_framework = pytest.mark.parametrize("framework", APPS)


async def read_to_end(stream: Any) -> bytes:
    body = b""
    while chunk := await stream.read(timeout=60):
        body += chunk
    return body


@every_framework
@pytest.mark.parametrize("wrapped", [False, True])
async def test_events_are_streamed_until_the_client_leaves(app: Any, wrapped: bool) -> None:
    middleware = SSEMiddleware(app)
    async with open_stream(middleware if wrapped else app, "/async") as stream:
        assert stream.status == 200
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["x-accel-buffering"] == "no"
        assert [(await stream.receive(10)).id for _ in range(5)] == ["0", "1", "2", "3", "4"]
        assert len(middleware.registry) == wrapped  # one stream, of the adapter: the middleware does not adopt it
        await stream.disconnect()
        assert seen == ["finally"]
    assert middleware.registry.statistics().closed == ({"disconnected": 1} if wrapped else {})


@every_framework
async def test_synchronous_source_has_its_own_thread(app: Any) -> None:
    async with open_stream(app, "/sync") as stream:
        assert [event.data async for event in stream] == [f"{number} asgi_sse source" for number in range(3)]
        assert stream.complete
    assert seen == ["finally"]


@every_framework
@pytest.mark.parametrize("wrapped", [False, True])
async def test_failing_source_cuts_the_body_and_is_raised(app: Any, wrapped: bool) -> None:
    stream: Any = None
    with pytest.raises(
        Exception, match=r"the source failed|Exception caught after response started|TaskGroup"
    ) as caught:
        async with open_stream(SSEMiddleware(app) if wrapped else app, "/failing") as stream:
            assert (await stream.receive(10)).data == "before"
            await read_to_end(stream)
    assert not stream.complete
    raised: BaseException | None = caught.value
    while isinstance(raised, BaseExceptionGroup):  # some versions of Quart let the group of their tasks out
        (raised,) = raised.exceptions
    # Litestar raises an error of its own, caused by that of the source.
    assert isinstance(raised, ZeroDivisionError) or isinstance(getattr(raised, "__cause__", None), ZeroDivisionError)


@every_framework
async def test_subscription_is_streamed(app: Any, framework: str) -> None:
    async with open_stream(SSEMiddleware(app), "/channel") as stream:
        while not adapter_apps.broker.subscribers("a"):
            await anyio.sleep(0.01)
        await adapter_apps.broker.publish("a", "x")
        assert (await stream.receive(10)).data == "x"
        if framework == "django":
            async with open_stream(app, "/publish") as other:
                assert other.status == 200
                published_id = (await read_to_end(other)).decode()
            assert (await stream.receive(10)).data == "of a synchronous view"
            last = await stream.receive(10)
            assert (last.data, last.id) == ("and through the event loop", published_id)
        await stream.disconnect()
    assert adapter_apps.broker.subscribers("a") == 0


@every_framework
async def test_post_is_answered_with_a_stream(app: Any) -> None:
    async with open_stream(app, "/post", method="POST", body=b"hello") as stream:
        assert stream.status == 200
        assert [event.data async for event in stream] == ["hello", "[DONE]"]
        if app is made.get("litestar"):
            assert stream.headers["set-cookie"].startswith("a=b")


@every_framework
async def test_head_response_has_no_body(app: Any, framework: str) -> None:
    async with open_stream(app, "/async", method="HEAD") as stream:
        assert stream.status == (405 if framework in {"fastapi", "litestar"} else 200)  # these do not route HEAD to GET
        assert b"data" not in await read_to_end(stream)
        assert stream.complete
    assert seen == []


@every_framework
async def test_drain_ends_the_body_properly(app: Any) -> None:
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(app, registry=registry), "/async") as stream:
        await stream.receive(10)
        registry.begin_drain()
        assert (await read_to_end(stream)).rstrip().rpartition(b"\n")[2].startswith(b"retry: ")
        assert stream.complete
    assert seen == ["finally"]
    assert registry.statistics().closed == {"drained": 1}


@every_framework
async def test_stuck_client_is_dropped(app: Any) -> None:
    registry = StreamRegistry()
    wrapped = SSEMiddleware(app, registry=registry, send_timeout=0.3)
    stream: Any = None
    with suppress(Exception):  # SendTimeoutError or the error that a framework makes of it; Quart raises none
        async with open_stream(wrapped, "/async", capacity=1) as stream:
            while not registry.statistics().closed:
                await anyio.sleep(0.01)
            await read_to_end(stream)
    assert not stream.complete
    assert seen == ["finally"]
    assert registry.statistics().closed == {"timed_out": 1}


@pytest.mark.parametrize("framework", ["quart", "django"])
async def test_error_after_the_client_left_is_logged(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with open_stream(app, "/failing-cleanup") as stream:
        await stream.receive(10)
        with suppress(Exception):
            await stream.disconnect()
    assert "the source of /failing-cleanup raised after its client had left" in caplog.text
    assert "ZeroDivisionError: in the clean-up" in caplog.text


@every_framework
async def test_idle_stream_is_kept_alive(app: Any) -> None:
    async with open_stream(SSEMiddleware(app, ping=0.01), "/async") as stream:
        body = b""
        while body.count(b"data: ") < 3:
            body += await stream.read(10)
        assert b"\n: ping" in body


@pytest.mark.parametrize("framework", ["starlette", "litestar"])
async def test_plain_response_is_accepted(app: Any) -> None:
    async with open_stream(SSEMiddleware(app), "/plain") as stream:
        assert (await stream.receive(10)).id == "0"
    assert seen == ["finally"]


@pytest.mark.parametrize(
    ("framework", "path"), [("fastapi", "/plain"), ("quart", "/plain"), ("django", "/plain"), ("litestar", "/any")]
)
async def test_plain_response_is_refused_with_a_hint(app: Any, path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        status = 0
        try:
            async with open_stream(app, path) as stream:
                status = stream.status
                await read_to_end(stream)
        except Exception as exc:  # the server logs it
            caplog.records.append(logging.LogRecord("", logging.ERROR, "", 0, str(exc), (), None))
        assert status == 500
    assert seen == []
    for record in caplog.records:
        record.exc_info = None  # it holds the view's frame, and so the response
    gc.collect()
    assert any(HINT in record.getMessage() or HINT in str(record.exc_text) for record in caplog.records)


def test_fastapi_does_not_serialise_the_plain_response() -> None:
    app = fastapi.FastAPI()

    @app.get("/")
    async def view():  # type: ignore[no-untyped-def]
        return asgi_sse.EventSourceResponse([])

    with TestClient(app) as client, pytest.raises(Exception, match=HINT):
        client.get("/")


def test_fastapi_refuses_the_plain_response_as_an_annotation() -> None:
    app = fastapi.FastAPI()
    with pytest.raises(TypeError, match=HINT):

        @app.get("/")
        async def view() -> asgi_sse.EventSourceResponse:
            return asgi_sse.EventSourceResponse([])


@pytest.mark.parametrize("framework", ["fastapi"])
async def test_fastapi_documents_the_media_type_and_accepts_a_generator(app: Any) -> None:
    content = app.openapi()["paths"]["/generator"]["get"]["responses"]["200"]["content"]
    assert list(content) == ["text/event-stream"]
    async with open_stream(app, "/generator") as stream:
        assert [(await stream.receive(10)).id for _ in range(3)] == ["0", "1", "2"]
        await stream.disconnect()
        assert seen == ["finally"]


async def test_fastapi_view_that_returns_a_single_dict_is_refused(anyio_backend: Any) -> None:
    app = fastapi.FastAPI()

    @app.get("/", response_class=starlette_adapter.EventSourceResponse)
    async def view() -> Any:
        return {"data": "one"}

    with pytest.raises(TypeError, match="content must be a series of events, got a single dict"):
        async with open_stream(app, "/") as stream:
            await read_to_end(stream)


@pytest.mark.parametrize("framework", ["starlette"])
async def test_starlette_endpoint_class_answers_get_only(app: Any) -> None:
    async with open_stream(app, "/class") as stream:
        assert (await stream.receive(10)).id == "0"
    async with open_stream(app, "/class", method="POST") as stream:
        assert stream.status == 405


@pytest.mark.parametrize("framework", ["quart"])
async def test_quart_source_may_use_the_request(app: Any) -> None:
    async with open_stream(app, "/context?name=x") as stream:
        assert [event.data async for event in stream] == ["x"]


@pytest.mark.parametrize("framework", ["quart"])
async def test_nested_request_has_its_own_scope(app: Any) -> None:
    async def outer(scope: Any, receive: Any, send: Any) -> None:
        async with open_stream(app, "/sync") as inner:
            count = len([event async for event in inner])
        await asgi_sse.EventSourceResponse([count])(scope, receive, send)

    async with open_stream(SSEMiddleware(outer), "/", method="GET") as stream:
        assert (await stream.receive(10)).data == "3"


def test_litestar_mounts_apps_and_accepts_a_raw_app() -> None:
    import litestar
    from litestar.testing import TestClient as LitestarClient

    async def two(request: Request) -> AsyncIterator[str]:
        yield request.path
        yield "[DONE]"

    async def raw(scope: litestar.types.Scope, receive: litestar.types.Receive, send: litestar.types.Send) -> None:
        await asgi_sse.EventSourceResponse(["raw"])(scope, receive, send)  # type: ignore[arg-type]

    handlers = [
        litestar_adapter.mount("/sse", create_app({"/two": two, "/": two, "/three/": two})),
        litestar.asgi("/raw", copy_scope=True)(raw),
        litestar.asgi("/alone", copy_scope=True)(create_app({"/alone": two})),
    ]
    with LitestarClient(litestar.Litestar(handlers)) as client:
        for path in ("/sse/two", "/sse", "/sse/three/", "/alone"):
            app_path = path.removeprefix("/sse") or "/"
            assert client.get(path).text.endswith(f"data: {app_path}\n\ndata: [DONE]\n\n")
        assert client.get("/raw").text.endswith("data: raw\n\n")
        assert client.get("/sse/two/").status_code == 404


# Django


@pytest.fixture
def on_django(anyio_backend: Any) -> Any:
    if "trio" in anyio_backend:
        pytest.skip("Django runs on asyncio only")
    if "django" not in made:
        made["django"] = APPS["django"]()
    return made["django"]


async def test_gzip_of_django_does_not_hold_events_back(on_django: Any) -> None:
    headers = {"accept": "text/event-stream", "accept-encoding": "gzip"}
    async with open_stream(SSEMiddleware(on_django), "/async", headers=headers) as stream:
        assert "content-encoding" not in {name.lower() for name in stream.headers}
        assert (await stream.receive(10)).id == "0"


async def test_middleware_of_django_may_wrap_the_body(on_django: Any) -> None:
    """Django closes only the outermost generator when the client leaves, but the source still ends."""
    headers = {"accept-encoding": "gzip"}
    async with open_stream(on_django, "/async", headers=headers) as stream:
        assert stream.headers["Content-Encoding"] == "gzip"
        await stream.read(timeout=100)
        await stream.disconnect()
    with anyio.fail_after(10):
        while not seen:
            await anyio.sleep(0.01)
    assert seen == ["finally"]


def test_wsgi_is_refused() -> None:
    response = django_adapter.EventSourceResponse([])
    with pytest.raises(TypeError, match="needs ASGI"):
        list(response)


async def test_django_endpoint_has_its_own_thread_and_signals(
    on_django: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Django never closes a database in memory, and Python 3.13 and later warn of it.
    monkeypatch.setitem(django.db.connections.settings["default"], "NAME", str(tmp_path / "database"))
    threads: set[int] = set()
    both = anyio.Event()
    signals: list[str] = []

    def query() -> int:
        with django.db.connection.cursor() as cursor:
            threads.add(threading.get_ident())
            return int(cursor.execute("SELECT 7").fetchone()[0])

    @django_adapter.endpoint
    async def numbers(request: Request) -> AsyncIterator[int]:
        """Yields a number."""
        yield await asgiref.sync.sync_to_async(query)()
        if len(threads) == 2:
            both.set()
        await both.wait()

    def note(signal: Any, **more: Any) -> None:
        signals.append("started" if signal is django.core.signals.request_started else "finished")

    django.core.signals.request_started.connect(note)
    django.core.signals.request_finished.connect(note)
    try:
        app = SSEMiddleware(on_django, routes={"/numbers": numbers})
        async with open_stream(app, "/numbers") as one, open_stream(app, "/numbers") as other:
            for stream in (one, other):
                assert [event.data async for event in stream] == ["7"]
    finally:
        django.core.signals.request_started.disconnect(note)
        django.core.signals.request_finished.disconnect(note)
    assert len(threads) == 2  # without the decorator, all endpoints share one
    assert sorted(signals) == ["finished", "finished", "started", "started"]
    assert numbers.__doc__ == "Yields a number."


async def test_synchronous_source_closes_its_connections_in_its_thread(
    on_django: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Django never closes a connection to a database in memory.
    monkeypatch.setitem(django.db.connections.settings["default"], "NAME", str(tmp_path / "database"))
    opened: list[Any] = []

    def rows() -> Iterator[int]:
        with django.db.connection.cursor() as cursor:
            opened.append(django.db.connections["default"].connection)
            for (number,) in cursor.execute("SELECT 1 UNION SELECT 2"):
                yield number

    @django_adapter.endpoint
    def endpoint() -> Iterator[int]:
        return rows()

    @django_adapter.endpoint
    def generator(request: Request) -> Iterator[int]:
        yield from rows()

    app = SSEMiddleware(on_django, routes={"/rows": generator, "/plain": endpoint})
    async with open_stream(app, "/rows") as stream:
        assert [event.data async for event in stream] == ["1", "2"]
    async with open_stream(app_returning(rows), "/") as stream:
        assert [event.data async for event in stream] == ["1", "2"]
    for connection in opened:
        with pytest.raises(Exception, match=r"closed database|created in a thread"):
            connection.execute("SELECT 1")


def app_returning(rows: Any) -> Any:
    from django.core.handlers.asgi import ASGIHandler

    class Handler(ASGIHandler):
        async def get_response_async(self, request: Any) -> Any:
            return django_adapter.EventSourceResponse(rows())

    return Handler()


def test_django_endpoint_refuses_other_values() -> None:
    with pytest.raises(TypeError, match="must be callable, got"):
        django_adapter.endpoint(7)  # type: ignore[arg-type]


# Errors


@pytest.mark.parametrize(
    "response",
    [django_adapter.EventSourceResponse, litestar_adapter.EventSourceResponse, quart_adapter.EventSourceResponse],
)
def test_invalid_arguments_are_refused_at_once(response: Any) -> None:
    adapter_apps.APPS["django"]()  # Django's response needs the settings
    with pytest.raises(TypeError, match="put it in a list"):
        response("text")
    with pytest.raises(ValueError, match="ping must be at least 0 or None, got -1"):
        response([], ping=-1)
    with pytest.raises(ValueError, match="would inject headers"):
        response([], headers={"x": "a\r\nb"})


def test_response_that_was_never_sent_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    asgi_sse.EventSourceResponse([])
    assert "was created but never sent" in caplog.text
    assert HINT in caplog.text


def test_missing_attribute_names_the_adapters() -> None:
    response = asgi_sse.EventSourceResponse([])
    with pytest.raises(AttributeError, match=HINT):
        response.headers  # type: ignore[attr-defined]  # noqa: B018
    assert response.status_code == 200
    assert dict(response.raw_headers)[b"x-accel-buffering"] == b"no"
