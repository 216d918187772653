"""What the paper leaves open: each setting changed alone, and the inputs of a fit.

The default is the paper's Algorithm 1: Adam from 1/T with step size 0.01, four passes, Jensen-
Shannon divergence. Coefficients are fitted without labels and scored on test rows, once. Tables are
predictions, see `predictions.packed`, with labels grouping and tasks (their number).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.studies.input_shifts import INPUT_SHIFTS, Batches, input_batches
from divmerge_book.studies.predictions import with_experts
from divmerge_book.studies.study import Experiments, study
from divmerge_core.divergences import js
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.merged_model import expert_logits
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS

DEFAULT = "default"
COLUMNS: Mapping[str, tuple[str, ...]] = {  # by stored table: what its methods say
    **{"changed": ("setting", "value"), "start": ("setting", "value")},
    **{"kinds": ("grouping", "coefficients"), "read": ("reading", "inputs")},
    **{"needed": ("inputs",), "wrong": ("kind", "share"), "answers": ("optimizer",)},
}


def rows_needed(settings: SimpleNamespace) -> int:
    """Unlabelled inputs per task that the studies of a size draw from."""
    return max(settings.inputs, 2 * settings.published, 2 * settings.pool, *settings.counts)


def num_tasks(experiments: Experiments) -> int:
    """The number of tasks that every experiment merges."""
    return len(next(iter(experiments.values())).problem.vectors.tasks)


def divmerge(problem: MergeProblem, seed: int, options: Mapping) -> Float[Tensor, " N"]:
    """DivMerge with these options, of which `steps` are Adam's; the average without inputs."""
    longest = max(map(len, problem.batches))
    if not longest:
        return METHODS["average"](problem)
    given = {**options}
    if steps := given.pop("steps", None):
        given |= {"inputs": 10**6, "epochs": math.ceil(steps / longest)}
    return METHODS["divmerge"](problem, progress=False, seed=seed, **given)


def fit_and_predict(
    experiment: Experiment,
    *,
    seed: int,
    options: Mapping,
    drawn: Mapping | None = None,
    others: Mapping[int, Batches] | None = None,
    **labels: object,
) -> pd.DataFrame:
    """Test predictions of DivMerge with these options, on all inputs, or on `drawn` ones."""
    problem = experiment.problem
    if drawn is not None:
        batches = input_batches(experiment, (others or {}).get(seed, []), **drawn, seed=seed)
        problem = replace(problem, batches=batches)
    return evaluate(experiment.problem, divmerge(problem, seed, options), experiment.test)


def predicted(experiments: Experiments, jobs: Sequence[Mapping], **bound: object) -> pd.DataFrame:
    """Predictions of DivMerge and of the experts. jobs: a method, options, perhaps a grouping."""
    rows = study(partial(fit_and_predict, **bound), experiments, jobs, method="divmerge")
    labels = [name for name in ("grouping", "tasks") if name == "tasks" or name in rows]
    return with_experts(rows.assign(tasks=num_tasks(experiments)), experiments, labels)


def variants(grid: Mapping[str, Sequence], num_tasks: int) -> dict[str, dict]:
    """Options of the default and of every change of one setting, but a start of 1/T, by name."""
    changes = {
        f"{setting}={value}": {setting: value}
        for setting, values in grid.items()
        for value in values
        if setting != "init" or abs(value - 1 / num_tasks) > 1e-9
    }
    return {DEFAULT: {}, **changes}


def ablation(
    experiments: Experiments, grid: Mapping[str, Sequence], *, groupings: Sequence[str], inputs: int
) -> pd.DataFrame:
    """DivMerge with one setting changed at a time: the method is `default` or `setting=value`."""
    jobs = [
        {"grouping": g, "method": name, "options": {"grouping": g, "inputs": inputs, **change}}
        for g in groupings
        for name, change in variants(grid, num_tasks(experiments)).items()
    ]
    return predicted(experiments, jobs)


def layers(experiments: Experiments, groupings: Sequence[str], *, inputs: int) -> pd.DataFrame:
    """What a layer may be: the method is `grouping=coefficients`. Label: tasks."""
    layout = next(iter(experiments.values())).problem.vectors.layout
    count = {g: num_tasks(experiments) * len(groups_of(layout, g)[0]) for g in groupings}
    options = {g: {"grouping": g, "inputs": inputs} for g in groupings}
    jobs = [{"method": f"{g}={count[g]}", "options": own} for g, own in options.items()]
    return predicted(experiments, jobs)


def readings(experiments: Experiments, groupings: Sequence[str], *, published: int) -> pd.DataFrame:
    """The paper's data set size read per task, and read in total, each with four epochs.

    published: the size of one coefficient per task, doubled otherwise. The method is
    `reading=inputs`.
    """
    jobs, number = [], num_tasks(experiments)
    for grouping in groupings:
        size = published if grouping == "task" else 2 * published
        for reading, inputs in {"per task": size, "in total": max(1, size // number)}.items():
            options = {"grouping": grouping, "inputs": inputs}
            jobs.append({"grouping": grouping, "method": f"{reading}={inputs}", "options": options})
    return predicted(experiments, jobs)


def learning_curve(
    experiments: Experiments, counts: Sequence[int], *, groupings: Sequence[str], steps: int
) -> pd.DataFrame:
    """Predictions by the number of inputs per task, the method, largest first, in as many steps.

    No inputs leave the start, 1/T. The inputs are sampled anew for every seed.
    """
    jobs = [
        {"grouping": g, "method": f"{n}", "options": {"grouping": g, "steps": steps}}
        | {"drawn": {"kind": DEFAULT, "share": 0.0, "inputs": n}}
        for g in groupings
        for n in sorted(counts, reverse=True)
    ]
    return predicted(experiments, jobs)


def input_shifts(
    experiments: Experiments,
    others: Mapping[int, Batches],
    *,
    inputs: int,
    shares: Sequence[float],
    groupings: Sequence[str],
    steps: int,
) -> pd.DataFrame:
    """Predictions by kind and share of shifted inputs, beside those of a task's own, `default`.

    others: by seed, inputs of other tasks. inputs: per task. The method is `kind=share`; the kind
    `none` is the start, 1/T.
    """
    kinds = {DEFAULT: (DEFAULT, 0.0), "none=1.0": ("none", 1.0)}
    kinds |= {f"{kind}={share}": (kind, share) for kind in INPUT_SHIFTS for share in shares}
    jobs = [
        {"grouping": g, "method": name, "options": {"grouping": g, "steps": steps}}
        | {"drawn": {"kind": kind, "share": share, "inputs": inputs}}
        for g in groupings
        for name, (kind, share) in kinds.items()
    ]
    return predicted(experiments, jobs, others=others)


@torch.no_grad()
def divergence_sum(
    problem: MergeProblem,
    flat: Float[Tensor, " N"],
    targets: Sequence[Sequence[Tensor]] | None = None,
) -> float:
    """Sum over tasks of the mean Jensen-Shannon divergence from the expert, in nats.

    targets: the experts' logits where they are known already.
    """
    total, targets = 0.0, targets or expert_logits(problem)
    for task, batches in enumerate(problem.batches):
        for batch, expert in zip(batches, targets[task], strict=True):
            loss = batch.weight @ js(expert, problem.logits(flat, task, batch))
            total += float(loss) / len(batches)
    return total


def both_sides(
    experiment: Experiment, *, others: Mapping[int, Batches], seed: int, inputs: int, steps: int
) -> list[dict]:
    """Proposition 3 on one experiment: a row per kind of shift and model."""
    problem, rows = experiment.problem, []
    kinds = {DEFAULT: 0.0, **dict.fromkeys(INPUT_SHIFTS, 1.0)}
    parts = {}
    for kind, share in kinds.items():
        batches = input_batches(experiment, others[seed], kind, share, inputs, seed)
        parts[kind] = replace(problem, batches=batches)
    own, options = parts.pop(DEFAULT), {"grouping": "layer", "steps": steps}
    models = {"average": METHODS["average"](own), "DivMerge": divmerge(own, seed, options)}
    right = {model: divergence_sum(own, flat) for model, flat in models.items()}
    for kind, part in parts.items():
        for model, flat in models.items():
            wrong = divergence_sum(part, flat)
            row = {"kind": kind, "model": model, "right": right[model], "wrong": wrong}
            bound = 2 * math.log(2) * len(problem.batches)
            rows.append({**row, "apart": abs(right[model] - wrong), "bound": bound})
    return rows


def proposition3(
    experiments: Experiments, others: Mapping[int, Batches], *, inputs: int, steps: int
) -> pd.DataFrame:
    """Both sides of Proposition 3, for the average and for a fit on a task's own inputs.

    A mixture with a share s of shifted inputs is at most s away in total variation, and its
    objective is linear in s, so a row per seed, kind and model at s = 1 suffices. Columns: seed,
    kind, model, right and wrong (objectives on own and shifted inputs, nats), apart (the left
    side), bound (2 log 2 per task).
    """
    measure = partial(both_sides, others=others)
    return study(measure, experiments, [{}], inputs=inputs, steps=steps)
