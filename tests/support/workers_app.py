"""The app of the README section on several workers. Its responses contain the id of the process that sent them."""

import os
from collections.abc import AsyncIterator

from asgi_sse import Broker, HTTPError, Request, Run, Subscription, create_app

broker = Broker(os.environ["BROKER_URL"], prefix="workers")


async def news(request: Request) -> Subscription:
    return broker.subscribe("news", last_event_id=request.last_event_id, snapshot=lambda: str(os.getpid()))


async def publish(request: Request) -> None:
    raise HTTPError(200, await broker.publish("news", (await request.body()).decode()))


async def words() -> AsyncIterator[str]:
    for word in ("one", "two", "three"):
        yield f"{word} from {os.getpid()}"


async def run(request: Request) -> Run:
    return await broker.run(request.path_params["name"], words(), join=True)


app = create_app({"/news": news, "/publish": publish, "/runs/{name}": run}, broker=broker)
