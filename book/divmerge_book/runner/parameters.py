"""What a notebook may be given: the types of its parameters, and their check where it runs."""

import ast
import difflib
import json
from collections.abc import Collection, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

FINITE = Annotated[float, Field(allow_inf_nan=False)]
SCALARS = {"int": int, "float": FINITE, "str": str, "bool": bool}
KINDS = {**SCALARS, **{f"list[{name}]": list[kind] for name, kind in SCALARS.items()}}
INJECTED = "# Parameters\n"  # how a cell begins that papermill puts after the notebook's own
HOW = {  # what plain papermill asks for, where it would read another type out of the text
    "bool": "; papermill reads -p {name} True and -p {name} False",
    "str": "; papermill reads text with -r {name} TEXT",
    "list": "; papermill reads a list with -y '{name}: [FIRST, SECOND]'",
}


@dataclass(frozen=True)
class Parameter:
    """One line `name: kind = default  # help` of a parameters cell. given: the default's text."""

    name: str
    kind: str
    given: str
    help: str

    @property
    def default(self) -> object:
        return ast.literal_eval(self.given)


def declared(source: str, where: str) -> dict[str, Parameter]:
    """The parameters that a cell declares, by name.

    Raises ValueError for a line of another form, or of a type that is not in KINDS.
    """
    found, written = {}, source.encode().splitlines()
    for line in ast.parse(source).body:
        if not declares([line]) or line.value is None:
            raise ValueError(
                f"{where}: `{ast.unparse(line)}` is not `name: type = default  # help`"
                f" with a type out of {', '.join(KINDS)}"
            )
        name, kind, given = map(ast.unparse, (line.target, line.annotation, line.value))
        comment = written[line.end_lineno - 1][line.end_col_offset :].decode().strip("# ")
        found[name] = Parameter(name, kind, given, comment)
    return found


def check(parameter: Parameter, value: object) -> object:
    """The value in the parameter's type; only an int given for a float is converted.

    Raises ValueError for another type, and for a list that has a value twice.
    """
    value = list(value) if isinstance(value, tuple) else value
    try:
        found = TypeAdapter(KINDS[parameter.kind]).validate_python(value, strict=True)
    except ValidationError:
        text = f"parameter {parameter.name} must be {parameter.kind}, got {value!r}"
        raise ValueError(text) from None
    if isinstance(found, list) and len(set(found)) < len(found):
        raise ValueError(f"parameter {parameter.name} has a value twice: {value!r}")
    return found


def parse(kind: str, text: str) -> object:
    """A value typed on the command line: JSON or Python, a bare word, or a list with commas."""
    if kind == "str" and text[:1] not in ("'", '"'):
        return text
    if kind.startswith("list[") and text[:1] not in ("[", "("):
        return [parse(kind[5:-1], word.strip()) for word in text.split(",") if word.strip()]
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text  # refused by check, which knows what was wanted


def known(name: str, allowed: Collection[str], instead: str) -> None:
    """Raise ValueError where a notebook has no parameter of this name; instead: what it has."""
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, n=1)
        close = [f"; did you mean {one!r}?" for one in near]
        raise ValueError(f"unknown parameter {name!r}{''.join(close)}{instead}")


# --- in the kernel --------------------------------------------------------------------------------
def check_parameters(notebook: MutableMapping[str, object]) -> frozenset[str]:
    """Check a running notebook's parameters, in a cell after them; returns those that are set.

    notebook: its `globals()`. The parameters are the lines `name: type = value` of the cell that
    ran last with such a line at its top; what papermill injected stands in a cell after it. An int
    for a float becomes a float. Not set are size, the switches `live` and `publish`, and what is
    empty: 0, "", [] and False leave a choice to the size. Raises ValueError for a value of another
    type, a value twice in a list, a number that is not finite, an injected name that the notebook
    does not have, or a size that does not exist.
    """
    cells = [(source, statements(source)) for source in notebook.get("In", ())]  # what has run
    own = [number for number, (_, body) in enumerate(cells) if declares(body)]
    if not own:
        raise ValueError("run the notebook's first code cell, its parameters, before this one")
    allowed = declared(cells[own[-1]][0], "its parameters")
    for source, body in cells[own[-1] + 1 :]:
        for line in body if source.startswith(INJECTED) else ():
            for target in getattr(line, "targets", ()):
                known(ast.unparse(target), allowed, f"; it has {', '.join(allowed)}")
    for name, parameter in allowed.items():
        try:
            notebook[name] = check(parameter, notebook[name])
        except ValueError as error:
            hint = HOW.get(parameter.kind.partition("[")[0], "").format(name=name)
            raise ValueError(f"{error}{hint * (' must be ' in str(error))}") from None
    if "size" in allowed:
        from divmerge_book.evaluation.experiment import SIZES  # imports torch, which takes seconds

        SIZES[notebook["size"]]  # an unknown one is refused, with those that there are
    return frozenset({n for n in allowed if notebook[n]} - {"size", "live", "publish"})


def statements(source: str) -> list[ast.stmt]:
    """A cell's statements; none of one that did not parse."""
    with suppress(SyntaxError):
        return ast.parse(source).body
    return []


def declares(body: list[ast.stmt]) -> bool:
    """Whether a cell begins with a line `name: type = value`."""
    first = body[0] if body else None
    return isinstance(first, ast.AnnAssign) and ast.unparse(first.annotation) in KINDS
