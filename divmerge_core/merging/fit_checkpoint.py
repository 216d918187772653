"""What a fit has learned from the model so far, in a file: a killed fit replays it and goes on."""

import hashlib
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    EllipsisType,
    FunctionType,
    MethodType,
    ModuleType,
)

import torch
from torch import Tensor

from divmerge_core.storage import fresh_file

Entry = tuple[float, Tensor]  # the loss, and its gradient in the coefficients [T, G]


PLAIN = str | bytes | int | float | complex | EllipsisType | None | torch.device | torch.dtype


def digest(*parts: object) -> str:
    """A digest by content of tensors, numbers, names, functions, and what holds or binds them.

    That is sequences, mappings, dataclasses, modules, partials, and closures. Raises TypeError for
    anything else.
    """
    told = Teller()
    told.tell(parts)
    return told.sha.hexdigest()


class Teller:
    """Writes content into one hash; a function that comes again is told by its name."""

    def __init__(self):
        self.sha, self.seen = hashlib.sha256(), set()

    def tell(self, part: object) -> None:
        """Feed the hash with one thing, and with all that it holds."""
        self.sha.update(f"{type(part).__qualname__}:".encode())
        if isinstance(part, Tensor):
            self.sha.update(f"{part.dtype} {tuple(part.shape)}".encode())
            for some in part.detach().reshape(-1).split(1 << 26):
                self.sha.update(memoryview(some.contiguous().view(torch.uint8).cpu().numpy()))
        elif isinstance(part, PLAIN):
            self.sha.update(f"{part!r};".encode())
        elif isinstance(part, FunctionType):
            self.function(part)
        elif isinstance(part, CodeType):
            self.tell((part.co_code, part.co_names, part.co_consts))
        elif isinstance(part, type | BuiltinFunctionType | ModuleType):
            self.sha.update(f"{getattr(part, '__module__', '')} {part.__name__};".encode())
        elif isinstance(part, list | tuple):
            self.sha.update(f"{len(part)};".encode())
            for one in part:
                self.tell(one)
        else:
            self.tell(held(part))

    def function(self, function: FunctionType) -> None:
        """Its name, what it is bound to and, outside this package, its code and what that names."""
        self.sha.update(f"{function.__module__}.{function.__qualname__};".encode())
        if id(function) in self.seen:
            return
        self.seen.add(id(function))
        top = function.__module__.split(".")[0]
        if top == __package__.partition(".")[0]:
            function = inspect.unwrap(function)
        else:
            named = {n: function.__globals__.get(n) for n in names(function.__code__)}
            own = {n: v for n, v in named.items() if belongs(v, top)}
            self.tell((function.__code__, own))
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        self.tell((function.__defaults__, function.__kwdefaults__, cells))


def held(part: object) -> list:
    """What a container holds, in an order that is always the same. Raises TypeError for others."""
    if isinstance(part, partial):
        return [part.func, list(part.args), dict(part.keywords)]
    if isinstance(part, MethodType):
        return [part.__func__, part.__self__]
    if isinstance(part, torch.nn.Module):
        return [type(part), dict(part.state_dict())]
    if is_dataclass(part):
        return [(one.name, getattr(part, one.name)) for one in fields(part)]
    if isinstance(part, Mapping):
        return list(part.items())
    if isinstance(part, set | frozenset):
        return sorted(part, key=repr)
    raise TypeError(f"{type(part).__name__} has no digest; give tensors, numbers, names, functions")


def names(code: CodeType) -> list[str]:
    """What a function's code asks for by name, the functions inside it included."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return sorted({*code.co_names, *chain(*map(names, inner))})


def belongs(value: object, top: str) -> bool:
    """Whether a global is a number, a tensor, or a function of the same package as its user."""
    if isinstance(value, FunctionType):
        return value.__module__.split(".")[0] == top
    return isinstance(value, Tensor | PLAIN | partial) and value is not None


@cache
def package_digest() -> str:
    """A digest of all code of this package."""
    root = Path(__file__).parents[1]
    return digest(*(path.read_bytes() for path in sorted(root.rglob("*.py"))))


def code_of(function: Callable) -> str:
    """A digest of a function: its code, what it is bound to, and its own helpers.

    Of functions of this package only the names count: their code is to have a digest of its own.
    Raises ValueError for one that is bound to what has no digest.
    """
    try:
        return digest(function)
    except TypeError as error:
        raise ValueError(
            f"a checkpoint cannot tell {function} from other functions ({error}); give a function "
            "bound to numbers, names and tensors only, or no checkpoint"
        ) from error


@dataclass
class FitCheckpoint:
    """The results of all passes through the model, in their order.

    All else in a fit (its optimiser's state, what it draws) follows from them, so replaying them
    leads back to the same place, bit for bit. path: where they are kept, None for nowhere. every:
    passes between two writes. fit: what tells one fit from another.
    """

    path: Path | None = None
    fit: Mapping = field(default_factory=dict)
    every: int = 5
    entries: list[Entry] = field(default_factory=list)
    place: int = 0

    @classmethod
    def open(cls, path: Path | str | None, fit: Mapping, every: int = 5) -> "FitCheckpoint":
        """An empty ledger, or the one kept at `path`.

        Raises ValueError where another fit's is, naming what differs, or a file of another kind.
        """
        if path is None or not Path(path).is_file():
            return cls(None if path is None else Path(path), fit, every)
        try:
            kept = torch.load(path, weights_only=True)
            before, entries = kept["fit"], list(map(tuple, kept["entries"]))
        except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no fit that was stopped; delete it or give another checkpoint"
            ) from error
        changed = sorted(k for k in {*fit, *before} if before.get(k) != fit.get(k))
        if changed:
            raise ValueError(
                f"{path} was written by a fit with other {', '.join(changed)}; delete it or give "
                "another checkpoint"
            )
        return cls(Path(path), fit, every, entries)

    @property
    def replaying(self) -> bool:
        """Whether the next result is known already."""
        return self.place < len(self.entries)

    def next(self, compute: Callable[[], Entry]) -> Entry:
        """The next result: from the file, or computed now."""
        if not self.replaying:
            self.entries.append(compute())
            if len(self.entries) % self.every == 0:
                self.save()
        self.place += 1
        return self.entries[self.place - 1]

    def save(self) -> None:
        """Write all results, whole or not at all."""
        if self.path is not None:
            with fresh_file(self.path) as new:
                torch.save({"fit": dict(self.fit), "entries": self.entries}, new)
