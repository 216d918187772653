"""A dictionary of named functions: fill it with a decorator, read it by name, and be told the
choices."""

import difflib
from collections.abc import Callable
from typing import Any


class UnknownName(KeyError, ValueError):
    """A name that is not registered; the message lists the names that are."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(dict[str, Any]):
    """Name -> entry, with facts beside each entry in `facts[name]`.

    >>> COLOURS = Registry("colour")
    >>> @COLOURS.register("red", warm=True)
    ... def red(): return 0xFF0000
    >>> COLOURS["red"](), COLOURS.facts["red"]["warm"]
    (16711680, True)
    >>> COLOURS["rad"]
    Traceback (most recent call last): divmerge_core.registry.UnknownName: unknown colour 'rad';
    choose one of: red (did you mean 'red'?)
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.facts: dict[str, dict[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[Any], Any]:
        """Decorator that files its function (or any value) under `name`; a name is taken once."""
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is registered already; choose another name")

        def keep(entry: Any) -> Any:
            self[name] = entry
            self.facts[name] = facts
            return entry

        return keep

    def __missing__(self, name: str) -> Any:
        near = difflib.get_close_matches(str(name), self, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UnknownName(f"unknown {self.kind} {name!r}; choose one of: {', '.join(self)}{hint}")
