"""Continual merging: experts arrive one at a time, and earlier tasks lose accuracy."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies.evaluator import accuracies, expert_accuracies
from divmerge_book.studies.study import study
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import elected
from divmerge_core.methods import METHODS
from divmerge_core.methods.continual import join, linear_places, untouched

BATCH = {  # continual method -> the method that sees all experts at once
    "opcm": "tsv_m",
    "running_average": "average",
    "sequential_task_arithmetic": "task_arithmetic",
    "sequential_ties": "ties",
}
Offset = Float[Tensor, " N"]  # of a merged model from the base
STEPS: Mapping[str, Callable[[Offset, Offset, int], Offset]] = {
    "running_average": lambda offset, delta, count: offset + (delta - offset) / count,
    "sequential_task_arithmetic": lambda offset, delta, count: offset + 0.3 * delta,
    "sequential_ties": lambda offset, delta, count: (
        0.5 * delta
        if count == 1
        else offset + 0.5 * elected(torch.stack([offset, delta]), 0.2).sum(0)
    ),
}
SHARE = 0.5  # of OPCM: the published one


def orders(tasks: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """`count` different random orders of the tasks, or all there are where those are fewer."""
    generator, found = random.Random(seed), {}
    while len(found) < min(count, math.factorial(len(tasks))):
        found[tuple(generator.sample(list(tasks), len(tasks)))] = None
    return list(found)


def merged_models(
    experiment: Experiment, method: str, order: Sequence[str]
) -> Iterator[Float[Tensor, " N"]]:
    """The merged model after every arrival: METHODS[method] of the first experts of the order.

    Incremental, so t arrivals cost t steps. Published scales throughout: a scale cannot be tuned
    for tasks that have not arrived.
    """
    problem = experiment.problem
    places, merging = linear_places(problem), untouched(problem)
    offset = torch.zeros_like(problem.vectors.base)
    for count, task in enumerate(order, start=1):
        (delta,) = dense(problem.vectors.select([task]).deltas)
        if method == "opcm":
            merging = join(merging, delta, places, SHARE, True)
            offset = merging.offset
        else:
            offset = STEPS[method](offset, delta, count)
        yield problem.vectors.base + offset


def in_order(
    experiment: Experiment, *, seed: int, method: str, order: int, tasks: Sequence[str]
) -> list[dict]:
    """Accuracy on all tasks seen so far, after every arrival: arrived, task, accuracy."""
    rows = []
    for count, model in enumerate(merged_models(experiment, method, tasks), start=1):
        found = accuracies(experiment, model, tasks[:count])
        for task, accuracy in zip(tasks, found, strict=False):
            rows.append({"arrived": count, "task": task, "accuracy": accuracy})
    return rows


def at_once(experiment: Experiment, *, seed: int, method: str) -> list[dict]:
    """Test accuracies of a method that sees all experts at once: task, accuracy."""
    found = accuracies(experiment, METHODS[method](experiment.problem))
    tasks = experiment.problem.vectors.tasks
    return [{"task": t, "accuracy": value} for t, value in zip(tasks, found, strict=True)]


def continual_merging(experiment: Experiment, *, count: int = 10, seed: int = 0) -> pd.DataFrame:
    """Every continual method over `count` random orders, with references.

    Columns: method, order (its number), arrived (how many experts so far), task, accuracy (on test
    rows), expert (the task's own expert's accuracy). The methods that see all experts at once, and
    `expert` itself, have order -1.
    """
    tasks, experts = experiment.problem.vectors.tasks, expert_accuracies(experiment)
    jobs = [
        {"method": method, "order": number, "tasks": list(order)}
        for number, order in enumerate(orders(tasks, count, seed))
        for method in BATCH
    ]
    every = {seed: experiment}
    batch = study(at_once, every, [{"method": name} for name in BATCH.values()], method="method")
    alone = pd.DataFrame(experts.items(), columns=["task", "accuracy"]).assign(method="expert")
    table = pd.concat([study(in_order, every, jobs), batch, alone], ignore_index=True)
    table = table.fillna({"order": -1, "arrived": len(tasks)}).assign(
        expert=table.task.map(experts)
    )
    return table.astype({"order": int, "arrived": int}).drop(columns=["seed", "tasks"])


def backward_transfer(table: pd.DataFrame) -> pd.DataFrame:
    """ACC, its ratio to the experts, and BWT: a row per method and order of `continual_merging`.

    acc: mean over tasks of the accuracy after the last arrival. ratio: mean over tasks of the same
    divided by the expert's. bwt: backward transfer, the mean over all tasks but the last to arrive
    of final accuracy minus accuracy right after the task's own arrival; below 0 is forgetting. NaN
    for methods that see all experts at once. kept_margin and below (how many tasks): of `margins`,
    after the last arrival, where the table has them.
    """
    rows = []
    for (method, order), some in table.groupby(["method", "order"], sort=False):
        last = some[some.arrived == some.arrived.max()].set_index("task")
        first = some.drop_duplicates("task").set_index("task")  # in order of arrival
        change = (last.accuracy - first.accuracy.loc[last.index])[first.arrived < len(last)]
        row = {"method": method, "order": order, "acc": last.accuracy.mean()}
        row |= {"ratio": (last.accuracy / last.expert).mean()}
        row |= {"bwt": change.mean() if order >= 0 else math.nan}
        if "kept_margin" in last:
            row |= {"kept_margin": last.kept_margin.mean(), "below": last.below.sum()}
        rows.append(row)
    return pd.DataFrame(rows)
