"""examples/mcp/server.py, plus a page with the number of its streams and sessions for test_mcp.py."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mcp"))

import server

from asgi_sse.adapters.sse_starlette_status import running_streams


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope.get("path") != "/statistics":
        await server.app(scope, receive, send)
        return
    gc.collect()  # the SDK's tasks leave reference cycles
    streams = {
        "all": sorted(stream.path for stream in server.app.registry),
        "by the adapter": len(running_streams),
        "sessions": len(server.replay._of_session),
    }
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(streams).encode()})
