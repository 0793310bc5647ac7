"""`open_stream`: expectations, reconnecting, slow clients, and the rules of a server."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from testing_apps import START, make_app, plain_app

from asgi_sse import EventDecoder, ServerSentEvent, create_app
from asgi_sse.testing import StreamingASGITransport, assert_event, open_stream, running

on_both = pytest.mark.anyio


@on_both
async def test_expectations_pass_for_the_events_that_come() -> None:
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
async def test_failure_shows_the_differing_event_and_earlier_ones(wanted: dict[str, Any], message: str) -> None:
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
async def test_failure_says_what_did_not_come(call: Any, message: str) -> None:
    async with open_stream(make_app(), "/ticks") as stream:
        await stream.expect()
        with pytest.raises(AssertionError, match=message):
            await call(stream)


@on_both
async def test_failure_names_a_response_that_is_not_an_event_stream() -> None:
    async with open_stream(make_app(), "/nowhere") as stream:
        with pytest.raises(AssertionError, match=r"404 ended>, which is not an event stream.*text/plain.*b'Not Found'"):
            await stream.expect("x")
    async with open_stream(plain_app(START, {"body": b"data: no blank line", "more_body": True})) as stream:
        with pytest.raises(AssertionError, match="the last bytes are not a complete event: b'data: no blank"):
            await stream.expect_nothing(1)
        with pytest.raises(AssertionError, match=r"the app returned without it.*more_body"):
            await stream.expect_end()


@on_both
async def test_app_errors_are_raised_unchanged() -> None:
    """An app's own TimeoutError is not taken for a missing event."""
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
async def test_receive_json_refuses_other_data() -> None:
    async with open_stream(make_app(), "/fails") as stream:
        with pytest.raises(AssertionError, match=r"the data must be JSON, got .*data='first'"):
            await stream.receive_json()
    with pytest.raises(AssertionError, match=r"expected data=\{\}"):
        assert_event(ServerSentEvent("x"), {})


def test_assert_event_accepts_events_of_any_decoder() -> None:
    (event,) = EventDecoder().feed(b'id: 7\nevent: order\ndata: {"a": [1, 2]}\n\n')
    assert_event(event, {"a": [1, 2]}, event="order", id=7)
    with pytest.raises(AssertionError, match=r"expected event='message'; .* came: its type differs"):
        assert_event(event, event="message")


@on_both
async def test_json_is_sent_with_its_content_type() -> None:
    async with open_stream(make_app(), "/echo", method="POST", json={"a": None}) as stream:
        await stream.expect("application/json {'a': None}")


@on_both
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"app": None}, TypeError, "app must be an ASGI app, got None"),
        ({"path": "http://host/"}, ValueError, "path must begin with '/', got 'http://host/'"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1 message, got 0"),
        ({"body": "text"}, TypeError, "body must be bytes, got str 'text'; pass a JSON value as json="),
    ],
)
async def test_invalid_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
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
async def test_missing_response_start_times_out() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()

    with pytest.raises(TimeoutError, match=r"response start within 0.05 s, got <OpenStream GET / no response yet"):
        async with open_stream(silent, timeout=0.05):
            pass


@on_both
async def test_response_start_in_the_turn_of_the_deadline_counts() -> None:
    async def raises(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    for _ in range(20):  # trio runs what is ready in any order
        async with open_stream(plain_app(START, {"body": b"data: x\n\n"}), timeout=1e-9) as stream:
            await stream.expect("x")
        with pytest.raises(ZeroDivisionError):
            async with open_stream(raises, timeout=1e-9):
                pass


@on_both
async def test_app_that_ignores_the_disconnect_is_cancelled() -> None:
    ended = []

    async def ignores_disconnect(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(
        AssertionError,
        match=r"not returned 0.05 s after its client has left: <OpenStream GET / 200 open>.*http.disconnect",
    ):
        async with open_stream(ignores_disconnect, timeout=0.05):
            pass
    assert ended
    with pytest.raises(ZeroDivisionError) as caught:
        async with open_stream(ignores_disconnect, timeout=0.05):
            raise ZeroDivisionError
    assert "not returned" in caught.value.__notes__[0]


@on_both
async def test_app_that_ignores_its_cancellation_too_is_cancelled_again(anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("in trio, each await of a cancelled task raises")
    cancellations = 0

    async def ignores_everything(scope: Any, receive: Any, send: Any) -> None:
        nonlocal cancellations
        await send(START)
        while cancellations < 2:
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                cancellations += 1

    with pytest.raises(AssertionError, match=r"not returned 0.05 s after its client has left"):
        async with open_stream(ignores_everything, timeout=0.05):
            pass
    await anyio.wait_all_tasks_blocked()
    assert cancellations == 2


@on_both
async def test_app_that_returns_without_a_response_fails() -> None:
    async def forgets(scope: Any, receive: Any, send: Any) -> None:
        """Answer nothing."""

    with pytest.raises(AssertionError, match="the app must send a response, but it returned without one"):
        async with open_stream(forgets):
            pass


@on_both
async def test_messages_of_extensions_change_nothing() -> None:
    body = {"type": "http.response.body", "body": b"data: x\n\n", "more_body": True}
    trailers = {"type": "http.response.trailers", "headers": []}

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        for message in [
            {"type": "http.response.debug", "info": {}},
            START,
            body,
            {**body, "more_body": False},
            trailers,
        ]:
            await send(message)

    async with open_stream(sends) as stream:
        assert [event.data async for event in stream] == ["x", "x"]
        assert stream.complete


# Reconnecting


@on_both
async def test_reconnect_continues_after_the_last_event() -> None:
    async with open_stream(make_app(), "/ticks", headers={"X-Mine": "kept"}) as stream:
        await stream.collect(2, timeout=2)
        async with stream.reconnect() as again:
            await again.expect({"n": 3})
            async with again.reconnect() as third:
                await third.expect({"n": 4})


@on_both
async def test_last_event_id_ignores_decoded_events_not_yet_received() -> None:
    body = b"id: 0\n\nid: 1\ndata: a\n\nid: 2\ndata: b\n\nid: 3\n\n"
    async with open_stream(plain_app(START, {"body": body})) as stream:
        assert stream.last_event_id == ""
        await stream.expect("a")
        assert stream.last_event_id == "1"
        await stream.expect("b")
        assert stream.last_event_id == "3"


@on_both
async def test_reconnect_without_an_id_sends_no_last_event_id() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))
        await send(START)
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        await receive()
        await receive()

    async with open_stream(app, headers={"Last-Event-ID": "7"}) as stream:
        await stream.expect("x")
        async with stream.reconnect() as again:
            await again.expect("x")
    assert [headers.get(b"last-event-id") for headers in seen] == [b"7", None]


@on_both
async def test_reconnect_after_an_error_response_fails() -> None:
    async with open_stream(make_app(), "/nowhere") as stream:
        with pytest.raises(AssertionError, match=r"does not reconnect after <OpenStream GET /nowhere 404"):
            async with stream.reconnect():
                pass


# Slow clients


@on_both
async def test_client_that_does_not_read_is_dropped() -> None:
    async def large() -> AsyncIterator[str]:
        while True:
            yield "x" * 100_000

    app = create_app({"/": large}, send_timeout=30)
    with pytest.raises(TimeoutError, match="read nothing for 30 s"):
        async with open_stream(app, capacity=1):
            await anyio.sleep(40)
    assert app.registry.statistics().closed == {"timed_out": 1}


@on_both
async def test_client_that_leaves_or_catches_up_is_not_reported_as_dropped() -> None:
    async def impatient(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
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


# The server's side


@on_both
async def test_messages_in_the_wrong_order_are_refused_as_by_a_server() -> None:
    end = {"type": "http.response.body", "body": b"data: x\n\n"}
    for messages, error in [
        ([START, START], r"sent http\.response\.start twice"),
        ([end], r"sent http\.response\.body before"),
        ([START, end, end], r"sent http\.response\.body after the last one"),
    ]:

        async def sends(scope: Any, receive: Any, send: Any, messages: Any = messages) -> None:
            for message in messages:
                await send(message)

        with pytest.raises(RuntimeError, match=error):
            async with open_stream(sends) as stream:
                [event async for event in stream]


@on_both
async def test_app_receives_a_disconnect_after_its_last_message() -> None:
    """As on servers, even though the test has not read the response."""
    heard = []

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)
        await send({"type": "http.response.body", "body": b"data: x\n\n"})
        heard.append(await receive())

    async with open_stream(waits) as stream:
        await anyio.sleep(1)
        assert heard == [{"type": "http.disconnect"}]
        await stream.expect("x")
        await stream.expect_end()


@on_both
@pytest.mark.parametrize("headers", [{"last-event-id": "\u2713"}, [("a", b"b")]])
async def test_invalid_headers_are_refused(headers: Any) -> None:
    with pytest.raises(ValueError, match=r"latin-1"):
        async with open_stream(make_app(), "/ticks", headers=headers):
            pass
