"""Runs on Redis and Valkey: leases, lost holders, and runs that outlive their log."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from backend_helpers import data, endless, renewed_already, reset_reason, take, two_parts, wait_until
from backend_servers import TIMEOUT_S, Valkey
from serving import environment

from asgi_sse import Broker
from asgi_sse.broker.backends.base import Publication
from asgi_sse.broker.backends.redis import RedisBackend
from asgi_sse.broker.runs import manager
from asgi_sse.broker.runs.publisher import final_event

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,
    pytest.mark.skipif(not Valkey.available(), reason="Valkey is not installed"),
    pytest.mark.usefixtures("short_block"),
]


SHORT_TTL_MS = 15_000  # half of a lease of 30 s: longer than a busy machine stalls


def renewed(client: Any, prefix: str) -> bool:
    """Return whether the lease of the run ``r`` was renewed since its TTL was set to `SHORT_TTL_MS`."""
    left: int = client.pttl(f"{{{prefix}}}:r:r")
    return left > SHORT_TTL_MS


async def delete_all(valkey: Valkey, prefix: str, *brokers: Broker) -> None:
    """Delete all keys, and wait until the brokers have restarted."""
    with valkey.client() as client:
        client.delete(*client.keys(f"\\{{{prefix}}}:*"))
    await wait_until(lambda: all(broker.statistics().restarts == 1 for broker in brokers))


# Leases


@pytest.mark.usefixtures("short_watch")
async def test_leases_are_renewed_after_an_error(valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", endless())
        renew = RedisBackend.renew_lease
        failed: list[object] = []

        async def fail_once(self: RedisBackend, name: str, lease: Any) -> bool:
            if not failed:
                failed.append(name)
                raise redis.exceptions.ResponseError("NOPERM")
            return await renew(self, name, lease)

        monkeypatch.setattr(RedisBackend, "renew_lease", fail_once)
        with valkey.client() as client:
            client.pexpire(f"{{{prefix}}}:r:r", SHORT_TTL_MS)
            await wait_until(lambda: bool(failed) and renewed(client, prefix))
        assert await two.find_run("r") is not None
        run.cancel()


HOLDER = """
import asyncio, sys
from asgi_sse import Broker


async def source():
    yield "first"
    print("begun", flush=True)
    await asyncio.Event().wait()


async def main():
    async with Broker(sys.argv[1], prefix=sys.argv[2]) as broker:
        await (await broker.run("r", source())).wait()


asyncio.run(main())
"""


@pytest.mark.usefixtures("short_watch")
async def test_run_of_a_killed_holder_is_ended_by_another_process(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as two, Broker(valkey.url, prefix=prefix) as three:
        holder = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLDER, valkey.url, prefix, env=environment(), stdout=asyncio.subprocess.PIPE
        )
        assert holder.stdout is not None
        assert await asyncio.wait_for(holder.stdout.readline(), TIMEOUT_S) == b"begun\n"
        found = [await broker.find_run("r") for broker in (two, three)]
        holder.kill()
        await holder.wait()
        with valkey.client() as client:
            assert 0 < client.pttl(f"{{{prefix}}}:r:r") <= 30_000
            client.pexpire(f"{{{prefix}}}:r:r", 1)  # so that the lease expires
        for run in found:
            assert run is not None
            async with asyncio.timeout(TIMEOUT_S):
                assert await run.wait() == "lost"
                seen = [event async for event in run.subscribe()]
            assert data(seen) == ["first", '{"reason":"lost"}']
        async with Broker(valkey.url, prefix=prefix) as cold:
            late = await cold.find_run("r")
            assert late is not None
            assert data(await take(late.subscribe(), 2)) == ["first", '{"reason":"lost"}']
        async with asyncio.timeout(TIMEOUT_S):
            again = await three.run("r", endless())
        assert again.outcome is None
        again.cancel()
        await again.wait()


@pytest.mark.usefixtures("short_watch")
async def test_run_continues_as_long_as_its_holder(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", endless())
        found = await two.find_run("r")
        assert found is not None
        with valkey.client() as client:
            for _ in range(3):
                client.pexpire(f"{{{prefix}}}:r:r", SHORT_TTL_MS)
                await wait_until(lambda: renewed(client, prefix))
            client.delete(f"{{{prefix}}}:r:r")
            await wait_until(lambda: bool(client.exists(f"{{{prefix}}}:r:r")))  # the holder writes it again
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await found.wait()
        with valkey.client() as client:
            client.hset(f"{{{prefix}}}:r:r", "holder", "another")
            await wait_until(lambda: run.publisher is None)  # the former holder stops publishing
            client.pexpire(f"{{{prefix}}}:r:r", 1)  # so that the lease of the other holder expires
        async with asyncio.timeout(TIMEOUT_S):
            assert await run.wait() == "lost"
        found.cancel()
        run.cancel()


async def test_run_that_was_taken_over_ends_where_the_new_holder_ends_it(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "_WATCH_INTERVAL_S", 0.05)
    stopped = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            yield "0"
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", source())
        reader = run.subscribe()
        assert data(await take(reader, 1)) == ["0"]
        with valkey.client() as client:
            client.hset(f"{{{prefix}}}:r:r", "holder", "another")
        async with asyncio.timeout(TIMEOUT_S):
            await stopped.wait()
            await two.publish("r", "1")  # an event that was sent before the end
            await two._backend.publish(Publication("r", final_event("lost"), end="lost", keep_after=0, ttl=60))
            assert data([event async for event in reader]) == ["1", '{"reason":"lost"}']
            assert await run.wait() == "lost"


async def test_concurrent_starts_in_one_process_share_one_run(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        for number in range(50):
            runs = await asyncio.gather(*(broker.run(f"r{number}", ["x"], join=True) for _ in range(5)))
            assert len(set(map(id, runs))) == 1
            async with asyncio.timeout(TIMEOUT_S):
                await runs[0].wait()


async def test_run_stays_whole_while_its_process_lags_behind(valkey: Valkey, prefix: str) -> None:
    events: asyncio.Queue[str] = asyncio.Queue()

    async def source() -> AsyncIterator[str]:
        while True:
            yield await events.get()

    async with Broker(valkey.url, prefix=prefix, run_grace=0) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", source())
        for number in range(400):
            events.put_nowait(str(number))
        await wait_until(lambda: two.statistics().received == 400)
        reads, held, xread = asyncio.Event(), asyncio.Event(), one._backend._client.xread  # type: ignore[attr-defined]

        async def wait_and_read(*args: Any, **options: Any) -> Any:
            reads.set()
            await held.wait()
            return await xread(*args, **options)

        one._backend._client.xread = wait_and_read  # type: ignore[attr-defined]
        await asyncio.wait_for(reads.wait(), TIMEOUT_S)  # the read before the replacement has ended
        for _ in range(30):
            await asyncio.gather(*(two.publish("a", "x") for _ in range(64)))
        held.set()
        await wait_until(lambda: one.statistics().last_event_id == two.statistics().last_event_id)
        events.put_nowait("400")
        await wait_until(lambda: two.statistics().received == 400 + 30 * 64 + 1)
        with valkey.client() as client:
            assert client.xlen(f"{{{prefix}}}:c:r") == 401
        run.cancel()


# Runs that outlive their log


async def test_run_continues_in_the_next_epoch(valkey: Valkey, prefix: str) -> None:
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", two_parts(release))
        found = await two.find_run("r")
        assert found is not None
        readers = [run.subscribe(), found.subscribe()]
        for reader in readers:
            assert data(await take(reader, 1)) == ["before"]
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        release.set()
        for reader in readers:
            reset, after, end = await take(reader, 3)
            assert reset_reason(reset) == "epoch"
            assert (after.data, end.event) == ("after", "end")
        async with asyncio.timeout(TIMEOUT_S):
            assert await run.wait() == await found.wait() == "finished"


@pytest.mark.usefixtures("short_watch")
async def test_running_run_is_not_taken_for_lost_after_an_epoch_change(valkey: Valkey, prefix: str) -> None:
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        for _ in range(20):
            await one.publish("a", "x")  # so that the run begins after the end of the next log
        run = await one.run("r", two_parts(release))
        found = await two.find_run("r")
        assert found is not None
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        await asyncio.sleep(0.5)  # ten checks of the leases
        assert found.outcome is None
        async with Broker(valkey.url, prefix=prefix) as three:
            late = await three.find_run("r")
            assert late is not None
            release.set()
            async with asyncio.timeout(TIMEOUT_S):
                reset, *rest = [event async for event in late.subscribe()]
                assert reset_reason(reset) == "expired"  # the beginning of the run is lost
                assert data(rest) == ["after", '{"reason":"finished"}']
                assert await run.wait() == await found.wait() == "finished"


@pytest.mark.usefixtures("short_watch")
async def test_late_subscriber_of_a_run_without_its_beginning_gets_a_reset(valkey: Valkey, prefix: str) -> None:
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", two_parts(release))
        await take(run.subscribe(), 1)
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        release.set()
        async with asyncio.timeout(TIMEOUT_S):
            while (found := await two.find_run("r")) is None:
                await asyncio.sleep(0.01)  # until the holder has renewed its lease
        for late in (run, found):
            reset, *rest = [event async for event in late.subscribe()]
            assert reset_reason(reset) == "expired"
            assert [event.event for event in rest][-1] == "end"
            assert "before" not in data(rest)


@pytest.mark.parametrize("joins", [False, True])
async def test_stale_lease_of_a_run_without_its_beginning_leads_to_a_reset(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch, *, joins: bool
) -> None:
    """The holder renewed its lease after the log was replaced, but before it knew of that."""
    release = asyncio.Event()
    key = f"{{{prefix}}}:r:r"
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", two_parts(release))
        await take(run.subscribe(), 1)
        monkeypatch.setattr(one._backend, "renew_lease", renewed_already)
        with valkey.client() as client:
            lease = client.hgetall(key)
            pipeline = client.pipeline()
            pipeline.delete(*client.keys(f"\\{{{prefix}}}:*"))
            pipeline.hset(key, mapping=lease)
            pipeline.execute()
        await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        found = await two.run("r", endless(), join=True) if joins else await two.find_run("r")
        assert found is not None
        late = found.subscribe()
        release.set()
        reset, *rest = [event async for event in late]
        assert reset_reason(reset) == "expired"
        assert data(rest)[:1] == ["after"]
        assert rest[-1].event == "end"


async def test_run_name_is_reusable_after_an_epoch_change(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", ["before"])
        async with asyncio.timeout(TIMEOUT_S):
            assert await run.wait() == "finished"
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:meta", f"{{{prefix}}}:log", f"{{{prefix}}}:last", f"{{{prefix}}}:c:r")
        await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        assert await two.find_run("r") is None
        again = await two.run("r", ["again"], join=True)
        assert data([event async for event in again.subscribe()])[0] == "again"


async def test_run_is_found_at_once_after_an_epoch_change(valkey: Valkey, prefix: str) -> None:
    """A 404 would stop the client for good, and another process would start the run a second time."""
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", endless())
        await delete_all(valkey, prefix, one, two)
        async with asyncio.timeout(manager._WATCH_INTERVAL_S / 2):
            while await two.find_run("r") is None:
                await asyncio.sleep(0.01)
        run.cancel()


async def test_run_that_ends_before_the_loss_is_noticed_is_not_renewed(valkey: Valkey, prefix: str) -> None:
    """No second end, with the outcome "lost", follows either."""
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", two_parts(release))
        for _ in range(20):
            await one.publish("a", "x")  # so that no event of the next log arrives before the loss is noticed
        await wait_until(lambda: one.statistics().received == 21)
        await asyncio.sleep(0.1)
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        release.set()
        async with asyncio.timeout(TIMEOUT_S):
            assert await run.wait() == "finished"
        await asyncio.sleep(0.2)  # enough for a renewal
        assert await two.find_run("r") is None


async def test_lost_last_event_of_a_run_is_published_again(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event was acknowledged, but the log was replaced before anyone received it."""
    monkeypatch.setattr(manager, "_WATCH_INTERVAL_S", 0.5)
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", two_parts(release))
        found = await two.find_run("r")
        assert found is not None
        readers = [run.subscribe(), found.subscribe()]
        for reader in readers:
            assert data(await take(reader, 1)) == ["before"]
        backend = one._backend
        assert isinstance(backend, RedisBackend)
        send, lost = backend._send, False

        async def send_and_lose(batch: Any, attempt: int) -> list[str]:
            nonlocal lost
            if lost or batch[0].publication.end is None:
                return await send(batch, attempt)
            lost = True
            await delete_all(valkey, prefix, one, two)
            return [f"{'0' * 8}-3"]

        monkeypatch.setattr(backend, "_send", send_and_lose)
        release.set()
        async with asyncio.timeout(TIMEOUT_S):
            assert await run.wait() == await found.wait() == "finished"
            for reader in readers:
                seen = [event async for event in reader]
                assert seen[-1].event == "end"
                assert "reset" in [event.event for event in seen]


async def test_run_that_starts_during_an_epoch_change_begins_in_the_new_epoch(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        for _ in range(20):
            await one.publish("a", "x")  # so that the run would begin after its own end
        backend = one._backend
        assert isinstance(backend, RedisBackend)
        lease = backend._lease_script

        async def lease_and_lose(**arguments: Any) -> Any:
            answer = await lease(**arguments)
            await delete_all(valkey, prefix, one, two)
            return answer

        monkeypatch.setattr(backend, "_lease_script", lease_and_lose)
        run = await one.run("r", ["0", "1"])
        async with asyncio.timeout(TIMEOUT_S):
            assert await run.wait() == "finished"
            seen = [event async for event in run.subscribe()]
        assert data(seen)[-3:] == ["0", "1", '{"reason":"finished"}']


async def test_lookups_before_and_after_an_epoch_change_return_the_same_run(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        await one.publish("a", "x")
        run = await one.run("r", endless())
        find, found_lease, proceed = two._backend.find_lease, asyncio.Event(), asyncio.Event()

        async def find_and_wait(name: str) -> Any:
            lease = await find(name)
            found_lease.set()
            await proceed.wait()
            return lease

        monkeypatch.setattr(two._backend, "find_lease", find_and_wait)
        late = asyncio.ensure_future(two.find_run("r"))
        await found_lease.wait()
        monkeypatch.undo()
        found = await two.find_run("r")
        assert found is not None
        await delete_all(valkey, prefix, one, two)
        proceed.set()
        assert await late is found
        run.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            assert await found.wait() == "cancelled"


async def test_run_whose_middle_was_lost_begins_after_the_loss(tmp_path: Path) -> None:
    """The events that are left of the beginning are not replayed, since no reset would mark the hole after them."""
    texts: asyncio.Queue[str] = asyncio.Queue()

    async def source() -> AsyncIterator[str]:
        while (text := await texts.get()) != "":
            yield text

    with Valkey(tmp_path) as server:
        async with Broker(server.url) as one, Broker(server.url) as two:
            run = await one.run("r", source())
            live = run.subscribe()
            texts.put_nowait("kept")
            await take(live, 1)
            await asyncio.to_thread(server.save)
            texts.put_nowait("lost")
            await take(live, 1)
            await asyncio.to_thread(server.restart, saved=True)
            await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
            found = await two.find_run("r")
            assert found is not None
            readers = [live, run.subscribe(), found.subscribe()]
            texts.put_nowait("after")
            texts.put_nowait("")
            for reader in readers:
                async with asyncio.timeout(TIMEOUT_S):
                    reset, *rest = [event async for event in reader]
                assert reset.event == "reset"
                assert data(rest) == ["after", '{"reason":"finished"}']


@pytest.mark.parametrize("holder", [0, 1])
async def test_earlier_run_on_a_rolled_back_server_does_not_end_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: int
) -> None:
    """It does not before the loss is noticed, and not after either."""
    monkeypatch.setattr(manager, "_WATCH_INTERVAL_S", 0.2)
    release = asyncio.Event()
    with Valkey(tmp_path) as server:
        async with Broker(server.url) as one, Broker(server.url) as two:
            earlier = await (one, two)[holder].run("r", ["x"])
            async with asyncio.timeout(TIMEOUT_S):
                assert await earlier.wait() == "finished"
            with server.client() as client:
                ended = client.hgetall("{asgi_sse}:r:r")
            await asyncio.to_thread(server.save)
            await one.publish("a", "x")
            run = await one.run("r", two_parts(release))
            found = await two.find_run("r")
            assert found is not None
            readers = [run.subscribe(), found.subscribe()]
            for reader in readers:
                await take(reader, 1)
            with server.client() as client:  # as a server has it that was rolled back without notice
                client.hset("{asgi_sse}:r:r", mapping=ended)
            await manager.RunManager._look_after(two._runs, "r", found, set())
            await manager.RunManager._look_after(one._runs, "r", run, set())
            assert found.outcome is run.outcome is None
            with server.client() as client:
                assert client.hget("{asgi_sse}:r:r", "outcome") == b""  # the holder has restored its lease
            await asyncio.to_thread(server.restart, saved=True)
            await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
            async with asyncio.timeout(TIMEOUT_S):
                while await two.find_run("r") is None:
                    await asyncio.sleep(0.01)
            release.set()
            for reader in readers:
                async with asyncio.timeout(TIMEOUT_S):
                    seen = [event async for event in reader]
                assert reset_reason(seen[0]) == "epoch"
                assert data(seen[1:]) == ["after", '{"reason":"finished"}']


async def test_run_ends_although_its_keys_are_gone(valkey: Valkey, prefix: str) -> None:
    release = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        await release.wait()
        yield "x"

    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", source())
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        release.set()
        async with asyncio.timeout(TIMEOUT_S):
            assert await run.wait() == "finished"
        assert await two.find_run("r") is None
