"""What DivMerge's coefficients do about conflict: coefficients by group of parameters and task,
beside what task vectors share and dispute there, for growing numbers of tasks."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import run_method
from divmerge_book.evaluation.statistics import largest_of, middle, orderings, ranks, standard
from divmerge_book.interference.weights import (
    by_group,
    cosine,
    mean_with_others,
    norms_by_group,
    sign_conflict,
    touched,
)
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import limit

CLUES = ("conflict", "cosine", "norm", "js")  # what a coefficient may follow


@dataclass(frozen=True)
class Effort:
    """How much is fitted: numbers of tasks (the first of the suite), groupings, inputs, passes."""

    counts: tuple[int, ...]
    groupings: tuple[str, ...]
    inputs: int
    epochs: int
    seeds: tuple[int, ...]
    draws: int


EFFORTS = {
    "smoke": Effort((2, 3), ("block",), inputs=16, epochs=1, seeds=(0,), draws=200),
    "default": Effort((2, 4, 8), ("block",), inputs=16, epochs=2, seeds=(0,), draws=500),
    "full": Effort((2, 4, 8), ("block",), inputs=48, epochs=4, seeds=(0, 1, 2), draws=5000),
}


def fitted(bench: Experiment, grouping: str, effort: Effort, seed: int) -> dict:
    """DivMerge's coefficients by group and task on a bench, from the cache or fitted now."""
    options = {"inputs": effort.inputs, "epochs": effort.epochs, "seed": seed, "progress": False}
    spec = f"divmerge/{grouping}"

    def find() -> dict:
        fit = run_method(bench, spec, {**options, "grouping": grouping}).fit
        return {key: fit[key] for key in ("tasks", "groups", "coefficients")}

    return kept(bench, find, "coefficients by group", grouping, options, method=spec)


@torch.no_grad()
def average_js(problem: MergeProblem) -> list[float]:
    """Every task's mean JS from its expert in the average of all experts, in nats."""
    flat, found = METHODS["average"](problem), []
    for task, name in enumerate(problem.vectors.tasks):
        expert = problem.vectors.expert(name)
        apart = [
            DIVERGENCES["js"](*(problem.logits(some, task, batch) for some in (expert, flat)))
            for batch in problem.batches[task]
        ]
        found.append(torch.cat(apart).double().mean().item())
    return found


def coefficient_table(benches: Mapping[int, Experiment], effort: Effort) -> pd.DataFrame:
    """Coefficients, and what stands beside them in each group, for growing numbers of tasks.

    benches: by seed of the experts. Columns: seed, count (T, the first of the bench's tasks),
    grouping, group, task, coefficient, conflict and cosine (mean with the other tasks of the T,
    touched parameters), norm (share of the task vector's length), js (of the task's
    answers in the average of the T experts, on the inputs that the fit sees; one for all groups),
    reach (the most that the fit's
    steps can move a coefficient, their number times Adam's step size of 0.01).
    """
    rows = []
    jobs = [(s, t, g) for s in benches for t in effort.counts for g in effort.groupings]
    for seed, count, grouping in tqdm(jobs, "coefficients", leave=False):
        every = benches[seed].problem.vectors.tasks
        if count > len(every):
            continue
        bench = benches[seed].select(every[:count])
        fit, vectors = fitted(bench, grouping, effort, seed), bench.problem.vectors
        learned = touched(vectors)
        clues = [mean_with_others(by_group(f, learned, grouping)) for f in (sign_conflict, cosine)]
        seen = limit(bench.problem, effort.inputs, grouping)
        hurt = average_js(seen)
        norms = norms_by_group(vectors, grouping)
        norms = (norms / norms.norm(dim=1, keepdim=True)).T  # [G, T]
        label = {"seed": seed, "count": count, "grouping": grouping}
        label["reach"] = 0.01 * effort.epochs * max(map(len, seen.batches))
        for t, task in enumerate(vectors.tasks):
            for g, group in enumerate(fit["groups"]):
                values = [clue[g, t].item() for clue in (*clues, norms)]
                own = dict(zip(CLUES, (*values, hurt[t]), strict=True))
                own["coefficient"] = fit["coefficients"][t][g]
                rows.append({**label, "group": group, "task": task, **own})
    return pd.DataFrame(rows)


def followed(table: pd.DataFrame, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Does a coefficient follow what stands beside it? Rank correlations over tasks and groups.

    table: of `coefficient_table`; means over seeds. view: `cells`, as they stand, where large
    tensors differ from small ones in everything; `within`, less each group's mean over tasks.
    Intervals: tasks are drawn with replacement, all groups of a task at once. p: the coefficients'
    tasks are renamed. Columns: grouping, count, view, clue, rho, low, high, p, p_max (corrected
    over the clues of one fit and view), cells. Fits of fewer than three tasks are left out: nothing
    can be renamed.
    """
    rows = []
    for (grouping, count), some in table.groupby(["grouping", "count"], sort=False):
        if count < 3:
            continue
        mean = some.groupby(["task", "group"], sort=False)[["coefficient", *CLUES]].mean()
        cube = np.stack([mean[name].unstack("group").to_numpy() for name in mean])  # [C, T, G]
        size = {"grouping": grouping, "count": int(count), "cells": cube[0].size}
        for view, maps in {"cells": cube, "within": cube - cube.mean(1, keepdims=True)}.items():
            for record in cluster_correlations(maps[0], maps[1:], draws=draws, seed=seed):
                rows.append({**size, "view": view, "clue": CLUES[record.pop("number")], **record})
    return pd.DataFrame(rows)


def cluster_correlations(
    target: Float[np.ndarray, "T G"],
    clues: Float[np.ndarray, "C T G"],
    *,
    draws: int,
    seed: int,
) -> list[dict]:
    """Spearman correlation of a map with each of C others, tasks kept whole: one record per clue.

    Keys: number, rho, low, high, p, p_max, as in `followed`; NaN for a clue that does not vary.
    """
    generator, count = np.random.default_rng(seed), len(target)

    def rho(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        flat = others.reshape(len(others), -1)
        return standard(ranks(flat)) @ standard(ranks(own.reshape(-1)))

    value = rho(target, clues)
    chosen = [generator.integers(count, size=count) for _ in range(draws)]
    drawn = np.stack([rho(target[rows], clues[:, rows]) for rows in chosen])
    low, high = middle(drawn)
    orders = orderings(count, draws, generator)
    p, p_max, _ = largest_of(value, np.stack([rho(target[order], clues) for order in orders]))
    return [
        {"number": n, "rho": float(value[n]), "low": float(low[n]), "high": float(high[n]),
         "p": float(p[n]), "p_max": float(p_max[n])}
        for n in range(len(clues))
    ]  # fmt: skip
