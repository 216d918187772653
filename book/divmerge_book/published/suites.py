"""Both suites by name: from the hub, from folders in its layout, or from stand-ins made here."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import transformers

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.published import glue, t5, toy_models, toy_t5
from divmerge_book.published.sources import SOURCES, Source
from divmerge_book.user_models import check, load, read

TASKS = {glue.SUITE: tuple(glue.PRINTED), t5.SUITE: tuple(SOURCES)}
BASES = {glue.SUITE: glue.BASE, t5.SUITE: t5.BASE}


@dataclass(frozen=True)
class Places:
    """Where a suite's models and data are: base, an expert per task, and data.

    glue: the folder that DIVMERGE_GLUE_DIR would name, None for that or the hub. sources: of T5's
    tasks. tiny: whether these are stand-ins, whose numbers mean nothing beyond that they are there.
    """

    suite: str
    base: str
    experts: Mapping[str, str]
    glue: str | None = None
    sources: Mapping[str, Source] | None = None
    tiny: bool = False

    def table(self) -> pd.DataFrame:
        """A row per task: expert and data; for T5 also what the expert reads and writes."""
        rows = {task: {"expert": name} for task, name in self.experts.items()}
        for task, source in (self.sources or {}).items():
            told = source.template.replace("{text}", source.text)
            told = told.replace("{pair}", source.pair or "")
            rows[task] |= {"data": source.data, "reads": told, "writes": source.answer}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")


def published(
    suite: str,
    tasks: Sequence[str] = (),
    *,
    base: str = "",
    experts: Sequence[str] = (),
    data: Sequence[str] = (),
) -> Places:
    """The suite's own identifiers, or others in their place; all may be folders.

    experts, data: one per task, in the order of `tasks`; empty for the suite's own. data of
    gpt2_glue: at most one folder in the layout of nyu-mll/glue. Raises ValueError for an unknown
    suite or task, and for a list of another length.
    """
    if suite not in TASKS:
        raise ValueError(f"suite must be one of {', '.join(TASKS)}, got {suite!r}")
    names = list(tasks or TASKS[suite])
    wanted = {"experts": len(names), "data": 1 if suite == glue.SUITE else len(names)}
    for what, given in (("experts", experts), ("data", data)):
        if given and len(given) != wanted[what]:
            raise ValueError(f"{what} must be {wanted[what]} for {names}, or none; got {given}")
    if suite == glue.SUITE:
        own = glue.identifiers(names)
        named = dict(zip(names, experts, strict=True)) if experts else own
        return Places(suite, base or glue.BASE, named, data[0] if data else None)
    sources = {name: SOURCES[name] for name in t5.checked(names, SOURCES)}
    for number, name in enumerate(names):
        changes = {"expert": experts[number]} if experts else {}
        changes |= {"data": data[number]} if data else {}
        sources[name] = replace(sources[name], **changes)
    named = {name: source.expert for name, source in sources.items()}
    return Places(suite, base or t5.BASE, named, sources=sources)


def stand_ins(suite: str, folder: Path, *, size: str = "smoke", seed: int = 0) -> Places:
    """Tiny models and data for a suite, made in `folder`. Raises ValueError for unknown names."""
    if suite not in TASKS:
        raise ValueError(f"suite must be one of {', '.join(TASKS)}, got {suite!r}")
    if suite == t5.SUITE:
        base, sources = toy_t5.make_t5(folder, size=size, seed=seed)
        experts = {name: source.expert for name, source in sources.items()}
        return Places(suite, base, experts, sources=sources, tiny=True)
    made = toy_models.make_gpt2(folder, size=size, seed=seed)
    names = [path.name for path in sorted(Path(made["glue"]).iterdir())]
    experts = {name: made["expert"].format(task=name) for name in names}
    return Places(suite, made["base"], experts, made["glue"], tiny=True)


@contextmanager
def glue_from(folder: str | None) -> Iterator[None]:
    """GLUE is read from this folder; None leaves the environment as it is."""
    before = os.environ.get("DIVMERGE_GLUE_DIR")
    if folder is not None:
        os.environ["DIVMERGE_GLUE_DIR"] = folder
    try:
        yield
    finally:
        if folder is not None:
            os.environ.pop("DIVMERGE_GLUE_DIR")
            os.environ |= {} if before is None else {"DIVMERGE_GLUE_DIR": before}


def prepare_published(
    places: Places,
    folder: Path,
    *,
    rows: Mapping[str, int] | None = None,
    device: str = "cpu",
    precision: str = "float32",
    progress: bool = True,
) -> Experiment:
    """A suite as a bench: everything checked, experts read, unlabelled inputs and exams ready.

    folder: for the description that gpt2_glue is checked by. rows: at most so many of `merge`,
    `validation` and `test`. Raises ValueError for whatever cannot be found or does not fit.
    """
    names = list(places.experts)
    if places.suite == t5.SUITE:
        settings = {"device": device, "precision": precision, "progress": progress}
        return t5.prepare_t5(names, base=places.base, sources=places.sources, rows=rows, **settings)
    with glue_from(places.glue):
        given = {"base": places.base, "expert": places.experts, "rows": rows}
        if places.tiny:
            given["max_length"] = toy_models.POSITIONS
        path = glue.describe(folder, names, progress=progress, **given)
        plan = check(read(path))
    return load(plan, device=device, precision=precision)


def memory() -> pd.DataFrame:
    """Numbers of parameters, and GB of all T + 3 float32 copies that a fit holds, per suite.

    Base, T task vectors, the live buffer, and the model itself. From configurations: GPT-2's, and
    T5-base's as published (12 + 12 layers of 768 units); activations come on top.
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
