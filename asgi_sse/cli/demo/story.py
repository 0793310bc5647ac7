"""A text that is made word by word, as a language model would: a run, which goes on whoever reads it."""

import random
from collections.abc import AsyncIterator
from typing import Any, Final

import anyio

from asgi_sse.broker import Broker
from asgi_sse.protocol.event import ServerSentEvent

from .limits import Allowance
from .ticks import now

_PAUSE: Final = (0.05, 0.25)
"""Seconds between two words: at random in this range, about as a language model writes."""

_KEPT: Final = 60.0
"""Seconds after its end for which a story can be read."""

_TEXT: Final = """\
Once upon a time there was a word that had to travel. It left a server in the morning, in an event of its own, and in
front of it on the same wire went all the words that had been said before. Each of them carried a number, so that
nobody who waited at the other end could lose count. Then the wire broke. A train had gone into a tunnel, or somebody
had closed the lid of a laptop; words are never told why. But the one who told the story did not stop for that: the
next words were made and numbered as before, and put on a shelf where they could be found. When the train came out on
the other side, the browser called again by itself and said the last number that it had seen. So the server took from
the shelf what came after, sent it at once, and went on with what was new. No word came twice, and none was missing.
Somebody who came late to the station heard it all from its beginning, and nobody had to tell it again for that. And
when the last word had been said, a small event behind it told everybody that this was the end, so that they could all
hang up, and no one would keep calling a server that had nothing left to say.
"""


class Story:
    """Tells one story at a time, to whoever listens.

    Args:
        broker: Whose runs the stories are, and on whose channel ``story`` it says how far the one under way is.
    """

    channel: Final = "story"

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._words = _TEXT.split()
        self._allowance = Allowance(burst=10, per_second=1)
        self._number = 0
        self._made = 0
        self._goes_on = False

    async def begin(self) -> str:
        """Begin one, unless one goes on.

        Returns:
            The name of its run.

        Raises:
            HTTPError: 429, too many were asked for.
        """
        self._allowance.take()
        if not self._goes_on:
            self._number, self._made, self._goes_on = self._number + 1, 0, True
        # Two who ask at the same time get the same one, by its name.
        run = await self._broker.run(self._name, self._tokens(), ttl=_KEPT, join=True)
        return run.name

    @property
    def _name(self) -> str:
        return f"story/{self._number}"

    def state(self) -> dict[str, Any]:
        """How far it is."""
        return {"run": self._name, "made": self._made, "of": len(self._words), "goes_on": self._goes_on}

    async def _tokens(self) -> AsyncIterator[ServerSentEvent]:
        try:
            for number, word in enumerate(self._words, 1):
                yield ServerSentEvent({"n": number, "word": word, "at": now()}, event="token")
                self._tell(number)
                await anyio.sleep(random.uniform(*_PAUSE))  # noqa: S311 (it guards nothing)
        finally:
            self._goes_on = False
            self._tell(self._made)

    def _tell(self, made: int) -> None:
        self._made = made
        self._broker.publish_nowait(self.channel, {"event": "story", "data": self.state()})
