"""Both suites by name: from the hub, from folders in its layout, or of toy models made here."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
import transformers

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.published import glue, t5, toy_models
from divmerge_book.published.sources import SOURCES, Source
from divmerge_book.user_models import check, load, read

TASKS = {glue.SUITE: tuple(glue.PRINTED), t5.SUITE: tuple(SOURCES)}


@dataclass(frozen=True)
class SuitePaths:
    """Where a suite's models and data are: hub names or folders.

    glue: the folder that DIVMERGE_GLUE_DIR would name, None for that or the hub. sources: of T5's
    tasks. toy: whether these are toy models, whose scores mean nothing.
    """

    suite: str
    base: str
    experts: Mapping[str, str]
    glue: str | None = None
    sources: Mapping[str, Source] | None = None
    toy: bool = False

    def table(self) -> pd.DataFrame:
        """A row per task: expert and data; for T5 also what the expert reads and writes."""
        rows = {task: {"expert": name} for task, name in self.experts.items()}
        for task, source in (self.sources or {}).items():
            reads = source.template.replace("{text}", source.text)
            reads = reads.replace("{pair}", source.pair or "")
            rows[task] |= {"data": source.data, "reads": reads, "writes": source.answer}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")


def known(suite: str) -> str:
    if suite not in TASKS:
        raise ValueError(f"suite must be one of {', '.join(TASKS)}, got {suite!r}")
    return suite


def published(
    suite: str,
    tasks: Sequence[str] = (),
    *,
    base: str = "",
    experts: Sequence[str] = (),
    data: Sequence[str] = (),
) -> SuitePaths:
    """The suite's own identifiers, or others in their place; all may be folders.

    experts, data: one per task, in the order of `tasks`; empty for the suite's own. data of
    gpt2_glue: at most one folder in the layout of nyu-mll/glue. Raises ValueError for an unknown
    suite or task, and for a list of another length.
    """
    classifiers = known(suite) == glue.SUITE
    names = list(tasks or TASKS[suite])
    wanted = {"experts": len(names), "data": 1 if classifiers else len(names)}
    for what, given in (("experts", experts), ("data", data)):
        if given and len(given) != wanted[what]:
            raise ValueError(f"{what} must be {wanted[what]} for {names}, or none; got {given}")
    if classifiers:
        own = glue.identifiers(names)
        named = dict(zip(names, experts, strict=True)) if experts else own
        return SuitePaths(suite, base or glue.BASE, named, data[0] if data else None)
    sources = {name: SOURCES[name] for name in t5.checked(names, SOURCES)}
    for field, given in (("expert", experts), ("data", data)):
        for name, place in zip(names, given, strict=False):
            sources[name] = replace(sources[name], **{field: place})
    named = {name: source.expert for name, source in sources.items()}
    return SuitePaths(suite, base or t5.BASE, named, sources=sources)


def toy_suite(suite: str, folder: Path, *, size: str = "smoke", seed: int = 0) -> SuitePaths:
    """Toy models and data for a suite, made in `folder`. Raises ValueError for unknown names."""
    if known(suite) == t5.SUITE:
        base, sources = toy_models.make_t5(folder, size=size, seed=seed)
        experts = {name: source.expert for name, source in sources.items()}
        return SuitePaths(suite, base, experts, sources=sources, toy=True)
    made = toy_models.make_gpt2(folder, size=size, seed=seed)
    names = [path.name for path in sorted(Path(made["glue"]).iterdir())]
    experts = {name: made["expert"].format(task=name) for name in names}
    return SuitePaths(suite, made["base"], experts, made["glue"], toy=True)


def prepare_published(
    paths: SuitePaths,
    folder: Path,
    *,
    rows: Mapping[str, int] | None = None,
    device: str = "cpu",
    precision: str = "float32",
    progress: bool = True,
) -> Experiment:
    """A suite as an experiment: all checked, experts read, inputs and labelled splits ready.

    folder: for the description of gpt2_glue. rows: at most so many of `merge`, `validation` and
    `test`. Raises ValueError for whatever cannot be found or does not fit.
    """
    names = list(paths.experts)
    if paths.suite == t5.SUITE:
        settings = {"device": device, "precision": precision, "progress": progress}
        return t5.prepare_t5(names, base=paths.base, sources=paths.sources, rows=rows, **settings)
    given = {"base": paths.base, "expert": paths.experts, "rows": rows}
    if paths.toy:
        given["max_length"] = toy_models.POSITIONS
    with mock.patch.dict(os.environ, {"DIVMERGE_GLUE_DIR": paths.glue} if paths.glue else {}):
        plan = check(read(glue.describe(folder, names, progress=progress, **given)))
    return load(plan, device=device, precision=precision)


def memory() -> pd.DataFrame:
    """Numbers of parameters, and GB of all T + 3 float32 copies that a fit holds, per suite.

    Base, T task vectors, the merged model's buffer, and the model itself. From configurations:
    GPT-2's, and T5-base's as published (12 + 12 layers of 768 units); activations are not counted.
    """
    wide = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        models = {
            glue.SUITE: transformers.GPT2Model(transformers.GPT2Config()),
            t5.SUITE: transformers.T5ForConditionalGeneration(transformers.T5Config(**wide)),
        }
    found = []
    for suite, model in models.items():
        size, count = sum(tensor.numel() for tensor in model.parameters()), len(TASKS[suite])
        found.append((suite, count, size, (count + 3) * size * 4 / 1e9))
    columns = ["suite", "experts", "parameters", "GB in float32"]
    return pd.DataFrame(found, columns=columns).set_index("suite")
