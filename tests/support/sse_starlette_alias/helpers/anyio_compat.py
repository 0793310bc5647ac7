"""What sse-starlette's tests import beside the library, and its source distribution leaves out."""

from contextlib import contextmanager


@contextmanager
def collapse_excgroups():
    """Raise the one exception of a group, not the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
