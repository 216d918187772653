"""Robustness of objectives: temperatures, and one corrupted expert.

Corruptions change one expert of an experiment, or the logits that the fit takes for its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from divmerge_book.data.splits import Splits
from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.models.encoders import classifier_forward
from divmerge_book.models.finetuning import Recipe, fine_tune
from divmerge_book.studies import objective_fits as fitting
from divmerge_book.studies.objective_fits import FitConfig, FitSpec
from divmerge_book.studies.predictions import report_of, with_experts
from divmerge_book.studies.study import Experiments, study
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.fit import expert_logits
from divmerge_core.registry import Registry

SHARPER = 5.0  # what an over-confident expert's logits are multiplied by
CORRUPTIONS = Registry("corruption")  # name -> function(experiment, task number, seed) -> Corrupted


@dataclass(frozen=True)
class Corrupted:
    """An experiment with one expert changed. retarget: changes that expert's logits, or None."""

    experiment: Experiment
    retarget: Callable[[Tensor], Tensor] | None = None


@CORRUPTIONS.register("left_out", label="left out")
def left_out(experiment: Experiment, number: int, seed: int) -> Corrupted:
    """The expert is not merged: the reference of the costs."""
    tasks = experiment.problem.vectors.tasks
    return Corrupted(experiment.select([task for n, task in enumerate(tasks) if n != number]))


CORRUPTIONS.register("none", label="as it is")(
    lambda experiment, number, seed: Corrupted(experiment)
)


@CORRUPTIONS.register("noise", label="noise for weights")
def noise(experiment: Experiment, number: int, seed: int) -> Corrupted:
    """Every tensor of the task vector replaced by Gaussian noise of the same length."""
    vectors = experiment.problem.vectors
    generator, deltas = torch.Generator().manual_seed(seed), dense(vectors.deltas).clone()
    for start, stop in vectors.layout.bounds:
        drawn = torch.randn(stop - start, generator=generator).to(deltas)
        part = deltas[number, start:stop]
        part.copy_(drawn * (part.square().sum() / drawn.square().sum()).sqrt())
    problem = replace(experiment.problem, vectors=replace(vectors, deltas=deltas))
    return Corrupted(replace(experiment, problem=problem))


def permuted(splits: Splits, seed: int) -> Splits:
    """The splits with the answers of the train rows shuffled among them."""
    rows = splits["train"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [(*row[:-1], rows[n][-1]) for row, n in zip(rows, order, strict=True)]
    return {**splits, "train": shuffled}


@CORRUPTIONS.register("permuted", label="trained on permuted labels")
def permuted_labels(experiment: Experiment, number: int, seed: int) -> Corrupted:
    """An expert that was fine-tuned as the others, on labels shuffled among the train rows."""
    vectors, experts, base = experiment.problem.vectors, [*experiment.experts], experiment.base
    task, recipe = TASKS[vectors.tasks[number]], experts[number].manifest["recipe"]
    origin = f"{task.origin()} permuted {seed}"
    shuffled = replace(task, read=lambda: permuted(task.read(), seed), origin=lambda: origin)
    experts[number] = fine_tune(base, shuffled, Recipe(**recipe), seed=seed)
    deltas = dense(vectors.deltas).clone()
    deltas[number] = vectors.layout.flatten(experts[number].state) - vectors.base
    changed = {"vectors": replace(vectors, deltas=deltas)}
    changed["forward"] = classifier_forward(base, [expert.head for expert in experts])
    problem = replace(experiment.problem, **changed)
    return Corrupted(replace(experiment, experts=experts, problem=problem))


# The weights stay as they are. The answers move on to the next class, as sure as ever; or the
# logits are SHARPER times as large.
CORRUPTIONS.register("wrong", label="surely wrong answers")(
    lambda experiment, number, seed: Corrupted(experiment, lambda logits: logits.roll(1, dims=-1))
)
CORRUPTIONS.register("overconfident", label="over-confident answers")(
    lambda experiment, number, seed: Corrupted(experiment, lambda logits: SHARPER * logits)
)


def corrupted_fit(
    experiment: Experiment, kind: str, objective: str, seed: int
) -> tuple[Experiment, FitSpec, str]:
    """The experiment with one corrupted expert, the fit of an objective on it, and that task.

    Task number seed modulo T is corrupted. Its changed logits, if any, are the fit's targets.
    """
    number = seed % len(experiment.experts)
    corrupted = CORRUPTIONS[kind](experiment, number, seed)
    spec = fitting.fit_spec(corrupted.experiment, objective)
    if corrupted.retarget is not None:
        targets: list = list(expert_logits(spec.problem))
        targets[number] = [corrupted.retarget(logits) for logits in targets[number]]
        spec = replace(spec, targets=targets)
    return corrupted.experiment, spec, experiment.problem.vectors.tasks[number]


def fit_with_corrupted(
    experiment: Experiment,
    *,
    seed: int,
    kind: str,
    objective: str,
    grouping: str,
    config: FitConfig,
    method: str,
) -> pd.DataFrame:
    """Test predictions on the other tasks, of a fit with one corrupted expert."""
    corrupted, spec, task = corrupted_fit(experiment, kind, objective, seed)
    vectors = corrupted.problem.vectors
    coeffs, diverged = fitting.fit(spec, grouping, config.rate, config)
    rows = evaluate(corrupted.problem, fitting.merge(vectors, coeffs, grouping), corrupted.test)
    merged = task in vectors.tasks
    own = coeffs[vectors.tasks.index(task)].mean().item() if merged else None
    return rows[rows.task != task].assign(strained=task, coefficient=own, diverged=diverged)


def corruption_study(
    experiments: Experiments,
    *,
    specs: Sequence[str],
    kinds: Sequence[str],
    groupings: Sequence[str],
    config: FitConfig | None = None,
) -> pd.DataFrame:
    """Every corruption x objective x grouping x seed: predictions on the other tasks.

    The method is `kind/objective/grouping`; every fit is also run with the expert left out. Labels:
    strained (the task whose expert is corrupted), coefficient (its own, mean over groups), diverged
    (the predictions are then those where the fit starts).
    """
    jobs = [
        {"kind": kind, "objective": spec, "grouping": grouping}
        | {"method": f"{kind}/{spec}/{grouping}"}
        for kind in dict.fromkeys(("left_out", *kinds))
        for spec in specs
        for grouping in groupings
    ]
    rows = study(fit_with_corrupted, experiments, jobs, config=config or FitConfig())
    return with_experts(rows, experiments, facts=["strained", "coefficient", "diverged"])


def corruption_costs(table: pd.DataFrame) -> pd.DataFrame:
    """What every corrupted expert costs the other tasks, by both scores, a row per merged model.

    Columns: kind, objective, grouping, seed, task (the corrupted one), honest (ANP of the others),
    kept_margin (theirs), below (how many are below the majority class), cost and kept_cost (the
    score where the expert is left out minus this), coefficient, diverged.
    """
    each = report_of(table).against_experts()
    each = each[each.counted].assign(below=lambda some: some.value < some.floor)
    how = {"honest": ("ratio", "mean"), "kept_margin": ("kept_margin", "mean")}
    means = each.groupby(["method", "seed"], sort=False).agg(**how, below=("below", "sum"))
    rows = table[table.method != "expert"].join(means, on=["method", "seed"])
    rows = rows.drop(columns=["answered", "predicted", "gold"]).rename(columns={"strained": "task"})
    key = ["objective", "grouping"]
    rows[["kind", *key]] = rows.pop("method").str.split("/", expand=True).to_numpy()
    left_out, kept = rows.kind == "left_out", [*key, "seed"]
    spared = rows[left_out].set_index(kept)[list(how)].add_prefix("spared_")
    rows = rows[~left_out].join(spared, on=kept).reset_index(drop=True)
    rows["cost"] = rows.pop("spared_honest") - rows.honest
    rows["kept_cost"] = rows.pop("spared_kept_margin") - rows.kept_margin
    return rows


def temperatures(
    experiments: Experiments,
    *,
    specs: Sequence[str],
    values: Sequence[float],
    grouping: str,
    config: FitConfig | None = None,
) -> dict[str, pd.DataFrame]:
    """Every objective x temperature x seed: predictions (`rows`) and whether `fits` diverged.

    The method is `objective=temperature`. Fits: objective, temperature, seed, diverged.
    """
    config, count = config or FitConfig(), len(next(iter(experiments.values())).experts)
    jobs = [
        {"objective": spec, "temperature": value, "method": f"{spec}={value:g}"}
        for spec in specs
        for value in values
    ]
    fixed = {"count": count, "grouping": grouping, "rate": config.rate, "config": config}
    rows = study(fitting.fit_and_predict, experiments, jobs, **fixed)
    key = ["objective", "temperature", "seed"]
    fits = rows[[*key, "diverged"]].drop_duplicates(key, ignore_index=True)
    return {"rows": with_experts(rows, experiments), "fits": fits}
