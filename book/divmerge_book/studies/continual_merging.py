"""Continual merging: experts arrive one at a time, and earlier tasks lose accuracy."""

import math
import random
from collections.abc import Iterator, Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies.evaluator import accuracies, expert_accuracies
from divmerge_book.studies.study import study
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.methods import METHODS
from divmerge_core.methods.continual import join, linear_places, untouched

BATCH = {  # continual method -> the method that sees all experts at once
    "opcm": "tsv_m",
    "running_average": "average",
    "sequential_task_arithmetic": "task_arithmetic",
    "sequential_ties": "ties",
}
SHARE = 0.5  # of OPCM: the published one


def orders(tasks: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """`count` different random orders of the tasks, or all there are where those are fewer."""
    generator, found = random.Random(0), {}
    while len(found) < min(count, math.factorial(len(tasks))):
        found[tuple(generator.sample(list(tasks), len(tasks)))] = None
    return list(found)


def merged_models(
    experiment: Experiment, method: str, order: Sequence[str]
) -> Iterator[Float[Tensor, " N"]]:
    """The merged model after every arrival: METHODS[method] of the first experts of the order.

    With published scales: a scale cannot be tuned for tasks that have not arrived. OPCM, which
    takes longest, goes on from the merge before.
    """
    problem = experiment.problem
    places, merging = linear_places(problem), untouched(problem)
    for count, task in enumerate(order, start=1):
        if method != "opcm":
            yield METHODS[method](problem.select(order[:count]))
            continue
        (delta,) = dense(problem.vectors.select([task]).deltas)
        merging = join(merging, delta, places, SHARE, True)
        yield problem.vectors.base + merging.offset


def arrivals(
    experiment: Experiment, *, seed: int, method: str, order: int, tasks: Sequence[str]
) -> list[dict]:
    """Test accuracies on the tasks seen so far after every arrival: arrived, task, accuracy.

    Order -1 stands for all experts at once.
    """
    if order >= 0:
        counts, models = range(1, len(tasks) + 1), merged_models(experiment, method, tasks)
    else:
        counts, models = [len(tasks)], [METHODS[method](experiment.problem)]
    return [
        {"arrived": count, "task": task, "accuracy": accuracy}
        for count, model in zip(counts, models, strict=True)
        for task, accuracy in zip(tasks, accuracies(experiment, model, tasks[:count]), strict=False)
    ]


def continual_merging(experiment: Experiment, *, count: int) -> pd.DataFrame:
    """Every continual method over `count` random orders, with references.

    Columns: method, order (its number), arrived (how many experts so far), task, accuracy (on test
    rows), expert (the task's own expert's accuracy). The methods that see all experts at once, and
    `expert` itself, have order -1.
    """
    tasks, experts = experiment.problem.vectors.tasks, expert_accuracies(experiment)
    jobs = [
        {"method": method, "order": number, "tasks": list(order)}
        for number, order in enumerate(orders(tasks, count))
        for method in BATCH
    ]
    jobs += [{"method": name, "order": -1, "tasks": list(tasks)} for name in BATCH.values()]
    alone = pd.DataFrame(experts.items(), columns=["task", "accuracy"])
    alone = alone.assign(method="expert", order=-1, arrived=len(tasks))
    table = pd.concat([study(arrivals, {0: experiment}, jobs), alone], ignore_index=True)
    return table.assign(expert=table.task.map(experts)).drop(columns=["seed", "tasks"])


def backward_transfer(table: pd.DataFrame) -> pd.DataFrame:
    """A row per method and order of `continual_merging`: acc, ratio, bwt after the last arrival.

    acc: mean accuracy; ratio: mean of accuracy over the expert's; bwt: backward transfer, the mean
    over all tasks but the last of final accuracy minus that at the task's own arrival, below 0 for
    forgetting, NaN without an order. Also kept_margin and below (how many tasks) where the table
    has them.
    """
    keys = ["method", "order"]
    most = table.groupby(keys).arrived.transform("max")
    first = table.drop_duplicates([*keys, "task"]).set_index([*keys, "task"])  # when it arrived
    last = table[table.arrived == most].set_index([*keys, "task"])
    last = last.assign(ratio=last.accuracy / last.expert, change=last.accuracy - first.accuracy)
    last["change"] = last.change.where(
        (first.arrived < last.arrived) & (last.index.get_level_values("order") >= 0)
    )
    means = {"acc": ("accuracy", "mean"), "ratio": ("ratio", "mean"), "bwt": ("change", "mean")}
    if "kept_margin" in last:
        means |= {"kept_margin": ("kept_margin", "mean"), "below": ("below", "sum")}
    return last.groupby(keys, sort=False).agg(**means).reset_index()
