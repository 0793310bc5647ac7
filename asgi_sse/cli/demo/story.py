"""A text that the server writes word by word, like a language model, whether or not anyone reads it."""

import random
from collections.abc import AsyncIterator
from typing import Any, Final

import anyio

from asgi_sse.broker import Broker
from asgi_sse.protocol.event import ServerSentEvent

from .limits import RateLimit
from .ticks import now_ms

_PAUSE_S: Final = (0.05, 0.25)
"""Range of the random pause between two words: about the speed of a language model."""

_KEPT_S: Final = 60.0
"""How long a finished story can be read."""

_TEXT: Final = """\
Once upon a time there was a word that had to travel from a server to a browser. The server put each word into an event
and gave every event a number. Then the train with the browser went into a tunnel, and the connection broke. The server
did not stop. It wrote the next words, gave them the next numbers, and kept them all in a log. When the train left the
tunnel, the browser reconnected by itself. It sent the number of the last event that it had seen. The server looked that
number up in its log and sent all later words at once. Then it went on with the new words, as if nothing had happened.
No word arrived twice, and no word was missing. A second browser joined late. It read the same log from the first word,
so the server did not have to write the story again. While both of them were reading, the server was restarted. Each
browser was told to wait for a different time, so that they did not all come back in the same second. After the last
word, the server sent one more event, which said that the story was over. Both browsers closed their streams and did not
ask again.
"""


class Story:
    """Writes one story at a time. Each story is a run of the broker.

    Args:
        broker: The broker of the runs, and of the channel ``story`` with the current story's progress.
    """

    channel: Final = "story"

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._words = _TEXT.split()
        self._limit = RateLimit(burst=10, per_second=1)
        self._number = 0
        self._written = 0
        self._running = False

    async def begin(self) -> str:
        """Start a story, or join the one that is running.

        Returns:
            The name of the run.

        Raises:
            HTTPError: 429, there were too many requests.
        """
        self._limit.take()
        if not self._running:
            self._number, self._written, self._running = self._number + 1, 0, True
        # Two simultaneous requests use the same name, so they get the same run.
        run = await self._broker.run(self._name, self._tokens(), ttl=_KEPT_S, join=True)
        return run.name

    @property
    def _name(self) -> str:
        return f"story/{self._number}"

    def state(self) -> dict[str, Any]:
        """Return the current story's progress."""
        return {"run": self._name, "written": self._written, "of": len(self._words), "running": self._running}

    async def _tokens(self) -> AsyncIterator[ServerSentEvent]:
        try:
            for number, word in enumerate(self._words, 1):
                yield ServerSentEvent({"n": number, "word": word, "at": now_ms()}, event="token")
                self._publish_progress(number)
                await anyio.sleep(random.uniform(*_PAUSE_S))  # noqa: S311 (not for security)
        finally:
            self._running = False
            self._publish_progress(self._written)

    def _publish_progress(self, written: int) -> None:
        self._written = written
        self._broker.publish_nowait(self.channel, {"event": "story", "data": self.state()})
