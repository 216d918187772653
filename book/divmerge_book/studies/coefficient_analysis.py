"""Coefficients of DivMerge by group and task, beside sign conflict, cosine, norm and JS."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pandas as pd
from jaxtyping import Float

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import run_method
from divmerge_book.evaluation.statistics import largest_of, middle, orderings, ranks, standard
from divmerge_book.interference.behaviour import all_logits
from divmerge_book.interference.weights import (
    by_group,
    cosine,
    mean_with_others,
    norms_by_group,
    sign_conflict,
    trained,
)
from divmerge_book.studies.study import study
from divmerge_core.divergences import js
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import limit

COVARIATES = ("conflict", "cosine", "norm", "js")


def average_js(problem: MergeProblem) -> list[float]:
    """Every task's mean JS (nats) of the average of all experts from its own expert."""
    flat, found = METHODS["average"](problem), []
    for task, name in enumerate(problem.vectors.tasks):
        both = (problem.vectors.expert(name), flat)
        logits = [all_logits(problem, some, task, problem.batches[task]) for some in both]
        found.append(js(*logits).double().mean().item())
    return found


def fitted(
    experiment: Experiment, *, seed: int, count: int, grouping: str, inputs: int, epochs: int
) -> list[dict]:
    """DivMerge's coefficients of the first `count` tasks; a row per task and group."""
    experiment = experiment.select(experiment.problem.vectors.tasks[:count])
    options = {"inputs": inputs, "epochs": epochs, "seed": seed, "progress": False}
    spec, vectors = f"divmerge/{grouping}", experiment.problem.vectors
    fit = run_method(experiment, spec, {**options, "grouping": grouping}).fit
    learned, seen = trained(vectors), limit(experiment.problem, inputs, grouping)
    conflict, angle = (
        mean_with_others(by_group(measure, learned, grouping))
        for measure in (sign_conflict, cosine)
    )  # [G, T]
    norms = norms_by_group(vectors, grouping)
    norms = (norms / norms.norm(dim=1, keepdim=True)).T
    steps, divergences, rows = epochs * max(map(len, seen.batches)), average_js(seen), []
    for t, task in enumerate(vectors.tasks):
        for g, group in enumerate(fit["groups"]):
            values = (conflict[g, t].item(), angle[g, t].item(), norms[g, t].item(), divergences[t])
            row = {"group": group, "task": task, "coefficient": fit["coefficients"][t][g]}
            rows.append(
                {**row, **dict(zip(COVARIATES, values, strict=True)), "reach": 0.01 * steps}
            )
    return rows


def coefficient_table(
    experiments: Mapping[int, Experiment],
    *,
    counts: Sequence[int],
    groupings: Sequence[str],
    inputs: int,
    epochs: int,
) -> pd.DataFrame:
    """Coefficients and covariates of every group and task, for growing numbers of tasks.

    experiments: by seed of the experts. counts: numbers of tasks; those above the experiment's are
    skipped. inputs, epochs: of DivMerge. Columns: seed, count, grouping, group, task, coefficient,
    conflict and cosine (mean with the other tasks, trained parameters), norm (share of the task
    vector's), js (of the average of the experts, on the inputs of the fit; the same for all
    groups), reach (the largest change of a coefficient: steps times Adam's step size of 0.01).
    """
    most = len(next(iter(experiments.values())).problem.vectors.tasks)
    jobs = [{"count": t, "grouping": g} for t in counts if t <= most for g in groupings]
    options = {"inputs": inputs, "epochs": epochs}
    return study(fitted, experiments, jobs, **options)


def covariate_correlations(
    table: pd.DataFrame, *, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Rank correlations of coefficients with covariates, over tasks and groups.

    table: of `coefficient_table`; means over seeds. view: `cells`, values as they are; `within`,
    minus each group's mean over tasks, which removes differences between large and small tensors.
    Intervals: bootstrap over tasks, all groups of a task at once. p: the coefficients' tasks are
    permuted. Columns: grouping, count, view, clue (the covariate), rho, low, high, p, p_max
    (corrected over the covariates of one fit and view), cells (how many values). Fits of fewer than
    three tasks are skipped: they have too few permutations.
    """
    rows = []
    for (grouping, count), some in table.groupby(["grouping", "count"], sort=False):
        if count < 3:
            continue
        mean = some.groupby(["task", "group"], sort=False)[["coefficient", *COVARIATES]].mean()
        cube = np.stack([mean[name].unstack("group").to_numpy() for name in mean])  # [C, T, G]
        for view, maps in {"cells": cube, "within": cube - cube.mean(1, keepdims=True)}.items():
            found = cluster_correlations(maps[0], maps[1:], draws=draws, seed=seed)
            labels = {"grouping": grouping, "count": int(count), "cells": cube[0].size}
            rows.append(found.assign(**labels, view=view, clue=COVARIATES))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def cluster_correlations(
    target: Float[np.ndarray, "T G"],
    covariates: Float[np.ndarray, "C T G"],
    *,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """Spearman correlation of a map with each of C others: rho, low, high, p, p_max by covariate.

    Tasks are resampled and permuted as wholes. NaN for a constant covariate.
    """
    generator, count = np.random.default_rng(seed), len(target)

    def rho(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        flat = others.reshape(len(others), -1)
        return standard(ranks(flat)) @ standard(ranks(own.reshape(-1)))

    value = rho(target, covariates)
    chosen = [generator.integers(count, size=count) for _ in range(draws)]
    low, high = middle(np.stack([rho(target[rows], covariates[:, rows]) for rows in chosen]))
    orders = orderings(count, draws, generator)
    p, p_max, _ = largest_of(value, np.stack([rho(target[o], covariates) for o in orders]))
    return pd.DataFrame({"rho": value, "low": low, "high": high, "p": p, "p_max": p_max})


def tables(
    experiments: Mapping[int, Experiment], options: SimpleNamespace
) -> dict[str, pd.DataFrame]:
    """Tables coefficients and followed, with the options of `settings("coefficients", size)`."""
    names = ("counts", "groupings", "inputs", "epochs")
    rows = coefficient_table(experiments, **{name: getattr(options, name) for name in names})
    return {"coefficients": rows, "followed": covariate_correlations(rows, draws=options.draws)}
