"""`asgi_sse.testing`: what it says of a stream, an app that runs and stops, virtual time, httpx; and the plugin."""

import threading
from collections.abc import AsyncIterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import httpx
import httpx2
import pytest
from adapter_apps import APPS
from starlette.testclient import TestClient

import asgi_sse
from asgi_sse import Broker, EventDecoder, EventSourceResponse, Request, ServerSentEvent, SSEMiddleware, create_app
from asgi_sse.testing import (
    StreamingASGITransport,
    VirtualTimeLoop,
    assert_event,
    open_stream,
    running,
    virtual_time,
)

pytest_plugins = ["pytester"]
on_both = pytest.mark.anyio

closed: list[str] = []


async def ticks(request: Request) -> AsyncIterator[dict[str, Any]]:
    """One a second, from where the client was."""
    try:
        for number in count(int(request.last_event_id or 0) + 1):
            yield {"data": {"n": number}, "event": "tick", "id": number}
            await anyio.sleep(1)
    finally:
        closed.append(request.path)


async def three() -> AsyncIterator[dict[str, Any]]:
    for number in (1, 2, 3):
        yield {"data": str(number), "id": number}


async def fails() -> AsyncIterator[str]:
    yield "first"
    await anyio.sleep(1)
    raise TimeoutError("the database")


async def echo(request: Request) -> AsyncIterator[str]:
    yield f"{request.headers['content-type']} {await request.json()}"


def make_app(**options: Any) -> SSEMiddleware:
    return create_app({"/ticks": ticks, "/three": three, "/fails": fails, "/echo": echo}, **options)


def plain_app(*messages: dict[str, Any]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send({"type": "http.response.body", **message})

    return app


HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


# Expectations


@on_both
async def test_what_is_expected_and_comes() -> None:
    async with open_stream(make_app(), "/ticks") as stream:
        received = await stream.expect({"n": 1}, event="tick", id=1)
        assert received.data == '{"n":1}'
        assert await stream.receive_json(timeout=2) == {"n": 2}
        await stream.expect_nothing(0.5)
        await stream.expect('{"n":3}', id="3")
        await stream.expect(timeout=2)
        assert [event.id for event in await stream.collect(3, timeout=4)] == ["5", "6", "7"]
    async with open_stream(make_app(), "/three") as stream:
        assert [event.data for event in await stream.collect(3)] == ["1", "2", "3"]
        await stream.expect_end()


@on_both
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"data": {"n": 3}}, r"expected data=\{'n': 3\}; the next event is .*\"n\":2.*: its data differs"),
        ({"data": "two"}, "expected data='two'; .* its data differs"),
        ({"event": "tock"}, "expected event='tock'; .* its type differs"),
        ({"data": {"n": 2}, "id": 3}, "expected data=.*, id=3; .* its id differs"),
    ],
)
async def test_another_event_than_expected_is_shown_with_those_before(wanted: dict[str, Any], message: str) -> None:
    async with open_stream(make_app(), "/ticks") as stream:
        await stream.expect()
        with pytest.raises(AssertionError, match=message) as caught:
            await stream.expect(**wanted, timeout=2)
    assert "<OpenStream GET /ticks 200 open>; the last events before: ServerSentEvent(data='{\"n\":1}'" in str(
        caught.value
    )


@on_both
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.expect("x", timeout=0.5), "expected data='x': no event came within 0.5 s.*before: .*\"n\":1"),
        (lambda s: s.collect(4, timeout=2.5), r"2 of 4 events came within 2.5 s. <OpenStream GET /ticks 200 open>"),
        (lambda s: s.expect_nothing(1.5), r"expected nothing for 1.5 s; .*\"n\":2.* came"),
        (lambda s: s.expect_end(0.5), r"expected the end of the body; it goes on: no event came within 0.5 s"),
        (lambda s: s.expect_end(2), r"expected the end of the body; .*\"n\":2.* came"),
    ],
)
async def test_what_does_not_come_is_told(call: Any, message: str) -> None:
    async with open_stream(make_app(), "/ticks") as stream:
        await stream.expect()
        with pytest.raises(AssertionError, match=message):
            await call(stream)


@on_both
async def test_what_is_no_event_stream_is_told() -> None:
    async with open_stream(make_app(), "/nowhere") as stream:
        with pytest.raises(AssertionError, match=r"404 ended>, which is no event stream.*text/plain.*b'Not Found'"):
            await stream.expect("x")
    async with open_stream(plain_app(HEAD, {"body": b"data: no blank line", "more_body": True})) as stream:
        with pytest.raises(AssertionError, match="what came last is no event, or not a whole one: b'data: no blank"):
            await stream.expect_nothing(1)
        with pytest.raises(AssertionError, match=r"the app returned without it.*more_body"):
            await stream.expect_end()


@on_both
async def test_what_the_app_raises_is_raised_as_it_is() -> None:
    """A TimeoutError of its own too, which is not that nothing came."""
    calls: list[Any] = [
        lambda s: s.expect("x", timeout=5),
        lambda s: s.collect(2, timeout=5),
        lambda s: s.expect_nothing(5),
        lambda s: s.expect_end(5),
        lambda s: s.receive(5),
    ]
    for call in calls:
        with pytest.raises(TimeoutError, match="the database"):
            async with open_stream(make_app(), "/fails") as stream:
                await stream.expect("first")
                await call(stream)


@on_both
async def test_data_that_is_no_json() -> None:
    async with open_stream(make_app(), "/fails") as stream:
        with pytest.raises(AssertionError, match=r"data='first'.* is no JSON"):
            await stream.receive_json()
    with pytest.raises(AssertionError, match=r"expected data=\{\}"):
        assert_event(ServerSentEvent("x"), {})


def test_events_of_another_decoder() -> None:
    (event,) = EventDecoder().feed(b'id: 7\nevent: order\ndata: {"a": [1, 2]}\n\n')
    assert_event(event, {"a": [1, 2]}, event="order", id=7)
    with pytest.raises(AssertionError, match=r"expected event='message'; .* came: its type differs"):
        assert_event(event, event="message")


@on_both
async def test_a_body_of_json() -> None:
    async with open_stream(make_app(), "/echo", method="POST", json={"a": None}) as stream:
        await stream.expect("application/json {'a': None}")


@on_both
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"app": None}, TypeError, "app=None is not an ASGI app"),
        ({"path": "http://host/"}, ValueError, "path='http://host/'.*begins with '/'"),
        ({"capacity": 0}, ValueError, "capacity=0 has no room"),
        ({"body": "text"}, TypeError, "body='text' is str; give bytes, or json="),
    ],
)
async def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        async with open_stream(**{"app": make_app(), **arguments}):
            pass
    if "app" in arguments:
        with pytest.raises(error, match=message):
            StreamingASGITransport(arguments["app"])
        with pytest.raises(error, match=message):
            async with running(arguments["app"]):
                pass


@on_both
async def test_an_app_that_sends_no_head_is_told() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()

    with pytest.raises(TimeoutError, match=r"no head within 0.05 s: <OpenStream GET / no response yet"):
        async with open_stream(silent, timeout=0.05):
            pass


@on_both
async def test_a_head_that_comes_in_the_turn_of_the_deadline_has_come() -> None:
    async def raises(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    for _ in range(20):  # trio runs what is ready in any order
        async with open_stream(plain_app(HEAD, {"body": b"data: x\n\n"}), timeout=1e-9) as stream:
            await stream.expect("x")
        with pytest.raises(ZeroDivisionError):
            async with open_stream(raises, timeout=1e-9):
                pass


@on_both
async def test_an_app_that_does_not_heed_the_disconnect_is_told_and_cancelled() -> None:
    ended = []

    async def heedless(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(
        AssertionError,
        match=r"not returned 0.05 s after its client has left: <OpenStream GET / 200 open>.*http.disconnect",
    ):
        async with open_stream(heedless, timeout=0.05):
            pass
    assert ended
    with pytest.raises(ZeroDivisionError) as caught:
        async with open_stream(heedless, timeout=0.05):
            raise ZeroDivisionError
    assert "not returned" in caught.value.__notes__[0]


# Coming back


@on_both
async def test_a_client_that_comes_back_goes_on_where_it_was() -> None:
    async with open_stream(make_app(), "/ticks", headers={"X-Mine": "kept"}) as stream:
        await stream.collect(2, timeout=2)
        async with stream.reconnect() as again:
            await again.expect({"n": 3})
            async with again.reconnect() as third:
                await third.expect({"n": 4})


@on_both
async def test_what_came_in_one_piece_and_was_not_received_was_not_received() -> None:
    body = b"id: 0\n\nid: 1\ndata: a\n\nid: 2\ndata: b\n\nid: 3\n\n"
    async with open_stream(plain_app(HEAD, {"body": body})) as stream:
        assert stream.last_event_id == ""
        await stream.expect("a")
        assert stream.last_event_id == "1"
        await stream.expect("b")
        assert stream.last_event_id == "3"


@on_both
async def test_what_no_eventsource_comes_back_to() -> None:
    async with open_stream(make_app(), "/nowhere") as stream:
        with pytest.raises(AssertionError, match=r"does not come back to <OpenStream GET /nowhere 404"):
            async with stream.reconnect():
                pass


# An app that runs


@on_both
async def test_a_server_that_stops_ends_its_streams() -> None:
    app = make_app()
    async with running(app) as server, open_stream(server, "/ticks") as stream:
        await stream.expect()
        await server.stop()
        await stream.expect_end()
        assert stream.retry is not None
        assert 1000 <= stream.retry <= 5000
        await server.stop()
        with pytest.raises(RuntimeError, match="/three: this server has stopped"):
            async with open_stream(server, "/three"):
                pass
    assert app.registry.statistics().closed == {"drained": 1}
    async with running(app) as server, open_stream(server, "/ticks") as stream:
        await stream.expect()


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """Without a middleware, and without a lifespan."""
    assert scope["type"] == "http"

    async def source() -> AsyncIterator[ServerSentEvent]:
        for number in count(1):
            yield ServerSentEvent(number, id=number)
            await anyio.sleep(1)

    await EventSourceResponse(source())(scope, receive, send)


@on_both
@pytest.mark.parametrize("app", [bare, make_app()], ids=["bare", "middleware"])
async def test_servers_in_one_loop_do_not_end_each_other_s_streams(app: Any) -> None:
    async with running(app) as one, running(app) as other:
        async with open_stream(one, "/ticks") as doomed, open_stream(other, "/ticks") as stream:
            await doomed.expect()
            await stream.expect()
            began = anyio.current_time()
            await one.stop()
            assert anyio.current_time() - began < 0.5
            await doomed.expect_end()
            await stream.expect(id=2, timeout=2)
        async with open_stream(other, "/ticks") as stream:
            await stream.expect()


@on_both
async def test_a_farewell_has_its_time() -> None:
    async def source(request: Request) -> AsyncIterator[str]:
        yield "first"
        await request.draining.wait()
        await anyio.sleep(3)
        yield "farewell"

    async with running(create_app({"/": source})) as server, open_stream(server) as stream:
        await stream.expect("first")
        await server.stop()
        await stream.expect("farewell")
        await stream.expect_end()


@on_both
async def test_who_does_not_read_while_the_server_stops_is_a_slow_client() -> None:
    async def source() -> AsyncIterator[str]:
        while True:
            yield "x"
            await anyio.sleep(0.1)

    dropped = "200 returned, dropped while it had as many unread messages as capacity=4 allows>"
    for capacity in (4, 1000):
        app = create_app({"/": source})
        async with running(app) as server, open_stream(server, capacity=capacity) as stream:
            await stream.expect("x")
            await anyio.sleep(2)
            await server.stop()
            if capacity == 4:
                with pytest.raises(AssertionError, match=f"4 of 100 events came: .*{dropped}"):
                    await stream.collect(100)
            else:
                assert {event.data async for event in stream} == {"x"}
                assert stream.complete


@on_both
async def test_who_leaves_or_catches_up_is_no_slow_client() -> None:
    async def impatient(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        for _ in range(6):
            sent = False
            while not sent:
                with anyio.move_on_after(1):
                    await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
                    sent = True

    async with open_stream(impatient, capacity=2) as stream:
        await anyio.sleep(5)
        assert "dropped" in repr(stream)
        assert len([event async for event in stream]) == 6
        assert "dropped" not in repr(stream)

    async def endless() -> AsyncIterator[str]:
        while True:
            yield "x" * 100_000

    async with open_stream(create_app({"/": endless}), capacity=2) as stream:
        await stream.receive()
    assert "dropped" not in repr(stream)


@on_both
async def test_a_stream_that_would_hold_the_server_is_told() -> None:
    async def foreign(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send(HEAD)
        await receive()
        await receive()

    with pytest.raises(AssertionError, match=r"GET /foreign: still running 0.2 s after .* A deploy hangs here"):
        async with running(foreign) as server, open_stream(server, "/foreign"):
            await server.stop(timeout=0.2)
    async with running(SSEMiddleware(foreign)) as server, open_stream(server, "/foreign") as stream:
        await server.stop()
        await stream.expect_end()


async def told(state: dict[str, Any]) -> AsyncIterator[Any]:
    """What requests are given. No list, which a thread would read: the virtual clock does not wait for it."""
    yield state["pool"]
    yield len(state)


def with_lifespan(*, startup: Any = None, shutdown: Any = None, answer: str = "complete") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await EventSourceResponse(told(scope["state"]))(scope, receive, send)
            scope["state"]["mine"] = True
            return
        scope["state"]["pool"] = "open"
        for phase, error in (("startup", startup), ("shutdown", shutdown)):
            await receive()
            if error is not None and answer == "complete":
                raise error
            await send({"type": f"lifespan.{phase}.{'complete' if error is None else answer}", "message": "no pool"})
            if error is not None:
                raise error

    return app


@on_both
async def test_requests_have_copies_of_the_state() -> None:
    async with running(with_lifespan()) as server:
        assert server.state == {"pool": "open"}
        for _ in range(2):
            async with open_stream(server) as stream:
                await stream.expect("open")
                await stream.expect("1")
        async with open_stream(server, scope={"state": {"more": 1}}) as stream:
            await stream.expect("open")
            await stream.expect("2")


@on_both
@pytest.mark.parametrize("answer", ["complete", "failed"])
@pytest.mark.parametrize("phase", ["startup", "shutdown"])
async def test_a_lifespan_that_fails_is_raised(phase: str, answer: str) -> None:
    entered = []
    errors: dict[str, Any] = {phase: ZeroDivisionError()}
    with pytest.raises(ZeroDivisionError):
        async with running(with_lifespan(answer=answer, **errors)):
            entered.append(True)
    assert bool(entered) == (phase == "shutdown")


@on_both
async def test_a_lifespan_that_says_that_it_failed_and_no_more() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no pool"})

    with pytest.raises(RuntimeError, match="the startup failed: no pool"):
        async with running(app):
            pass


@on_both
@pytest.mark.parametrize("phase", ["startup", "shutdown"])
async def test_a_lifespan_that_hangs_is_told(phase: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == f"lifespan.{phase}":
                await anyio.sleep_forever()
            await send({"type": f"{message['type']}.complete"})

    with pytest.raises(TimeoutError, match=r"has not completed within 0.05 s"):
        async with running(app, timeout=0.05):
            pass


@on_both
async def test_what_the_test_raises_comes_first() -> None:
    with pytest.raises(LookupError) as caught:
        async with running(with_lifespan(shutdown=ZeroDivisionError("pool"))):
            raise LookupError
    assert caught.value.__notes__ == ["And on stopping the app: ZeroDivisionError: pool"]


@on_both
async def test_a_broker_s_runs_are_told_of_the_stop() -> None:
    broker = Broker()

    async def answers() -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep_forever()

    async def ask() -> Any:
        return await broker.run("answer", answers(), join=True)

    async with running(create_app({"/ask": ask}, broker=broker)) as server, open_stream(server, "/ask") as stream:
        await stream.expect("first")
        await server.stop(timeout=20)
        await stream.expect({"reason": "drained"}, event="end")
        await stream.expect_end()


# Frameworks


@on_both
@pytest.mark.parametrize("framework", ["starlette", "fastapi", "django", "quart", "litestar"])
async def test_frameworks(framework: str, anyio_backend_name: str) -> None:
    if framework in ("quart", "django") and anyio_backend_name == "trio":
        pytest.skip(f"{framework} runs on asyncio alone")
    async with running(APPS[framework]()) as server, open_stream(server, "/async") as stream:
        await stream.expect("0", id=0)
        await stream.expect("1", id=1)
        await server.stop()
        assert [event async for event in stream] == []
        assert stream.complete
        assert stream.retry is not None


# Slow clients, and virtual time


@on_both
async def test_a_client_that_does_not_read_is_dropped() -> None:
    async def large() -> AsyncIterator[str]:
        while True:
            yield "x" * 100_000

    app = create_app({"/": large}, send_timeout=30)
    with pytest.raises(TimeoutError, match="took nothing for 30 s"):
        async with open_stream(app, capacity=1):
            await anyio.sleep(40)
    assert app.registry.statistics().closed == {"timed_out": 1}


def test_virtual_time_needs_no_plugin() -> None:
    @virtual_time
    async def on_asyncio(argument: int) -> float:
        """Its name and documentation stay."""
        await anyio.sleep(3600)
        return anyio.current_time() + argument

    @virtual_time(backend="trio")
    async def on_trio() -> None:
        began = anyio.current_time()
        async with open_stream(create_app({"/": never})) as stream:
            assert b"ping" not in await stream.read()
            assert await stream.read(timeout=20) == b": ping\n\n"
        assert 15 <= anyio.current_time() - began <= 16

    assert 3600 <= on_asyncio(1) - 1 <= 3601
    assert on_asyncio.__doc__
    on_trio()


async def never() -> AsyncIterator[str]:
    await anyio.sleep_forever()
    yield ""


def test_virtual_time_of_what_it_cannot() -> None:
    with pytest.raises(TypeError, match="no coroutine function; write virtual_time right above"):
        virtual_time(lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="backend='curio' is none"):
        virtual_time(backend="curio")


# httpx


@pytest.mark.parametrize("client", [httpx, httpx2])
def test_the_transports_of_httpx_give_no_response_of_an_endless_stream(client: Any) -> None:
    """Which is why there is ours. An hour, of virtual time."""
    app = make_app()

    async def main() -> None:
        async with client.AsyncClient(transport=client.ASGITransport(app), base_url="http://test") as http:
            with anyio.move_on_after(3600) as hour:
                async with http.stream("GET", "/ticks"):
                    pytest.fail("a response")
            assert hour.cancelled_caught

    anyio.run(main, backend_options={"loop_factory": VirtualTimeLoop})
    assert app.registry.statistics().events >= 3600


@pytest.mark.filterwarnings("default")  # of Starlette, about httpx
def test_the_testclient_of_starlette_gives_none_either() -> None:
    app = make_app()
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(TestClient(app).get("/ticks").status_code))
    thread.start()
    thread.join(0.3)
    assert statuses == []
    app.registry.begin_drain()
    thread.join(60)
    assert statuses == [200]


clients = pytest.mark.parametrize("client", [httpx, httpx2])


@on_both
@clients
@pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning")  # of lines that are not read to the end
async def test_our_transport_gives_a_response_as_it_comes(client: Any) -> None:
    app = make_app()
    closed.clear()
    async with client.AsyncClient(transport=StreamingASGITransport(app), base_url="http://test") as http:
        async with http.stream("GET", "/ticks", headers={"Last-Event-ID": "41"}) as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = response.aiter_lines()
            assert [await anext(lines) for _ in range(7)][3:6] == ["id: 42", "event: tick", 'data: {"n":42}']
        assert closed == ["/ticks"]
        assert len(app.registry) == 0
        assert (await http.get("/nowhere")).text == "Not Found"
        assert (await http.get("/three")).text.count("data: ") == 3
        assert "application/json {'a': 1}" in (await http.post("/echo", json={"a": 1})).text
        assert (await http.head("/ticks")).content == b""
        with pytest.raises(client.ReadTimeout, match=r"nothing came within 0.5 s. <OpenStream GET /ticks 200 open>"):
            await http.get("/ticks", timeout=0.5)
        assert len(app.registry) == 0


@on_both
@clients
async def test_our_transport_and_what_the_app_raises(client: Any) -> None:
    async def raises(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        await receive()
        await receive()
        raise ZeroDivisionError

    def http(app: Any, **options: Any) -> Any:
        return client.AsyncClient(transport=StreamingASGITransport(app, **options), base_url="http://test")

    async with http(raises) as strict, http(raises, raise_app_exceptions=False) as lenient:
        with pytest.raises(ZeroDivisionError):
            await strict.get("/")
        assert (await lenient.get("/")).status_code == 500
    async with http(make_app()) as strict, http(make_app(), raise_app_exceptions=False) as lenient:
        with pytest.raises(TimeoutError, match="the database"):
            await strict.get("/fails")
        with pytest.raises(client.RemoteProtocolError, match="before the end of the body"):
            await lenient.get("/fails")
    async with http(silent) as strict:
        with pytest.raises(client.ReadTimeout, match=r"no response within 0.5 s"):
            await strict.get("/", timeout=0.5)
    async with http(late) as strict, http(late, raise_app_exceptions=False) as lenient:
        async with lenient.stream("GET", "/") as response:
            assert response.status_code == 200
        with pytest.raises(ZeroDivisionError):
            async with strict.stream("GET", "/"):
                pass


@on_both
async def test_our_transport_on_a_running_app() -> None:
    async with (
        running(make_app()) as server,
        httpx.AsyncClient(transport=StreamingASGITransport(server), base_url="http://test") as http,
        http.stream("GET", "/ticks") as response,
    ):
        await server.stop()
        decoder = EventDecoder()
        async for chunk in response.aiter_bytes():
            decoder.feed(chunk)
        assert decoder.retry is not None
        assert decoder.retry <= 5000


@on_both
async def test_messages_have_their_place_as_on_a_server() -> None:
    end = {"type": "http.response.body", "body": b"data: x\n\n"}
    for messages, told in [
        ([HEAD, HEAD], r"sent http\.response\.start twice"),
        ([end], r"sent http\.response\.body before"),
        ([HEAD, end, end], r"sent http\.response\.body behind the last one"),
    ]:

        async def sends(scope: Any, receive: Any, send: Any, messages: Any = messages) -> None:
            for message in messages:
                await send(message)

        with pytest.raises(RuntimeError, match=told):
            async with open_stream(sends) as stream:
                [event async for event in stream]


@on_both
async def test_who_has_the_whole_response_is_gone() -> None:
    """For the app, as on servers, though nobody has read it."""
    heard = []

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(HEAD)
        await send({"type": "http.response.body", "body": b"data: x\n\n"})
        heard.append(await receive())

    async with open_stream(waits) as stream:
        await anyio.sleep(1)
        assert heard == [{"type": "http.disconnect"}]
        await stream.expect("x")
        await stream.expect_end()


@on_both
@pytest.mark.parametrize("headers", [{"last-event-id": "\u2713"}, [("a", b"b")]])
async def test_headers_that_are_none(headers: Any) -> None:
    with pytest.raises(ValueError, match=r"latin-1"):
        async with open_stream(make_app(), "/ticks", headers=headers):
            pass


@on_both
@pytest.mark.parametrize(
    ("way", "expected"), [("cancelled", None), ("late", TimeoutError), ("failed", RuntimeError), ("complete", None)]
)
async def test_nothing_of_a_lifespan_is_left_running(way: str, expected: type[Exception] | None) -> None:
    left = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
            if way == "failed":
                await send({"type": "lifespan.startup.failed", "message": "no"})
            if way == "complete":
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await send({"type": "lifespan.shutdown.complete"})
            await anyio.sleep_forever()
        finally:
            left.append(way)

    with anyio.move_on_after(0.1 if way == "cancelled" else float("inf")):
        with pytest.raises(expected) if expected else nullcontext():
            async with running(app, timeout=0.05 if way == "late" else 15):
                assert way == "complete"
    assert left == [way]


# The plugin

PLUGIN = ["-p", "asgi_sse.testing.pytest_plugin", "-p", "no:cacheprovider", "-W", "error"]
APP = """
import time

import anyio, httpx, pytest
from asgi_sse import create_app
from asgi_sse.testing import open_stream, virtual_time

async def ticks():
    for number in range(10**9):
        yield str(number)
        await anyio.sleep(0.05)

app = create_app({"/ticks": ticks})
"""
HANGING = (
    APP
    + """
@pytest.mark.asgi_sse(timeout=0.5)
async def test_hangs():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get("/ticks")

@pytest.mark.asgi_sse(timeout=0.5)
class TestInClass:
    async def test_reads(self):
        async with open_stream(app, "/ticks") as stream:
            async for event in stream:
                pass

@pytest.mark.asgi_sse
async def test_is_fine():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")

@pytest.mark.asgi_sse
async def test_fails():
    assert False, "of itself"

left = []

@pytest.mark.asgi_sse
async def test_leaves():
    left.append(open_stream(app, "/ticks"))
    await left[0].__aenter__()

@pytest.mark.asgi_sse(leaks=False)
async def test_may_leave():
    left.append(open_stream(app, "/ticks"))
    await left[1].__aenter__()

@pytest.mark.asgi_sse(timouts=3)
async def test_wrong():
    pass

@pytest.mark.asgi_sse(timeout="5")
async def test_wrong_too():
    pass
"""
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test starts finds the package, where that is not installed; and has no plugin but those that it names."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(asgi_sse.__file__).parent.parent))


IN_FIXTURES = """
import pytest
from asgi_sse import create_app
from asgi_sse.testing import open_stream, running

async def ticks():
    yield "0"
    yield "1"

@pytest.fixture
async def server():
    async with running(create_app({"/ticks": ticks})) as server:
        yield server

@pytest.fixture
async def stream(server):
    async with open_stream(server, "/ticks") as stream:
        yield stream

@pytest.mark.asgi_sse
async def test_it(server, stream):
    await stream.expect("0")
    await server.stop()
"""
HUNG = ["the test has not ended within 0.5 s.", "  <Stream /ticks open>, * events."]


plugins = pytest.mark.parametrize(
    ("plugins", "prefix"),
    [
        (
            ["-p", "anyio.pytest_plugin"],
            "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'\n",
        ),
        (
            ["-p", "anyio.pytest_plugin"],
            "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'trio'\n",
        ),
        (
            [
                "-p",
                "pytest_asyncio.plugin",
                "-o",
                "asyncio_mode=auto",
                "-o",
                "asyncio_default_fixture_loop_scope=function",
            ],
            "",
        ),
    ],
    ids=["anyio", "trio", "pytest-asyncio"],
)


@plugins
def test_a_test_that_hangs_or_leaves_streams_fails(pytester: pytest.Pytester, plugins: list[str], prefix: str) -> None:
    pytester.makepyfile(HANGING + prefix)
    trio = "trio" in prefix  # on which a system task that the test has left is not allowed to go on
    result = pytester.runpytest_inprocess(
        *PLUGIN, *plugins, *(["-k", "not test_leaves and not test_may"] if trio else [])
    )
    result.assert_outcomes(failed=5 if trio else 6, passed=1 if trio else 2, deselected=2 if trio else 0)
    text = result.stdout.str()
    result.stdout.fnmatch_lines([*HUNG, "If it waits for a response: httpx's ASGITransport*"])
    result.stdout.fnmatch_lines([*HUNG, "  <OpenStream GET /ticks 200 open>.", "If it waits*"])
    assert "AssertionError: of itself" in text
    for wrong in ("got an unexpected keyword argument 'timouts'", "timeout must be a number or None, got '5'"):
        assert f"{wrong}; it takes timeout=, seconds or None, and leaks=, a bool" in text
    if not trio:
        result.stdout.fnmatch_lines(["the test leaves streams behind.", "  <Stream /ticks open>*", "  <OpenStream*"])


@plugins
def test_fixtures(pytester: pytest.Pytester, plugins: list[str], prefix: str) -> None:
    """Whose beginning and end are different tasks on pytest-asyncio."""
    pytester.makepyfile(IN_FIXTURES + prefix)
    pytester.runpytest_inprocess(*PLUGIN, *plugins).assert_outcomes(passed=1)


def test_an_interruption_is_not_lost_in_a_destructor(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        APP
        + """
import weakref

class Slow:
    def __del__(self):
        time.sleep(0.4)

@pytest.mark.asgi_sse(timeout=0.2)
def test_destructor():
    Slow()
    time.sleep(30)

class Thing:
    pass

@pytest.mark.asgi_sse(timeout=0.2)
def test_weak_reference():
    thing = Thing()
    weakref.finalize(thing, time.sleep, 0.4)
    del thing
    time.sleep(30)
"""
    )
    # A lost one is a warning of pytest, and the test is interrupted again after some seconds.
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(failed=2, errors=0, warnings=0)


def test_a_test_that_is_not_async_is_interrupted(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        APP
        + """
import unittest
from starlette.testclient import TestClient

@pytest.mark.filterwarnings("default")
def test_client():
    TestClient(app).get("/ticks")

class TestVirtual:
    @virtual_time
    async def test_virtual(self):
        async with open_stream(app, "/ticks") as stream:
            async for event in stream:
                pass

@virtual_time(backend="trio")
async def test_virtual_on_trio():
    async with open_stream(app, "/ticks") as stream:
        async for event in stream:
            pass

def test_blocked():
    time.sleep(30)

cleaned_up = []

class TestOfUnittest(unittest.IsolatedAsyncioTestCase):
    def setUp(self):
        self.addCleanup(cleaned_up.append, self.id())

    async def test_hangs(self):
        async with open_stream(app, "/ticks") as stream:
            async for event in stream:
                pass

    def test_hangs_too(self):
        time.sleep(30)

    async def test_is_fine(self):
        async with open_stream(app, "/ticks") as stream:
            await stream.expect("0")

def test_fine():
    assert [one.rpartition(".")[2] for one in cleaned_up] == ["test_hangs", "test_hangs_too", "test_is_fine"]
"""
    )
    pytester.makeini("[pytest]\nasgi_sse_guard = true")
    pytester.makeconftest(
        "import pytest\ndef pytest_collection_modifyitems(items):\n"
        "    for item in items: item.add_marker(pytest.mark.asgi_sse(timeout=30 if 'fine' in item.name else 0.5))"
    )
    result = pytester.runpytest_inprocess(*PLUGIN)
    result.assert_outcomes(failed=6, passed=2)
    result.stdout.fnmatch_lines([*HUNG] * 3)
    # unittest has asyncio debug each step, for which the stream may not have begun by then.
    result.stdout.fnmatch_lines(["*TestOfUnittest.test_hangs*", HUNG[0]])


def test_an_event_loop_is_interrupted_between_two_of_its_steps(pytester: pytest.Pytester) -> None:
    """In one of them, asyncio loses what it was about to do, and trio fails of its own."""
    pytester.makepyfile(
        APP.replace("0.05", "0")
        + """
import asyncio, signal, trio

pytestmark = pytest.mark.asgi_sse(timeout=60)
cleaned_up = []

async def reads(seconds):
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the guard's may ring before the loop runs
        try:
            async for event in stream:
                pass
        finally:
            cleaned_up.append(stream)

async def blocks():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(30)

many = pytest.mark.parametrize("number", range(12))

@many
def test_asyncio(number):
    asyncio.run(reads(0.01 + number / 1000), debug=True)

@many
def test_trio(number):
    trio.run(reads, 0.01 + number / 1000)

def test_all_are_cleaned_up():
    assert len(cleaned_up) == 24

def test_blocked():
    asyncio.run(blocks())

def test_blocked_on_trio():
    trio.run(blocks)
"""
    )
    result = pytester.runpytest_inprocess(*PLUGIN)
    result.assert_outcomes(failed=26, passed=1)
    assert result.stdout.str().count("the test has not ended within") >= 26


def test_what_was_interrupted_cleans_up_and_leaves_the_next_tests_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        APP
        + """
import asyncio, signal, trio

cleaned_up = []

async def blocks(backend):
    async def beside():
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            cleaned_up.append(backend)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(beside)
        async with open_stream(app, "/ticks") as stream:
            await stream.expect("0")
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(30)

@pytest.mark.asgi_sse(timeout=60)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_blocks(backend):
    anyio.run(blocks, backend, backend=backend)

def test_all_is_cleaned_up():
    assert cleaned_up == ["asyncio", "trio"]

@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()

@pytest.mark.parametrize("number", range(5))
@pytest.mark.asgi_sse(timeout=60)
def test_ends_when_it_is_late(loop, number):
    async def ends():
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        time.sleep(0.018 + number / 1000)  # in the loop's last turn

    loop.run_until_complete(ends())

def test_fine(loop):
    loop.run_until_complete(asyncio.sleep(0.05))
"""
    )
    result = pytester.runpytest_inprocess(*PLUGIN)
    passed = result.parseoutcomes()["passed"]  # of those that are late, some may be in time
    result.assert_outcomes(failed=9 - passed, passed=passed)
    result.stdout.fnmatch_lines(["FAILED *test_blocks?asyncio?*", "FAILED *test_blocks?trio?*"])
    for fine in ("test_all_is_cleaned_up", "test_fine"):
        result.stdout.no_fnmatch_line(f"FAILED *{fine}*")


SHARED = """
@pytest.mark.asgi_sse(timeout=0.5)
async def test_blocked():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")
        time.sleep(60)

async def test_is_fine():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")

async def test_is_fine_too():
    pass
"""


ONE_RUNNER = """
pytestmark = pytest.mark.anyio

@pytest.fixture(scope="module")
def anyio_backend():
    return "{}"

@pytest.fixture(scope="module", autouse=True)
async def shared():
    yield

"""
ONE_LOOP = [
    *("-p", "pytest_asyncio.plugin", "-o", "asyncio_mode=auto"),
    *("-o", "asyncio_default_fixture_loop_scope=session", "-o", "asyncio_default_test_loop_scope=session"),
]


@pytest.mark.parametrize(
    ("plugins", "shared"),
    [
        (["-p", "anyio.pytest_plugin"], ONE_RUNNER.format("asyncio")),
        (["-p", "anyio.pytest_plugin"], ONE_RUNNER.format("trio")),
        (ONE_LOOP, ""),
    ],
    ids=["anyio", "trio", "pytest-asyncio"],
)
def test_a_test_that_blocks_its_loop_leaves_it_to_the_others(
    pytester: pytest.Pytester, plugins: list[str], shared: str
) -> None:
    pytester.makepyfile(APP + shared + SHARED)
    result = pytester.runpytest_inprocess(*PLUGIN, *plugins)
    result.assert_outcomes(failed=1, passed=2)
    result.stdout.fnmatch_lines([HUNG[0], "  <Stream /ticks open>*"])


def test_it_does_nothing_unless_it_is_asked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import sys

def test_it():
    assert "asgi_sse.testing.pytest_plugin" in sys.modules
    assert "asgi_sse.testing.guard" not in sys.modules
    assert not {"httpx", "trio", "starlette"} & set(sys.modules)
"""
    )
    result = pytester.runpytest_subprocess(*PLUGIN, "--strict-config", timeout=60)
    result.assert_outcomes(passed=1)


def test_all_tests_are_guarded_by_an_option(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import asyncio
import pytest
from asgi_sse import EventSourceResponse
from asgi_sse.testing import open_stream

async def source():
    yield "0"
    await asyncio.Event().wait()

@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()

@pytest.fixture
def opened(loop):
    opened = open_stream(EventSourceResponse(source()))
    yield opened
    loop.run_until_complete(opened.__aexit__(None, None, None))

def test_leaves(loop, opened):
    stream = loop.run_until_complete(opened.__aenter__())
    loop.run_until_complete(stream.expect("0"))
"""
    )
    for value in ("true", "false"):
        pytester.makeini(f"[pytest]\nasgi_sse_guard = {value}")
        result = pytester.runpytest_inprocess(*PLUGIN)
        result.assert_outcomes(passed=value == "false", failed=value == "true")
