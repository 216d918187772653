"""Losses and gradients of past steps on disk, so that an interrupted fit can resume."""

import hashlib
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType

import torch
from torch import Tensor

from divmerge_core.storage import fresh_file

LossAndGradient = tuple[float, Tensor]  # the loss, and its gradient in the coefficients [T, G]


PLAIN = str | bytes | int | float | complex | EllipsisType | None | torch.device | torch.dtype


def digest(*parts: object) -> str:
    """SHA-256 of the content of tensors, numbers, names, functions and their containers.

    Containers are sequences, mappings, dataclasses, modules, partials and closures. Raises
    TypeError for anything else.
    """
    content = ContentHash()
    content.update(parts)
    return content.sha.hexdigest()


class ContentHash:
    """A hash of content; a function that occurs again contributes its name only."""

    def __init__(self):
        self.sha, self.seen = hashlib.sha256(), set()

    def update(self, part: object) -> None:
        """Hash one object and all that it contains."""
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
            self.update((part.co_code, part.co_names, part.co_consts))
        elif isinstance(part, type | BuiltinFunctionType | ModuleType):
            self.sha.update(f"{getattr(part, '__module__', '')} {part.__name__};".encode())
        elif isinstance(part, list | tuple):
            self.sha.update(f"{len(part)};".encode())
            for one in part:
                self.update(one)
        else:
            self.update(contents(part))

    def function(self, function: FunctionType) -> None:
        """Hash its name, closure, defaults and, outside this package, its code and helpers."""
        self.sha.update(f"{function.__module__}.{function.__qualname__};".encode())
        if id(function) in self.seen:
            return
        self.seen.add(id(function))
        top = function.__module__.split(".")[0]
        if top == __package__.partition(".")[0]:
            function = inspect.unwrap(function)
        else:
            named = {n: function.__globals__.get(n) for n in names(function.__code__)}
            own = {n: v for n, v in named.items() if is_own(v, top)}
            self.update((function.__code__, own))
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        self.update((function.__defaults__, function.__kwdefaults__, cells))


def contents(part: object) -> list:
    """The contents of a container in a fixed order. Raises TypeError for other objects."""
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
    """Names that a function's code uses, nested functions included."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return sorted({*code.co_names, *chain(*map(names, inner))})


def is_own(value: object, top: str) -> bool:
    """Whether a global is a number, a tensor, or a function of the package `top`."""
    if isinstance(value, FunctionType):
        return value.__module__.split(".")[0] == top
    return isinstance(value, Tensor | PLAIN | partial) and value is not None


@cache
def package_digest() -> str:
    """A digest of the source of this package."""
    root = Path(__file__).parents[1]
    return digest(*(path.read_bytes() for path in sorted(root.rglob("*.py"))))


def code_of(function: Callable) -> str:
    """A digest of a function: its code, closure and helpers.

    Functions of this package contribute their names: `package_digest` covers their code. Raises
    ValueError for a function bound to objects without a digest.
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
    """Loss and gradient of every step so far.

    They determine the optimizer's state and the random draws, so replaying them restores a fit bit
    for bit. path: the file, or None. every: steps between two writes. fit: the fit's fingerprint.
    """

    path: Path | None = None
    fit: Mapping = field(default_factory=dict)
    every: int = 5
    evaluations: list[LossAndGradient] = field(default_factory=list)
    position: int = 0

    @classmethod
    def open(cls, path: Path | str | None, fit: Mapping, every: int = 5) -> "FitCheckpoint":
        """An empty checkpoint, or the one stored at `path`.

        Raises ValueError for a file of another fit, naming what differs, or of another kind.
        """
        if path is None or not Path(path).is_file():
            return cls(None if path is None else Path(path), fit, every)
        try:
            kept = torch.load(path, weights_only=True)
            before, evaluations = kept["fit"], list(map(tuple, kept["evaluations"]))
        except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no fit that was stopped; delete it or give another checkpoint"
            ) from error
        if changed := sorted(k for k in {*fit, *before} if before.get(k) != fit.get(k)):
            raise ValueError(
                f"{path} was written by a fit with other {', '.join(changed)}; delete it or give "
                "another checkpoint"
            )
        return cls(Path(path), fit, every, evaluations)

    @property
    def replaying(self) -> bool:
        """Whether the next evaluation is stored."""
        return self.position < len(self.evaluations)

    def next(self, compute: Callable[[], LossAndGradient]) -> LossAndGradient:
        """The next evaluation, stored or computed."""
        if not self.replaying:
            self.evaluations.append(compute())
            if len(self.evaluations) % self.every == 0:
                self.save()
        self.position += 1
        return self.evaluations[self.position - 1]

    def save(self) -> None:
        """Write the file atomically."""
        if self.path is not None:
            with fresh_file(self.path) as new:
                torch.save({"fit": dict(self.fit), "evaluations": self.evaluations}, new)
