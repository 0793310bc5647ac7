"""The server and its connection, looked for through ``send``: what is in the way of that is no error of the stream."""

import functools
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from asgi_sse import EventSourceResponse, SendTimeoutError
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio

SCOPE: Any = {"type": "http", "method": "GET", "path": "/", "headers": []}


async def ticks() -> AsyncIterator[str]:
    yield "a"
    await anyio.sleep_forever()


async def respond(scope: Any, receive: Any, send: Any) -> None:
    await EventSourceResponse(ticks())(scope, receive, send)


class Transport:
    """The transport of a connection, which records whether it was cut."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class StuckSend:
    """The ``send`` of a connection whose client takes nothing."""

    def __init__(self, transport: Any = None) -> None:
        self.transport = transport

    async def __call__(self, message: Any) -> None:
        await anyio.sleep_forever()


class SendWithoutTransport(StuckSend):
    """A ``send`` whose transport cannot be asked for any more."""

    def __init__(self) -> None:
        """Set no transport."""

    def __getattr__(self, name: str) -> Any:
        if name == "transport":
            raise LookupError(name)
        raise AttributeError(name)


def plain(send: Any) -> Any:
    return send


def as_a_method(send: Any) -> Any:
    return send.__call__


def in_a_partial(send: Any) -> Any:
    async def call(first: Any, message: Any) -> None:
        await send(message)

    return functools.partial(call, "first")


def in_a_closure(send: Any) -> Any:
    async def call(message: Any) -> None:
        await send(message)

    return call


@pytest.mark.parametrize("wrap", [plain, as_a_method, in_a_partial, in_a_closure])
async def test_stuck_client_is_cut_through_the_transport_behind_send(wrap: Callable[[Any], Any]) -> None:
    transport = Transport()
    response = EventSourceResponse(ticks(), send_timeout=5)
    await response(SCOPE, anyio.sleep_forever, wrap(StuckSend(transport)))  # type: ignore[arg-type]
    assert transport.aborted


@pytest.mark.parametrize(
    "module", ["hypercorn.protocol.h2", "hypercorn.protocol.h3", "uvicorn.protocols.http.zttp_h2_impl"]
)
async def test_connection_that_other_streams_share_is_not_cut(module: str) -> None:
    shared = type("Protocol", (StuckSend,), {"__module__": module})
    transport = Transport()
    with pytest.raises(SendTimeoutError, match="read nothing for 5 s"):
        await EventSourceResponse(ticks(), send_timeout=5)(SCOPE, anyio.sleep_forever, shared(transport))  # type: ignore[arg-type]
    assert not transport.aborted


async def test_datagram_transport_which_serves_all_clients_is_not_cut() -> None:
    class Datagrams(Transport):
        def sendto(self, data: bytes) -> None:
            """Only a datagram transport has this."""

    transport = Datagrams()
    with pytest.raises(SendTimeoutError):
        await EventSourceResponse(ticks(), send_timeout=5)(SCOPE, anyio.sleep_forever, StuckSend(transport))  # type: ignore[arg-type]
    assert not transport.aborted


async def test_transport_that_cannot_be_read_leaves_the_timeout_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse.runtime.server")
    with pytest.raises(SendTimeoutError):
        await EventSourceResponse(ticks(), send_timeout=5)(SCOPE, anyio.sleep_forever, SendWithoutTransport())  # type: ignore[arg-type]
    assert "cannot find the connection of a SendWithoutTransport" in caplog.text


async def test_unfilled_closure_around_send_hides_the_transport() -> None:
    def wrap(inner: Any) -> Any:
        async def call(message: Any) -> None:
            await (inner if message else later_send)(message)

        if inner is None:
            later_send: Any = inner
        return call

    transport = Transport()
    with pytest.raises(SendTimeoutError):
        await EventSourceResponse(ticks(), send_timeout=5)(SCOPE, anyio.sleep_forever, wrap(StuckSend(transport)))  # type: ignore[arg-type]
    assert not transport.aborted


async def test_middleware_whose_attribute_raises_does_not_break_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse.runtime.server")

    class Sender:
        def __init__(self, wrapped: Any) -> None:
            self.wrapped = wrapped

        def __getattr__(self, name: str) -> Any:
            raise LookupError(name)

        async def __call__(self, message: Any) -> None:
            await self.wrapped(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(scope, receive, Sender(send))

    async with open_stream(app) as stream:
        await stream.expect("a")
    assert re.search("cannot find the server of a .*Sender", caplog.text)


async def test_stream_works_behind_any_number_of_middlewares() -> None:
    app: Any = respond
    for _ in range(60):
        app = wrapping_send(app)
    async with open_stream(app) as stream:
        await stream.expect("a")


def wrapping_send(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped_send(message: Any) -> None:
            await send(message)

        await app(scope, receive, wrapped_send)

    return middleware
