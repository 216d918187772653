"""Experts that arrive one at a time: what each arrival costs the tasks that came before it.

Every finished piece is kept in the cache, so an interrupted study goes on where it stopped.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import own_experts, shares
from divmerge_book.evaluation.metrics import predict
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import elected
from divmerge_core.merging.problem import Merged
from divmerge_core.methods import METHODS
from divmerge_core.methods.continual import join, linear_places, untouched

BATCH = {  # the method that sees all experts at once beside each that sees them one by one
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


def accuracies(bench: Experiment, merged: Merged, tasks: Sequence[str]) -> list[float]:
    """Share of right answers on the test rows of these tasks."""
    found = []
    for task in tasks:
        number = bench.problem.vectors.tasks.index(task)
        exam = bench.test[number]
        right = predict(bench.problem, merged, number, exam) == exam.gold
        found.append(right.double().mean().item())
    return found


def expert_accuracies(bench: Experiment) -> dict[str, float]:
    """Every expert's share of right answers on its own task's test rows."""
    found = kept(bench, lambda: shares(own_experts(bench, bench.test)), "experts on test")
    return dict(zip(bench.problem.vectors.tasks, found, strict=True))


def by_task(bench: Experiment, found: Sequence[float]) -> dict[str, list[float]]:
    """accuracies (those found), experts and majorities on the test rows: a number per task."""
    common = [exam.gold.bincount().max().item() / len(exam.gold) for exam in bench.test]
    experts = list(expert_accuracies(bench).values())
    return {"accuracies": list(found), "experts": experts, "majorities": common}


# --- one order after the other --------------------------------------------------------------------


def orders(tasks: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """`count` different random orders of the tasks, or all there are where those are fewer."""
    generator, found = random.Random(seed), {}
    while len(found) < min(count, math.factorial(len(tasks))):
        found[tuple(generator.sample(list(tasks), len(tasks)))] = None
    return list(found)


def continual(
    bench: Experiment, method: str, order: Sequence[str]
) -> Iterator[Float[Tensor, " N"]]:
    """The merged model after every arrival: METHODS[method] of the first experts of the order.

    Nothing is carried on but what the method itself would remember, so t arrivals cost t steps and
    not t merges from the start. Published scales throughout: a scale cannot be chosen for tasks
    that have not come yet.
    """
    problem, places = bench.problem, linear_places(bench.problem)
    merging, offset = untouched(problem), torch.zeros_like(problem.vectors.base)
    for count, task in enumerate(order, start=1):
        (delta,) = dense(problem.vectors.select([task]).deltas)
        if method == "opcm":
            merging = join(merging, delta, places, SHARE, True)
            offset = merging.offset
        else:
            offset = STEPS[method](offset, delta, count)
        yield problem.vectors.base + offset


def course(bench: Experiment, method: str, order: Sequence[str]) -> list[dict]:
    """Accuracy on all tasks seen so far, after every arrival: method, arrived, task, accuracy."""
    states, made, rows = continual(bench, method, order), [], []
    for count in range(1, len(order) + 1):
        seen = list(order[:count])
        if METHODS.facts[method]["symmetric"]:  # the same model in whatever order they came
            seen.sort(key=bench.problem.vectors.tasks.index)

        def find(seen: Sequence[str] = seen) -> list[float]:
            merged = None
            while len(made) < len(seen):
                merged = next(states)
                made.append(len(made))
            return accuracies(bench, merged, seen)

        found = dict(zip(seen, kept(bench, find, "arrival", method, seen), strict=True))
        rows += [
            {"method": method, "arrived": count, "task": task, "accuracy": found[task]}
            for task in order[:count]
        ]
    return rows


def at_once(bench: Experiment, method: str) -> list[float]:
    """Test accuracies where all experts are there from the start, in the tasks' order."""
    return accuracies(bench, METHODS[method](bench.problem), bench.problem.vectors.tasks)


def arrivals(bench: Experiment, *, count: int = 10, seed: int = 0) -> pd.DataFrame:
    """Every continual method over random orders, with references.

    Columns: method, order (its number), arrived (how many experts so far), task, accuracy (on test
    rows), expert (the task's own expert's accuracy). The methods that see all experts at once, and
    `expert` itself, stand there once, with order -1.
    """
    tasks, alone = bench.problem.vectors.tasks, expert_accuracies(bench)
    jobs = [(m, n, o) for n, o in enumerate(orders(tasks, count, seed)) for m in BATCH]
    rows = []
    for method, number, order in (bar := tqdm(jobs, "arrivals", leave=False)):
        bar.set_postfix_str(f"{method}, order {number}")
        rows += [{**row, "order": number} for row in course(bench, method, order)]
    for method in tqdm(BATCH.values(), "all at once", leave=False):
        find = partial(at_once, bench, method)
        found = zip(tasks, kept(bench, find, "all at once", method, method=method), strict=True)
        rows += [{"method": method, "task": task, "accuracy": value} for task, value in found]
    rows += [{"method": "expert", "task": task, "accuracy": value} for task, value in alone.items()]
    table = pd.DataFrame(rows).fillna({"order": -1, "arrived": len(tasks)})
    table = table.astype({"order": int, "arrived": int})
    return table.assign(expert=table.task.map(alone))


def forgetting(table: pd.DataFrame) -> pd.DataFrame:
    """ACC, its ratio to the experts, and BWT: a row per method and order of `arrivals`.

    acc: mean over tasks of the accuracy after the last arrival. ratio: mean over tasks of the same
    divided by the expert's. bwt: backward transfer, the mean over all tasks but the last to come of
    final accuracy minus accuracy right after the task's own arrival; below 0 is forgetting. NaN for
    methods that see all experts at once. kept_margin and below (how many tasks): of `margins`,
    after the last arrival, where the table has been scored there.
    """
    rows = []
    for (method, order), some in table.groupby(["method", "order"], sort=False):
        last = some[some.arrived == some.arrived.max()].set_index("task")
        first = some.drop_duplicates("task").set_index("task")  # in order of arrival
        change = (last.accuracy - first.accuracy.loc[last.index])[first.arrived < len(last)]
        rows.append(
            {
                "method": method,
                "order": order,
                "acc": last.accuracy.mean(),
                "ratio": (last.accuracy / last.expert).mean(),
                "bwt": change.mean() if order >= 0 else math.nan,
                **({"kept_margin": last.kept_margin.mean()} if "kept_margin" in last else {}),
                **({"below": last.below.sum()} if "below" in last else {}),
            }
        )
    return pd.DataFrame(rows)
