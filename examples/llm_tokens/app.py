"""Tokens of a language model as it makes them, asked for by POST; it stops when the client leaves."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import anyio
from starlette.responses import HTMLResponse

from asgi_sse import HTTPError, Request, ServerSentEvent, create_app

PAGE = HTMLResponse(Path(__file__).with_name("index.html").read_text())


async def generate(prompt: str) -> AsyncGenerator[str, None]:
    """Stands for a model."""
    made = 0
    try:
        for word in f"You said: {prompt}\nI have nothing to add, but I can say it at length.".split(" ") * 3:
            await anyio.sleep(0.04)
            made += 1
            yield f"{word} "
    finally:
        print(f"made {made} tokens", flush=True)


async def answer(request: Request) -> AsyncIterator[ServerSentEvent | str]:
    match await request.json(limit=100_000):
        case {"prompt": str(prompt)}:
            pass
        case _:
            raise HTTPError(422, 'give {"prompt": "some text"}')
    async with aclosing(generate(prompt)) as tokens:
        async for token in tokens:
            yield ServerSentEvent({"token": token})  # as JSON: a token may be a space, or a line end
    yield "[DONE]"


app = create_app({"/": PAGE, "/answer": answer})
