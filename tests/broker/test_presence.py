"""Presence: `on_join` and `on_leave` of a broker."""

import threading
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_sse import Broker, Subscription, create_app
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("is_async", [False, True])
async def test_hooks_are_called_for_streams(is_async: bool) -> None:
    seen: list[tuple[str, Any]] = []

    def hook(name: str) -> Any:
        async def later(subscription: Subscription) -> None:
            if name == "joined":
                await anyio.sleep(5)  # `on_leave` must wait for it
            seen.append((name, subscription.info.query["user"]))

        def at_once(subscription: Subscription) -> None:
            seen.append((name, subscription.info.query["user"]))

        return later if is_async else at_once

    async with Broker(on_join=hook("joined"), on_leave=hook("left")) as broker:
        app = create_app({"/a": broker.channel("a"), "/b": broker.endpoint("b")})
        async with open_stream(app, "/a?user=ann"), open_stream(app, "/b?user=bob") as stream:
            await stream.disconnect()
    assert sorted(seen) == [("joined", "ann"), ("joined", "bob"), ("left", "ann"), ("left", "bob")]
    assert seen.index(("joined", "bob")) < seen.index(("left", "bob"))


async def test_hooks_are_called_for_loops() -> None:
    seen: list[str] = []
    broker = Broker(
        on_join=lambda one: seen.append(f"{one.info} joined"), on_leave=lambda one: seen.append(f"{one.info} left")
    )
    await broker.publish("a", "x")
    async with broker.subscribe("a", info="one", last_event_id=None) as subscription:
        assert seen == []  # the first read comes later
        with anyio.move_on_after(1):
            await subscription.__anext__()
    assert seen == ["one joined", "one left"]


@pytest.mark.parametrize("is_async", [False, True])
async def test_error_of_a_hook_is_logged(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
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


async def test_sync_on_leave_waits_for_async_on_join() -> None:
    online: set[str] = set()

    async def joined(subscription: Subscription) -> None:
        await anyio.sleep(5)
        online.add("ann")

    broker = Broker(on_join=joined, on_leave=lambda subscription: online.discard("ann"))
    async with broker, open_stream(create_app({"/a": broker.channel("a")}), "/a"):
        pass
    assert online == set()


async def test_hanging_hook_does_not_block_close(caplog: pytest.LogCaptureFixture) -> None:
    async def hangs(subscription: Subscription) -> None:
        await anyio.sleep(10_000)

    async with Broker(on_leave=hangs) as broker:
        async with open_stream(create_app({"/a": broker.channel("a")}), "/a"):
            pass
        began = anyio.current_time()
    assert anyio.current_time() - began == pytest.approx(10, abs=0.1)
    assert "did not return within 10 s" in caplog.text


@pytest.mark.parametrize("join_seconds", [0, 5])
async def test_on_leave_is_called_when_the_broker_closes(join_seconds: float) -> None:
    called: list[str] = []

    async def on_join(subscription: Subscription) -> None:
        await anyio.sleep(join_seconds)
        called.append("joined")

    async def on_leave(subscription: Subscription) -> None:
        await anyio.sleep(1)
        called.append("left")

    async with anyio.create_task_group() as tasks:
        async with Broker(on_join=on_join, on_leave=on_leave) as broker:

            async def read() -> None:
                assert [event async for event in broker.subscribe("a")] == []

            tasks.start_soon(read)
            await anyio.sleep(1)
        assert called == ["joined", "left"]


async def test_close_cancels_no_hook_of_another_event_loop(caplog: pytest.LogCaptureFixture) -> None:
    began, proceed = threading.Event(), threading.Event()
    left: list[str] = []

    async def on_leave(subscription: Subscription) -> None:
        if subscription.info == "here":
            await anyio.sleep(10_000)
        began.set()
        await anyio.to_thread.run_sync(proceed.wait)
        left.append(subscription.info)

    async def leave_elsewhere() -> None:
        broker.subscribe("a", info="elsewhere").as_pull_source().detach()
        while not left:
            await anyio.sleep(0.01)

    async with Broker(on_leave=on_leave) as broker:
        thread = threading.Thread(target=anyio.run, args=(leave_elsewhere,))
        thread.start()
        assert began.wait(20)
        broker.subscribe("a", info="here").as_pull_source().detach()
    assert caplog.text.count("did not return within 10 s and is cancelled") == 1
    proceed.set()
    thread.join()
    assert left == ["elsewhere"]
