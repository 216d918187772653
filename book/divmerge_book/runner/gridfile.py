"""The file that describes a grid of runs: read strictly, every error with its line.

notebook: notebooks/04_merge.ipynb      # relative paths start at this file's folder
output: grids/divergences               # executed notebooks, failures, gathered results
fixed: {size: smoke, pair: [trec, movie]}
grid: {divergence: [js, kl], seeds: [[0], [1]]}   # every combination
cells: [{divergence: hellinger, lr: 0.05}]        # and these
retries: 1                              # how often a failed run is tried again
parallel: 2                             # runs at once on this machine
cpus: 1                                 # threads of a run; gpus: devices, or a part of one
executor: local                         # or ray, with `address:` or RAY_ADDRESS
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import yaml

from divmerge_book.data.code_digest import package_digest
from divmerge_book.runner.execute import parameters
from divmerge_book.runner.executors import Job
from divmerge_book.runner.parameters import Parameter, check
from divmerge_book.user_models.description import Reader

TOP = ("notebook", "output", "fixed", "grid", "cells", "retries")
TOP += ("parallel", "cpus", "gpus", "executor", "address")
EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Grid:
    """A notebook, what every run gives it, where results go, and how runs are carried out."""

    notebook: Path
    output: Path
    runs: Sequence[Mapping]  # all of a run's parameters, defaults with them
    retries: int = 1
    executor: str = "local"
    options: Mapping = field(default_factory=dict)  # of the executor

    @property
    def varying(self) -> list[str]:
        """The parameters that are not the same in all runs."""
        return [n for n in self.runs[0] if any(run[n] != self.runs[0][n] for run in self.runs)]

    def jobs(self) -> list[Job]:
        """The runs with their keys."""
        page = nbformat.read(self.notebook, as_version=4)
        source = [cell.source for cell in page.cells if cell.cell_type == "code"]
        jobs = []
        for values in self.runs:
            text = json.dumps([source, values, package_digest()], sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:24]
            name = self.notebook.name
            jobs.append(Job(key, name, nbformat.writes(page), values, package_digest()))
        return jobs


# --- the file ------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> Grid:
    """A grid from its file. Raises ValueError, with file and line, for all that cannot be run."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no grid {path}; see `python -m pydoc divmerge_book.runner.gridfile`"
        )
    reader = Reader(path, top=TOP)
    top = reader.tree()
    found = reader.fields(top, TOP, "the grid")
    reader.need(top, ("notebook", "output"), found, "the grid")
    notebook = path.parent / reader.word(found["notebook"], "notebook")
    allowed = parameters(notebook)
    fixed = values(reader, found["fixed"], allowed, "fixed") if "fixed" in found else {}
    runs = list(combinations(reader, found, allowed, fixed))
    for first, second in itertools.combinations(range(len(runs)), 2):
        if runs[first] == runs[second]:
            same = f"runs {first + 1} and {second + 1} are the same: {runs[first]}"
            raise reader.error(top, same)
    output = (path.parent / reader.word(found["output"], "output")).resolve()
    retries = number(reader, found, "retries", int, 0, 1)
    return Grid(notebook.resolve(), output, runs, retries, *carried_out(reader, found))


def combinations(reader: Reader, found: Mapping, allowed: Mapping, fixed: Mapping) -> Iterator:
    """Every run's parameters: the product of `grid`, then each of `cells`."""
    defaults = {name: parameter.default for name, parameter in allowed.items()}
    if "publish" in allowed and allowed["publish"].kind == "bool":
        defaults["publish"] = True  # a notebook that can store its results is run for them
    lists = {}
    if "grid" in found:
        for name, node in reader.fields(found["grid"], allowed, "grid").items():
            if not isinstance(node, yaml.SequenceNode) or not node.value:
                raise reader.error(node, f"{name} in grid must be a list with a value for each run")
            twice(reader, node, name, fixed)
            lists[name] = [value(reader, item, allowed[name]) for item in node.value]
    cells = []
    if "cells" in found:
        if not isinstance(found["cells"], yaml.SequenceNode):
            raise reader.error(found["cells"], "cells must be a list of runs, each NAME: VALUE")
        for n, node in enumerate(found["cells"].value, 1):
            cells.append(values(reader, node, allowed, f"cell {n}"))
            for name in cells[-1]:
                twice(reader, node, name, fixed)
    if lists or not cells:
        for chosen in itertools.product(*lists.values()):
            yield {**defaults, **fixed, **dict(zip(lists, chosen, strict=True))}
    for cell in cells:
        yield {**defaults, **fixed, **cell}


def twice(reader: Reader, node: yaml.Node, name: str, fixed: Mapping) -> None:
    if name in fixed:
        raise reader.error(node, f"{name} is fixed already; take it out of `fixed` to vary it")


def values(reader: Reader, node: yaml.Node, allowed: Mapping, what: str) -> dict[str, object]:
    """A mapping of parameters, in the notebook's types."""
    found = reader.fields(node, allowed, what)
    return {name: value(reader, one, allowed[name]) for name, one in found.items()}


def value(reader: Reader, node: yaml.Node, parameter: Parameter) -> object:
    """One parameter's value; YAML takes `1e-3` for a word, here it is a number."""
    try:
        given = yaml.SafeLoader("").construct_object(node, deep=True)
        if "float" in parameter.kind:
            given = [*map(numeric, given)] if isinstance(given, list) else numeric(given)
        return check(parameter, given)
    except (ValueError, yaml.YAMLError) as error:
        single = parameter.kind.startswith("list[") and isinstance(node, yaml.ScalarNode)
        hint = "; in a grid every entry is one run's list: [[0], [1]]" if single else ""
        raise reader.error(node, f"{error}{hint}") from error


def numeric(given: object) -> object:
    with suppress(ValueError):
        return float(given) if isinstance(given, str) else given
    return given


def number(
    reader: Reader, found: Mapping, name: str, kind: type, least: int | float, default: object
):
    """One of the file's own numbers."""
    if name not in found:
        return default
    text = reader.word(found[name], name)
    with suppress(ValueError):
        if least <= kind(text) < float("inf"):
            return kind(text)
    words = {int: "a whole number", float: "a number"}[kind]
    raise reader.error(found[name], f"{name} must be {words} of {least} or more, got {text!r}")


def carried_out(reader: Reader, found: Mapping) -> tuple[str, dict]:
    """The executor's name and options."""
    executor = reader.word(found["executor"], "executor") if "executor" in found else "local"
    if executor not in EXECUTORS:
        choices = ", ".join(EXECUTORS)
        raise reader.error(
            found["executor"], f"executor must be one of {choices}, got {executor!r}"
        )
    options = {
        "cpus": number(reader, found, "cpus", float, 0.01, None),
        "gpus": number(reader, found, "gpus", float, 0, 0.0),
    }
    if options["gpus"] > 1 and options["gpus"] % 1:
        raise reader.error(found["gpus"], "gpus must be a whole number or a part of one, below 1")
    apart = {"local": "address", "ray": "parallel"}[executor]
    if apart in found:
        why = {"local": "", "ray": ": cpus and gpus decide how many run at once"}[executor]
        raise reader.error(found[apart], f"executor {executor} takes no `{apart}`{why}")
    if executor == "local":
        options["parallel"] = number(reader, found, "parallel", int, 1, 1)
    elif "address" in found:
        options["address"] = reader.word(found["address"], "address")
    return executor, options
