"""`JetStream`: the part of JetStream that the backend on NATS needs, on one connection of nats-py.

The connection never reconnects by itself. The backend has to check the stream after a loss, before it publishes again.
"""

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

REQUEST_TIMEOUT_S: Final = 5.0
"""Seconds without an answer after which a request has failed."""

HEARTBEAT_S: Final = 1.0
"""Seconds without an event after which the server reports that a consumer is alive."""

DELIVERY_PREFIX: Final = "$JS.ACK."
"""Prefix of the reply subject of a message that a consumer delivers."""

_EPOCH_KEY, _START_KEY = "asgi_sse.epoch", "asgi_sse.start"
"""Keys in a stream's metadata: an epoch that a process has begun, and the offset after which it begins."""

_CLOSE_TIMEOUT_S: Final = 1.0
_PENDING_BYTES: Final = 256 * 1024 * 1024
_INACTIVE_S: Final = 30.0
"""Seconds after which the server deletes a consumer whose process is gone."""

_NAME_IN_USE: Final = 10058
"""Error code of the server for a stream that exists with another configuration."""


class StreamInfo(NamedTuple):
    """The state of a stream at one moment.

    Attributes:
        config: The configuration.
        epoch: The epoch: a hash of the stream's creation time and the epoch in its metadata.
        start: The offset after which the epoch begins.
        floor: The offset of the newest event that the stream has dropped; 0 if there is none.
        last: The offset of the last event.
        mean_bytes: Average size of a stored event, in bytes.
        time: The server's time, in seconds.
    """

    config: dict[str, Any]
    epoch: str
    start: int
    floor: int
    last: int
    mean_bytes: float
    time: float


class StoredMessage(NamedTuple):
    """A message of a stream.

    Attributes:
        offset: The sequence number in the stream.
        payload: The payload.
        time_ns: When the server received it, in nanoseconds.
    """

    offset: int
    payload: bytes
    time_ns: int


@dataclass(slots=True)
class Delivery:
    """The numbers in the reply subject of a message that a consumer delivers.

    Attributes:
        offset: The sequence number of the message in the stream. It may have gaps, where messages were deleted.
        sequence: The sequence number of the delivery in the consumer. It has no gaps, so a gap is a lost message.
        time_ns: When the server received the message, in nanoseconds.
        pending: Number of messages that the consumer will deliver after this one.
    """

    offset: int
    sequence: int
    time_ns: int
    pending: int

    @classmethod
    def of(cls, reply: str) -> Delivery:
        """Parse a reply subject: stream, consumer, numbers. Some servers put a domain and an account before them."""
        fields = reply.split(".")
        first = 5 if len(fields) == 9 else 7
        return cls(*map(int, fields[first : first + 4]))


class Consumer:
    """The messages that the server delivers from a stream, in order.

    Attributes:
        messages: Messages that were not taken yet.
        sequence: Consumer sequence of the last message that was taken.
        pending: Number of messages that followed it on the server.
        verified_offset: Offset up to which gaps are known to be deleted messages.
        last_heard: Time of the last message, by the clock of the event loop.
        subscription: The subscription of nats-py.
    """

    def __init__(self, pending: int = 0) -> None:
        self.messages: deque[Msg] = deque()
        self.sequence = self.verified_offset = 0
        self.pending = pending
        self.last_heard: float = asyncio.get_running_loop().time()
        self._arrived = asyncio.Event()
        self.subscription: Any = None

    def has_events(self) -> bool:
        """Return whether there are events among the messages, which may also be heartbeats."""
        return any(message.reply.startswith(DELIVERY_PREFIX) for message in self.messages)

    async def on_message(self, message: Msg) -> None:
        """Add a message and wake the reader."""
        self.messages.append(message)
        self.last_heard = asyncio.get_running_loop().time()
        self._arrived.set()

    def wake(self) -> None:
        """Wake the reader without a message."""
        self._arrived.set()

    async def wait(self) -> None:
        """Wait for messages, a call of `wake`, or one heartbeat interval."""
        if not self.messages:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._arrived.wait()
            except TimeoutError:
                pass
        self._arrived.clear()


class JetStream:
    """A connection. Every request fails once the connection is lost.

    Attributes:
        max_payload: Bytes that a message may have, including its headers.
    """

    def __init__(self) -> None:
        self._client = nats.aio.client.Client()
        self._answers: dict[str, asyncio.Future[Msg]] = {}
        self._tokens = count()
        self._inbox = ""
        self._subscription: Any = None
        self._consumer: Consumer | None = None
        self._error: Exception | None = None
        self.max_payload: int = 0

    @classmethod
    async def connect(cls, servers: list[str]) -> JetStream:
        """Connect to one of the servers, in random order.

        Raises:
            ConnectionError: No server could be reached. The text is the error of the last one.
        """
        failed: Exception | None = None
        for server in random.sample(servers, len(servers)):
            connection = cls()
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await connection._open(server)
                return connection
            except (nats.errors.Error, OSError, TimeoutError) as exc:
                await connection.close()
                # nats-py often says only that there are no servers; its error callback has the cause.
                failed = connection._error if isinstance(exc, NoServersError) and connection._error else exc
            except BaseException:
                await connection.close()
                raise
        raise ConnectionError(str(failed) or type(failed).__name__) from failed

    async def _open(self, server: str) -> None:
        await self._client.connect(
            [server],
            name="asgi_sse",
            allow_reconnect=False,
            max_reconnect_attempts=1,  # with 0, nats-py would try without end
            reconnect_time_wait=0,
            connect_timeout=ceil(REQUEST_TIMEOUT_S),
            ping_interval=20,
            # When this many bytes wait to be sent, nats-py waits too, and then forgets that it was cancelled. The
            # backend never has more than a few batches, so the limit is out of reach.
            pending_size=_PENDING_BYTES,
            flush_timeout=_CLOSE_TIMEOUT_S,
            error_cb=self._on_error,
            closed_cb=self._on_closed,
        )
        self.max_payload = self._client.max_payload
        self._inbox = self._client.new_inbox()
        self._subscription = await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)

    async def close(self) -> None:
        """Close the connection. Does not raise."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):  # nats-py waits until a dead server has taken all data
                await self._client.close()
        except Exception as exc:
            logger.debug("closing the connection failed: %s", exc)
        # If closing failed, now or when nats-py lost the connection, its tasks and its socket are still there.
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
        self._fail_requests()

    @property
    def is_lost(self) -> bool:
        """Whether the connection is closed or lost, so that requests fail."""
        return not self._client.is_connected

    async def _on_error(self, exc: Exception) -> None:
        self._error = exc
        logger.debug("nats-py reported %r", exc)

    async def _on_closed(self) -> None:
        self._fail_requests()

    def _fail_requests(self) -> None:
        for answer in list(self._answers.values()):
            if not answer.done():
                answer.set_exception(ConnectionClosedError())
                answer.exception()  # marks it as retrieved: its caller may have stopped waiting
        if self._consumer is not None:
            self._consumer.wake()

    # Requests

    async def _on_answer(self, message: Msg) -> None:
        answer = self._answers.get(message.subject.rpartition(".")[2])
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def send_request(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> asyncio.Future[Msg]:
        """Send a request and return a future of its answer. Requests are sent in the order of calls."""
        if self.is_lost:
            raise ConnectionClosedError
        token = str(next(self._tokens))
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._answers[token] = answer
        answer.add_done_callback(lambda _: self._answers.pop(token, None))
        try:
            await self._client.publish(subject, payload, f"{self._inbox}.{token}", headers=headers)
        except BaseException:
            answer.cancel()
            raise
        return answer

    async def reply(self, subject: str) -> None:
        """Send an empty message, such as the answer to flow control."""
        await self._client.publish(subject, b"")

    async def request(self, subject: str, content: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Send a request and return its JSON answer.

        Args:
            subject: The subject.
            content: Bytes to send, or a value to send as JSON.
            headers: Headers to send.

        Raises:
            APIError: The server answered with an error.
            NoRespondersError: Nothing answers on this subject: JetStream is off, or no stream has the subject.
            TimeoutError: There was no answer within 5 seconds.
        """
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            return parse_answer(await (await self.send_request(subject, payload, headers)))

    # Streams

    async def stream_info(self, name: str) -> StreamInfo:
        """Return the state of a stream.

        Raises:
            NotFoundError: There is no such stream.
        """
        info = await self.request(f"$JS.API.STREAM.INFO.{name}", {})
        state, config = info["state"], info["config"]
        metadata = config.get("metadata") or {}
        start = metadata.get(_START_KEY, "")
        identity = f"{info['created']}|{metadata.get(_EPOCH_KEY, '')}"
        last = state["last_seq"]
        return StreamInfo(
            config=config,
            epoch=blake2s(identity.encode(), digest_size=8).hexdigest(),
            start=min(int(start), last) if start.isdecimal() else 0,
            floor=max(state["first_seq"] - 1, 0),
            last=last,
            mean_bytes=state["bytes"] / max(state["messages"], 1),
            time=_nanoseconds(info["ts"]) / 1e9,
        )

    async def create_stream(self, config: dict[str, Any]) -> None:
        """Create a stream, unless there is one of this name; its owner chose the configuration."""
        name = config["name"]
        try:
            await self.request(f"$JS.API.STREAM.CREATE.{name}", config)
        except APIError as exc:
            if exc.err_code != _NAME_IN_USE:
                raise

    async def begin_epoch(self, name: str, *, instead_of: str) -> None:
        """Begin a new epoch after the last message, unless another process has begun one.

        Args:
            name: The name of the stream.
            instead_of: The epoch to replace.
        """
        info = await self.stream_info(name)
        if info.epoch != instead_of:
            return
        kept = {key: value for key, value in (info.config.get("metadata") or {}).items() if not key.startswith("_")}
        metadata = {**kept, _EPOCH_KEY: secrets.token_hex(8), _START_KEY: str(info.last)}
        await self.request(f"$JS.API.STREAM.UPDATE.{name}", {**info.config, "metadata": metadata})

    async def get_message(self, stream: str, **query: Any) -> StoredMessage | None:
        """Return a message from the leader of a stream, or ``None``.

        Args:
            stream: The name of the stream.
            query: ``seq``, ``last_by_subj``, or ``seq`` and ``next_by_subj``.
        """
        try:
            answer = await self.request(f"$JS.API.STREAM.MSG.GET.{stream}", query)
        except NotFoundError:
            return None
        found = answer["message"]
        return StoredMessage(found["seq"], base64.b64decode(found.get("data") or b""), _nanoseconds(found["time"]))

    async def consume(self, stream: str, start: int) -> Consumer:
        """Create a consumer of all messages of a stream from an offset on. It replaces the one before.

        Args:
            stream: The name of the stream.
            start: The first offset.
        """
        inbox = self._client.new_inbox()
        await self.stop_consumer()
        consumer = self._consumer = Consumer()
        # Without limits: at a limit, nats-py would drop messages. The server waits for answers to its flow control.
        consumer.subscription = await self._client.subscribe(
            inbox, cb=consumer.on_message, pending_msgs_limit=0, pending_bytes_limit=0
        )
        name = f"asgi_sse_{secrets.token_hex(8)}"
        config = {
            "name": name,
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(start, 1),
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "flow_control": True,
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
            "inactive_threshold": int(_INACTIVE_S * 1e9),
            "mem_storage": True,
            "num_replicas": 1,
        }
        created = await self.request(
            f"$JS.API.CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config, "action": "create"}
        )
        consumer.pending = created.get("num_pending", 0)
        return consumer

    async def stop_consumer(self) -> None:
        """Unsubscribe the current consumer; the server deletes it after 30 seconds."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None and consumer.subscription is not None and not self.is_lost:
            await consumer.subscription.unsubscribe()


def parse_answer(message: Msg) -> dict[str, Any]:
    """Return the JSON of an answer.

    Raises:
        APIError: The server answered with an error.
        NoRespondersError: Nothing answers on this subject.
    """
    if (message.headers or {}).get("Status") == "503":
        raise NoRespondersError
    answer: dict[str, Any] = json.loads(message.data)
    if "error" in answer:
        APIError.from_error(answer["error"])  # raises
    return answer


def _nanoseconds(text: str) -> int:
    """Parse a time as Go writes it, with up to nine digits of a second."""
    seconds, _, fraction = text.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{seconds}+00:00").timestamp()) * 10**9 + int(fraction.ljust(9, "0"))


def split_servers(url: str) -> list[str]:
    """Return the URLs of the servers in a URL. Servers without a scheme or a user have those of the first one.

    Raises:
        ValueError: The URL has no server.
    """
    scheme, _, addresses = url.partition("://")
    servers: list[str] = []
    first_login = ""
    for address in addresses.split(","):
        own_scheme, separator, rest = address.strip().rpartition("://")
        own_login, at, host = rest.rpartition("@")
        first_login = first_login or own_login
        login = own_login if at else first_login
        if host:
            servers.append(f"{own_scheme if separator else scheme}://{login + '@' if login else ''}{host}")
    if not servers:
        raise ValueError(f"url must name a server, got {redact_server(url)!r}; pass one like nats://HOST:PORT")
    return servers


def redact_server(url: str) -> str:
    """Return the URL of a server without its password or token."""
    head, at, tail = url.rpartition("@")
    if not at:
        return url
    scheme, separator, user = head.partition("://")
    name, colon, _ = user.partition(":")
    return f"{scheme}{separator}{name + ':' if colon else ''}***@{tail}"
