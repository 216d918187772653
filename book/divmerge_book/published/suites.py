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
from divmerge_book.published.sources import SOURCES, PublishedTask, distinct_tasks
from divmerge_book.user_models import check, load, read
from divmerge_core.registry import Registry

TASKS = Registry("published suite")
TASKS |= {glue.SUITE: tuple(glue.PRINTED), t5.SUITE: tuple(SOURCES)}
BASES = {glue.SUITE: glue.BASE, t5.SUITE: t5.BASE}
EXPERTS = {**glue.EXPERTS, **{task: source.expert for task, source in SOURCES.items()}}
SMALL = {glue.SUITE: ("cola", "sst2", "mnli"), t5.SUITE: ("imdb", "squad")}
TOYS = Registry("size")  # -> tasks of each suite, steps of each expert
TOYS |= {"smoke": (SMALL, 80), "default": (TASKS, 200)}


@dataclass(frozen=True)
class SuitePaths:
    """Where a suite's models and data are: hub names or folders.

    data: of T5 one per task; of gpt2_glue the folder that DIVMERGE_GLUE_DIR would name; empty for
    the suite's own. toy: whether these are toy models, whose scores mean nothing.
    """

    suite: str
    base: str
    experts: Mapping[str, str]
    data: Sequence[str] = ()
    toy: bool = False

    @property
    def sources(self) -> dict[str, PublishedTask]:
        """T5's experts and data by task; none of gpt2_glue."""
        if self.suite == glue.SUITE:
            return {}
        own = [SOURCES[name].data for name in self.experts]
        places = zip(self.experts.items(), self.data or own, strict=True)
        return {n: replace(SOURCES[n], expert=expert, data=place) for (n, expert), place in places}

    def table(self) -> pd.DataFrame:
        """A row per task: expert and data; for T5 also what the expert reads and writes."""
        rows = {task: {"expert": name} for task, name in self.experts.items()}
        for task, source in self.sources.items():
            reads = source.template.replace("{text}", source.text)
            reads = reads.replace("{pair}", source.pair or "")
            rows[task] |= {"data": source.data, "reads": reads, "writes": source.answer}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")


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
    names = distinct_tasks(suite, list(tasks or TASKS[suite]), TASKS[suite])
    wanted = {"experts": len(names), "data": 1 if suite == glue.SUITE else len(names)}
    for what, given in (("experts", experts), ("data", data)):
        if given and len(given) != wanted[what]:
            raise ValueError(f"{what} must be {wanted[what]} for {names}, or none; got {given}")
    named = dict(zip(names, experts or [EXPERTS[name] for name in names], strict=True))
    return SuitePaths(suite, base or BASES[suite], named, tuple(data))


def toy_suite(suite: str, folder: Path, *, size: str = "smoke", seed: int = 0) -> SuitePaths:
    """Toy models and data for a suite, made in `folder`. Raises ValueError for unknown names."""
    tasks, steps = TOYS[size]
    names = published(suite, tasks.get(suite, ())).experts
    toy_models.make_toys(folder, list(names), steps=steps, seed=seed)
    experts, data = ([str(folder / kind / n) for n in names] for kind in ("experts", "data"))
    data = [str(folder / "data")] if suite == glue.SUITE else data
    places = {"base": str(folder / "base"), "experts": experts, "data": data}
    return replace(published(suite, list(names), **places), toy=True)


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
    names, where = list(paths.experts), {"device": device, "precision": precision}
    given = {"base": paths.base, "rows": rows, "progress": progress}
    if paths.suite == t5.SUITE:
        return t5.prepare_t5(names, sources=paths.sources, **given, **where)
    if paths.toy:
        given["max_length"] = toy_models.POSITIONS
    with mock.patch.dict(os.environ, {"DIVMERGE_GLUE_DIR": paths.data[0]} if paths.data else {}):
        plan = check(read(glue.describe(folder, names, experts=paths.experts, **given)))
    return load(plan, **where)


def memory() -> pd.DataFrame:
    """Numbers of parameters, and GB of all T + 3 float32 copies that a fit holds, per suite.

    Base, T task vectors, the merged model's buffer, and the model itself. From configurations:
    GPT-2's, and T5-base's as published (12 + 12 layers of 768 units); activations are not counted.
    """
    wide = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        models = [
            transformers.GPT2Model(transformers.GPT2Config()),
            transformers.T5ForConditionalGeneration(transformers.T5Config(**wide)),
        ]
    table = pd.DataFrame(
        {
            "experts": map(len, TASKS.values()),
            "parameters": [sum(t.numel() for t in model.parameters()) for model in models],
        },
        index=pd.Index(TASKS, name="suite"),
    )
    return table.assign(**{"GB in float32": (table.experts + 3) * table.parameters * 4 / 1e9})
