"""A room in which everybody sees what anybody says, and how many are there."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from asgi_sse.broker import Broker
from asgi_sse.routing.request import HTTPError

from .limits import Allowance

_KEPT: Final = 30
"""Posts that who comes anew is shown."""

_LENGTHS: Final = {"name": 24, "text": 280}
_JOINER: Final = "\u200d"  # it is not printable, and makes one emoji of several


class Room:
    """The room: who reads its channel is in it.

    Args:
        broker: Whose channel ``room`` it is. Its hooks are to call `recount`.
    """

    channel: Final = "room"

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._posts: deque[dict[str, str]] = deque(maxlen=_KEPT)
        self._here = 0
        self._allowance = Allowance(burst=20, per_second=5)

    def recount(self) -> None:
        """Somebody came or left: tell the others."""
        here = self._broker.subscribers(self.channel)
        if here != self._here:
            self._here = here
            self._broker.publish_nowait(self.channel, {"event": "here", "data": {"here": here}})

    async def say(self, post: object) -> None:
        """Show everybody a post: ``{"name": …, "text": …}``.

        Raises:
            HTTPError: 400, it is none or too long; 429, there were too many.
        """
        if not isinstance(post, Mapping):
            raise HTTPError(400, 'give {"name": …, "text": …}')
        said = {field: _line(post.get(field), field, length) for field, length in _LENGTHS.items()}
        self._allowance.take()
        self._posts.append(said)
        await self._broker.publish(self.channel, {"event": "post", "data": said})

    def state(self) -> dict[str, Any]:
        """What who comes anew is shown."""
        return {"here": self._here, "posts": list(self._posts)}


def _line(value: object, field: str, length: int) -> str:
    """`value` as one line without what could turn or hide the rest of it.

    Raises:
        HTTPError: 400, it is no text, empty, or too long.
    """
    if not isinstance(value, str):
        raise HTTPError(400, f"{field} is {type(value).__name__}; give a str")
    if len(value) > length:
        raise HTTPError(400, f"{field} has {len(value)} characters; give {length} at the most")
    line = "".join(char for char in " ".join(value.split()) if char.isprintable() or char == _JOINER)
    if not line.strip(_JOINER):
        raise HTTPError(400, f"{field} is empty")
    return line
