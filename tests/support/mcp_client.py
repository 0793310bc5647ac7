"""The SDK's own client on every transport.

test_mcp.py runs it. The client prints JSON lines, and waits for a line on stdin where the test has to act first.
"""

import json
import sys
import time
from functools import partial
from typing import Any

import anyio
from mcp import Client
from mcp.client.sse import sse_client


def report(what: str, **more: Any) -> None:
    print(json.dumps({"what": what, **more}), flush=True)


async def wait_for_test() -> None:
    await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


async def call_tools(name: str, client: Client) -> None:
    """Make the calls that end by themselves, and report their results."""
    steps: list[float] = []

    async def progress(progress: float, total: float | None, message: str | None) -> None:
        steps.append(progress)

    tools = [tool.name for tool in (await client.list_tools()).tools]
    add: Any = (await client.call_tool("add", {"a": 1, "b": 2})).structured_content
    count: Any = (await client.call_tool("count", {"to": 3, "seconds": 0.02}, None, progress)).structured_content
    report(name, protocol=client.protocol_version, tools=tools, add=add, count=count, steps=steps)


class Call:
    """A tool call that runs until the server stops."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: list[float] = []

    async def _progress(self, progress: float, total: float | None, message: str | None) -> None:
        self.steps.append(progress)

    async def reached(self, number: float) -> None:
        while not self.steps or self.steps[-1] < number:
            await anyio.sleep(0.01)

    async def run(self, client: Client) -> None:
        try:
            await client.call_tool("count", {"to": 10_000, "seconds": 0.05}, None, self._progress)
        except Exception as exc:
            report("ended", name=self.name, error=repr(exc), steps=self.steps, at=time.monotonic())


async def listen(client: Client) -> None:
    try:
        async with client.listen(tools_list_changed=True) as subscription:
            report("listening")
            async for _ in subscription:
                pass
    except Exception as exc:
        report("ended", name="listen", error=repr(exc), at=time.monotonic())


async def main(base: str) -> None:
    def sse(mode: str) -> Client:
        return Client(sse_client(f"{base}/sse"), mode=mode)

    async with (
        Client(f"{base}/mcp", mode="legacy") as legacy,
        Client(f"{base}/mcp") as auto,
        anyio.create_task_group() as tasks,
    ):
        await call_tools("legacy", legacy)
        await call_tools("auto", auto)
        for mode in ("legacy", "auto"):
            async with sse(mode) as client:
                await call_tools(f"sse {mode}", client)

        cut = Call("cut")
        tasks.start_soon(cut.run, legacy)
        await cut.reached(2)
        report("ready to be cut")
        await wait_for_test()
        before = cut.steps[-1]
        await cut.reached(before + 15)
        report("resumed", steps=cut.steps[: int(before) + 15])

        async with sse("legacy") as old:
            running = [Call("post"), Call("modern"), Call("sse")]
            for call, client in zip(running, (legacy, auto, old), strict=True):
                tasks.start_soon(partial(call.run, client))
            tasks.start_soon(listen, auto)
            for call in running:
                await call.reached(2)
            report("all open")
            await wait_for_test()


anyio.run(main, sys.argv[1])
