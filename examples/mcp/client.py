"""Call the tools of ``server.py`` with the SDK's client: ``python client.py URL [legacy]``."""

import asyncio
import sys

from mcp import Client
from mcp.client.sse import sse_client


async def show(progress: float, total: float | None, message: str | None) -> None:
    """Print a progress report."""
    print(f"progress {progress:g}/{total or 0:g}: {message}", flush=True)


async def main(url: str, mode: str = "auto") -> None:
    """List the tools and call each one."""
    async with Client(sse_client(url) if url.endswith("/sse") else url, mode=mode) as client:
        print(f"protocol {client.protocol_version}")
        print("tools:", ", ".join(tool.name for tool in (await client.list_tools()).tools))
        print("1 + 2 =", (await client.call_tool("add", {"a": 1, "b": 2})).structured_content)
        result = await client.call_tool("count", {"to": 3, "seconds": 0.5}, progress_callback=show)
        print(result.structured_content)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
