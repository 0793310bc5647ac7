"""The tokens of a language model, streamed as the answer to a POST. The model stops when the client disconnects."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import anyio
from starlette.responses import HTMLResponse

from asgi_sse import HTTPError, Request, ServerSentEvent, create_app

PAGE = HTMLResponse(Path(__file__).with_name("index.html").read_text())


async def generate(prompt: str) -> AsyncGenerator[str, None]:
    """Generate tokens slowly, in place of a real model."""
    generated = 0
    try:
        for word in f"You said: {prompt}\nI have nothing to add, but I can say it at length.".split(" ") * 3:
            await anyio.sleep(0.04)
            generated += 1
            yield f"{word} "
    finally:
        print(f"generated {generated} tokens", flush=True)


async def answer(request: Request) -> AsyncIterator[ServerSentEvent | str]:
    match await request.json(limit=100_000):
        case {"prompt": str(prompt)}:
            pass
        case _:
            raise HTTPError(422, 'the body must be {"prompt": "some text"}')
    # aclosing() ends the generator at once when the client disconnects, and so runs its `finally`.
    async with aclosing(generate(prompt)) as tokens:
        async for token in tokens:
            yield ServerSentEvent({"token": token})  # JSON keeps tokens such as a space or a line end
    yield "[DONE]"


app = create_app({"/": PAGE, "/answer": answer})
