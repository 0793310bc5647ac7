"""Our responses in the views of every framework: they stream, or an error says what to return instead."""

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
    pytest.mark.real_time,  # Django's views and sources have threads
    # Django 5.2 leaves the request's body open behind a response that failed.
    pytest.mark.filterwarnings(r"ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning"),
]

ON_ASYNCIO_ALONE = {"quart", "django"}
HINT = "return the EventSourceResponse of asgi_sse.adapters"
made: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def nothing_seen(request: pytest.FixtureRequest) -> Iterator[None]:
    seen.clear()
    yield
    if "django" in request.node.name:
        gc.collect()  # or the warning would come in a test of another file


@pytest.fixture
def app(framework: str, anyio_backend: Any) -> Any:
    if framework in ON_ASYNCIO_ALONE and "trio" in anyio_backend:
        pytest.skip(f"{framework} runs on asyncio alone")
    if framework not in made:
        made[framework] = APPS[framework]()
    return made[framework]


every_framework = pytest.mark.parametrize("framework", APPS)


async def the_end_of(stream: Any) -> bytes:
    body = b""
    while chunk := await stream.read(timeout=60):
        body += chunk
    return body


@every_framework
@pytest.mark.parametrize("wrapped", [False, True])
async def test_events_come_as_they_are_made_until_the_client_leaves(app: Any, wrapped: bool) -> None:
    middleware = SSEMiddleware(app)
    async with open_stream(middleware if wrapped else app, "/async") as stream:
        assert stream.status == 200
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["x-accel-buffering"] == "no"
        assert [(await stream.receive(10)).id for _ in range(5)] == ["0", "1", "2", "3", "4"]
        assert len(middleware.registry) == wrapped  # of the adapter alone: it is not adopted, too
        await stream.disconnect()
        assert seen == ["finally"]
    assert middleware.registry.statistics().closed == ({"disconnected": 1} if wrapped else {})


@every_framework
async def test_synchronous_sources_have_a_thread_of_their_own(app: Any) -> None:
    async with open_stream(app, "/sync") as stream:
        assert [event.data async for event in stream] == [f"{number} asgi_sse source" for number in range(3)]
        assert stream.complete
    assert seen == ["finally"]


@every_framework
@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_source_that_fails_cuts_the_body_and_is_raised(app: Any, wrapped: bool) -> None:
    stream: Any = None
    with pytest.raises(Exception, match=r"the source failed|Exception caught after response started") as caught:
        async with open_stream(SSEMiddleware(app) if wrapped else app, "/failing") as stream:
            assert (await stream.receive(10)).data == "before"
            await the_end_of(stream)
    assert not stream.complete
    # Litestar has an error of its own for it, with the cause behind.
    assert isinstance(caught.value, ZeroDivisionError) or isinstance(caught.value.__cause__, ZeroDivisionError)


@every_framework
async def test_a_subscription_is_streamed(app: Any, framework: str) -> None:
    async with open_stream(SSEMiddleware(app), "/channel") as stream:
        while not adapter_apps.broker.subscribers("a"):
            await anyio.sleep(0.01)
        await adapter_apps.broker.publish("a", "x")
        assert (await stream.receive(10)).data == "x"
        if framework == "django":
            async with open_stream(app, "/publish") as other:
                assert other.status == 200
                given = (await the_end_of(other)).decode()
            assert (await stream.receive(10)).data == "of a synchronous view"
            last = await stream.receive(10)
            assert (last.data, last.id) == ("and through the event loop", given)
        await stream.disconnect()
    assert adapter_apps.broker.subscribers("a") == 0


@every_framework
async def test_a_post_is_answered_with_a_stream(app: Any) -> None:
    async with open_stream(app, "/post", method="POST", body=b"hello") as stream:
        assert stream.status == 200
        assert [event.data async for event in stream] == ["hello", "[DONE]"]
        if app is made.get("litestar"):
            assert stream.headers["set-cookie"].startswith("a=b")


@every_framework
async def test_head_has_no_body_and_ends(app: Any, framework: str) -> None:
    async with open_stream(app, "/async", method="HEAD") as stream:
        assert stream.status == (405 if framework in {"fastapi", "litestar"} else 200)  # those route no HEAD to a GET
        assert b"data" not in await the_end_of(stream)
        assert stream.complete
    assert seen == []


@every_framework
async def test_a_drain_ends_it_properly(app: Any) -> None:
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(app, registry=registry), "/async") as stream:
        await stream.receive(10)
        registry.begin_drain()
        assert (await the_end_of(stream)).rstrip().rpartition(b"\n")[2].startswith(b"retry: ")
        assert stream.complete
    assert seen == ["finally"]
    assert registry.statistics().closed == {"drained": 1}


@every_framework
async def test_a_stuck_client_holds_its_source_and_is_dropped(app: Any) -> None:
    registry = StreamRegistry()
    wrapped = SSEMiddleware(app, registry=registry, send_timeout=0.3)
    stream: Any = None
    with suppress(Exception):  # SendTimeoutError, as it is or as its framework reports it; Quart keeps it for itself
        async with open_stream(wrapped, "/async", capacity=1) as stream:
            while not registry.statistics().closed:
                await anyio.sleep(0.01)
            await the_end_of(stream)
    assert not stream.complete
    assert seen == ["finally"]
    assert registry.statistics().closed == {"timed_out": 1}


@pytest.mark.parametrize("framework", ["quart", "django"])
async def test_what_a_source_raises_behind_its_client_is_logged(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with open_stream(app, "/rude") as stream:
        await stream.receive(10)
        with suppress(Exception):
            await stream.disconnect()
    assert "the source of /rude raised when its client had left" in caplog.text
    assert "ZeroDivisionError: in the clean-up" in caplog.text


@every_framework
async def test_an_idle_stream_is_kept_alive(app: Any) -> None:
    async with open_stream(SSEMiddleware(app, ping=0.01), "/async") as stream:
        body = b""
        while body.count(b"data: ") < 3:
            body += await stream.read(10)
        assert b"\n: ping" in body


@pytest.mark.parametrize("framework", ["starlette", "litestar"])
async def test_the_plain_response_is_taken(app: Any) -> None:
    async with open_stream(SSEMiddleware(app), "/plain") as stream:
        assert (await stream.receive(10)).id == "0"
    assert seen == ["finally"]


@pytest.mark.parametrize(
    ("framework", "path"), [("fastapi", "/plain"), ("quart", "/plain"), ("django", "/plain"), ("litestar", "/any")]
)
async def test_where_the_plain_response_is_not_taken_that_is_told(
    app: Any, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        status = 0
        try:
            async with open_stream(app, path) as stream:
                status = stream.status
                await the_end_of(stream)
        except Exception as exc:  # which the server logs
            caplog.records.append(logging.LogRecord("", logging.ERROR, "", 0, str(exc), (), None))
        assert status == 500
    assert seen == []
    for record in caplog.records:
        record.exc_info = None  # which holds the view's frame, and so the response
    gc.collect()
    assert any(HINT in record.getMessage() or HINT in str(record.exc_text) for record in caplog.records)


def test_fastapi_without_an_annotation_does_not_make_json_of_it() -> None:
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
async def test_fastapi_knows_the_media_type_and_takes_a_generator(app: Any) -> None:
    content = app.openapi()["paths"]["/generator"]["get"]["responses"]["200"]["content"]
    assert list(content) == ["text/event-stream"]
    async with open_stream(app, "/generator") as stream:
        assert [(await stream.receive(10)).id for _ in range(3)] == ["0", "1", "2"]
        await stream.disconnect()
        assert seen == ["finally"]


async def test_fastapi_is_told_when_what_it_serialised_is_no_series(anyio_backend: Any) -> None:
    app = fastapi.FastAPI()

    @app.get("/", response_class=starlette_adapter.EventSourceResponse)
    async def view() -> Any:
        return {"data": "one"}

    with pytest.raises(TypeError, match="a single dict, not a series of events"):
        async with open_stream(app, "/") as stream:
            await the_end_of(stream)


@pytest.mark.parametrize("framework", ["starlette"])
async def test_an_endpoint_class_for_starlette(app: Any) -> None:
    async with open_stream(app, "/class") as stream:
        assert (await stream.receive(10)).id == "0"
    async with open_stream(app, "/class", method="POST") as stream:
        assert stream.status == 405


@pytest.mark.parametrize("framework", ["quart"])
async def test_quart_lets_the_source_look_at_the_request(app: Any) -> None:
    async with open_stream(app, "/context?name=x") as stream:
        assert [event.data async for event in stream] == ["x"]


@pytest.mark.parametrize("framework", ["quart"])
async def test_a_request_inside_of_another_has_its_own_scope(app: Any) -> None:
    async def outer(scope: Any, receive: Any, send: Any) -> None:
        async with open_stream(app, "/sync") as inside:
            count = len([event async for event in inside])
        await asgi_sse.EventSourceResponse([count])(scope, receive, send)

    async with open_stream(SSEMiddleware(outer), "/", method="GET") as stream:
        assert (await stream.receive(10)).data == "3"


def test_litestar_mounts_and_takes_a_raw_app() -> None:
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
            inside = path.removeprefix("/sse") or "/"
            assert client.get(path).text.endswith(f"data: {inside}\n\ndata: [DONE]\n\n")
        assert client.get("/raw").text.endswith("data: raw\n\n")
        assert client.get("/sse/two/").status_code == 404


# Django


@pytest.fixture
def on_django(anyio_backend: Any) -> Any:
    if "trio" in anyio_backend:
        pytest.skip("Django runs on asyncio alone")
    if "django" not in made:
        made["django"] = APPS["django"]()
    return made["django"]


async def test_djangos_gzip_does_not_hold_it(on_django: Any) -> None:
    headers = {"accept": "text/event-stream", "accept-encoding": "gzip"}
    async with open_stream(SSEMiddleware(on_django), "/async", headers=headers) as stream:
        assert "content-encoding" not in {name.lower() for name in stream.headers}
        assert (await stream.receive(10)).id == "0"


async def test_a_middleware_of_django_may_wrap_it(on_django: Any) -> None:
    """Then only the outermost generator is closed when the client leaves; the source learns of it all the same."""
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


async def test_an_endpoint_beside_django_has_its_own_thread_and_signals(on_django: Any) -> None:
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
    assert len(threads) == 2  # without, all endpoints share one
    assert sorted(signals) == ["finished", "finished", "started", "started"]
    assert numbers.__doc__ == "Yields a number."


async def test_the_connections_of_a_synchronous_source_are_closed_in_its_thread(
    on_django: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Django keeps one in memory open for ever.
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
    async with open_stream(django_adapter_app(rows), "/") as stream:
        assert [event.data async for event in stream] == ["1", "2"]
    for connection in opened:
        with pytest.raises(Exception, match=r"closed database|created in a thread"):
            connection.execute("SELECT 1")


def django_adapter_app(rows: Any) -> Any:
    from django.core.handlers.asgi import ASGIHandler

    class Handler(ASGIHandler):  # type: ignore[misc]
        async def get_response_async(self, request: Any) -> Any:
            return django_adapter.EventSourceResponse(rows())

    return Handler()


def test_what_is_no_endpoint_is_refused() -> None:
    with pytest.raises(TypeError, match="must be callable, got"):
        django_adapter.endpoint(7)  # type: ignore[arg-type]


# What is wrong


@pytest.mark.parametrize(
    "response",
    [django_adapter.EventSourceResponse, litestar_adapter.EventSourceResponse, quart_adapter.EventSourceResponse],
)
def test_wrong_arguments_are_told_at_once(response: Any) -> None:
    adapter_apps.APPS["django"]()  # its responses ask for settings
    with pytest.raises(TypeError, match="put it in a list"):
        response("text")
    with pytest.raises(ValueError, match="ping must be at least 0 or None, got -1"):
        response([], ping=-1)
    with pytest.raises(ValueError, match="would inject headers"):
        response([], headers={"x": "a\r\nb"})


def test_a_response_that_was_never_sent_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    asgi_sse.EventSourceResponse([])
    assert "was made, but never sent" in caplog.text
    assert HINT in caplog.text


def test_an_attribute_of_other_responses_is_told_of() -> None:
    response = asgi_sse.EventSourceResponse([])
    with pytest.raises(AttributeError, match=HINT):
        response.headers  # type: ignore[attr-defined]  # noqa: B018
    assert response.status_code == 200
    assert dict(response.raw_headers)[b"x-accel-buffering"] == b"no"
