"""The module ``sse_starlette.sse`` for sse-starlette's own tests, which patch a private method to start a shutdown."""

import anyio

from asgi_sse.adapters import sse_starlette as ours
from asgi_sse.adapters.sse_starlette import AppStatus, SendTimeoutError, ServerSentEvent, ensure_bytes

__all__ = ["AppStatus", "EventSourceResponse", "SendTimeoutError", "ServerSentEvent", "ensure_bytes"]

# Some test files import these names at their top, so without them none of their tests would run.
_get_shutdown_state = _get_uvicorn_server = _shutdown_watcher = None


class EventSourceResponse(ours.EventSourceResponse):
    """Our response, which sets `AppStatus.should_exit` when a patched `_listen_for_exit_signal` returns."""

    _listen_for_exit_signal = None

    async def __call__(self, scope, receive, send):
        if self._listen_for_exit_signal is None:
            await super().__call__(scope, receive, send)
            return
        error = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._wait_for_exit)
            try:
                await super().__call__(scope, receive, send)
            except Exception as exc:
                error = exc
            tasks.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _wait_for_exit(self):
        await self._listen_for_exit_signal()
        AppStatus.should_exit = True
