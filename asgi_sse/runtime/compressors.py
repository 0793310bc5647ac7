"""Finds what compresses responses, by looking at the app and at what left it.

A compressor that does not flush after every event holds events back: for a while, or until the stream ends. And
none that was measured heeds ``Cache-Control: no-transform``.
"""

import functools
import logging
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final

from asgi_sse.errors import printable
from asgi_sse.protocol.asgi import Send

from .base import EventLoop
from .server import unwrap_send

logger = logging.getLogger(__name__)


LOOK_AFTER: Final = 1.0
"""Seconds after which the first bytes of a stream should have left the app, and all who would mark its head have."""


@dataclass(frozen=True, slots=True)
class Compressor:
    """A middleware in the stack of an app.

    Attributes:
        name: Its class, with its module.
        path: Where in the stack it was found.
        encodes: Whether it would compress an event stream; ``None``: its name alone makes it suspect.
        cure: What to do.
    """

    name: str
    path: str
    encodes: bool | None
    cure: str


def _before(package: str, *release: int) -> Callable[[], bool]:
    def check() -> bool:
        try:
            found = re.findall(r"\d+", version(package))
        except PackageNotFoundError:
            return True
        return tuple(map(int, found[: len(release)])) < release

    return check


def _always() -> bool:
    return True


def _never() -> bool:
    return False


def _since(package: str, *release: int) -> Callable[[], bool]:
    before = _before(package, *release)
    return lambda: not before()


# Each run behind a stream of six small events in half seconds, as installed today and in the versions that differ.
_KNOWN: Final[dict[str, tuple[Callable[[], bool], str]]] = {
    "starlette.middleware.gzip.GZipMiddleware": (
        _before("starlette", 0, 46),
        "upgrade Starlette to 0.46 or later, which leaves event streams alone",
    ),
    "brotli_asgi.BrotliMiddleware": (_always, "give it excluded_handlers=[...] with the paths of the streams"),
    "starlette_compress.CompressMiddleware": (
        _since("starlette-compress", 2, 0),
        "call starlette_compress.remove_compress_type('text/event-stream')",
    ),
    "asgi_gzip.asgi_gzip.GZipMiddleware": (_before("asgi-gzip", 0, 3), "upgrade asgi-gzip to 0.3 or later"),
    "asgi_gzip.GZipMiddleware": (_before("asgi-gzip", 0, 3), "upgrade asgi-gzip to 0.3 or later"),
    "zstd_asgi.ZstdMiddleware": (_always, "give it excluded_handlers=[...] with the paths of the streams"),
    "asgi_compression.middleware.CompressionMiddleware": (_never, ""),
    "litestar.middleware.compression.middleware.CompressionMiddleware": (
        _always,
        "give CompressionConfig exclude=[...] with the paths of the streams",
    ),
    "django.middleware.gzip.GZipMiddleware": (_always, "serve the streams beside Django, as routes of SSEMiddleware"),
    "django_http_compression.middleware.HttpCompressionMiddleware": (
        _always,
        "serve the streams beside Django, as routes of SSEMiddleware",
    ),
    "compression_middleware.middleware.CompressionMiddleware": (
        _always,
        "serve the streams beside Django, as routes of SSEMiddleware",
    ),
    "quart_compress.quart_compress.Compress": (_never, ""),
    "blacksheep.server.compression.GzipMiddleware": (_never, ""),
}

_SUSPECT: Final = re.compile(r"gzip|brotli|zstd|deflate|compress", re.IGNORECASE)

# How apps and middlewares hold what is inside of them.
_EDGES: Final = (
    "app", "_app", "inner", "application", "asgi_app", "asgi", "wrapped", "next_app", "user_middleware", "cls",
    "middleware", "middlewares", "_middlewares", "middleware_class", "middleware_stack", "_middleware_chain",
    "compression_config", "after_request_funcs", "_unprepared_middleware", "_asgi_middleware", "asgi_handler",
    "asgi_router", "router", "_base_app", "other_asgi_app", "application_mapping", "mounts", "handler", "__wrapped__",
    "routes",
)  # fmt: skip
_LIMIT: Final = 3000


class Guard:
    """What one wrapper does about compression, and what it has seen of it.

    Args:
        app: The app around which it is.
        mode: ``"bypass"`` or ``"refuse"``.
        count: Told of each stream that was encoded, held or buffered.
    """

    def __init__(self, app: Any, mode: str, count: Callable[[str], None]) -> None:
        self._app = app
        self._count = count
        self._reported: set[str] = set()
        self._looked = False
        self._found: list[Compressor] | None = None
        self.bypass = mode == "bypass"
        self.refuse = mode == "refuse"

    def look(self) -> None:
        """Warn once of each compressor inside of the app that would compress a stream."""
        if self._looked:
            return
        self._looked = True
        for compressor in self._inside():
            if compressor.encodes:
                logger.warning(
                    "%s (%s) compresses event streams, which delays their events. %s To be rid of it, %s.",
                    compressor.name, compressor.path, self._measures(), compressor.cure,
                    extra={"sse_middleware": compressor.name},
                )  # fmt: skip
            elif compressor.encodes is None:
                logger.info(
                    "%s (%s) may compress event streams, by its name", compressor.name, compressor.path,
                    extra={"sse_middleware": compressor.name},
                )  # fmt: skip

    def _measures(self) -> str:
        if self.bypass:
            return "Requests that accept text/event-stream bypass it."
        return "Streams that it has compressed are refused."

    def _inside(self) -> list[Compressor]:
        if self._found is None:
            self._found = []
            try:
                self._found = find_compressors(self._app)
            except Exception:  # an app whose parts do not like to be looked at
                logger.debug("cannot look for compressors in a %s", type(self._app).__qualname__, exc_info=True)
        return self._found

    def report(self, kind: str, path: str, encoding: str = "") -> None:
        """Count a stream that was encoded, held or buffered, and warn of the first one of its kind."""
        self._count(kind)
        if kind in self._reported:
            return
        self._reported.add(kind)
        what = {
            "encoded": f"left the app {encoding}-encoded",
            "buffered": "has sent events of which none has left the app: something collects them",
            "held": "has sent its head, which has not left the app: something waits for the first event",
        }[kind]
        level = logging.INFO if kind == "held" else logging.WARNING  # our opening comment sets it free at once
        path = printable(path)
        extra = {"sse_path": path, "sse_compression": kind}
        logger.log(level, "the event stream %s %s. %s", path, what, self._advice(), extra=extra)

    def _advice(self) -> str:
        named = [compressor for compressor in self._inside() if compressor.encodes is not False]
        if not named:
            return "Look for a middleware that compresses or collects responses, and exclude the path from it."
        return f"It is likely {named[0].name} ({named[0].path}): {named[0].cure}."

    def refusal(self, encoding: str) -> str:
        """What to tell the client of a stream that is refused."""
        return f"This event stream was {encoding}-encoded by a middleware, which delays its events. {self._advice()}\n"


def watch_head(
    headers: list[tuple[bytes, bytes]], send: Send, loop: EventLoop, path: str, count: Callable[[str], None]
) -> None:
    """Look at a head some time after it was sent: whether somebody around us has put a content coding into it.

    Every compressor that was measured does so in the very list that it was given, once it sees the body.
    """
    loop.call_at(loop.time() + LOOK_AFTER, partial(_look_at_head, headers, send, path, count))


def _look_at_head(headers: list[tuple[bytes, bytes]], send: Send, path: str, count: Callable[[str], None]) -> None:
    encoding = encoding_of(headers)
    if not encoding:
        return
    count("encoded")
    names = compressors_around(send)
    name = names[0] if names else "A middleware"
    if name in _warned_outside:
        return
    _warned_outside.add(name)
    path = printable(path)
    logger.warning(
        "the event stream %s was %s-encoded on its way out. %s, around the app, does that, which delays events: put "
        "SSEMiddleware around it, or send the stream with the header 'content-encoding: identity'",
        path, encoding, name,
        extra={"sse_path": path, "sse_compression": "encoded", "sse_middleware": name},
    )  # fmt: skip


_warned_outside: Final[set[str]] = set()  # once a process: whoever is around us is not ours to ask


def find_compressors(app: Any) -> list[Compressor]:
    """The compressors in the stack of `app`, those that would compress an event stream first.

    Looks from the app inwards, at what holds what, and asks nothing of it. Misses what is wrapped in a way
    that it does not know, such as Django's ``@gzip_page`` on one view.
    """
    found: dict[str, Compressor] = {}
    django = False  # inside: a process may have its settings, and serve an app of another kind
    for thing, path in _inside(app):
        django = django or type(thing).__module__.startswith("django.core.handlers.")
        compressor = _judge(thing, path)
        if compressor is not None and compressor.name not in found:
            found[compressor.name] = compressor
    for name in _django_middleware() if django else ():
        compressor = _named(name, "settings.MIDDLEWARE")
        if compressor is not None and compressor.name not in found:
            found[compressor.name] = compressor
    return sorted(found.values(), key=lambda compressor: not compressor.encodes)


def compressors_around(send: Send) -> list[str]:
    """The names of what looks like a compressor between an app and its server, innermost first."""
    names = (f"{thing.__module__}.{thing.__qualname__}" for thing in map(_class_or_function, unwrap_send(send)))
    return [name for name in names if _SUSPECT.search(name)]


def encoding_of(headers: Any) -> str:
    """The content coding among a response's headers; ``""`` for none."""
    for name, value in headers:
        if name.lower() == b"content-encoding" and value.lower() != b"identity":
            return str(value, "latin-1")
    return ""


def _class_or_function(thing: Any) -> Any:
    return thing if isinstance(thing, type | FunctionType) else type(thing)


def _judge(thing: Any, path: str) -> Compressor | None:
    kind = _class_or_function(thing)
    if isinstance(kind, FunctionType):
        return None
    for base in kind.__mro__:
        known = _named(f"{base.__module__}.{base.__qualname__}", path)
        if known is not None and known.encodes is not None:
            return known
    return _named(f"{kind.__module__}.{kind.__qualname__}", path) if callable(thing) else None


def _named(name: str, path: str) -> Compressor | None:
    known = _KNOWN.get(name)
    if known is not None:
        return Compressor(name, path, known[0](), known[1])
    if _SUSPECT.search(name) and not name.startswith("asgi_sse."):
        return Compressor(name, path, None, "exclude the paths of the streams from it")
    return None


def _inside(app: Any) -> Iterator[tuple[Any, str]]:
    queue = deque([(app, "app")])
    seen: set[int] = set()
    while queue and len(seen) < _LIMIT:
        thing, path = queue.popleft()
        if thing is None or id(thing) in seen or isinstance(thing, str | bytes | int | float | ModuleType):
            continue
        seen.add(id(thing))
        if isinstance(thing, list | tuple | set | frozenset):
            queue.extend((item, f"{path}[{number}]") for number, item in enumerate(thing))
        elif isinstance(thing, dict):
            queue.extend((item, f"{path}[{key!r}]") for key, item in thing.items())
        elif isinstance(thing, MethodType):
            queue.append((thing.__self__, path))
        elif isinstance(thing, functools.partial):
            queue.extend((item, path) for item in (thing.func, *thing.args, *thing.keywords.values()))
        elif isinstance(thing, FunctionType):
            queue.extend((item, path) for item in _closure(thing) if callable(item))
        else:
            yield thing, path
            if not isinstance(thing, type):
                queue.extend(_held_by(thing, path))


def _held_by(thing: Any, path: str) -> Iterator[tuple[Any, str]]:
    for name in _EDGES:
        try:
            held = getattr(thing, name, None)
        except Exception:  # noqa: S112 (a property that is not ready yet)
            continue
        if held is not None:
            yield (list(held) if _is_blacksheep_list(held) else held), f"{path}.{name}"


def _is_blacksheep_list(held: Any) -> bool:
    # BlackSheep keeps its middlewares in an iterable of its own, each wrapped with its place in the order.
    return type(held).__module__.startswith("blacksheep.") and hasattr(held, "__iter__")


def _closure(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _django_middleware() -> list[str]:
    conf = sys.modules.get("django.conf")
    settings = getattr(conf, "settings", None)
    return list(settings.MIDDLEWARE) if settings is not None and settings.configured else []
