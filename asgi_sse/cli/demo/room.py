"""A chat between all open tabs, with the number of tabs."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from asgi_sse.broker import Broker
from asgi_sse.routing.request import HTTPError

from .limits import RateLimit

_KEPT: Final = 30
"""Posts that a new tab gets."""

_LENGTHS: Final = {"name": 24, "text": 280}
_JOINER: Final = "\u200d"  # joins several emoji into one; str.isprintable() refuses it


class Room:
    """The chat. The subscribers of its channel are in it.

    Args:
        broker: The broker of the channel ``room``. Its hooks must call `update_count`.
    """

    channel: Final = "room"

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._posts: deque[dict[str, str]] = deque(maxlen=_KEPT)
        self._here = 0
        self._limit = RateLimit(burst=20, per_second=5)

    def update_count(self) -> None:
        """Publish the number of tabs if it changed."""
        here = self._broker.subscribers(self.channel)
        if here != self._here:
            self._here = here
            self._broker.publish_nowait(self.channel, {"event": "here", "data": {"here": here}})

    async def say(self, post: object) -> None:
        """Publish a post, ``{"name": …, "text": …}``.

        Raises:
            HTTPError: 400, the post is invalid or too long; 429, there were too many posts.
        """
        if not isinstance(post, Mapping):
            raise HTTPError(400, 'the post must be {"name": …, "text": …}')
        clean = {field: _clean_line(post.get(field), field, length) for field, length in _LENGTHS.items()}
        self._limit.take()
        self._posts.append(clean)
        await self._broker.publish(self.channel, {"event": "post", "data": clean})

    def state(self) -> dict[str, Any]:
        """Return what a new tab shows."""
        return {"here": self._here, "posts": list(self._posts)}


def _clean_line(value: object, field: str, max_length: int) -> str:
    """Return `value` as one line, without characters that could reverse or hide the rest of it.

    Raises:
        HTTPError: 400, the value is not a string, is empty, or is too long.
    """
    if not isinstance(value, str):
        raise HTTPError(400, f"{field} must be a string, got {type(value).__name__}")
    if len(value) > max_length:
        raise HTTPError(400, f"{field} must have at most {max_length} characters, got {len(value)}")
    line = "".join(char for char in " ".join(value.split()) if char.isprintable() or char == _JOINER)
    if not line.strip(_JOINER):
        raise HTTPError(400, f"{field} must not be empty")
    return line
