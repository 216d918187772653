"""Which objective: every divergence and the baseline objectives, fitted under one protocol.

All fits start at 1/T, see the same unlabelled inputs in the same order, take as many steps of Adam,
and have the same few step sizes to choose from on validation rows. Trajectories record losses,
gradients, coefficients and scores of every task by step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.experiment import SIZES, Experiment, prepare
from divmerge_book.evaluation.hyperparameter_search import validation_scores
from divmerge_book.evaluation.statistics import spearman
from divmerge_book.studies import objective_fits as fitting
from divmerge_book.studies.objective_fits import START, FitConfig, FitSpec, Targets, objectives
from divmerge_book.studies.predictions import compared, with_experts
from divmerge_book.studies.robustness import corrupted_fit
from divmerge_book.studies.study import Experiments, study
from divmerge_core.kernels.merge import grouped_inner
from divmerge_core.merging.fit import Step, expert_logits

REFERENCE = "js"
FIT = ["kind", "objective", "seed"]  # what distinguishes fits


def middle(counts: Sequence[int]) -> int:
    """The number of tasks at which step sizes are chosen, and robustness is measured."""
    return sorted(counts)[len(counts) // 2]


def prepared(
    settings: SimpleNamespace,
    size: str,
    suite: str,
    tasks: Sequence[str],
    seeds: Sequence[int],
    **options: str,
) -> dict[int, Experiment]:
    """The suite's experiments by seed, with as many rows as the settings say."""
    rows = {"merge_rows": settings.inputs, "validation_rows": settings.validation}
    own = replace(SIZES[size], **rows, test_rows=settings.test, precision="float32")
    return {
        seed: prepare(suite, list(tasks) or None, size=own, seed=seed, **options) for seed in seeds
    }


def chosen_rate(
    experiments: Sequence[Experiment], objective: str, grouping: str, config: FitConfig
) -> float:
    """The step size with the highest validation ANP, mean over experiments; of equals the first."""

    def score(rate: float) -> float:
        fits = [fitting.fit_result(one, objective, grouping, rate, config) for one in experiments]
        return sum(found["validation"] for found in fits) / len(fits)

    return max(config.rates, key=score)


def ablation(
    experiments: Experiments,
    *,
    specs: Sequence[str],
    groupings: Sequence[str],
    counts: Sequence[int],
    config: FitConfig | None = None,
) -> dict[str, pd.DataFrame]:
    """Every objective x grouping x number of tasks x seed: predictions (`scores`) and `fits`.

    experiments: of all tasks. specs: objectives, none for all. counts: how many tasks, from the
    first on. The step size is chosen once per objective and grouping, at the middle count, over all
    seeds (search `searched`); for `same` all take config.rate, at that count. Fits: search, count,
    grouping, objective, seed, rate, validation (ANP), diverged. Raises ValueError without js, the
    reference.
    """
    config, specs = config or FitConfig(), list(specs) or objectives()
    if REFERENCE not in specs:
        raise ValueError(f"differences are from {REFERENCE!r}; add it to {specs}")
    few = [one.select(one.problem.vectors.tasks[: middle(counts)]) for one in experiments.values()]
    pairs, jobs = list(product(groupings, specs)), []
    rates = {
        (grouping, spec): chosen_rate(few, spec, grouping, config)
        for grouping, spec in tqdm(pairs, "step sizes", leave=False)
    }
    same = dict.fromkeys(pairs, config.rate)
    for search, count, rate_of in [
        *(("searched", count, rates) for count in counts),
        ("same", middle(counts), same),
    ]:
        label = {"search": search, "count": count}
        jobs.append({**label, "grouping": "task", "objective": START, "rate": 0.0, "method": START})
        for (grouping, spec), rate in rate_of.items():
            own = {"grouping": grouping, "objective": spec, "rate": rate}
            jobs.append({**label, **own, "method": f"{spec}/{grouping}"})
    rows = study(fitting.fit_and_predict, experiments, jobs, config=config)
    key = ["search", "count", "grouping", "objective", "seed"]
    fits = rows[rows.objective != START].drop_duplicates(key, ignore_index=True)
    fits = fits[[*key, "rate", "validation", "diverged"]]
    return {"scores": with_experts(rows, experiments, ["search", "count"]), "fits": fits}


def summary(table: pd.DataFrame, *, draws: int = 2000) -> pd.DataFrame:
    """Both scores of every `objective/grouping`, and differences from js of that grouping.

    Columns: search, count, objective, grouping, and those of `predictions.compared`, with p
    corrected within a search. The merge at 1/T, where all fits start, is the objective `start`,
    ungrouped, without differences.
    """

    def reference(method: str) -> str | None:
        _, _, grouping = method.partition("/")
        return f"{REFERENCE}/{grouping}" if grouping else None

    found = compared(table, ["search", "count"], reference, family="search", draws=draws)
    parts = found.pop("method").str.partition("/")
    return found.assign(objective=parts[0], grouping=parts[2])


# --- trajectories ---------------------------------------------------------------------------------
def task_gradients(
    spec: FitSpec, coeffs: Float[Tensor, "T G"], grouping: str, targets: Targets
) -> Iterator[tuple[float, float]]:
    """Per task: its loss on all its inputs, and the norm of that loss's gradient in Lambda."""
    vectors = spec.problem.vectors
    segments = fitting.coefficients_of(vectors, grouping).segments
    flat = fitting.merge(vectors, coeffs, grouping).requires_grad_()
    parameters = vectors.layout.unflatten(flat)
    for task, batches in enumerate(spec.problem.batches):
        logits = spec.problem.forward(parameters, [(task, batch) for batch in batches])
        terms = zip(batches, targets[task], logits, strict=True)
        loss = sum(b.weight @ spec.loss(e, z) for b, e, z in terms) / len(batches)
        (slope,) = torch.autograd.grad(loss, flat)
        yield loss.item(), grouped_inner(slope, vectors.deltas, segments).norm().item()


def trajectory(
    experiment: Experiment,
    *,
    seed: int,
    kind: str,
    objective: str,
    grouping: str,
    config: FitConfig,
    every: int,
) -> list[dict]:
    """The rows of one fit, every few steps; a fit that diverges ends early."""
    _, spec, strained = corrupted_fit(experiment, kind, objective, seed)
    vectors, rows = spec.problem.vectors, []
    smaller = replace(spec, problem=fitting.with_used_words(spec.problem))
    targets = spec.targets or expert_logits(spec.problem)
    last = config.epochs * max(map(len, spec.problem.batches))

    def record(step: Step) -> None:
        if step.number % every and step.number != last:
            return
        found = list(task_gradients(smaller, step.coeffs, grouping, targets))
        anp, margin = validation_scores(experiment, fitting.merge(vectors, step.coeffs, grouping))
        total = sum(norm for _, norm in found)
        for task, (loss, norm) in enumerate(found):
            row = {"step": step.number, "task": vectors.tasks[task], "loss": loss, "pull": norm}
            row |= {"share": norm / total if total else np.nan, "anp": anp, "kept_margin": margin}
            rows.append({**row, "coefficient": step.coeffs[task].mean().item()})

    _, diverged = fitting.fit(spec, grouping, config.rate, config, record)
    return [{"strained": strained, "diverged": diverged, **row} for row in rows]


def trajectories(
    experiments: Experiments,
    *,
    specs: Sequence[str],
    grouping: str,
    kinds: Sequence[str] = ("none",),
    config: FitConfig | None = None,
    every: int = 4,
) -> pd.DataFrame:
    """Every objective's fit, recorded every few steps: a row per step and task.

    specs: objectives, none for all. Columns: kind (of CORRUPTIONS), objective, seed, strained (the
    corrupted task), diverged, step, task, loss (on all the task's inputs), pull (norm of that
    loss's gradient in Lambda), share (of the sum of the norms), coefficient (mean over groups), anp
    and kept_margin (of the merged model, on validation rows).
    """
    jobs = [{"kind": kind, "objective": s} for kind in kinds for s in list(specs) or objectives()]
    fixed = {"grouping": grouping, "config": config or FitConfig(), "every": every}
    return study(trajectory, experiments, jobs, **fixed)


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """The loss summed over tasks, and both scores, at every recorded step of every fit."""
    scores = {name: (name, "first") for name in ("anp", "kept_margin")}
    return table.groupby([*FIT, "step"], sort=False).agg(loss=("loss", "sum"), **scores)


def disagreement(table: pd.DataFrame) -> pd.DataFrame:
    """Per fit without corruption: how far a falling loss means a rising ANP.

    Columns: objective, seed, records; correlation, Spearman's of minus the loss and the ANP over
    those steps; against, the share of stretches between them over which both fell; lost and
    kept_lost, the best ANP and kept margin of the fit minus the last.
    """

    def of(fit: pd.DataFrame) -> pd.Series:
        loss, anp, kept = fit.loss, fit.anp, fit.kept_margin
        fell = ((loss.diff() < 0) & (anp.diff() < 0)).iloc[1:]
        agree = float(spearman(-loss.to_numpy(), anp.to_numpy()))
        lost = {"lost": anp.max() - anp.iloc[-1], "kept_lost": kept.max() - kept.iloc[-1]}
        return pd.Series(
            {"correlation": agree, "against": fell.mean(), **lost, "records": len(fit)}
        )

    fits = totals(table[table.kind == "none"]).groupby(["objective", "seed"], sort=False)
    return fits.apply(of).reset_index().astype({"records": int})


def balance(table: pd.DataFrame) -> pd.DataFrame:
    """Per fit: how evenly the norms of the tasks' gradients are shared, means over steps.

    Columns: kind, objective, seed; tasks, their number T; effective_tasks, 1 / sum of squared
    shares, 1 to T; largest, the largest share; strained, the corrupted task's share.
    """
    shares = table.assign(squared=table.share**2).groupby([*FIT, "step"], sort=False)
    steps = shares.agg(tasks=("task", "size"), largest=("share", "max"))
    steps["effective_tasks"] = 1 / shares.squared.sum()
    own = table[table.task == table.strained].groupby(FIT, sort=False).share.mean()
    found = steps.groupby(FIT, sort=False).mean().assign(strained=own)
    return found.astype({"tasks": int}).reset_index()
