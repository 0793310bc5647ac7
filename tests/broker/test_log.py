"""The log of a broker, its rings, and the names of channels."""

import re
from itertools import count
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asgi_sse import ServerSentEvent
from asgi_sse.broker.log import EventLog
from asgi_sse.broker.patterns import check_name, check_pattern, is_pattern, pattern_test

CHANNELS = ["a", "a.x", "a.y", "b.x", "b.y.z"]
PATTERNS = ["a", "a.x", "b.x", "a.*", "*.x", "**", "b.**", "*"]


def offsets(entries: Any) -> list[int]:
    return [entry.offset for entry in entries]


def event(data: str = "x") -> ServerSentEvent:
    return ServerSentEvent(data, event="kind")


class LogAndModel(RuleBasedStateMachine):
    """Compares the log with a model that never forgets.

    A read after an offset gives all later events in order, unless the log says that it is not complete.
    """

    @initialize(
        history=st.integers(1, 5),
        max_bytes=st.sampled_from([450, 1500, 10**6]),
        max_age=st.sampled_from([None, 3.0]),
        max_channels=st.integers(1, 5),
    )
    def start(self, history: int, max_bytes: int, max_age: float | None, max_channels: int) -> None:
        self.log = EventLog(history=history, max_bytes=max_bytes, max_age=max_age, max_channels=max_channels)
        self.limits = history, max_bytes, max_channels
        self.kept: set[str] = set()
        self.published: list[tuple[int, str, bytes]] = []
        self.now = 0.0

    @rule(channel=st.sampled_from(CHANNELS), size=st.sampled_from([1, 30, 90]))
    def publish(self, channel: str, size: int) -> None:
        entry = self.log.append(channel, event("x" * size), self.now)
        self.published.append((entry.offset, channel, entry.chunk))
        assert entry.event.id == self.log.id_of(entry.offset)
        # The newest event is always there.
        assert offsets(self.log.entries([channel], entry.offset - 1)) == [entry.offset]

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        self.log.expire(self.now)

    @rule(channel=st.sampled_from(CHANNELS))
    def keep_or_release(self, channel: str) -> None:
        if channel in self.kept:
            self.kept.discard(channel)
            self.log.release(channel)
        else:
            self.kept.add(channel)
            self.log.keep(channel, 900)

    @rule(patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3), back=st.integers(0, 12))
    def read(self, patterns: list[str], back: int) -> None:
        after = max(0, self.log.last_offset - back)
        tests = [pattern_test(pattern) for pattern in patterns]
        matching = [name for name in CHANNELS if any(test(name) for test in tests)]
        has_patterns = any(map(is_pattern, patterns))
        names = [name for name in self.log.channels if name in matching]
        names += [name for name in patterns if not is_pattern(name) and name not in names]
        expected = [offset for offset, channel, _ in self.published if channel in matching and offset > after]
        many = {*names, *(f"never.{number}" for number in range(100))}  # read from the sequence of all channels
        assert offsets(self.log.entries(many, after)) == offsets(self.log.entries(names, after))
        found = offsets(self.log.entries(names, after))
        if self.log.is_complete(names, self.now, patterns=has_patterns, after=after):
            assert found == expected
        else:
            assert found == sorted(set(found) & set(expected))

    @rule(channel=st.sampled_from(CHANNELS), back=st.integers(0, 12), limit=st.sampled_from([1, 100, 10**6]))
    def read_bytes(self, channel: str, back: int, limit: int) -> None:
        ring, position = self.log.ring(channel), max(0, self.log.last_offset - back)
        if ring is None:
            return
        expected = b"".join(entry.chunk for entry in ring.after(position))
        body = b""
        while ring.has(position):
            chunk, count, position = ring.read(position, limit)
            assert count == chunk.count(b"\n\n")
            assert len(chunk) <= limit or chunk.count(b"\n\n") == 1
            body += chunk
        assert body == expected

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "log"):
            return
        history, max_bytes, max_channels = self.limits
        assert sum(self.log.ring(name) is not None for name in self.log.channels) <= max_channels + len(self.kept)
        assert len(self.log.channels) <= 2 * max_channels + len(self.kept)
        for name in self.log.channels:
            ring = self.log.ring(name)
            if ring is None:
                continue  # of a forgotten channel, the log knows only the last offset
            if name in self.kept:
                assert ring.size <= 900 or len(ring) == 1
            else:
                assert len(ring) <= history
                assert ring.size <= max_bytes or len(ring) == 1
            assert ring.size == sum(350 + 2 * len(entry.chunk) for entry in ring.after(0))


TestLogAndModel = LogAndModel.TestCase
TestLogAndModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_ids_are_parsed_to_offsets_or_reasons() -> None:
    log = EventLog(epoch="abc")
    for _ in range(3):
        log.append("a", event(), 0)
    assert log.id_of(2) == "abc-2"
    assert log.parse("abc-2") == 2
    assert log.parse("abc-0") == 0
    assert log.parse("abc-4") == "unknown"  # beyond the last offset
    assert log.parse("abd-2") == "epoch"
    for other in ("", "2", "abc-", "abc-02", "abc-2 ", "abc-\u0662", "ABC-2", "abc-" + "9" * 19):
        assert log.parse(other) == "unknown"
    assert EventLog().epoch != EventLog().epoch


def test_longest_id_is_cors_safe() -> None:
    log = EventLog(epoch="z" * 32)
    log.last_offset = 10**18
    assert re.fullmatch(r"[0-9a-z-]{1,127}", log.id_of(log.last_offset))


def test_dropped_events_are_known_by_channel() -> None:
    log = EventLog(history=2)
    for channel in "aaab":
        log.append(channel, event(), 0)
    assert not log.is_complete(["a"], 0, patterns=False, after=0)
    assert log.is_complete(["a"], 0, patterns=False, after=1)
    assert log.is_complete(["b"], 0, patterns=False, after=0)  # events of other channels do not matter
    assert not log.is_complete(["a", "b"], 0, patterns=False, after=0)
    assert log.is_complete(["never"], 0, patterns=False, after=0)


def test_last_offset_of_a_forgotten_channel_is_known() -> None:
    log = EventLog(max_channels=1)
    log.append("a", event(), 0)
    log.append("b", event(), 0)
    assert log.ring("a") is None
    assert not log.is_complete(["a"], 0, patterns=False, after=0)
    assert log.is_complete(["a"], 0, patterns=False, after=1)
    assert log.is_complete(["never"], 0, patterns=True, after=0)  # a known channel is no reason for doubt
    log.append("a", event(), 0)
    assert not log.is_complete(["a"], 0, patterns=False, after=0)
    assert log.is_complete(["a"], 0, patterns=False, after=1)
    log.append("c", event(), 0)
    log.append("d", event(), 0)  # b is forgotten twice: only the floor of all such channels is known
    assert log.channels == ["d", "c"]
    assert not log.is_complete(["never"], 0, patterns=True, after=1)
    assert not log.is_complete(["b"], 0, patterns=False, after=1)


def test_kept_channel_is_not_subject_to_the_limits() -> None:
    log = EventLog(history=2, max_channels=1, max_age=10)
    log.keep("run", 10_000)
    for _ in range(10):
        log.append("run", event(), 0)
    for channel in ("a", "b"):
        log.append(channel, event(), 100)
    log.expire(100)
    assert offsets(log.entries(["run"], 0)) == list(range(1, 11))
    log.release("run")
    assert log.ring("run") is None
    assert not log.is_complete(["run"], 0, patterns=False, after=9)
    assert log.is_complete(["run"], 0, patterns=False, after=10)


def test_reads_at_the_same_offset_share_one_result() -> None:
    log = EventLog()
    for _ in range(10):
        log.append("a", event(), 0)
    ring = log.ring("a")
    assert ring is not None
    assert ring.read(3, 10_000)[0] is ring.read(3, 10_000)[0]
    assert ring.read(9, 10_000)[0] is next(iter(ring.after(9))).chunk
    log.append("a", event("later"), 0)
    assert ring.read(3, 10_000)[2] == 11


def test_dropped_entries_are_removed_from_a_ring() -> None:
    log = EventLog(history=10)
    for number in range(100_000):
        log.append("a", event(str(number)), 0)
    ring = log.ring("a")
    assert ring is not None
    assert offsets(ring.after(0)) == list(range(99_991, 100_001))
    assert len(ring._entries) < 200


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("orders.*", ["orders.1", "orders.x-y"], ["orders", "orders.1.2", "order.1", "xorders.1"]),
        ("orders.**", ["orders.1", "orders.1.2"], ["orders", "orders2.1"]),
        ("*.done", ["a.done"], ["done", "a.b.done", "a.doner"]),
        ("**", ["a", "a.b.c"], []),
        ("*", ["a", "chat/42"], ["a.b"]),
        ("a.b", ["a.b"], ["aXb", "a.b.c"]),
    ],
)
def test_pattern_matches_names(pattern: str, matching: list[str], others: list[str]) -> None:
    test = pattern_test(check_pattern(pattern))
    assert [name for name in matching + others if test(name)] == matching


@pytest.mark.parametrize("name", ["a", "a.b", "chat/42", "user:7@example.com", "x" * 200])
def test_valid_names(name: str) -> None:
    assert check_name(name) == name
    assert check_pattern(name) == name
    assert not is_pattern(name)


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a..b", "a b", "a\nb", "ä", "a*", "*", "a>", "x" * 201, "a.\n"])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="channel"):
        check_name(name)


@pytest.mark.parametrize("pattern", ["a*", "**.a", "a.**.b", "a.*b", "***", "*.", "x" * 199 + ".*"])
def test_invalid_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        check_pattern(pattern)


def test_name_must_be_a_str() -> None:
    with pytest.raises(TypeError, match=r"channel must be a str, got 7 \(int\)"):
        check_pattern(7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "limits",
    [{"history": 0}, {"history": True}, {"max_bytes": 1.5}, {"max_channels": -1}, {"max_age": 0}, {"epoch": "A"}],
)
def test_invalid_limits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(limits))} must be"):
        EventLog(**limits)


def test_channels_share_one_sequence_of_offsets() -> None:
    log, sequence = EventLog(), count(1)
    assert [log.append(name, event(), 0).offset for name in "abcab"] == [next(sequence) for _ in range(5)]
    assert "a" in log
    assert "z" not in log


def test_fill_leaves_no_gap_before_newer_events() -> None:
    log = EventLog(history=4, epoch="a")
    for number in range(1, 16):
        log.append("x", ServerSentEvent(str(number)), 0.0)
    fetched = [log.entry(number, "x", ServerSentEvent(str(number)), 0.0) for number in range(8, 16)]
    for number in range(16, 25):
        log.append("x", ServerSentEvent(str(number)), 0.0)
    log.fill("x", fetched, 7, until=15)
    assert not log.is_complete(["x"], 0.0, patterns=False, after=17)
    assert [entry.offset for entry in log.entries(["x"], 20)] == [21, 22, 23, 24]


def test_missed_events_empty_the_channel_and_no_other() -> None:
    log = EventLog()
    for channel in "aab":
        log.append(channel, event(), 0)
    log.skip(7)
    log.miss("a", 7)
    assert not log.is_complete(["a"], 0, patterns=False, after=6)
    assert log.is_complete(["a"], 0, patterns=False, after=7)
    assert log.is_complete(["b"], 0, patterns=False, after=0)
    assert offsets(log.entries(["a", "b"], 0)) == [3]
    log.miss("a", 5)  # what is known about later events stays true
    assert not log.is_complete(["a"], 0, patterns=False, after=6)


def test_cut_drops_the_events_of_all_channels_but_kept_ones() -> None:
    log = EventLog()
    log.keep_many()
    log.keep("run", 10_000)
    for channel in ("a", "run", "b", "run", "a"):
        log.append(channel, event(), 0)
    log.cut(4)
    assert offsets(log.entries(["a", "b", "run"], 0)) == [2, 4, 5]
    assert not log.is_complete(["b"], 0, patterns=False, after=2)
    assert log.is_complete(["run"], 0, patterns=False, after=0)
    assert not log.is_complete(["never"], 0, patterns=True, after=3)  # a pattern may have matched what was cut
    log.cut(5)
    assert offsets(log.entries(["a", "b", "run"], 0)) == [2, 4]


def test_release_of_a_channel_that_was_not_kept_drops_nothing() -> None:
    log = EventLog()
    log.append("a", event(), 0)
    log.release("a")
    assert offsets(log.entries(["a"], 0)) == [1]


def test_wide_reads_give_events_in_order_after_events_were_put_back() -> None:
    log = EventLog(epoch="a")
    names = [f"c{number}" for number in range(100)]
    log.restart("b", 100, [(name, number) for number, name in enumerate(names, 1)], floor=0)
    for number in range(100, 0, -1):
        name = names[number - 1]
        log.fill(name, [log.entry(number, name, event(), 0)], 0, until=100)
    assert offsets(log.entries(names, 0)) == list(range(1, 101))
    log.append("c0", event(), 0)
    assert offsets(log.entries(names, 98)) == [99, 100, 101]
