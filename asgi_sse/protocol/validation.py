"""`check_number`, which checks seconds, sizes and counts when they are passed in."""

from asgi_sse.errors import short_repr


def check_number(name: str, value: object, *, optional: bool = False, positive: bool = False) -> None:
    """Raise if `value` is not a number of at least 0.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.
        optional: Whether ``None`` is allowed.
        positive: Whether 0 is forbidden.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is out of range.
    """
    if value is None and optional:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{' or None' * optional}, got {short_repr(value)}")
    if not value >= 0 or (positive and value == 0):
        bound = "more than 0" if positive else "at least 0"
        raise ValueError(f"{name} must be {bound}{' or None' * optional}, got {short_repr(value)}")
