"""`RouteTable`: path patterns and what they lead to."""

import re
from collections.abc import Mapping
from typing import Final, Generic, TypeVar, cast

from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import Scope

T = TypeVar("T")

_PARAMETER: Final = re.compile(r"\{([^{}]*)\}")


class RouteTable(Generic[T]):
    """Finds the target of a path. A literal segment takes precedence over a parameter.

    Args:
        routes: Patterns such as ``"/users/{name}/events"``, each with its target.

    Raises:
        ValueError: A pattern is invalid, or two patterns match the same paths.
    """

    def __init__(self, routes: Mapping[str, T]) -> None:
        shapes: dict[tuple[str, ...], str] = {}
        rows: list[tuple[tuple[str | None, ...], tuple[str, ...], T]] = []
        for pattern, target in routes.items():
            literals, names = _parse(pattern)
            shape = tuple("{}" if literal is None else f"/{literal}" for literal in literals)
            if shape in shapes:
                raise ValueError(f"routes {shapes[shape]!r} and {pattern!r} match the same paths; remove one")
            shapes[shape] = pattern
            rows.append((literals, names, target))
        # A path without parameters costs one dictionary lookup. Among the other patterns, the one whose literal segment
        # is further to the left comes first.
        self._literal = {"/" + "/".join(map(str, literals)): target for literals, names, target in rows if not names}
        rows = [row for row in rows if row[1]]
        self._rows = sorted(rows, key=lambda row: [literal is None for literal in row[0]])
        self._most_segments = max((len(row[0]) for row in rows), default=0)

    def find(self, path: str) -> tuple[T, dict[str, str]] | None:
        """Return the target of `path` and the values of its parameters; ``None`` if no pattern matches."""
        literal = self._literal.get(path)
        if literal is not None:
            return literal, {}
        if not self._rows:
            return None
        # One segment more than any pattern has is enough to match none of them. A path of a million slashes is thus not
        # split into a million strings.
        before, *segments = path.split("/", self._most_segments + 1)
        if before:  # h11 accepts any target: "x/items/1" must not match "/items/1", which a proxy may have blocked
            return None
        for literals, names, target in self._rows:
            if len(literals) == len(segments) and all(
                bool(segment) if literal is None else literal == segment
                for literal, segment in zip(literals, segments, strict=True)
            ):
                values = (segment for literal, segment in zip(literals, segments, strict=True) if literal is None)
                return target, dict(zip(names, values, strict=True))
        return None


def _parse(pattern: str) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """Return the segments of `pattern`, ``None`` for each parameter, and the names of the parameters."""
    if not isinstance(pattern, str) or not pattern.startswith("/"):
        raise ValueError(
            f"a route must start with '/', got {short_repr(pattern)}; pass a path such as '/events/{{name}}'"
        )
    if "?" in pattern or "#" in pattern:
        raise ValueError(f"a route must have no query and no fragment, got {pattern!r}; read request.query instead")
    literals: list[str | None] = []
    names: list[str] = []
    for segment in pattern.split("/")[1:]:
        match = _PARAMETER.fullmatch(segment)
        if match is None:
            if not {*"{}<>"}.isdisjoint(segment):  # "<name>" is the syntax of other frameworks and unlikely in a path
                raise ValueError(
                    f"a parameter must be a whole segment such as '/{{name}}', got {segment!r} in route {pattern!r}; "
                    "take the segment apart in the endpoint"
                )
            literals.append(segment)
            continue
        name = match[1]
        if not name.isidentifier() or name in names:
            raise ValueError(
                f"a parameter must have a unique name of letters, digits and '_', got {match[0]!r} in route "
                f"{pattern!r}; there are no converters, every parameter is a str"
            )
        literals.append(None)
        names.append(name)
    return tuple(literals), tuple(names)


def route_path(scope: Scope) -> str:
    """Return the path below ``root_path``. Some servers and mounts put that prefix before the path, others do not."""
    path, root = cast("str", scope["path"]), cast("str", scope.get("root_path", "")).rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    return path or "/"
