"""The shutdown of the drop-in for sse-starlette: `AppStatus`, which reports it and can start it by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from asgi_sse.stream.registry import StreamRegistry

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.runtime.server import Server
    from asgi_sse.stream.stream import Stream

__all__ = ["AppStatus"]

running_streams: Final[dict[Stream, StreamRegistry]] = {}
"""The streams of the drop-in that run in this process, each with its registry."""


class ManualRegistry(StreamRegistry):
    """A registry that does not watch for the server's shutdown, so only `AppStatus` ends its streams."""

    def watch(self, server: Server) -> None:
        """Do nothing."""


manual_registry: Final = ManualRegistry()
"""The registry of streams that began while the automatic drain was off."""


class _AppStatusType(type):
    """The type of `AppStatus`, because ``should_exit`` is a property of the class itself."""

    exits_by_hand: bool = False

    @property
    def should_exit(cls) -> bool:
        return cls.exits_by_hand or any(registry.draining for registry in list(running_streams.values()))

    @should_exit.setter
    def should_exit(cls, value: bool) -> None:
        cls.exits_by_hand = bool(value)
        if value:
            for stream, registry in list(running_streams.items()):
                registry.end((stream,))


class AppStatus(metaclass=_AppStatusType):
    """Whether the server is stopping, for every stream of this adapter in the process.

    Attributes:
        should_exit: True while a server stops under running streams. Set it to True, from any thread, to end all
            running streams, and every new one at once, until you set it to False.
        enable_automatic_graceful_drain: Whether streams that begin now end when their server stops. Default: True.
        original_handler: Called by `handle_exit`. Default: ``None``, since this library replaces no signal handler of
            uvicorn's.
    """

    enable_automatic_graceful_drain: ClassVar[bool] = True
    original_handler: ClassVar[Callable[..., Any] | None] = None

    @staticmethod
    def disable_automatic_graceful_drain() -> None:
        """Let only ``AppStatus.should_exit = True`` end the streams that begin from now on."""
        AppStatus.enable_automatic_graceful_drain = False

    @staticmethod
    def enable_automatic_graceful_drain_mode() -> None:
        """Let the server's shutdown end the streams that begin from now on."""
        AppStatus.enable_automatic_graceful_drain = True

    @staticmethod
    def handle_exit(*args: Any, **kwargs: Any) -> None:
        """End the streams, unless the automatic drain is off, and call `original_handler`. For signal handlers.

        Args:
            *args: Passed on to `original_handler`.
            **kwargs: Passed on to `original_handler`.
        """
        if AppStatus.enable_automatic_graceful_drain:
            AppStatus.should_exit = True
        if AppStatus.original_handler is not None:
            AppStatus.original_handler(*args, **kwargs)
