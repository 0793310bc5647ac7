"""A search for middlewares that compress responses, in the app's stack and in the responses that left it.

A compressor that does not flush after every event delays events, for a while or until the stream ends. None
of the compressors measured obeys ``Cache-Control: no-transform``.
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

logger: Final = logging.getLogger(__name__)


CHECK_AFTER_S: Final = 1.0
"""When to check a stream for compression, in seconds after its start. By then its first bytes should have left the
app, and each compressor has set its response header."""


@dataclass(frozen=True, slots=True)
class Compressor:
    """A middleware that compresses responses, in the stack of an app.

    Attributes:
        name: The middleware's class, with its module.
        path: Where in the stack the middleware was found.
        encodes: Whether the middleware compresses event streams; ``None`` if only its name is suspect.
        cure: What the developer can do.
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


# Each was measured around a stream of six small events, half a second apart: in the current version, and in the
# versions that behave differently.
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

_SUSPECT_NAME: Final = re.compile(r"gzip|brotli|zstd|deflate|compress", re.IGNORECASE)

# The attributes by which apps and middlewares hold the app inside them.
_INNER_ATTRIBUTES: Final = (
    "app", "_app", "inner", "application", "asgi_app", "asgi", "wrapped", "next_app", "user_middleware", "cls",
    "middleware", "middlewares", "_middlewares", "middleware_class", "middleware_stack", "_middleware_chain",
    "compression_config", "after_request_funcs", "_unprepared_middleware", "_asgi_middleware", "asgi_handler",
    "asgi_router", "router", "_base_app", "other_asgi_app", "application_mapping", "mounts", "handler", "__wrapped__",
    "routes",
)  # fmt: skip
_MAX_OBJECTS: Final = 3000
"""The search in an app stops after this many objects."""


class CompressorGuard:
    """The policy of one middleware about compressed streams, and the warnings that it has given.

    Args:
        app: The app inside the middleware.
        mode: ``"bypass"`` or ``"refuse"``.
        count: Called for each stream that was encoded, held or buffered, with that word.

    Attributes:
        bypass: Whether requests for event streams are sent past the compressors.
        refuse: Whether compressed streams are refused.
    """

    def __init__(self, app: Any, mode: str, count: Callable[[str], None]) -> None:
        self._app = app
        self._count = count
        self._reported: set[str] = set()
        self._warned = False
        self._found: list[Compressor] | None = None
        self.bypass: bool = mode == "bypass"
        self.refuse: bool = mode == "refuse"

    def warn_once(self) -> None:
        """Log a warning for each compressor in the app that would compress a stream. Later calls do nothing."""
        if self._warned:
            return
        self._warned = True
        for compressor in self._inside():
            if compressor.encodes:
                logger.warning(
                    "%s (%s) compresses event streams, which delays their events. %s To avoid this, %s.",
                    compressor.name, compressor.path, self._policy(), compressor.cure,
                    extra={"sse_middleware": compressor.name},
                )  # fmt: skip
            elif compressor.encodes is None:
                logger.info(
                    "%s (%s) has a name that suggests it may compress event streams", compressor.name, compressor.path,
                    extra={"sse_middleware": compressor.name},
                )  # fmt: skip

    def _policy(self) -> str:
        if self.bypass:
            return "SSEMiddleware routes requests that accept text/event-stream past it."
        return "SSEMiddleware refuses the streams that it has compressed."

    def _inside(self) -> list[Compressor]:
        if self._found is None:
            self._found = []
            try:
                self._found = find_compressors(self._app)
            except Exception:  # an attribute of the app raised
                logger.debug("cannot search for compressors in a %s", type(self._app).__qualname__, exc_info=True)
        return self._found

    def report(self, kind: str, path: str, encoding: str = "") -> None:
        """Count a stream that was encoded, held or buffered, and log the first one of each kind.

        Args:
            kind: ``"encoded"``, ``"held"`` or ``"buffered"``.
            path: The path of the request.
            encoding: The content coding, if `kind` is ``"encoded"``.
        """
        self._count(kind)
        if kind in self._reported:
            return
        self._reported.add(kind)
        what = {
            "encoded": f"left the app {encoding}-encoded",
            "buffered": "has sent events, but none has left the app: a middleware collects them",
            "held": "has sent its headers, but they have not left the app: a middleware waits for the first event",
        }[kind]
        level = logging.INFO if kind == "held" else logging.WARNING  # our opening comment releases them at once
        path = printable(path)
        extra = {"sse_path": path, "sse_compression": kind}
        logger.log(level, "the event stream %s %s. %s", path, what, self._advice(), extra=extra)

    def _advice(self) -> str:
        named = [compressor for compressor in self._inside() if compressor.encodes is not False]
        if not named:
            return "Look for a middleware that compresses or collects responses, and exclude the path from it."
        return f"The cause is probably {named[0].name} ({named[0].path}): {named[0].cure}."

    def refusal(self, encoding: str) -> str:
        """Return the text of the response to a client whose stream is refused."""
        return f"This event stream was {encoding}-encoded by a middleware, which delays its events. {self._advice()}\n"


def check_headers_later(
    headers: list[tuple[bytes, bytes]], send: Send, loop: EventLoop, path: str, count: Callable[[str], None]
) -> None:
    """Check the response headers again after `CHECK_AFTER_S`, for a content coding that a middleware around us added.

    Every compressor measured adds it to the list object that we sent, when it sees the first part of the body.

    Args:
        headers: The list that was sent.
        send: The ``send`` of the request.
        loop: The event loop of the request.
        path: The path of the request.
        count: Called with ``"encoded"`` if there is a content coding.
    """
    loop.call_at(loop.time() + CHECK_AFTER_S, partial(_check_headers, headers, send, path, count))


def _check_headers(headers: list[tuple[bytes, bytes]], send: Send, path: str, count: Callable[[str], None]) -> None:
    encoding = encoding_of(headers)
    if not encoding:
        return
    count("encoded")
    names = compressors_around(send)
    name = names[0] if names else "a middleware"
    if name in _warned_outside:
        return
    _warned_outside.add(name)
    path = printable(path)
    logger.warning(
        "the event stream %s was %s-encoded by %s, which is around the app and delays events. Put SSEMiddleware around "
        "it, or send the stream with the header 'content-encoding: identity'",
        path, encoding, name,
        extra={"sse_path": path, "sse_compression": "encoded", "sse_middleware": name},
    )  # fmt: skip


# One warning per middleware and process: no object of ours belongs to a middleware around us.
_warned_outside: Final[set[str]] = set()


def find_compressors(app: Any) -> list[Compressor]:
    """Return the compressors in the stack of `app`; those that compress event streams come first.

    The search reads attributes, from the app inwards, and calls nothing. It misses a wrapper that it does not
    know, such as Django's ``@gzip_page`` on one view.
    """
    found: dict[str, Compressor] = {}
    django = False  # set by an object of Django in the app: settings alone may belong to another app of the process
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
    """Return the names of the suspected compressors between an app and its server, innermost first."""
    names = (f"{thing.__module__}.{thing.__qualname__}" for thing in map(_class_or_function, unwrap_send(send)))
    return [name for name in names if _SUSPECT_NAME.search(name)]


def encoding_of(headers: Any) -> str:
    """Return the content coding of a response from its headers, or ``""``."""
    for name, value in headers:
        if name.lower() == b"content-encoding" and value.lower() != b"identity":
            return str(value, "latin-1")
    return ""


def _class_or_function(thing: Any) -> Any:
    return thing if isinstance(thing, type | FunctionType) else type(thing)


def _judge(thing: Any, path: str) -> Compressor | None:
    kind: type = thing if isinstance(thing, type) else type(thing)
    for base in kind.__mro__:
        known = _named(f"{base.__module__}.{base.__qualname__}", path)
        if known is not None and known.encodes is not None:
            return known
    return _named(f"{kind.__module__}.{kind.__qualname__}", path) if callable(thing) else None


def _named(name: str, path: str) -> Compressor | None:
    known = _KNOWN.get(name)
    if known is not None:
        return Compressor(name, path, known[0](), known[1])
    if _SUSPECT_NAME.search(name) and not name.startswith("asgi_sse."):
        return Compressor(name, path, None, "exclude the paths of the streams from it")
    return None


def _inside(app: Any) -> Iterator[tuple[Any, str]]:
    queue = deque([(app, "app")])
    seen: set[int] = set()
    while queue and len(seen) < _MAX_OBJECTS:
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
    for name in _INNER_ATTRIBUTES:
        try:
            held = getattr(thing, name, None)
        except Exception:  # noqa: S112 (a property that is not ready yet)
            continue
        if held is not None:
            yield (list(held) if _is_blacksheep_list(held) else held), f"{path}.{name}"


def _is_blacksheep_list(held: Any) -> bool:
    # BlackSheep keeps its middlewares in an iterable of its own, each wrapped together with its priority.
    return type(held).__module__.startswith("blacksheep.") and hasattr(held, "__iter__")


def _closure(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the closure has not filled it yet
            continue


def _django_middleware() -> list[str]:
    conf = sys.modules.get("django.conf")
    settings = getattr(conf, "settings", None)
    return list(settings.MIDDLEWARE) if settings is not None and settings.configured else []
