"""Coefficients of DivMerge by group and task, beside sign conflict, cosine, norm and JS."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pandas as pd
from jaxtyping import Float

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import run_method
from divmerge_book.evaluation.statistics import ranks, standard
from divmerge_book.interference import weights
from divmerge_book.interference.behaviour import js_from_expert
from divmerge_book.studies.mantel import resampled
from divmerge_book.studies.study import study
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import limit

COVARIATES = ("conflict", "cosine", "norm", "js")


def fitted(
    experiment: Experiment, *, seed: int, count: int, grouping: str, inputs: int, epochs: int
) -> pd.DataFrame:
    """DivMerge's coefficients of the first `count` tasks; a row per task and group.

    Columns: group, task, coefficient, conflict and cosine (mean with the other tasks, trained
    parameters), norm (share of the task vector's norm), js (of the average, the same in every group
    of a task), reach (how far Adam can move a coefficient).
    """
    experiment = experiment.select(experiment.problem.vectors.tasks[:count])
    options = {"inputs": inputs, "epochs": epochs, "seed": seed, "progress": False}
    vectors, options["grouping"] = experiment.problem.vectors, grouping
    fit = run_method(experiment, f"divmerge/{grouping}", options).fit
    learned, seen = weights.trained(vectors), limit(experiment.problem, inputs, grouping)
    conflict, cosine = (
        weights.mean_with_others(weights.by_group(measure, learned, grouping)).T
        for measure in (weights.sign_conflict, weights.cosine)
    )  # [T, G]
    norms = weights.norms_by_group(vectors, grouping)
    values = {"coefficient": np.array(fit["coefficients"]), "conflict": conflict, "cosine": cosine}
    values["norm"] = norms / norms.norm(dim=1, keepdim=True)
    average = METHODS["average"](seen)
    found = [js_from_expert(seen, average, t, some) for t, some in enumerate(seen.batches)]
    values["js"] = np.repeat(found, len(fit["groups"]))
    index = pd.MultiIndex.from_product([vectors.tasks, fit["groups"]], names=["task", "group"])
    table = pd.DataFrame({name: np.ravel(value) for name, value in values.items()}, index)
    steps = epochs * max(map(len, seen.batches))
    return table.assign(reach=0.01 * steps).reset_index()


def tables(
    experiments: Mapping[int, Experiment], options: SimpleNamespace
) -> dict[str, pd.DataFrame]:
    """Tables coefficients (`fitted`, by seed, count and grouping) and followed (correlations).

    experiments: by seed of the experts. options: counts (numbers of tasks; those above the
    experiment's are skipped), groupings, inputs, epochs and draws, as in
    `settings("coefficients", size)`.
    """
    most = len(next(iter(experiments.values())).problem.vectors.tasks)
    counts = [count for count in options.counts if count <= most]
    jobs = [{"count": count, "grouping": name} for count in counts for name in options.groupings]
    rows = study(fitted, experiments, jobs, inputs=options.inputs, epochs=options.epochs)
    return {"coefficients": rows, "followed": covariate_correlations(rows, draws=options.draws)}


def by_count(block: pd.DataFrame) -> pd.DataFrame:
    """Coefficients by number of tasks. block: rows of `fitted` of one grouping."""
    groups = block.groupby("count")
    table = groups.coefficient.agg(["mean", "min", "max"]).rename_axis("T")
    table["sum over tasks"] = table["mean"] * table.index
    table["largest move"] = groups.reach.max()
    over = block.groupby(["count", "task", "group"]).coefficient.std()
    return table.assign(**{"std over seeds": over.groupby("count").mean()})


def covariate_correlations(table: pd.DataFrame, *, draws: int) -> pd.DataFrame:
    """Rank correlations of coefficients with covariates, over tasks and groups, means over seeds.

    view: `cells`, values as they are; `within`, minus each group's mean over tasks, which removes
    differences between large and small tensors. Columns: grouping, count, view, clue (the
    covariate), cells (how many values), and those of `cluster_correlations`, p_max corrected over
    the covariates of one fit and view. Fits of fewer than three tasks have too few permutations.
    """
    rows, enough = [], table[table["count"] >= 3]
    for (grouping, count), some in enough.groupby(["grouping", "count"], sort=False):
        mean = some.groupby(["task", "group"], sort=False)[["coefficient", *COVARIATES]].mean()
        cube = np.stack([mean[name].unstack("group").to_numpy() for name in mean])  # [C, T, G]
        for view, maps in {"cells": cube, "within": cube - cube.mean(1, keepdims=True)}.items():
            found = cluster_correlations(maps[0], maps[1:], draws=draws)
            labels = {"grouping": grouping, "count": int(count), "cells": cube[0].size}
            rows.append(found.assign(**labels, view=view, clue=COVARIATES))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def cluster_correlations(
    target: Float[np.ndarray, "T G"], covariates: Float[np.ndarray, "C T G"], *, draws: int
) -> pd.DataFrame:
    """Spearman correlation of a map with each of C others: rho, low, high, p, p_max.

    Tasks are resampled and permuted as wholes. NaN for a constant covariate.
    """

    def rho(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        flat = others.reshape(len(others), -1)
        return standard(ranks(flat)) @ standard(ranks(own.reshape(-1)))

    found = resampled(
        rho(target, covariates),
        lambda rows: rho(target[rows], covariates[:, rows]),
        lambda order: rho(target[order], covariates),
        sizes=(len(target),),
        draws=draws,
    )
    return pd.DataFrame(found._asdict()).drop(columns="threshold").rename(columns={"value": "rho"})
