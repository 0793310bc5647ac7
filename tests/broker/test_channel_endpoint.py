"""Channels as endpoints: who may read what and until when, snapshots, presence, checkpoints, limits."""

import random
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from asgi_sse import (
    Access,
    Broker,
    EventSourceResponse,
    HTTPError,
    InvalidEventError,
    Request,
    ServerSentEvent,
    StreamClosedError,
    StreamRegistry,
    Subscription,
    create_app,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def status_of(app: Any, path: str, **arguments: Any) -> tuple[int, str]:
    async with open_stream(app, path, **arguments) as stream:
        if stream.status == 200:
            return 200, ""
        return stream.status, (await stream.read()).decode()


# Which channels


async def test_the_channel_of_the_path_or_of_the_query() -> None:
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
        ("/any", 400, "name the channels: as {channel} in the route, or as ?channel=NAME"),
        ("/any?channel=a%20b", 400, "channel 'a b': give up to 200 of"),
        ("/any?channel=", 400, "channel ''"),
        ("/any?channel=a.*", 400, "channel 'a.*'"),  # nobody has granted to read by a pattern
        ("/of/**", 400, "channel '**'"),
        ("/any?" + "&".join(f"channel={number}" for number in range(101)), 400, "101 channels"),
        ("/runs?channel=a", 404, "no run is called a"),
        ("/runs?channel=a&channel=b", 400, "2 runs; one stream carries one"),
    ],
)
async def test_what_names_no_channel(path: str, status: int, detail: str) -> None:
    broker = Broker()
    app = create_app(
        {"/of/{channel}": broker.endpoint(), "/any": broker.endpoint(), "/runs": broker.endpoint(runs=True)}
    )
    found = await status_of(app, path)
    assert found[0] == status
    assert detail in found[1]


# Who may read


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
async def test_access(granted: Any, path: str, status: int) -> None:
    app = create_app({"/events": Broker().endpoint(authorize=granting(granted))})
    if status == 500:
        with pytest.raises(TypeError, match=re.escape(f"authorize gave {granted!r}; give channels")):
            await status_of(app, "/events" + path)
    else:
        assert (await status_of(app, "/events" + path))[0] == status


async def test_an_authorizer_need_not_be_async() -> None:
    app = create_app({"/events/{channel}": Broker().endpoint(authorize=lambda request: request.headers.get("x-may"))})
    assert await status_of(app, "/events/a", headers={"x-may": "a"}) == (200, "")
    assert await status_of(app, "/events/b", headers={"x-may": "a"}) == (403, "no access to b")
    assert await status_of(app, "/events/b") == (403, "Forbidden")


async def test_what_is_asked_for_is_all_that_is_granted_where_nothing_is_named() -> None:
    broker = Broker()
    app = create_app({"/mine": broker.endpoint(authorize=lambda request: ["user.7", "news.*"])})
    async with open_stream(app, "/mine") as stream:
        for channel in ("user.8", "user.7", "news.x"):
            await broker.publish(channel, channel)
        assert [(await stream.receive()).data for _ in range(2)] == ["user.7", "news.x"]


async def test_a_stream_ends_when_its_access_does(monkeypatch: pytest.MonkeyPatch) -> None:
    broker, registry = Broker(), StreamRegistry()
    access = Access("a", expires_at=time.time() + 60)
    app = create_app({"/a": broker.endpoint("a", authorize=lambda request: access)}, registry=registry)
    async with open_stream(app, "/a") as stream:
        await broker.publish("a", "x")
        assert (await stream.receive()).data == "x"
        await anyio.sleep(30)  # not close to the end, which is one of the real clock
        assert len(registry) == 1
        assert [event async for event in stream] == []
        assert stream.complete
        await stream.disconnect()
    assert registry.statistics().closed == {"expired": 1}
    assert broker.subscribers("a") == 0
    monkeypatch.setattr("asgi_sse.broker.endpoint.time.time", lambda: access.expires_at)
    assert (await status_of(app, "/a"))[0] == 403


@pytest.mark.parametrize("ending", ["refused", "less", "error"])
async def test_access_is_looked_at_again(ending: str) -> None:
    broker, registry = Broker(), StreamRegistry()
    asked = 0

    async def authorize(request: Request) -> Any:
        nonlocal asked
        asked += 1
        await anyio.sleep(1)
        if asked < 4:
            return Access(["a", "b"], expires_at=time.time() + 100)
        if ending == "error":
            raise LookupError("who knows")
        return None if ending == "refused" else ["b"]

    app = create_app({"/a": broker.endpoint(authorize=authorize, recheck=60)}, registry=registry)
    began = anyio.current_time()
    manager = open_stream(app, "/a?channel=a")
    stream = await manager.__aenter__()
    assert [event async for event in stream if event.event != "x"] == [] if ending != "error" else True
    if ending == "error":
        with pytest.raises(LookupError, match="who knows"):
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


async def test_an_expiry_that_was_put_off() -> None:
    """By the second answer of the authorizer; without one, the stream ends at the first answer's time."""
    for recheck, lasts in ((60, True), (None, False)):
        broker, until = Broker(), [100.0, 1000.0, 1000.0, 1000.0]

        def authorize(request: Request, until: list[float] = until) -> Access:
            return Access("a", expires_at=time.time() + until.pop(0))

        async with open_stream(create_app({"/a": broker.endpoint("a", authorize=authorize, recheck=recheck)}), "/a"):
            await anyio.sleep(150)
            assert broker.subscribers("a") == lasts


async def test_a_channel_that_is_full_is_a_503() -> None:
    broker = Broker(max_subscribers=1)
    app = create_app({"/of/{channel}": broker.endpoint(), "/a": broker.channel("a")})
    async with open_stream(app, "/of/a"):
        for path in ("/of/a", "/a"):
            async with open_stream(app, path) as stream:
                assert stream.status == 503
                assert stream.headers["retry-after"] == "5"
                assert await stream.read() == b"a has 1 subscribers already, the most there may be"
        assert (await status_of(app, "/of/b"))[0] == 200
    assert (await status_of(app, "/of/a"))[0] == 200


async def test_a_filter_that_sees_the_request() -> None:
    broker = Broker()

    def wanted(request: Request, event: ServerSentEvent) -> bool:
        return event.event == request.query["type"]

    async with open_stream(create_app({"/a": broker.endpoint("a", filter=wanted)}), "/a?type=x") as stream:
        for number, kind in enumerate("xyx"):
            await broker.publish("a", {"data": number, "event": kind})
        assert [(await stream.receive()).data for _ in range(2)] == ["0", "2"]


def test_bad_arguments() -> None:
    broker = Broker()
    with pytest.raises(TypeError, match="authorize='a' is not callable"):
        broker.endpoint(authorize="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recheck= is of no use without authorize="):
        broker.endpoint(recheck=1)
    with pytest.raises(ValueError, match="recheck must be more than 0 or None, got 0"):
        broker.endpoint(recheck=0, authorize=lambda request: None)
    with pytest.raises(ValueError, match="channel 'a b'"):
        broker.endpoint("a b")
    with pytest.raises(ValueError, match="runs=True: a stream carries one run"):
        broker.endpoint(runs=True, snapshot=lambda request: None)
    with pytest.raises(TypeError, match="recheck must be a number or None, got '5'"):
        broker.endpoint(recheck="5", authorize=lambda request: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expires_at=nan is no time"):
        Access("a", expires_at=float("nan"))
    with pytest.raises(TypeError, match="snapshot='a' is not callable"):
        broker.subscribe("a", snapshot="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expires_at='soon'"):
        Access("a", expires_at="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern 'a\\*'"):
        Access(["a*"])
    for name in ("on_join", "on_leave"):
        with pytest.raises(TypeError, match=f"{name}=1 is not callable"):
            Broker(**{name: 1})  # type: ignore[arg-type]


# Snapshots


class Counter:
    """State that changes by published events, and can be asked for as a whole."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.value = 0
        self.made = 0
        self.wait: anyio.Event | None = None

    async def add(self) -> None:
        self.value += 1
        await self.broker.publish("counter", {"event": "added", "data": self.value})

    async def snapshot(self, request: Request | None = None) -> list[dict[str, Any]]:
        self.made += 1
        if self.wait is not None:
            await self.wait.wait()
        return [{"event": "part", "data": "of it"}, {"event": "all", "data": self.value}]


async def test_a_snapshot_comes_first_and_its_last_event_has_the_place() -> None:
    broker = Broker()
    counter = Counter(broker)
    await counter.add()
    app = create_app({"/c": broker.endpoint("counter", snapshot=counter.snapshot)}, opening_comment=False, retry=None)
    async with open_stream(app, "/c") as stream:
        opening = (await stream.read()).decode()
        place = opening.partition("id: ")[2].partition("\n")[0]
        assert place.endswith("-1")
        # Who is cut in between has no id, and gets all of it again.
        assert opening == f"event: part\ndata: of it\n\nid: {place}\nevent: all\ndata: 1\n\n"
        await counter.add()
        assert (await stream.receive()).data == "2"
    async with open_stream(app, "/c", headers={"Last-Event-ID": place}) as stream:
        assert (await stream.receive()).event == "added"  # no snapshot: it goes on
    assert counter.made == 1


async def test_what_is_published_while_a_snapshot_is_made_comes_behind_it() -> None:
    broker = Broker()
    counter = Counter(broker)
    counter.wait = anyio.Event()
    response = EventSourceResponse(broker.subscribe("counter", snapshot=counter.snapshot))
    async with open_stream(response) as stream:
        await anyio.sleep(1)
        await counter.add()
        await counter.add()
        await anyio.sleep(1)
        counter.wait.set()
        seen = [await stream.receive() for _ in range(4)]
    # It was made of what had changed already: an event may repeat what it has seen, and none is missed.
    assert [(event.event, event.data) for event in seen] == [
        ("part", "of it"),
        ("all", "2"),
        ("added", "1"),
        ("added", "2"),
    ]
    assert str(seen[1].id).endswith("-0")


@pytest.mark.parametrize("reads", ["stream", "iterable"])
async def test_a_snapshot_follows_each_reset(reads: str) -> None:
    broker = Broker(history=2)
    counter = Counter(broker)
    subscription = broker.subscribe("counter", snapshot=counter.snapshot, last_event_id="gone-1")
    for _ in range(5):
        await counter.add()

    async def check(receive: Any) -> None:
        reset = await receive()
        assert (reset.event, reset.data, reset.id) == ("reset", '{"reason":"epoch"}', "")
        assert [(await receive()).event for _ in range(2)] == ["part", "all"]
        await counter.add()
        assert (await receive()).data == "6"
        for _ in range(5):
            await counter.add()
        if reads == "stream":  # which has taken the first of them already, or all
            return
        reset = await receive()
        assert (reset.event, reset.data, reset.id) == ("reset", '{"reason":"overflow"}', "")
        assert subscription.last_event_id == ""
        assert (await receive()).event == "part"
        state = await receive()
        assert (state.event, state.data) == ("all", "11")
        assert subscription.last_event_id == state.id

    if reads == "stream":
        # Made when it is read, behind the five: so that they are not lost, but in the snapshot.
        async with open_stream(EventSourceResponse(subscription)) as stream:
            await check(stream.receive)
    else:
        async with subscription:
            await check(subscription.__anext__)
    assert counter.made == 2 - (reads == "stream")


async def test_a_slow_stream_gets_a_snapshot_in_place_of_what_it_missed() -> None:
    broker = Broker(history=2)
    counter = Counter(broker)
    app = create_app({"/c": broker.endpoint("counter", snapshot=counter.snapshot)}, send_timeout=None)
    async with open_stream(app, "/c", capacity=1) as stream:
        for _ in range(50):
            await counter.add()
            await anyio.sleep(0.01)
        seen: list[ServerSentEvent] = []
        while not seen or seen[-1].event != "reset":
            seen.append(await stream.receive())
        assert seen[-1].id == ""
        assert [(await stream.receive()).event for _ in range(2)] == ["part", "all"]
        assert stream.last_event_id
        await counter.add()
        assert (await stream.receive()).data == "51"


@pytest.mark.parametrize("kind", ["one", "none", "empty", "sync", "generator", "async generator", "iterator"])
async def test_what_a_snapshot_may_be(kind: str) -> None:
    class Iterates:
        def __init__(self) -> None:
            self.left = 2

        def __aiter__(self) -> "Iterates":
            return self

        async def __anext__(self) -> str:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return "x"

    def make() -> Any:
        async def generate() -> AsyncIterator[str]:
            yield "x"
            await anyio.lowlevel.checkpoint()
            yield "x"

        return {
            "one": ServerSentEvent("x"),
            "none": None,
            "empty": [],
            "sync": ["x", "x"],
            "generator": (text for text in "xx"),
            "async generator": generate(),
            "iterator": Iterates(),
        }[kind]

    broker = Broker()
    await broker.publish("a", "before")
    async with open_stream(EventSourceResponse(broker.subscribe("a", snapshot=make))) as stream:
        for _ in range({"one": 1, "none": 0, "empty": 0}.get(kind, 2)):
            assert (await stream.receive()).data == "x"
        await broker.publish("a", "later")
        assert (await stream.receive()).data == "later"


@pytest.mark.parametrize(
    ("made", "error"), [([{"data": 1, "id": 7}], InvalidEventError), (object(), TypeError), ([b"x"], InvalidEventError)]
)
async def test_what_is_no_snapshot(made: Any, error: type[Exception]) -> None:
    broker = Broker()
    with pytest.raises(error):
        async with open_stream(EventSourceResponse(broker.subscribe("a", snapshot=lambda: made))) as stream:
            await stream.receive()
    assert broker.subscribers("a") == 0


async def test_a_snapshot_that_fails_has_a_status_of_its_own_or_cuts_the_stream() -> None:
    broker = Broker(history=2)
    fails: list[Exception] = [HTTPError(503, "the database is down")]

    async def snapshot(request: Request) -> str:
        await anyio.sleep(0.5)  # less than open_timeout
        if fails:
            raise fails.pop()
        return "state"

    app = create_app({"/a": broker.endpoint("a", snapshot=snapshot)}, send_timeout=None)
    assert await status_of(app, "/a") == (503, "the database is down")
    with pytest.raises(ZeroDivisionError):
        async with open_stream(app, "/a", capacity=1) as stream:
            fails.append(ZeroDivisionError())
            for _ in range(50):
                await broker.publish("a", "x")
                await anyio.sleep(0.01)
            async for _ in stream:
                pass
    assert broker.subscribers("a") == 0


async def test_a_client_that_leaves_while_its_snapshot_is_made() -> None:
    broker = Broker()
    ended: list[str] = []

    async def snapshot() -> None:
        try:
            await anyio.sleep(3600)
        except anyio.get_cancelled_exc_class():
            ended.append("cancelled")
            raise

    async with open_stream(EventSourceResponse(broker.subscribe("a", snapshot=snapshot))) as stream:
        await anyio.sleep(1)
        await stream.disconnect()
    assert ended == ["cancelled"]
    assert broker.subscribers("a") == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
async def test_a_state_that_is_rebuilt_is_right_in_the_end(seed: int) -> None:
    """Of clients that keep it by snapshots and changes, are cut anywhere, and too slow at times."""
    chance = random.Random(seed)
    broker = Broker(history=chance.choice([1, 3, 50]), max_channels=chance.choice([1, 50]))
    state: set[int] = set()

    async def snapshot() -> list[dict[str, Any]]:
        made = [{"event": "part", "data": number} for number in sorted(state)]
        await anyio.sleep(chance.choice([0, 0, 0.1, 0.3]))
        return [{"event": "clear", "data": ""}, *made]

    done = anyio.Event()

    async def client() -> None:
        seen: set[int] = set()
        last = ""
        while True:
            ending = done.is_set()
            response = EventSourceResponse(
                broker.subscribe("set.*", last_event_id=last or None, snapshot=snapshot), send_timeout=None
            )
            async with open_stream(response, capacity=1) as stream:
                events: list[ServerSentEvent] = []
                with anyio.move_on_after(5 if ending else 0.2):
                    for _ in range(10**6 if ending else chance.randrange(20)):
                        events.append(await stream.receive(10))  # noqa: PERF401 (it is cut)
                events += stream._events  # fed to the decoder: seen, with its id
                if any(event.event == "reset" for event in events) or stream._decoder.last_event_id:
                    last = stream.last_event_id
            for event in events:
                if event.event in {"clear", "reset"}:
                    seen.clear()
                else:
                    seen.add(int(str(event.data)))
            if ending:
                break
        assert seen == state

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(client)
        for number in range(60):
            state.add(number)
            await broker.publish(f"set.{number % 3}", number)
            if chance.random() < 0.3:
                await anyio.sleep(chance.choice([0, 0.01]))
        done.set()


@pytest.mark.parametrize("how", ["expired", "overflow"])
async def test_one_snapshot_is_made_at_a_time_and_for_the_place_that_was_taken_before(how: str) -> None:
    """It was lost before it is read, and in the second case again while it is made."""
    broker = Broker(history=2)
    state, made = 0, 0

    async def change(number: int = 1) -> None:
        nonlocal state
        for _ in range(number):
            state += 1
            await broker.publish("a", {"event": "change", "data": state})

    async def snapshot() -> dict[str, Any]:
        nonlocal made
        made += 1
        seen = state
        await anyio.sleep(1)
        return {"event": "state", "data": seen}

    await change(5)
    last = broker.subscribe("a").last_event_id.replace("-5", "-1")
    response = EventSourceResponse(
        broker.subscribe("a", last_event_id=last if how == "expired" else None, snapshot=snapshot), send_timeout=None
    )

    async def later() -> None:
        await anyio.sleep(0.5)
        await change(1 if how == "expired" else 5)  # which has no place in the log
        await anyio.sleep(4)
        await change()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(later)
        async with open_stream(response) as stream:
            seen = 0
            while seen < (7 if how == "expired" else 11):
                event = await stream.receive(5)
                if event.event == "state":
                    seen = int(str(event.data))
                    assert str(event.id).endswith(f"-{seen}")
                elif event.event == "change":
                    seen += 1
                    assert str(event.data) == str(seen)
    assert made == (1 if how == "expired" else 2)


async def test_a_reader_whose_snapshot_is_slower_than_the_log_forgets_is_given_up() -> None:
    broker, registry = Broker(history=2), StreamRegistry()

    async def snapshot() -> str:
        await anyio.sleep(1)
        return "state"

    async def publish() -> None:
        while True:
            await broker.publish("a", "x")
            await anyio.sleep(0.1)

    response = EventSourceResponse(broker.subscribe("a", snapshot=snapshot), registry=registry)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        async with open_stream(response) as stream:
            events = [event.event async for event in stream]
        tasks.cancel_scope.cancel()
    assert events.count("reset") == 4
    assert registry.statistics().closed == {"overflowed": 1}


async def test_pings_leaving_and_the_end_reach_a_stream_whose_first_snapshot_is_made() -> None:
    broker, registry = Broker(), StreamRegistry()
    cancelled: list[bool] = []

    async def snapshot(request: Request) -> None:
        try:
            await anyio.sleep(1000)
        except anyio.get_cancelled_exc_class():
            cancelled.append(True)
            raise

    app = create_app({"/a": broker.endpoint("a", snapshot=snapshot)}, registry=registry, ping=5)
    async with open_stream(app, "/a") as stream:
        await stream.read()
        assert await stream.read(timeout=6) == b": ping\n\n"
        await stream.disconnect()
    async with open_stream(app, "/a") as stream:
        report = await registry.drain()
        assert [event async for event in stream] == []
        assert stream.complete
    assert report.closed == 1
    assert cancelled == [True, True]
    async with open_stream(app, "/a", method="HEAD") as stream:
        assert await stream.read() == b""


async def test_they_are_asgi_apps_too() -> None:
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


# Checkpoints


async def test_keep_alives_that_commit_a_place() -> None:
    broker = Broker(history=2)
    app = create_app({"/quiet": broker.endpoint("quiet", checkpoint=True)}, ping=15)
    async with open_stream(app, "/quiet") as stream:
        await stream.read()
        for number in range(10):
            await broker.publish("busy", number)
        place = await stream.read(timeout=20)
        assert place.endswith(b"-10\n\n")
        assert place.startswith(b"id: ")
        await broker.publish("quiet", "x")
        assert str((await stream.receive()).id).endswith("-11")
        assert (await stream.read(timeout=20)).endswith(b"-11\n\n")  # and again, since it keeps the stream alive
    last = stream.last_event_id
    async with open_stream(app, "/quiet", headers={"Last-Event-ID": last}) as stream:
        await broker.publish("quiet", "y")
        assert (await stream.receive()).data == "y"


async def test_no_checkpoint_passes_what_the_client_does_not_have() -> None:
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


# Access that is looked at again


async def test_an_authorizer_that_does_not_answer_does_not_grant() -> None:
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


async def test_a_broader_grant_goes_on() -> None:
    broker, grants = Broker(), [["user.7"], ["user.**"], ["user.*", "news"]]

    def authorize(request: Request) -> list[str]:
        return grants.pop(0) if len(grants) > 1 else grants[0]

    async with open_stream(create_app({"/a": broker.endpoint(authorize=authorize, recheck=60)}), "/a") as stream:
        await anyio.sleep(200)
        await broker.publish("user.7", "x")
        assert (await stream.receive()).data == "x"


# Presence


@pytest.mark.parametrize("is_async", [False, True])
async def test_presence(is_async: bool) -> None:
    seen: list[tuple[str, Any]] = []

    def hook(what: str) -> Any:
        async def later(subscription: Subscription) -> None:
            if what == "came":
                await anyio.sleep(5)  # and yet it is done before what is done when that one leaves
            seen.append((what, subscription.info.query["user"]))

        def at_once(subscription: Subscription) -> None:
            seen.append((what, subscription.info.query["user"]))

        return later if is_async else at_once

    async with Broker(on_join=hook("came"), on_leave=hook("left")) as broker:
        app = create_app({"/a": broker.channel("a"), "/b": broker.endpoint("b")})
        async with open_stream(app, "/a?user=ann"), open_stream(app, "/b?user=bob") as stream:
            await stream.disconnect()
    assert sorted(seen) == [("came", "ann"), ("came", "bob"), ("left", "ann"), ("left", "bob")]
    assert seen.index(("came", "bob")) < seen.index(("left", "bob"))


async def test_presence_of_who_reads_without_a_response() -> None:
    seen: list[str] = []
    broker = Broker(
        on_join=lambda who: seen.append(f"{who.info} came"), on_leave=lambda who: seen.append(f"{who.info} left")
    )
    await broker.publish("a", "x")
    async with broker.subscribe("a", info="one", last_event_id=None) as subscription:
        assert seen == []  # not yet read
        with anyio.move_on_after(1):
            await subscription.__anext__()
    assert seen == ["one came", "one left"]


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_hook_that_raises_is_logged(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    def hook(subscription: Subscription) -> Any:
        async def later() -> None:
            await anyio.lowlevel.checkpoint()
            raise LookupError("in the hook")

        if is_async:
            return later()
        raise LookupError("in the hook")

    async with Broker(on_join=hook) as broker, open_stream(create_app({"/a": broker.channel("a")}), "/a") as stream:
        await broker.publish("a", "x")
        assert (await stream.receive()).data == "x"
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info and record.exc_info[1]] == [
        ("in the hook",)
    ]


async def test_a_hook_that_is_done_at_once_waits_for_the_one_before() -> None:
    online: set[str] = set()

    async def came(subscription: Subscription) -> None:
        await anyio.sleep(5)
        online.add("ann")

    broker = Broker(on_join=came, on_leave=lambda subscription: online.discard("ann"))
    async with broker, open_stream(create_app({"/a": broker.channel("a")}), "/a"):
        pass
    assert online == set()


async def test_a_hook_that_hangs_does_not_hold_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def hangs(subscription: Subscription) -> None:
        await anyio.sleep(10_000)

    async with Broker(on_leave=hangs) as broker:
        async with open_stream(create_app({"/a": broker.channel("a")}), "/a"):
            pass
        began = anyio.current_time()
    assert anyio.current_time() - began == pytest.approx(10, abs=0.1)
    assert "did not return within 10 s" in caplog.text


@pytest.mark.parametrize("came", [0, 5])
async def test_who_leaves_because_the_broker_closes_is_told_of(came: float) -> None:
    told: list[str] = []

    async def on_join(subscription: Subscription) -> None:
        await anyio.sleep(came)
        told.append("came")

    async def on_leave(subscription: Subscription) -> None:
        await anyio.sleep(1)
        told.append("left")

    async with anyio.create_task_group() as tasks:
        async with Broker(on_join=on_join, on_leave=on_leave) as broker:

            async def read() -> None:
                assert [event async for event in broker.subscribe("a")] == []

            tasks.start_soon(read)
            await anyio.sleep(1)
        assert told == ["came", "left"]


async def test_names_that_come_and_go_leave_nothing_with_who_reads_them_by_a_pattern() -> None:
    broker = Broker(max_channels=10)
    async with broker.subscribe("**") as subscription:
        with anyio.move_on_after(0.1):
            await subscription.__anext__()
        for number in range(5000):
            broker.publish_nowait(f"a.{number}", "x")
        assert len(broker._dispatcher._patterns["**"].channels) < 500


# As an iterable


@pytest.mark.parametrize("how", ["closed", "drained"])
async def test_a_loop_over_a_subscription_ends_with_the_broker(how: str) -> None:
    broker, registry = Broker(), StreamRegistry()
    create_app({}, registry=registry, broker=broker)

    async def read() -> None:
        assert [event async for event in broker.subscribe("a")] == []

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.sleep(1)
        assert broker.subscribers("a") == 1
        if how == "drained":
            registry.begin_drain()
        else:
            async with broker:
                pass
    assert broker.subscribers("a") == 0


async def test_an_iterable_that_is_left_is_closed() -> None:
    broker = Broker()
    for number in range(3):
        await broker.publish("a", number)

    async def leave_with(how: str) -> None:
        async for event in broker.subscribe("a", last_event_id=None):
            if how == "break":
                break
            raise ValueError(event)

    for how in ("break", "error"):
        async with anyio.create_task_group() as tasks:

            async def run(how: str = how) -> None:
                if how == "break":
                    await leave_with(how)
                else:
                    with pytest.raises(ValueError, match="ServerSentEvent"):
                        await leave_with(how)

            tasks.start_soon(run)
            await anyio.wait_all_tasks_blocked()
            assert broker.subscribers("a") == 1
            await broker.publish("a", "x")
        await anyio.wait_all_tasks_blocked()
        assert broker.subscribers("a") == 0


async def test_a_closed_subscription_cannot_be_read_again() -> None:
    broker = Broker()
    async with broker.subscribe("a") as subscription:
        pass
    assert [event async for event in subscription] == []
    with pytest.raises(StreamClosedError):
        async with open_stream(EventSourceResponse(subscription)):
            pass
