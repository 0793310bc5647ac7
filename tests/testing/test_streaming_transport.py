"""`StreamingASGITransport`, with httpx and httpx2, beside the transports that hang."""

import threading
from typing import Any

import anyio
import httpx
import httpx2
import pytest
from starlette.testclient import TestClient
from testing_apps import START, closed, make_app

from asgi_sse import EventDecoder
from asgi_sse.testing import StreamingASGITransport, VirtualTimeLoop, running

on_both = pytest.mark.anyio
clients = pytest.mark.parametrize("client", [httpx, httpx2])


@clients
def test_transport_of_httpx_returns_no_response_for_an_endless_stream(client: Any) -> None:
    """This is why `StreamingASGITransport` exists. The hour is one of virtual time."""
    app = make_app()

    async def main() -> None:
        async with client.AsyncClient(transport=client.ASGITransport(app), base_url="http://test") as http:
            with anyio.move_on_after(3600) as hour:
                async with http.stream("GET", "/ticks"):
                    pytest.fail("there must be no response")
            assert hour.cancelled_caught

    anyio.run(main, backend_options={"loop_factory": VirtualTimeLoop})
    assert app.registry.statistics().events >= 3600


@pytest.mark.filterwarnings("default")  # Starlette warns about httpx
def test_testclient_of_starlette_returns_no_response_either() -> None:
    app = make_app()
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(TestClient(app).get("/ticks").status_code))
    thread.start()
    thread.join(0.3)
    assert statuses == []
    app.registry.begin_drain()
    thread.join(60)
    assert statuses == [200]


@on_both
@clients
@pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning")  # the lines are not read to their end
async def test_response_comes_chunk_by_chunk(client: Any) -> None:
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
async def test_head_response_has_no_body_even_if_the_app_sends_one(client: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for more_body in (True, False):
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": more_body})

    async with client.AsyncClient(transport=StreamingASGITransport(app), base_url="http://test") as http:
        assert (await http.get("/")).text == "data: x\n\n" * 2
        response = await http.head("/")
    assert response.headers["content-type"] == "text/event-stream"
    assert response.content == b""


@on_both
@clients
async def test_app_errors_are_raised_or_become_responses(client: Any) -> None:
    async def raises(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async def never_answers(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()

    async def fails_late(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
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
    async with http(never_answers) as strict:
        with pytest.raises(client.ReadTimeout, match=r"no response within 0.5 s"):
            await strict.get("/", timeout=0.5)
    async with http(fails_late) as strict, http(fails_late, raise_app_exceptions=False) as lenient:
        async with lenient.stream("GET", "/") as response:
            assert response.status_code == 200
        with pytest.raises(ZeroDivisionError):
            async with strict.stream("GET", "/"):
                pass


@on_both
async def test_transport_works_on_a_running_app() -> None:
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
