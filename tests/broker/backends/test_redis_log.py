"""The log on Redis and Valkey: keys that are trimmed, deleted or rolled back, and payloads of others."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from backend_helpers import data, reset_reason, take, wait_until
from backend_servers import PREFIX, TIMEOUT_S, Valkey

import asgi_sse.broker
from asgi_sse import Broker, EventSourceResponse
from asgi_sse.broker.backends.redis import RedisBackend
from asgi_sse.testing import open_stream

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,
    pytest.mark.skipif(not Valkey.available(), reason="Valkey is not installed"),
    pytest.mark.usefixtures("short_block"),
]


def block_loop_during(call: Callable[[], Any]) -> None:
    """Run `call` in a thread while the event loop is blocked, so that no reader sees the steps of it."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(TIMEOUT_S)


async def test_trimmed_log_is_filled_from_the_channel_streams(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        by_name, by_pattern, both, overflowed = (
            broker.subscribe(*names) for names in (("a",), ("b.*",), ("a", "b.x"), ("gone", "a"))
        )
        first = await broker.publish("a", "first")
        await broker.publish("b.x", "first")
        for subscription, number in ((by_name, 1), (by_pattern, 1), (both, 2), (overflowed, 1)):
            await take(subscription, number)

        def publish_and_trim() -> None:
            for number in range(5):
                for channel in ("a", "b.x", "unread", "gone"):
                    asgi_sse.broker.publish(valkey.url, channel, f"{channel} {number}", prefix=prefix)
            with valkey.client() as client:
                client.xtrim(f"{{{prefix}}}:log", maxlen=0, approximate=False)
                client.xtrim(f"{{{prefix}}}:c:gone", maxlen=2, approximate=False)

        block_loop_during(publish_and_trim)
        assert data(await take(by_name, 5)) == [f"a {number}" for number in range(5)]
        assert data(await take(by_pattern, 5)) == [f"b.x {number}" for number in range(5)]
        seen = data(await take(both, 10))
        assert seen == [f"{channel} {number}" for number in range(5) for channel in ("a", "b.x")]
        while (reset := (await take(overflowed, 1))[0]).event is None:
            pass  # the first events may have arrived before the trim
        assert reset_reason(reset) == "overflow"
        last = await broker.publish("unread", "last")
        cold = broker.subscribe("unread", "a", last_event_id=first)  # also for a channel that nobody has read
        seen = data(await take(cold, 11))
        assert seen[-1] == "last"
        assert [text for text in seen if (text or "").startswith("unread")] == [f"unread {n}" for n in range(5)]
        assert cold.last_event_id == last
        assert broker.statistics().restarts == 0


@pytest.mark.parametrize("keys", [("meta",), ("last",), ("meta", "log", "last"), ("*",)])
async def test_deleted_keys_begin_a_new_epoch(valkey: Valkey, prefix: str, keys: tuple[str, ...]) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        subscriptions = [broker.subscribe("a") for broker in (one, two)]
        ids = [await one.publish("a", str(number)) for number in range(5)]
        for subscription in subscriptions:
            await take(subscription, 5)
        with valkey.client() as client:
            names = [f"{{{prefix}}}:{key}" for key in keys]
            client.delete(*(client.keys(names[0].replace("{", "\\{")) if keys == ("*",) else names))
        after = await two.publish("a", "after")  # noticed by the publisher or by the idle reader
        assert after.partition("-")[0] != ids[0].partition("-")[0]
        for subscription in subscriptions:
            reset, event = await take(subscription, 2)
            assert reset_reason(reset) == "epoch"
            assert (event.data, event.id) == ("after", after)
        for broker in (one, two):
            (reset,) = await take(broker.subscribe("a", last_event_id=ids[2]), 1)
            assert reset_reason(reset) == "epoch"
            assert broker.statistics().restarts == 1


async def test_idle_reader_notices_a_deleted_log(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "x")
        await take(subscription, 1)
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:meta")
        assert reset_reason((await take(subscription, 1))[0]) == "epoch"


async def test_deleted_stream_is_harmless_while_live_and_resets_a_resume(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        first = await broker.publish("a", "0")
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:log")
        await broker.publish("a", "1")
        assert data(await take(subscription, 2)) == ["0", "1"]
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:c:a")
        last = await broker.publish("a", "2")
        assert data(await take(subscription, 1)) == ["2"]
        async with Broker(valkey.url, prefix=prefix) as cold:
            (reset,) = await take(cold.subscribe("a", last_event_id=first), 1)
            assert (reset_reason(reset), reset.id) == ("expired", last)


async def test_rolled_back_server_gets_a_new_epoch(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server:
        async with Broker(server.url) as one, Broker(server.url) as two:
            subscriptions = [broker.subscribe("a") for broker in (one, two)]
            kept = [await one.publish("a", str(number), idempotency_key=str(number)) for number in range(3)]
            await asyncio.to_thread(server.save)
            lost = [await one.publish("a", f"lost {number}") for number in range(3)]
            for subscription in subscriptions:
                await take(subscription, 6)
            await asyncio.to_thread(server.restart, saved=True)
            ids = [await two.publish("a", f"new {number}") for number in range(4)]  # more than were lost
            assert not {ids[0].partition("-")[0]} & {kept[0].partition("-")[0]}
            for broker, subscription in zip((one, two), subscriptions, strict=True):
                reset, *events = await take(subscription, 5)
                assert reset_reason(reset) == "epoch"
                assert [event.id for event in events] == ids
                (reset,) = await take(broker.subscribe("a", last_event_id=lost[1]), 1)
                assert reset_reason(reset) == "epoch"
            again = await one.publish("a", "2", idempotency_key="2")  # kept, so it is in the log only once
            assert again.partition("-")[::2] == (ids[0].partition("-")[0], kept[2].partition("-")[2])


async def test_invalid_payload_is_skipped_and_logged(
    valkey: Valkey, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        with valkey.client() as client:
            for payload in (
                b"no JSON",
                b"[1]",
                b'{"id": "7", "data": "x"}',
                b'{"data": "x", "event": "a\\nb"}',
                b"\xff",
            ):
                meta = f"{{{prefix}}}:meta"
                number = client.hincrby(meta, "n", 1)
                fields = {"c": "a", "e": payload, "l": number - 1, "t": 0, "x": client.hget(meta, "epoch")}
                client.xadd(f"{{{prefix}}}:log", fields, id=f"{number}-0")
        await broker.publish("a", "1")
        assert data(await take(subscription, 2)) == ["0", "1"]
    skipped = [record for record in caplog.records if record.getMessage().startswith("skipped invalid event")]
    assert [vars(record)["sse_backend"] for record in skipped] == [valkey.url] * 5
    assert not any(part in caplog.text for part in ("no JSON'", "[1]", "a\\nb"))  # nothing of the payloads


async def test_invalid_payload_is_skipped_when_a_channel_is_fetched(
    valkey: Valkey, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        first = await broker.publish("a", "0")
        with valkey.client() as client:
            number = client.hincrby(f"{{{prefix}}}:meta", "n", 1)
            client.xadd(f"{{{prefix}}}:c:a", {"e": b"no JSON", "l": number - 1, "t": 0}, id=f"{number}-0")
        await broker.publish("a", "1")
        async with Broker(valkey.url, prefix=prefix) as cold:
            assert data(await take(cold.subscribe("a", last_event_id=first), 1)) == ["1"]
    assert f"skipped invalid event {number} of {valkey.url}" in caplog.messages


# Restarts and gaps


async def test_restarted_server_with_a_trimmed_log_causes_no_reset(tmp_path: Path) -> None:
    """The entry that was read last is recognised in the stream of its channel."""

    def restart_and_trim() -> None:
        server.restart()
        with server.client() as client:
            client.xtrim("{asgi_sse}:log", maxlen=0, approximate=False)

    with Valkey(tmp_path) as server:
        async with Broker(server.url, publish_timeout=None) as broker:
            subscription = broker.subscribe("a")
            await broker.publish("a", "0")
            assert data(await take(subscription, 1)) == ["0"]
            # After a gap was filled, the last entry is known with its channel.
            block_loop_during(
                partial(trim_after, server, PREFIX, partial(asgi_sse.broker.publish, server.url, "a", "1"))
            )
            assert data(await take(subscription, 1)) == ["1"]
            block_loop_during(restart_and_trim)
            await broker.publish("a", "2")
            assert data(await take(subscription, 1)) == ["2"]
            assert (broker.statistics().reconnects, broker.statistics().restarts) == (1, 0)


async def test_rollback_is_noticed_although_other_processes_published_as_many_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Valkey(tmp_path) as server:
        async with Broker(server.url, publish_timeout=None) as broker:
            subscription = broker.subscribe("a")
            await broker.publish("a", "kept")
            await asyncio.to_thread(server.save)
            lost = await broker.publish("a", "lost")
            await take(subscription, 2)

            def roll_back_and_publish() -> None:
                server.restart(saved=True)
                for number in range(3):
                    asgi_sse.broker.publish(server.url, "a", f"new {number}")

            block_loop_during(roll_back_and_publish)
            assert reset_reason((await take(subscription, 1))[0]) == "epoch"
            last = await broker.publish("a", "last")
            assert last.partition("-")[0] != lost.partition("-")[0]
            assert data(await take(subscription, 1)) == ["last"]
            assert reset_reason((await take(broker.subscribe("a", last_event_id=lost), 1))[0]) == "epoch"
    assert f"{server.url} has lost acknowledged events; subscribers get a reset event" in caplog.messages


def trim_after(server: Valkey, prefix: str, call: Callable[[], Any]) -> None:
    """Trim the log after `call`, so that a process that has not read it meanwhile finds a gap."""
    # A read that waits at the server gets the first event, and no later one.
    asgi_sse.broker.publish(server.url, "first", "x", prefix=prefix)
    call()
    with server.client() as client:
        client.xtrim(f"{{{prefix}}}:log", maxlen=0, approximate=False)


async def test_gap_resets_the_subscribers_of_a_channel_whose_stream_is_gone(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        gone, other = broker.subscribe("gone"), broker.subscribe("other")
        for name in ("gone", "other"):
            await broker.publish(name, "0")
        for subscription in (gone, other):
            await take(subscription, 1)

        def publish_and_delete() -> None:
            for number in range(1, 4):
                for name in ("gone", "other"):
                    asgi_sse.broker.publish(valkey.url, name, number, prefix=prefix)
            with valkey.client() as client:
                client.delete(f"{{{prefix}}}:c:gone")

        block_loop_during(lambda: trim_after(valkey, prefix, publish_and_delete))
        assert data(await take(other, 3)) == ["1", "2", "3"]
        assert reset_reason((await take(gone, 1))[0]) == "overflow"
        last = await broker.publish("gone", "last")
        assert [event.id for event in await take(gone, 1)] == [last]
        assert broker.statistics().restarts == 0


async def test_gap_in_which_channels_were_forgotten_resets_all_that_may_have_read_them(
    valkey: Valkey, prefix: str
) -> None:
    async with Broker(valkey.url, prefix=prefix, max_channels=3) as broker:
        by_pattern, by_name = broker.subscribe("**"), broker.subscribe("kept")
        await broker.publish("kept", "0")
        for subscription in (by_pattern, by_name):
            await take(subscription, 1)

        def publish_to_many() -> None:
            for number in range(6):
                asgi_sse.broker.publish(valkey.url, f"c{number}", "x", prefix=prefix)
                asgi_sse.broker.publish(valkey.url, "kept", number, prefix=prefix)

        block_loop_during(lambda: trim_after(valkey, prefix, publish_to_many))
        for subscription in (by_pattern, by_name):
            (reset,) = await take(subscription, 1)
            assert (reset_reason(reset), str(reset.id).partition("-")[2]) == ("expired", "14")
        last = await broker.publish("kept", "last")
        for subscription in (by_pattern, by_name):
            assert [event.id for event in await take(subscription, 1)] == [last]


async def test_gap_that_is_larger_than_the_history_overflows_no_stream(valkey: Valkey, prefix: str) -> None:
    """The server keeps more events than it has to, and streams get turns while the gap is filled."""
    async with (
        Broker(valkey.url, prefix=prefix, history=8) as broker,
        open_stream(EventSourceResponse(broker.subscribe("a")), capacity=100) as stream,
    ):
        await broker.publish("a", "0")
        assert (await stream.receive(TIMEOUT_S)).data == "0"

        def publish_many() -> None:
            for number in range(1, 50):
                asgi_sse.broker.publish(valkey.url, "a", number, prefix=prefix)

        block_loop_during(lambda: trim_after(valkey, prefix, publish_many))
        received = [(await stream.receive(TIMEOUT_S)).data for _ in range(49)]
        assert received == [str(number) for number in range(1, 50)]


async def test_gap_whose_last_event_was_deleted_does_not_delay_later_events(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        await take(subscription, 1)

        def publish_and_delete() -> None:
            ids = [asgi_sse.broker.publish(valkey.url, "a", number, prefix=prefix) for number in (1, 2)]
            with valkey.client() as client:
                client.xdel(f"{{{prefix}}}:c:a", f"{ids[1].partition('-')[2]}-0")

        block_loop_during(lambda: trim_after(valkey, prefix, publish_and_delete))
        assert data(await take(subscription, 1)) == ["1"]
        last = await broker.publish("a", "3")
        assert last.endswith("-5")
        assert [event.id for event in await take(subscription, 1)] == [last]


# Large entries, and fetches that a new log overtakes


async def test_entries_that_take_too_long_to_read_are_read_in_smaller_numbers(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        client = broker._backend._client  # type: ignore[attr-defined]
        xread, counts = client.xread, []

        async def read_slowly(*arguments: Any, count: int, **options: Any) -> Any:
            counts.append(count)
            if count > 10:
                raise redis.exceptions.TimeoutError
            return await xread(*arguments, count=count, **options)

        monkeypatch.setattr(client, "xread", read_slowly)
        await broker.publish("a", "x")
        assert data(await take(subscription, 1)) == ["x"]
        assert counts[:4] == [256, 64, 16, 4]


async def test_fetch_that_a_new_log_overtakes_puts_nothing_back(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one:
        ids = [await one.publish("a", f"old {number}") for number in range(3)]
        async with Broker(valkey.url, prefix=prefix) as cold:
            backend = cold._backend
            assert isinstance(backend, RedisBackend)
            read_channels = backend._read_channels

            async def read_and_lose(*arguments: Any, **options: Any) -> Any:
                found = await read_channels(*arguments, **options)
                monkeypatch.undo()
                with valkey.client() as client:
                    client.delete(*client.keys(f"\\{{{prefix}}}:*"))
                for number in range(5):
                    await one.publish("a", f"new {number}")
                await wait_until(lambda: cold.statistics().received == 5)
                return found

            monkeypatch.setattr(backend, "_read_channels", read_and_lose)
            subscription = cold.subscribe("a", last_event_id=ids[0])
            assert reset_reason((await take(subscription, 1))[0]) == "epoch"
            last = await one.publish("a", "last")
            assert [event.id for event in await take(subscription, 1)] == [last]
            start = f"{last.partition('-')[0]}-0"
            again = await take(cold.subscribe("a", last_event_id=start), 6)
            assert data(again) == [*(f"new {number}" for number in range(5)), "last"]
