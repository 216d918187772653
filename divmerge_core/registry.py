"""Named functions: filed with a decorator, read by name; an unknown name is told the choices."""

import difflib
from collections.abc import Callable
from typing import Any


class UnknownName(KeyError, ValueError):
    """A name that is not registered; the message lists the names that are."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(dict[str, Any]):
    """Name -> entry, with facts beside each entry in `facts[name]`; defaults: of these facts.

    >>> HUES = Registry("hue")
    >>> @HUES.register("red", warm=True)
    ... def red(): return 0xFF0000
    >>> HUES["red"](), HUES.facts["red"]["warm"]
    (16711680, True)
    >>> HUES["rad"]
    Traceback (most recent call last):
    divmerge_core.registry.UnknownName: unknown hue 'rad'; choose one of: red (did you mean 'red'?)
    """

    def __init__(self, kind: str, **defaults: Any):
        super().__init__()
        self.kind, self.defaults = kind, defaults
        self.facts: dict[str, dict[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[Any], Any]:
        """Decorator that files its function (or any value) under `name`; a name is taken once."""
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is registered already; choose another name")

        def keep(entry: Any) -> Any:
            self[name] = entry
            self.facts[name] = {**self.defaults, **facts}
            return entry

        return keep

    def __missing__(self, name: str) -> Any:
        other = {facts.get("elsewhere"): own for own, facts in self.facts.items()}.get(str(name))
        near = [other] if other else difflib.get_close_matches(str(name), self, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UnknownName(f"unknown {self.kind} {name!r}; choose one of: {', '.join(self)}{hint}")
