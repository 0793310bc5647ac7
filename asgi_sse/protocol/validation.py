"""`check_number`: seconds, sizes and counts, looked at where they are given."""

from asgi_sse.errors import short_repr


def check_number(name: str, value: object, *, optional: bool = False, positive: bool = False) -> None:
    """See that `value` is a number of at least 0.

    Args:
        name: The argument's.
        value: What was given for it.
        optional: Whether it may be ``None``.
        positive: Whether it must be more than 0.

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.
    """
    if value is None and optional:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={short_repr(value)} is {type(value).__name__}; give a number{', or None' * optional}")
    if not value >= 0 or (positive and value == 0):
        raise ValueError(
            f"{name}={short_repr(value)} is out of range; give {'more than' if positive else 'at least'} 0"
        )
