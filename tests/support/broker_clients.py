"""What tests of brokers share: the status of a request, and the ids of events."""

from typing import Any

from asgi_sse import Broker, ServerSentEvent
from asgi_sse.testing import open_stream


async def status_of(app: Any, path: str, **arguments: Any) -> tuple[int, str]:
    """Return the status of a request to `app`, and the body unless the response is a stream."""
    async with open_stream(app, path, **arguments) as stream:
        if stream.status == 200:
            return 200, ""
        return stream.status, (await stream.read()).decode()


def offset_of(event: ServerSentEvent) -> int:
    """Return the offset in the id of an event."""
    assert event.id is not None
    return int(event.id.partition("-")[2])


def id_of(broker: Broker, offset: int) -> str:
    """Return the id at an offset of the broker's log."""
    epoch = broker.subscribe("any").last_event_id.partition("-")[0]
    return f"{epoch}-{offset}"
