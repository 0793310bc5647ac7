"""A board of orders per shop: first the whole board, then each change. Only the shop's owners can read it."""

import json
from pathlib import Path

from starlette.responses import HTMLResponse, PlainTextResponse

from asgi_sse import Broker, HTTPError, Request, ServerSentEvent, create_app

PAGE = HTMLResponse(Path(__file__).with_name("index.html").read_text())
KEYS = {"bread": "shop.bakery", "meat": "shop.butcher"}  # in place of real sessions

broker = Broker()
boards: dict[str, dict[str, str]] = {"shop.bakery": {}, "shop.butcher": {}}


async def change(request: Request) -> PlainTextResponse:
    channel = f"shop.{request.path_params['shop']}"
    order, state = request.query.get("order", ""), request.query.get("state", "")
    if channel not in boards or not order or not state:
        raise HTTPError(400, "the shop must exist, and order and state must be given")
    if len(boards[channel]) >= 1000 or len(order) + len(state) > 200:
        raise HTTPError(400, "the board is full, or the order or state is too long")
    boards[channel][order] = state
    await broker.publish(channel, ServerSentEvent({"order": order, "state": state}, event="change"))
    return PlainTextResponse("changed\n", 201)


def authorize(request: Request) -> list[str] | None:
    """Return the channels that this client may read; ``None`` answers 403."""
    channel = KEYS.get(request.query.get("key", ""))
    return None if channel is None else [channel]


def board(request: Request) -> ServerSentEvent:
    """Return the whole board, for new clients and for those that missed changes."""
    return ServerSentEvent(json.dumps(boards[KEYS[request.query["key"]]]), event="board")


app = create_app(
    {"/": PAGE, "/shops/{shop}": change, "/board": broker.endpoint(authorize=authorize, snapshot=board)},
    broker=broker,
)
