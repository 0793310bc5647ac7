"""An app with metrics, which the tests scrape in a process of its own."""

from collections.abc import AsyncIterator

import anyio
from prometheus_client import REGISTRY

from asgi_sse import Broker, Request, create_app
from asgi_sse.metrics.prometheus import MetricsEndpoint

broker = Broker()


async def news(request: Request) -> AsyncIterator[int]:
    async with broker.subscribe("news") as subscription:
        broker.publish_nowait("news", "discarded")
        yield 1
        await subscription.__anext__()
        yield 2
        await anyio.sleep_forever()


app = create_app(
    {"/news": news, "/metrics": MetricsEndpoint(broker=broker, collector_registry=REGISTRY)}, broker=broker
)
