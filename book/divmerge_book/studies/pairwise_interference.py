"""Interference between every two experts, and the loss along the segment between them.

All scores are on test rows.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.interference.behaviour import barrier
from divmerge_book.studies.evaluator import Evaluator, fewer_rows
from divmerge_book.studies.study import study
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.registry import Registry

RULES = Registry("rule")  # name -> function(task vector i, task vector j, j shuffled) -> change
RULES.register("added", label=r"$\theta_0 + \tau_i + \tau_j$")(lambda i, j, noise: i + j)
RULES.register("shuffled", label=r"$\theta_0 + \tau_i + \tau_j$, shuffled")(
    lambda i, j, noise: i + noise
)
RULES.register("averaged", label=r"$\theta_0 + (\tau_i + \tau_j) / 2$")(
    lambda i, j, noise: (i + j) / 2
)
RULES.register("halved", label=r"$\theta_0 + \tau_i / 2$")(lambda i, j, noise: i / 2)


def permuted(row: Float[Tensor, " N"], layout: Layout, seed: int) -> Float[Tensor, " N"]:
    """A task vector with its entries shuffled within every tensor: noise of the same norms."""
    generator, result = torch.Generator().manual_seed(seed), row.clone()
    for start, stop in layout.bounds:
        order = torch.randperm(stop - start, generator=generator).to(row.device)
        result[start:stop] = row[start:stop][order]
    return result


def costs_of(experiment: Experiment, *, seed: int, other: str, rows: int) -> list[dict]:
    """Cost of task vector `other` for every other task and rule: rule, task, accuracy, js."""
    evaluator, table = Evaluator(fewer_rows(experiment, rows)), []
    vectors = experiment.problem.vectors
    deltas = dense(vectors.deltas)
    own = deltas[vectors.tasks.index(other)]
    noise = permuted(own, vectors.layout, seed)
    for number, task in enumerate(vectors.tasks):
        if task == other:
            continue
        before = evaluator.score(evaluator.experts[number], number)["accuracy"]
        for rule, change in RULES.items():
            flat = vectors.base + change(deltas[number], own, noise)
            after = evaluator.score(evaluator.logits(flat, number), number)
            row = {"rule": rule, "task": task, "js": after["js"]}
            table.append({**row, "accuracy": round(before - after["accuracy"], 5)})
    return table


def costs(experiments: Mapping[int, Experiment], *, rows: int) -> pd.DataFrame:
    """Cost of expert j for task i under every rule of RULES, for all ordered pairs.

    added: expert i plus all of vector j. shuffled: the same with vector j shuffled. averaged: the
    mean of both experts. halved: half of vector i and nothing of j. Columns: seed, rule, task (i),
    other (j), accuracy (lost, in shares of 1) and js (from expert i, nats).
    """
    tasks = next(iter(experiments.values())).problem.vectors.tasks
    jobs = [{"other": task} for task in tasks]
    table = study(costs_of, experiments, jobs, rows=rows)
    return table[["seed", "rule", "task", "other", "accuracy", "js"]]


def matrix(table: pd.DataFrame, rule: str, column: str) -> pd.DataFrame:
    """A rule's cost, mean over seeds: a row per affected task, a column per added expert."""
    some, order = table[table.rule == rule], list(dict.fromkeys(table.other))
    wide = some.pivot_table(index="task", columns="other", values=column)
    return wide.reindex(index=order, columns=order)


def by_cost(table: pd.DataFrame, count: int, *, column: str = "js") -> list[str]:
    """`count` pairs `a+b`, evenly spaced by rank, from the most to the least costly.

    By the rule `added`, mean over seeds and both directions.
    """
    wide = matrix(table, "added", column)
    both = {f"{a}+{b}": wide.loc[a, b] + wide.loc[b, a] for a, b in combinations(wide.index, 2)}
    ranked = sorted(both, key=lambda pair: -both[pair])
    places = torch.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().long()
    return [ranked[place] for place in places.tolist()]


def segment(experiment: Experiment, *, seed: int, pair: str, points: int, rows: int) -> list[dict]:
    """Along the segment from expert a to expert b of `a+b`: at, task, accuracy, js, nll."""
    evaluator = Evaluator(fewer_rows(experiment.select(pair.split("+")), rows))
    vectors, table = evaluator.experiment.problem.vectors, []
    for at in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        flat = vectors.merge([1 - at, at])
        for number, task in enumerate(vectors.tasks):
            score = evaluator.score(evaluator.logits(flat, number), number)
            table.append({"at": round(at, 5), "task": task, **score})
    return table


def segments(
    experiments: Mapping[int, Experiment], pairs: Sequence[str], *, points: int, rows: int
) -> pd.DataFrame:
    """`segment` of every pair `a+b`, each task with its own head; 0 is expert a, 1 expert b.

    Columns: seed, pair, and those of `segment`. Raises ValueError for fewer than 3 points.
    """
    if points < 3:
        raise ValueError(f"points must be 3 or more, both ends and between; got {points}")
    jobs = [{"pair": pair} for pair in pairs]
    return study(segment, experiments, jobs, points=points, rows=rows)


def barriers(table: pd.DataFrame) -> pd.DataFrame:
    """The barrier of every pair and seed: columns seed, pair, error, nll, error_chord, nll_chord.

    Of the test error and the cross-entropy of the labels (nats), each the mean of the pair's two
    tasks at every point; against the mean of the ends, and against the chord between them.
    """
    along = table.assign(error=1 - table.accuracy).groupby(["seed", "pair", "at"], sort=True)
    by_pair = along[["error", "nll"]].mean().groupby(level=["seed", "pair"], sort=False)
    heights = {"": barrier, "_chord": lambda losses: barrier(losses, reference="chord")}
    columns = {
        column + suffix: by_pair[column].agg(lambda losses, height=height: height([*losses]))
        for suffix, height in heights.items()
        for column in ("error", "nll")
    }
    return pd.DataFrame(columns).reset_index()
