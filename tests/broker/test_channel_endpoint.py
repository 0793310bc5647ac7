"""`Broker.endpoint`: which channels a client may read, until when, and what an endpoint answers."""

import re
import time
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from broker_clients import id_of, status_of
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from asgi_sse import (
    Access,
    Broker,
    EventSourceResponse,
    HTTPError,
    Request,
    ServerSentEvent,
    StreamRegistry,
    create_app,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


# Which channels


async def test_channels_come_from_the_route_the_query_or_the_endpoint() -> None:
    broker = Broker()
    app = create_app({"/of/{channel}": broker.endpoint(), "/any": broker.endpoint(), "/fixed": broker.endpoint("a.*")})
    async with (
        open_stream(app, "/of/b") as of_path,
        open_stream(app, "/any?channel=b&channel=chat/42&channel=b") as of_query,
        open_stream(app, "/fixed?channel=b") as fixed,
    ):
        for channel in ("b", "chat/42", "a.x"):
            await broker.publish(channel, channel)
        assert (await of_path.receive()).data == "b"
        assert [(await of_query.receive()).data for _ in range(2)] == ["b", "chat/42"]
        assert (await fixed.receive()).data == "a.x"


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("/any", 400, "name a channel, as {channel} in the route or as ?channel=NAME"),
        ("/any?channel=a%20b", 400, "in segments between dots, got 'a b'"),
        ("/any?channel=", 400, "got ''"),
        ("/any?channel=a.*", 400, "got 'a.*'; only patterns may have '*'"),  # a pattern needs a grant
        ("/of/**", 400, "got '**'; only patterns may have '*'"),
        ("/any?" + "&".join(f"channel={number}" for number in range(101)), 400, "the request names 101 channels"),
        ("/runs?channel=a", 404, "no run a: it has not begun"),
        ("/runs?channel=a&channel=b", 400, "the request names 2 runs; a stream carries one run"),
    ],
)
async def test_requests_without_a_valid_channel_are_refused(path: str, status: int, detail: str) -> None:
    broker = Broker()
    app = create_app(
        {"/of/{channel}": broker.endpoint(), "/any": broker.endpoint(), "/runs": broker.endpoint(runs=True)}
    )
    found = await status_of(app, path)
    assert found[0] == status
    assert detail in found[1]


async def test_channels_and_endpoints_are_asgi_apps() -> None:
    broker = Broker()
    app = Starlette(
        routes=[
            Route("/of/{channel}", broker.endpoint()),
            Route("/a", broker.channel("a")),
            Mount("/mounted", broker.endpoint("a")),
        ]
    )
    async with (
        open_stream(app, "/of/a") as one,
        open_stream(app, "/a") as other,
        open_stream(app, "/mounted/x") as third,
    ):
        await broker.publish("a", "x")
        for stream in (one, other, third):
            assert (await stream.receive()).data == "x"
    await (await broker.run("run", ["x"])).wait()
    async with open_stream(app, "/of/run") as stream:
        last = [event async for event in stream][-1].id
    async with open_stream(app, "/of/run", headers={"Last-Event-ID": str(last)}) as stream:
        assert stream.status == 204


async def test_filter_gets_the_request() -> None:
    broker = Broker()

    def wanted(request: Request, event: ServerSentEvent) -> bool:
        return event.event == request.query["type"]

    async with open_stream(create_app({"/a": broker.endpoint("a", filter=wanted)}), "/a?type=x") as stream:
        for number, kind in enumerate("xyx"):
            await broker.publish("a", {"data": number, "event": kind})
        assert [(await stream.receive()).data for _ in range(2)] == ["0", "2"]


async def test_full_channel_is_answered_with_503() -> None:
    broker = Broker(max_subscribers=1)
    app = create_app({"/of/{channel}": broker.endpoint(), "/a": broker.channel("a")})
    async with open_stream(app, "/of/a"):
        for path in ("/of/a", "/a"):
            async with open_stream(app, path) as stream:
                assert stream.status == 503
                assert stream.headers["retry-after"] == "5"
                assert await stream.read() == b"channel a is full (max_subscribers=1); try again later"
        assert (await status_of(app, "/of/b"))[0] == 200
    assert (await status_of(app, "/of/a"))[0] == 200


def test_invalid_endpoint_arguments_are_refused() -> None:
    broker = Broker()
    with pytest.raises(TypeError, match="authorize must be a function or None, got 'a'"):
        broker.endpoint(authorize="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recheck must be None without authorize, got 1"):
        broker.endpoint(recheck=1)
    with pytest.raises(ValueError, match="recheck must be more than 0 or None, got 0"):
        broker.endpoint(recheck=0, authorize=lambda request: None)
    with pytest.raises(ValueError, match="got 'a b'; remove ' '"):
        broker.endpoint("a b")
    with pytest.raises(ValueError, match="snapshot must be None with runs=True"):
        broker.endpoint(runs=True, snapshot=lambda request: None)
    with pytest.raises(ValueError, match="channels must be at most one with runs=True, got 2"):
        broker.endpoint("a", "b", runs=True)
    with pytest.raises(TypeError, match="recheck must be a number or None, got '5'"):
        broker.endpoint(recheck="5", authorize=lambda request: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expires_at must be a Unix time in seconds or None, got nan"):
        Access("a", expires_at=float("nan"))
    with pytest.raises(TypeError, match="snapshot must be a function or None, got 'a'"):
        broker.subscribe("a", snapshot="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expires_at must be a Unix time in seconds or None, got 'soon'"):
        Access("a", expires_at="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^pattern must have .*, got 'a\*'"):
        Access(["a*"])
    for name in ("on_join", "on_leave"):
        with pytest.raises(TypeError, match=f"{name} must be a function or None, got 1"):
            Broker(**{name: 1})  # type: ignore[arg-type]


# Access


def granting(granted: Any) -> Any:
    async def authorize(request: Request) -> Any:
        await anyio.lowlevel.checkpoint()
        if isinstance(granted, Exception):
            raise granted
        return granted

    return authorize


@pytest.mark.parametrize(
    ("granted", "path", "status"),
    [
        (True, "?channel=a", 200),
        (True, "?channel=a.*", 403),
        (["a"], "?channel=a", 200),
        ("a", "?channel=a", 200),
        (["a"], "", 200),
        (["a"], "?channel=b", 403),
        (["a"], "?channel=a&channel=b", 403),
        (["a.*"], "?channel=a.x", 200),
        (["a.*"], "?channel=a.*", 200),
        (["a.**"], "?channel=a.*", 200),
        (["**"], "?channel=a.*&channel=b", 200),
        (["a.*"], "?channel=a.**", 403),
        (["a.**"], "?channel=*.x", 403),
        ([], "?channel=a", 403),
        ("", "?channel=a", 403),
        (None, "?channel=a", 403),
        (False, "", 403),
        (Access("a", expires_at=time.time() - 1), "?channel=a", 403),
        (Access(["a"], expires_at=time.time() + 1000), "?channel=a", 200),
        (HTTPError(401, headers={"www-authenticate": "Bearer"}), "?channel=a", 401),
        (7, "?channel=a", 500),
        ({"channels": ["a"]}, "?channel=a", 500),
        ({"a": True}, "?channel=a", 500),
    ],
)
async def test_access_follows_the_grant(granted: Any, path: str, status: int) -> None:
    app = create_app({"/events": Broker().endpoint(authorize=granting(granted))})
    if status == 500:
        with pytest.raises(TypeError, match=re.escape(f", or None for no access, got {granted!r}")):
            await status_of(app, "/events" + path)
    else:
        assert (await status_of(app, "/events" + path))[0] == status


async def test_authorize_may_be_sync() -> None:
    app = create_app({"/events/{channel}": Broker().endpoint(authorize=lambda request: request.headers.get("x-may"))})
    assert await status_of(app, "/events/a", headers={"x-may": "a"}) == (200, "")
    assert await status_of(app, "/events/b", headers={"x-may": "a"}) == (403, "no access to b")
    assert await status_of(app, "/events/b") == (403, "Forbidden")


async def test_stream_carries_all_granted_channels_if_none_is_named() -> None:
    broker = Broker()
    app = create_app({"/mine": broker.endpoint(authorize=lambda request: ["user.7", "news.*"])})
    async with open_stream(app, "/mine") as stream:
        for channel in ("user.8", "user.7", "news.x"):
            await broker.publish(channel, channel)
        assert [(await stream.receive()).data for _ in range(2)] == ["user.7", "news.x"]


async def test_stream_ends_when_access_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    broker, registry = Broker(), StreamRegistry()
    access = Access("a", expires_at=time.time() + 60)
    app = create_app({"/a": broker.endpoint("a", authorize=lambda request: access)}, registry=registry)
    async with open_stream(app, "/a") as stream:
        await broker.publish("a", "x")
        assert (await stream.receive()).data == "x"
        await anyio.sleep(30)  # well before the end, since `expires_at` is on the real clock
        assert len(registry) == 1
        assert [event async for event in stream] == []
        assert stream.complete
        await stream.disconnect()
    assert registry.statistics().closed == {"expired": 1}
    assert broker.subscribers("a") == 0
    monkeypatch.setattr("asgi_sse.broker.endpoint.time.time", lambda: access.expires_at)
    assert (await status_of(app, "/a"))[0] == 403


@pytest.mark.parametrize("ending", ["refused", "less", "error"])
async def test_access_is_rechecked(ending: str) -> None:
    broker, registry = Broker(), StreamRegistry()
    asked = 0

    async def authorize(request: Request) -> Any:
        nonlocal asked
        asked += 1
        await anyio.sleep(1)
        if asked < 4:
            return Access(["a", "b"], expires_at=time.time() + 100)
        if ending == "error":
            raise LookupError("no database")
        return None if ending == "refused" else ["b"]

    app = create_app({"/a": broker.endpoint(authorize=authorize, recheck=60)}, registry=registry)
    began = anyio.current_time()
    manager = open_stream(app, "/a?channel=a")
    stream = await manager.__aenter__()
    assert [event async for event in stream if event.event != "x"] == [] if ending != "error" else True
    if ending == "error":
        with pytest.raises(LookupError, match="no database"):
            await anyio.sleep(200)
            await stream.disconnect()
        assert not stream.complete
    else:
        await stream.disconnect()
        assert stream.complete
        assert anyio.current_time() - began == pytest.approx(1 + 3 * 61, abs=1)
    await manager.__aexit__(None, None, None)
    assert asked == 4
    assert registry.statistics().closed == {"failed" if ending == "error" else "expired": 1}
    assert broker.subscribers("a") == 0


async def test_recheck_can_extend_the_expiry() -> None:
    """With `recheck`, the second result of `authorize` counts. Without, the stream ends at the time of the first."""
    for recheck, lasts in ((60, True), (None, False)):
        broker, until = Broker(), [100.0, 1000.0, 1000.0, 1000.0]

        def authorize(request: Request, until: list[float] = until) -> Access:
            return Access("a", expires_at=time.time() + until.pop(0))

        async with open_stream(create_app({"/a": broker.endpoint("a", authorize=authorize, recheck=recheck)}), "/a"):
            await anyio.sleep(150)
            assert broker.subscribers("a") == lasts


async def test_authorize_that_hangs_grants_nothing() -> None:
    broker, registry, asked = Broker(), StreamRegistry(), 0

    async def authorize(request: Request) -> bool:
        nonlocal asked
        asked += 1
        if asked > 1:
            await anyio.sleep(10_000)
        return True

    app = create_app({"/a": broker.endpoint("a", authorize=authorize, recheck=60)}, registry=registry)
    async with open_stream(app, "/a") as stream:
        assert [event async for event in stream] == []
        assert stream.complete
        await stream.disconnect()
    assert registry.statistics().closed == {"expired": 1}


async def test_stream_continues_if_the_grant_becomes_broader() -> None:
    broker, grants = Broker(), [["user.7"], ["user.**"], ["user.*", "news"]]

    def authorize(request: Request) -> list[str]:
        return grants.pop(0) if len(grants) > 1 else grants[0]

    async with open_stream(create_app({"/a": broker.endpoint(authorize=authorize, recheck=60)}), "/a") as stream:
        await anyio.sleep(200)
        await broker.publish("user.7", "x")
        assert (await stream.receive()).data == "x"


# Checkpoints


async def test_checkpoint_keep_alives_commit_an_id() -> None:
    broker = Broker(history=2)
    app = create_app({"/quiet": broker.endpoint("quiet", checkpoint=True)}, ping=15)
    async with open_stream(app, "/quiet") as stream:
        await stream.read()
        for number in range(10):
            await broker.publish("busy", number)
        checkpoint = await stream.read(timeout=20)
        assert checkpoint.endswith(b"-10\n\n")
        assert checkpoint.startswith(b"id: ")
        await broker.publish("quiet", "x")
        assert str((await stream.receive()).id).endswith("-11")
        assert (await stream.read(timeout=20)).endswith(b"-11\n\n")  # again, because it is a keep-alive too
    last = stream.last_event_id
    async with open_stream(app, "/quiet", headers={"Last-Event-ID": last}) as stream:
        await broker.publish("quiet", "y")
        assert (await stream.receive()).data == "y"


async def test_checkpoint_waits_until_the_client_has_the_snapshot() -> None:
    broker = Broker()
    made = anyio.Event()

    async def snapshot() -> str:
        await made.wait()
        return "state"

    subscription = broker.subscribe("a", snapshot=snapshot, checkpoint=True)
    async with open_stream(EventSourceResponse(subscription, ping=5)) as stream:
        await stream.read()
        assert await stream.read(timeout=6) == b": ping\n\n"
        made.set()
        assert (await stream.receive()).data == "state"
        assert (await stream.read(timeout=6)).startswith(b"id: ")


async def test_checkpoint_never_passes_an_event_that_the_client_has_not_got() -> None:
    broker = Broker()
    source = broker.subscribe("a", checkpoint=True).as_pull_source()
    assert source.take(1000).endswith(b"-0\n\n")
    assert source.take(1000) == b""
    await broker.publish("other", "x")
    assert source.keep_alive() == f"id: {id_of(broker, 1)}\n\n".encode()
    await broker.publish("a", "unread")
    await broker.publish("other", "x")
    assert source.keep_alive() == b""
    assert b"data: unread" in source.take(1000)
    assert source.keep_alive() == f"id: {id_of(broker, 3)}\n\n".encode()
    source.stop()
    await broker.publish("other", "x")
    assert source.keep_alive() == b""
    source.detach()
