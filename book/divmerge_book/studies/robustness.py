"""Robustness of objectives: temperatures, and one corrupted expert.

Corruptions change one expert of an experiment, or the logits that the fit takes for its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from divmerge_book.data.splits import Splits
from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.models.encoders import classifier_forward
from divmerge_book.models.finetuning import Expert, Recipe, fine_tune
from divmerge_book.studies.objective_fits import (
    FitConfig,
    FitSpec,
    fit_and_predict,
    fit_or_start,
    fit_spec,
    merge,
)
from divmerge_book.studies.predictions import report_of, with_experts
from divmerge_book.studies.study import study
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


@CORRUPTIONS.register("none", label="as it is")
def none(experiment: Experiment, number: int, seed: int) -> Corrupted:
    """Every expert as it is."""
    return Corrupted(experiment)


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
    task, old = TASKS[experiment.problem.vectors.tasks[number]], experiment.experts[number]
    shuffled_task = replace(
        task,
        read=lambda: permuted(task.read(), seed),
        origin=lambda: f"{task.origin()} permuted {seed}",
    )
    expert = fine_tune(experiment.base, shuffled_task, Recipe(**old.manifest["recipe"]), seed=seed)
    return Corrupted(with_expert(experiment, number, expert))


def with_expert(experiment: Experiment, number: int, expert: Expert) -> Experiment:
    """The experiment with another expert, and its head, in one task's place."""
    vectors, experts = experiment.problem.vectors, [*experiment.experts]
    experts[number] = expert
    deltas = dense(vectors.deltas).clone()
    deltas[number] = vectors.layout.flatten(expert.state) - vectors.base
    problem = replace(
        experiment.problem,
        vectors=replace(vectors, deltas=deltas),
        forward=classifier_forward(experiment.base, [e.head for e in experts]),
    )
    return replace(experiment, experts=experts, problem=problem)


@CORRUPTIONS.register("wrong", label="surely wrong answers")
def wrong(experiment: Experiment, number: int, seed: int) -> Corrupted:
    """The expert's weights as they are; its answers moved on to the next class, as sure as ever."""
    return Corrupted(experiment, lambda logits: logits.roll(1, dims=-1))


@CORRUPTIONS.register("overconfident", label="over-confident answers")
def overconfident(experiment: Experiment, number: int, seed: int) -> Corrupted:
    """The expert's weights as they are; its logits SHARPER times as large."""
    return Corrupted(experiment, lambda logits: SHARPER * logits)


def corrupted_spec(corrupted: Corrupted, objective: str, number: int) -> FitSpec:
    """The fit of an objective, with the changed expert's logits as its targets."""
    spec = fit_spec(corrupted.experiment, objective)
    if corrupted.retarget is None:
        return spec
    targets: list = list(expert_logits(spec.problem))
    targets[number] = [corrupted.retarget(logits) for logits in targets[number]]
    return replace(spec, targets=targets)


def corrupted_task(experiment: Experiment, seed: int) -> int:
    """The number of the task whose expert is corrupted: the seed's, so that they take turns."""
    return seed % len(experiment.experts)


# --- costs to the other tasks ---------------------------------------------------------------------


def fit_with_corrupted(
    experiment: Experiment,
    *,
    seed: int,
    kind: str,
    objective: str,
    grouping: str,
    config: FitConfig,
    method: str,
) -> list[dict]:
    """Test predictions on the other tasks, of a fit with one corrupted expert."""
    number = corrupted_task(experiment, seed)
    corrupted = CORRUPTIONS[kind](experiment, number, seed)
    vectors, tasks = corrupted.experiment.problem.vectors, experiment.problem.vectors.tasks
    spec = corrupted_spec(corrupted, objective, number)
    coeffs, diverged = fit_or_start(spec, grouping, config.rate, config)
    flat = merge(vectors, coeffs, grouping)
    rows = evaluate(corrupted.experiment.problem, flat, corrupted.experiment.test)
    own = coeffs[number].mean().item() if tasks == vectors.tasks else None
    facts = {"strained": tasks[number], "coefficient": own, "diverged": diverged}
    return rows[rows.task != tasks[number]].assign(**facts).to_dict("records")


def corruption_study(
    experiments: Mapping[int, Experiment],
    *,
    specs: Sequence[str],
    kinds: Sequence[str],
    groupings: Sequence[str],
    config: FitConfig | None = None,
) -> pd.DataFrame:
    """Every corruption x objective x grouping x seed: predictions on the other tasks.

    A seed corrupts the expert of task number seed modulo T. Labels: strained (that task),
    coefficient (its own, mean over groups), diverged (the predictions are then those where the fit
    starts); the method is `kind/objective/grouping`. Every fit is also run with the expert left
    out. `corruption_costs` reads the table.
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

    table: of `corruption_study`. Columns: kind, objective, grouping, seed, task (the corrupted
    one), honest (ANP of the other tasks), kept_margin (theirs), below (how many of them are below
    the majority class), cost and kept_cost (the score where the expert is left out minus this),
    coefficient, diverged. An expert as it is, the kind `none`, costs the others too.
    """
    each = report_of(table).against_experts()
    each = each[each.counted].assign(below=lambda some: some.value < some.floor)
    groups = each.groupby(["method", "seed"], sort=False)
    means = groups[["ratio", "kept_margin"]].mean().assign(below=groups.below.sum())
    rows = table[table.method != "expert"].join(means, on=["method", "seed"])
    rows[["kind", "objective", "grouping"]] = rows.method.str.split("/", expand=True).to_numpy()
    rows = rows.rename(columns={"strained": "task", "ratio": "honest"})
    key, scores = ["objective", "grouping", "seed"], ["honest", "kept_margin"]
    without = rows[rows.kind == "left_out"].set_index(key)[scores]
    spared = without.loc[list(rows[key].itertuples(index=False))].to_numpy()
    rows[["cost", "kept_cost"]] = spared - rows[scores].to_numpy()
    rows = rows.drop(columns=["method", "answered", "predicted", "gold"])
    return rows[rows.kind != "left_out"].reset_index(drop=True)


def temperatures(
    experiments: Mapping[int, Experiment],
    *,
    specs: Sequence[str],
    values: Sequence[float],
    grouping: str,
    config: FitConfig | None = None,
) -> dict[str, pd.DataFrame]:
    """Every objective x temperature x seed: predictions (`rows`) and whether `fits` diverged.

    The method is `objective=temperature`. Fits: objective, temperature, seed, diverged.
    """
    config = config or FitConfig()
    jobs = [
        {"objective": spec, "temperature": value, "method": f"{spec}={value:g}"}
        for spec in specs
        for value in values
    ]
    count = len(next(iter(experiments.values())).experts)
    fixed = {"count": count, "grouping": grouping, "rate": config.rate, "config": config}
    rows = study(fit_and_predict, experiments, jobs, **fixed)
    names = ["objective", "temperature", "seed", "diverged"]
    fits = rows[names].drop_duplicates(names[:3], ignore_index=True)
    return {"rows": with_experts(rows, experiments), "fits": fits}
