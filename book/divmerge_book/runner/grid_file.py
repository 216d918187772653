"""The file that describes a grid of runs, as a pydantic schema: every error names its line.

notebook: notebooks/04_merge.ipynb      # relative paths start at this file's folder
output: grids/divergences               # executed notebooks, failures, collected results
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import nbformat
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    create_model,
    model_validator,
)
from typing_extensions import TypedDict

from divmerge_book.data.code_digest import package_digest
from divmerge_book.data.schema import Fields, FilePath, check_names, error_at, read_file, typed
from divmerge_book.runner.execute import parameters
from divmerge_book.runner.executors import Job
from divmerge_book.runner.parameters import Parameter, check


def gpu_share(gpus: float) -> float:
    if gpus > 1 and gpus % 1:
        raise ValueError(f"must be a whole number or a part of one, below 1; got {gpus}")
    return gpus


class GridFile(Fields):
    """The fields of a grid's file; `schema_of` adds the types of the notebook's parameters."""

    notebook: FilePath
    output: FilePath
    fixed: Any = {}
    grid: Any = {}
    cells: Any = []
    retries: Annotated[int, Field(ge=0)] = 1
    parallel: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] | None = None
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(gpu_share)] = 0.0
    executor: Literal["local", "ray"] = "local"
    address: str | None = None

    @model_validator(mode="after")
    def consistent(self) -> "GridFile":
        given, fixed = self.model_fields_set, set(self.fixed)
        if type(self) is GridFile:  # read for the notebook alone
            return self
        if self.executor == "local" and "address" in given:
            raise error_at("address", "executor local takes no `address`")
        if self.executor == "ray" and "parallel" in given:
            why = "cpus and gpus decide how many run at once"
            raise error_at("parallel", f"executor ray takes no `parallel`: {why}")
        for field, names in (("grid", self.grid), ("cells", set().union(*self.cells))):
            if twice := sorted(fixed.intersection(names)):
                why = "take it out of `fixed` to vary it"
                raise error_at(field, f"{twice[0]} is fixed already; {why}")
        return self


def value(parameter: Parameter, given: Any) -> object:
    """One parameter's value; YAML takes `1e-3` for a word, here it is a number."""
    hint = "; in a grid every entry is one run's list: [[0], [1]]"
    hint = hint if parameter.kind.startswith("list[") and not isinstance(given, list) else ""
    given = typed(given)
    if "float" in parameter.kind:
        given = [*map(number, given)] if isinstance(given, list) else number(given)
    try:
        return check(parameter, given)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None


def number(given: object) -> object:
    with suppress(ValueError):
        return float(given) if isinstance(given, str) else given
    return given


def schema_of(allowed: Mapping[str, Parameter]) -> type[GridFile]:
    """The schema with the notebook's parameters and their types."""

    def mapping(types: Mapping[str, object]) -> object:
        made = TypedDict("Values", types, total=False)
        made.__pydantic_config__ = ConfigDict(extra="forbid")
        return Annotated[made, BeforeValidator(partial(check_names, allowed=types))]

    one = {n: Annotated[Any, PlainValidator(partial(value, p))] for n, p in allowed.items()}
    many = {n: Annotated[list[kind], Field(min_length=1)] for n, kind in one.items()}
    fields = {"fixed": (mapping(one), {}), "grid": (mapping(many), {})}
    return create_model("GridFile", __base__=GridFile, **fields, cells=(list[mapping(one)], []))


@dataclass(frozen=True)
class Grid:
    """A grid's file and its runs; varying: the parameters that are not the same in all of them."""

    file: GridFile
    jobs: Sequence[Job]
    varying: Sequence[str]

    def folder(self, job: Job) -> Path:
        return self.file.output / "cells" / job.key

    def finished(self, job: Job) -> bool:
        return (self.folder(job) / "cell.json").is_file()

    def label(self, job: Job) -> str:
        """What tells a run from the others."""
        named = (f"{name}={job.parameters[name]}" for name in self.varying)
        return ", ".join(named) or "the only run"


def read(path: str | os.PathLike) -> Grid:
    """A grid from its file. Raises ValueError, with file and line, for all that cannot be run."""
    allowed = parameters(read_file(path, GridFile, "grid").notebook)
    file = read_file(path, schema_of(allowed), "grid")
    runs = list(combinations(file, allowed))
    for (first, one), (second, other) in itertools.combinations(enumerate(runs, 1), 2):
        if one == other:
            raise ValueError(f"{path}: runs {first} and {second} are the same: {one}")
    page, code = nbformat.read(file.notebook, as_version=4), package_digest()
    source = [cell.source for cell in page.cells if cell.cell_type == "code"]
    whole, elsewhere, jobs = nbformat.writes(page), code if file.executor == "ray" else "", []
    for values in runs:
        text = json.dumps([source, values, code], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        jobs.append(Job(key, file.notebook.name, whole, values, elsewhere))
    varying = [name for name in runs[0] if any(run[name] != runs[0][name] for run in runs)]
    return Grid(file, jobs, varying)


def combinations(file: GridFile, allowed: Mapping[str, Parameter]) -> Iterator[dict]:
    """Every run's parameters: the product of `grid`, then each of `cells`."""
    shared = {name: parameter.default for name, parameter in allowed.items()}
    if "publish" in allowed and allowed["publish"].kind == "bool":
        shared["publish"] = True  # a notebook that can store its results is run for them
    shared |= file.fixed
    if file.grid or not file.cells:
        for chosen in itertools.product(*file.grid.values()):
            yield shared | dict(zip(file.grid, chosen, strict=True))
    for cell in file.cells:
        yield shared | cell
