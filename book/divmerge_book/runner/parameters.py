"""What a notebook may be given: the types of its parameters, and their check where it runs."""

import ast
import difflib
import json
import math
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass

SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
KINDS = (*SCALARS, *(f"list[{name}]" for name in SCALARS))
INJECTED = "# Parameters\n"  # how a cell begins that papermill puts after the notebook's own
HOW = {  # what plain papermill asks for, where it would read another type out of the text
    "bool": "papermill reads -p {name} True and -p {name} False",
    "str": "papermill reads text with -r {name} TEXT",
    "list": "papermill reads a list with -y '{name}: [FIRST, SECOND]'",
}


@dataclass(frozen=True)
class Parameter:
    """One line `name: kind = default  # help` of a notebook's parameters cell."""

    name: str
    kind: str
    default: object
    help: str


def declarations(source: str, where: str) -> Iterator[tuple[str, str, ast.AnnAssign]]:
    """Name, type and syntax of every line of a parameters cell.

    Raises ValueError for a line of another form, or of a type that is not in KINDS.
    """
    for line in ast.parse(source).body:
        if not isinstance(line, ast.AnnAssign) or ast.unparse(line.annotation) not in KINDS:
            raise ValueError(
                f"{where}: `{ast.unparse(line)}` is not `name: type = default  # help`"
                f" with a type out of {', '.join(KINDS)}"
            )
        yield ast.unparse(line.target), ast.unparse(line.annotation), line


def check(parameter: Parameter, value: object) -> object:
    """The value in the parameter's type; only an int given for a float is converted."""
    inner = parameter.kind.removeprefix("list[").removesuffix("]")
    if inner == parameter.kind:
        if inner == "float" and type(value) is int:
            value = float(value)
        if type(value) is SCALARS[inner] and (inner != "float" or math.isfinite(value)):
            return value
    elif isinstance(value, (list, tuple)):
        return [check(Parameter(parameter.name, inner, None, ""), item) for item in value]
    raise ValueError(f"parameter {parameter.name} must be {parameter.kind}, got {value!r}")


def parse(parameter: Parameter, text: str) -> object:
    """A value typed on the command line: JSON or Python, a bare word, or a list with commas."""
    plural = parameter.kind.startswith("list[")
    if parameter.kind == "str" and text[:1] not in ("'", '"'):
        return text
    if plural and text[:1] not in ("[", "("):
        inner = Parameter(parameter.name, parameter.kind[5:-1], None, "")
        return [parse(inner, word.strip()) for word in text.split(",") if word.strip()]
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text  # refused by check, which knows what was wanted


def unknown(name: str, allowed: Collection[str]) -> str:
    """Says that a notebook has no parameter of this name, and which one may have been meant."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"unknown parameter {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


# --- in the kernel --------------------------------------------------------------------------------


def check_parameters(notebook: MutableMapping[str, object]) -> frozenset[str]:
    """Check a running notebook's parameters, in a cell after them; returns those that are set.

    notebook: its `globals()`. The parameters are the lines `name: type = value` of the cell that
    ran last with such a line at its top; what papermill injected stands in a cell after it. An int
    for a float becomes a float. Not set are size, the switches `live` and `publish`, and what is
    empty: 0, "", [] and False leave a choice to the size. Raises ValueError for a value of another
    type, a number that is not finite, an injected name that the notebook does not have, or a size
    that does not exist.
    """
    cells = list(notebook.get("In", ()))  # what this kernel has run
    own = [number for number, source in enumerate(cells) if declares(source)]
    if not own:
        raise ValueError("run the notebook's first code cell, its parameters, before this one")
    allowed = {name: kind for name, kind, _ in declarations(cells[own[-1]], "its parameters")}
    for source in cells[own[-1] + 1 :]:
        for name in assigned(source) if source.startswith(INJECTED) else ():
            if name not in allowed:
                raise ValueError(f"{unknown(name, allowed)}; it has {', '.join(allowed)}")
    for name, kind in allowed.items():
        notebook[name] = explained(Parameter(name, kind, None, ""), notebook[name])
    if "size" in allowed:
        from divmerge_book.evaluation.experiment import SIZES  # imports torch, which takes seconds

        if notebook["size"] not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {notebook['size']!r}")
    found = {name for name in allowed if notebook[name]}
    return frozenset(found - {"size", "live", "publish"})


def declares(source: str) -> bool:
    """Whether a cell begins with a line `name: type = value`; a cell that failed to parse: no."""
    with suppress(SyntaxError):
        body = ast.parse(source).body
        first = body[0] if body else None
        return isinstance(first, ast.AnnAssign) and ast.unparse(first.annotation) in KINDS
    return False


def assigned(source: str) -> list[str]:
    """The names that a cell of plain assignments gives values to."""
    lines = [line for line in ast.parse(source).body if isinstance(line, ast.Assign)]
    return [ast.unparse(target) for line in lines for target in line.targets]


def explained(parameter: Parameter, value: object) -> object:
    """`check`, and how papermill has to be asked for this type."""
    try:
        return check(parameter, value)
    except ValueError as error:
        hint = HOW.get(parameter.kind.partition("[")[0], "").format(name=parameter.name)
        raise ValueError(f"{error}; {hint}" if hint else str(error)) from None
