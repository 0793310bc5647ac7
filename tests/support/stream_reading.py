"""Reads a whole response of the app under test, as text or as events."""

from asgi_sse.testing import OpenStream


async def read_text(stream: OpenStream) -> str:
    """Return the body, which must be complete."""
    body = b""
    while chunk := await stream.read(timeout=100):
        body += chunk
    assert stream.complete
    return body.decode()


async def read_data(stream: OpenStream) -> list[str | None]:
    """Return the data of each event, up to the end of the stream."""
    return [event.data async for event in stream]
