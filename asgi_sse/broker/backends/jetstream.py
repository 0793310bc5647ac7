"""`JetStream`: what the back end on NATS needs of it, by one connection of nats-py that never reconnects by itself."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import secrets
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2s
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import nats.aio.client
import nats.errors
from nats.errors import ConnectionClosedError, NoRespondersError, NoServersError
from nats.js.errors import APIError, NotFoundError

if TYPE_CHECKING:
    from nats.aio.msg import Msg

logger: Final = logging.getLogger(__name__)

ANSWER: Final = 5.0
"""Seconds without an answer after which a request has failed."""

HEARTBEAT: Final = 1.0
"""Seconds without an event after which a consumer says that it is there."""

DELIVERY: Final = "$JS.ACK."
"""What the reply subject begins with of a message that a consumer delivers."""

EPOCH, START = "asgi_sse.epoch", "asgi_sse.start"
"""In a stream's metadata: the epoch that somebody has begun, and the number behind which it is."""

_CLOSING: Final = 1.0
_PENDING: Final = 256 * 1024 * 1024
_UNUSED: Final = 30.0
"""Seconds after which the server forgets a consumer whose process is gone."""


class Stream(NamedTuple):
    """A stream, as it was at a moment.

    Attributes:
        config: Its configuration.
        epoch: Tells it from others.
        start: The number behind which this epoch is.
        floor: The number of the last event that it has not any more.
        last: That of its last one.
        size: Bytes that one takes, on average.
        time: The server's clock, in seconds.
    """

    config: dict[str, Any]
    epoch: str
    start: int
    floor: int
    last: int
    size: float
    time: float


class Stored(NamedTuple):
    """A message of a stream.

    Attributes:
        offset: Its number.
        payload: What it carries.
        time: When the server has got it, in ns.
    """

    offset: int
    payload: bytes
    time: int


@dataclass(slots=True)
class Delivery:
    """What stands in the reply subject of a message that a consumer delivers.

    Attributes:
        offset: That of the message, in the stream.
        place: That of its delivery.
        time: When the server has got it, in ns.
        pending: How many follow.
    """

    offset: int
    place: int
    time: int
    pending: int

    @classmethod
    def of(cls, reply: str) -> Delivery:
        """Read it: stream, consumer and numbers; some servers have a domain and an account before them."""
        fields = reply.split(".")
        first = 5 if len(fields) == 9 else 7
        return cls(*map(int, fields[first : first + 4]))


class Consumer:
    """What a stream delivers, in its order; who reads it looks at the places.

    Attributes:
        messages: Those that nobody has taken yet.
        place: That of the last delivery which was taken.
        pending: How many there were behind that.
        checked: The number up to which those that are left out were deleted.
        heard: When there was anything of it, by the clock of the event loop.
    """

    def __init__(self, pending: int = 0) -> None:
        self.messages: deque[Msg] = deque()
        self.place = self.checked = 0
        self.pending = pending
        self.heard = asyncio.get_running_loop().time()
        self._arrived = asyncio.Event()
        self.subscription: Any = None

    def has_more(self) -> bool:
        """Whether there are events among the messages."""
        return any(message.reply.startswith(DELIVERY) for message in self.messages)

    async def on_message(self, message: Msg) -> None:
        """Put it to the others."""
        self.messages.append(message)
        self.heard = asyncio.get_running_loop().time()
        self._arrived.set()

    def wake(self) -> None:
        """There is something to look at."""
        self._arrived.set()

    async def wait(self) -> None:
        """Return when there is something to look at, or when there might be."""
        if not self.messages:
            try:
                async with asyncio.timeout(HEARTBEAT):
                    await self._arrived.wait()
            except TimeoutError:
                pass
        self._arrived.clear()


class JetStream:
    """A connection. Once it is lost, all that is asked of it fails.

    Attributes:
        max_payload: Bytes that a message may have, with its headers.
    """

    def __init__(self) -> None:
        self._client = nats.aio.client.Client()
        self._answers: dict[str, asyncio.Future[Msg]] = {}
        self._tokens = count()
        self._receiver = ""
        self._subscription: Any = None
        self._consumer: Consumer | None = None
        self._error: Exception | None = None
        self.max_payload = 0

    @classmethod
    async def connect(cls, servers: list[str]) -> JetStream:
        """Connect to one of them.

        Raises:
            ConnectionError: None of them can be had; of the last one, why.
        """
        failed: Exception | None = None
        for server in random.sample(servers, len(servers)):
            link = cls()
            try:
                async with asyncio.timeout(ANSWER):
                    await link._open(server)
                return link
            except (nats.errors.Error, OSError, TimeoutError) as exc:
                await link.close()
                # nats-py may only say that there is no server; what has happened says more
                failed = link._error if isinstance(exc, NoServersError) and link._error else exc
            except BaseException:
                await link.close()
                raise
        raise ConnectionError(str(failed) or type(failed).__name__) from failed

    async def _open(self, server: str) -> None:
        await self._client.connect(
            [server],
            name="asgi_sse",
            allow_reconnect=False,
            max_reconnect_attempts=1,  # 0: it would try for ever
            reconnect_time_wait=0,
            connect_timeout=ceil(ANSWER),
            ping_interval=20,
            # When so much waits to be sent, nats-py waits as well, and forgets meanwhile that it was cancelled. There
            # are never more than a few batches.
            pending_size=_PENDING,
            flush_timeout=_CLOSING,
            error_cb=self._on_error,
            closed_cb=self._on_closed,
        )
        self.max_payload = self._client.max_payload
        self._receiver = self._client.new_inbox()
        self._subscription = await self._client.subscribe(f"{self._receiver}.*", cb=self._on_answer)

    async def close(self) -> None:
        """Let go of it. Does not raise."""
        try:
            async with asyncio.timeout(_CLOSING):  # nats-py waits for what a dead server was to be sent
                await self._client.close()
        except Exception as exc:
            logger.debug("closing the connection: %s", exc)
        # Where that has failed, here or when nats-py lost the connection, it has left its tasks and the socket behind.
        consumer, self._consumer = self._consumer, None
        for subscription in (self._subscription, consumer and consumer.subscription):
            task = getattr(subscription, "_wait_for_msgs_task", None)
            if task is not None:
                task.cancel()
        writer = getattr(getattr(self._client, "_transport", None), "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
        if consumer is not None:
            consumer.wake()
        self._fail()

    @property
    def is_lost(self) -> bool:
        """Whether there is no use for it any more."""
        return not self._client.is_connected

    async def _on_error(self, exc: Exception) -> None:
        self._error = exc
        logger.debug("nats-py: %r", exc)

    async def _on_closed(self) -> None:
        self._fail()

    def _fail(self) -> None:
        for answer in list(self._answers.values()):
            if not answer.done():
                answer.set_exception(ConnectionClosedError())
                answer.exception()  # nobody may wait for it any more
        if self._consumer is not None:
            self._consumer.wake()

    # Requests

    async def _on_answer(self, message: Msg) -> None:
        answer = self._answers.get(message.subject.rpartition(".")[2])
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def ask(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> asyncio.Future[Msg]:
        """Send a request. In what order several are asked, in that they are sent."""
        if self.is_lost:
            raise ConnectionClosedError
        token = str(next(self._tokens))
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._answers[token] = answer
        answer.add_done_callback(lambda _: self._answers.pop(token, None))
        try:
            await self._client.publish(subject, payload, f"{self._receiver}.{token}", headers=headers)
        except BaseException:
            answer.cancel()
            raise
        return answer

    async def say(self, subject: str) -> None:
        """Send nothing, to a subject that waits for it."""
        await self._client.publish(subject, b"")

    async def request(self, subject: str, what: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Ask for an answer in JSON.

        Raises:
            APIError: It is an error.
            NoRespondersError: There is nobody to answer it: no JetStream, or no stream of that subject.
            TimeoutError: There was none.
        """
        payload = what if isinstance(what, bytes) else json.dumps(what).encode()
        async with asyncio.timeout(ANSWER):
            return answer_of(await (await self.ask(subject, payload, headers)))

    # Streams

    async def stream(self, name: str) -> Stream:
        """Look at one.

        Raises:
            NotFoundError: There is none.
        """
        info = await self.request(f"$JS.API.STREAM.INFO.{name}", {})
        state, config = info["state"], info["config"]
        metadata = config.get("metadata") or {}
        told = metadata.get(START, "")
        identity = f"{info['created']}|{metadata.get(EPOCH, '')}"
        last = state["last_seq"]
        return Stream(
            config=config,
            epoch=blake2s(identity.encode(), digest_size=8).hexdigest(),
            start=min(int(told), last) if told.isdecimal() else 0,
            floor=max(state["first_seq"] - 1, 0),
            last=last,
            size=state["bytes"] / max(state["messages"], 1),
            time=_nanoseconds(info["ts"]) / 1e9,
        )

    async def make_stream(self, config: dict[str, Any]) -> None:
        """Make one, unless there is one of that name."""
        name = config["name"]
        try:
            await self.request(f"$JS.API.STREAM.CREATE.{name}", config)
        except APIError as exc:
            if exc.err_code != 10058:  # there is one with another configuration, which is its owner's choice
                raise

    async def begin_epoch(self, name: str, *, instead_of: str) -> None:
        """What is in the stream by now is of another epoch from what follows; unless somebody else has said so."""
        stream = await self.stream(name)
        if stream.epoch != instead_of:
            return
        kept = {key: value for key, value in (stream.config.get("metadata") or {}).items() if not key.startswith("_")}
        metadata = {**kept, EPOCH: secrets.token_hex(8), START: str(stream.last)}
        await self.request(f"$JS.API.STREAM.UPDATE.{name}", {**stream.config, "metadata": metadata})

    async def message(self, stream: str, **which: Any) -> Stored | None:
        """A message, as the leader has it: by ``seq``, ``last_by_subj``, or ``seq`` and ``next_by_subj``."""
        try:
            answer = await self.request(f"$JS.API.STREAM.MSG.GET.{stream}", which)
        except NotFoundError:
            return None
        found = answer["message"]
        return Stored(found["seq"], base64.b64decode(found.get("data") or b""), _nanoseconds(found["time"]))

    async def consume(self, stream: str, start: int) -> Consumer:
        """What the stream has from a number on, and what it gets."""
        receiver = self._client.new_inbox()
        await self.release()
        consumer = self._consumer = Consumer()
        # No limit here, at which nats-py would drop messages: the server waits for our answers to its flow control.
        consumer.subscription = await self._client.subscribe(
            receiver, cb=consumer.on_message, pending_msgs_limit=0, pending_bytes_limit=0
        )
        name = f"asgi_sse_{secrets.token_hex(8)}"
        config = {
            "name": name,
            "deliver_subject": receiver,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(start, 1),
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "flow_control": True,
            "idle_heartbeat": int(HEARTBEAT * 1e9),
            "inactive_threshold": int(_UNUSED * 1e9),
            "mem_storage": True,
            "num_replicas": 1,
        }
        made = await self.request(
            f"$JS.API.CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config, "action": "create"}
        )
        consumer.pending = made.get("num_pending", 0)
        return consumer

    async def release(self) -> None:
        """What was consumed is not wanted any more."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None and consumer.subscription is not None and not self.is_lost:
            await consumer.subscription.unsubscribe()


def answer_of(message: Msg) -> dict[str, Any]:
    """What an answer says.

    Raises:
        APIError: It is an error.
        NoRespondersError: There was nobody to answer.
    """
    if (message.headers or {}).get("Status") == "503":
        raise NoRespondersError
    answer: dict[str, Any] = json.loads(message.data)
    if "error" in answer:
        APIError.from_error(answer["error"])  # raises
    return answer


def _nanoseconds(text: str) -> int:
    """A time as Go writes it, with up to nine digits behind the seconds."""
    seconds, _, fraction = text.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{seconds}+00:00").timestamp()) * 10**9 + int(fraction.ljust(9, "0"))


def servers_of(url: str) -> list[str]:
    """The servers of a URL; the scheme and the user of the first one are those of all that have none."""
    scheme, _, places = url.partition("://")
    servers: list[str] = []
    user = ""
    for place in places.split(","):
        own, separator, rest = place.strip().rpartition("://")
        given, at, host = rest.rpartition("@")
        user = user or given
        login = given if at else user
        if host:
            servers.append(f"{own if separator else scheme}://{login + '@' if login else ''}{host}")
    if not servers:
        raise ValueError(f"url={shown_server(url)!r} names no server; give nats://HOST:PORT")
    return servers


def shown_server(url: str) -> str:
    """A URL without its password, or its token."""
    head, at, tail = url.rpartition("@")
    if not at:
        return url
    scheme, separator, user = head.partition("://")
    name, colon, _ = user.partition(":")
    return f"{scheme}{separator}{name + ':' if colon else ''}***@{tail}"
