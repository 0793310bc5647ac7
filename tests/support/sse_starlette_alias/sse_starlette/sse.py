"""``sse_starlette.sse``. Its tests tell a response of a shutdown by patching a private method of it."""

import anyio

from asgi_sse.adapters import sse_starlette as ours
from asgi_sse.adapters.sse_starlette import AppStatus, SendTimeoutError, ServerSentEvent, ensure_bytes

__all__ = ["AppStatus", "EventSourceResponse", "SendTimeoutError", "ServerSentEvent", "ensure_bytes"]

# Imported at the top of some of the tests, so that without them no test of the file could be run.
_get_shutdown_state = _get_uvicorn_server = _shutdown_watcher = None


class EventSourceResponse(ours.EventSourceResponse):
    """Our response; when its `_listen_for_exit_signal` was patched and returns, that is told to `AppStatus`."""

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
