"""Answers of a language model that continue when the page is closed, and are complete when it is opened again."""

import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
from starlette.responses import HTMLResponse, JSONResponse

from asgi_sse import Broker, HTTPError, Request, ServerSentEvent, create_app

PAGE = HTMLResponse(Path(__file__).with_name("index.html").read_text())

# Redis instead of memory lets every process serve every answer.
broker = Broker(os.environ.get("BROKER_URL", "memory://"), run_grace=1)


async def generate(prompt: str) -> AsyncIterator[ServerSentEvent]:
    """Generate tokens slowly, in place of a real model."""
    try:
        for word in f"You said: {prompt}\nI have nothing to add, but I can say it at length.".split(" ") * 3:
            await anyio.sleep(0.04)
            yield ServerSentEvent({"token": f"{word} "})
    finally:
        print("the answer is complete or was cancelled", flush=True)


async def ask(request: Request) -> JSONResponse:
    match await request.json(limit=100_000):
        case {"prompt": str(prompt)}:
            pass
        case _:
            raise HTTPError(422, 'the body must be {"prompt": "some text"}')
    # The run keeps its events for 600 seconds after its end. Its random name protects it from other clients.
    run = await broker.run(f"answer/{secrets.token_hex(8)}", generate(prompt), ttl=600, max_lifetime=60)
    return JSONResponse({"channel": run.name}, 202)


async def cancel(request: Request) -> JSONResponse:
    run = await broker.find_run(request.query.get("channel", "none"))
    if run is None:
        raise HTTPError(404, "there is no such answer")
    run.cancel()
    return JSONResponse({"outcome": await run.wait()}, 202)


app = create_app(
    {"/": PAGE, "/ask": ask, "/cancel": cancel, "/answers": broker.endpoint(runs=True)},
    broker=broker,
)
