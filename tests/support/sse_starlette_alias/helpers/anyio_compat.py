"""A module that sse-starlette's tests import and its source distribution does not contain."""

from contextlib import contextmanager


@contextmanager
def collapse_excgroups():
    """Raise the exception of a group of one instead of the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
