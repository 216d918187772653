"""Trajectories of fits: losses, gradients, coefficients and scores of every task by step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import validation_scores
from divmerge_book.evaluation.statistics import spearman
from divmerge_book.studies.objective_fits import (
    FitConfig,
    FitSpec,
    Targets,
    fit,
    merge,
    objectives,
    with_used_words,
)
from divmerge_book.studies.robustness import CORRUPTIONS, corrupted_spec, corrupted_task
from divmerge_book.studies.study import study
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import Step, expert_logits
from divmerge_core.merging.problem import Diverged


def task_gradients(
    spec: FitSpec, coeffs: Float[Tensor, "T G"], grouping: str, targets: Targets
) -> Iterator[tuple[float, float]]:
    """Per task: its loss on all its inputs, and the norm of that loss's gradient in Lambda."""
    vectors = spec.problem.vectors
    segments = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping).segments
    flat = grouped_merge(vectors.base, vectors.deltas, coeffs.to(vectors.base), segments)
    parameters = vectors.layout.unflatten(flat.requires_grad_())
    for task, batches in enumerate(spec.problem.batches):
        logits = spec.problem.forward(parameters, [(task, batch) for batch in batches])
        terms = zip(batches, targets[task], logits, strict=True)
        loss = sum(b.weight @ spec.loss(e, z) for b, e, z in terms) / len(batches)
        (slope,) = torch.autograd.grad(loss, flat)
        yield loss.item(), grouped_inner(slope, vectors.deltas, segments).norm().item()


@dataclass
class Recorder:
    """Rows of every task's loss, gradient and coefficient, and both scores, every few steps."""

    experiment: Experiment
    spec: FitSpec
    grouping: str
    every: int
    last: int
    rows: list[dict]

    def __call__(self, step: Step) -> None:
        if step.number % self.every and step.number != self.last:
            return
        smaller = replace(self.spec, problem=with_used_words(self.spec.problem))
        targets = self.spec.targets or expert_logits(self.spec.problem)
        found = list(task_gradients(smaller, step.coeffs, self.grouping, targets))
        vectors, total = self.spec.problem.vectors, sum(norm for _, norm in found)
        flat = merge(vectors, step.coeffs, self.grouping)
        anp, margin = validation_scores(self.experiment, flat)
        for task, (loss, norm) in enumerate(found):
            row = {"step": step.number, "task": vectors.tasks[task], "loss": loss, "pull": norm}
            row |= {"share": norm / total if total else np.nan, "anp": anp, "kept_margin": margin}
            self.rows.append({**row, "coefficient": step.coeffs[task].mean().item()})


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
    """The rows of one fit; a fit that diverges ends early."""
    number = corrupted_task(experiment, seed)
    spec = corrupted_spec(CORRUPTIONS[kind](experiment, number, seed), objective, number)
    last = config.epochs * max(map(len, spec.problem.batches))
    recorder = Recorder(experiment, spec, grouping, every, last, [])
    try:
        fit(spec, grouping, config.rate, config, recorder)
    except Diverged:
        pass
    task = experiment.problem.vectors.tasks[number]
    return [{"strained": task, **row} for row in recorder.rows]


def trajectories(
    experiments: Mapping[int, Experiment],
    *,
    specs: Sequence[str],
    grouping: str,
    kinds: Sequence[str] = ("none",),
    config: FitConfig | None = None,
    every: int = 4,
) -> pd.DataFrame:
    """Every objective's fit, recorded every few steps: a row per step and task.

    specs: objectives, none for all. Columns: kind (of CORRUPTIONS; task number seed modulo T is
    corrupted), strained (that task), objective, seed, step, task, loss (of the task, on all its
    inputs), pull (norm of that loss's gradient in Lambda), share (of the sum of the tasks' norms),
    coefficient (mean over groups), anp and kept_margin (of the merged model, on validation rows).
    """
    jobs = [{"kind": kind, "objective": s} for kind in kinds for s in list(specs) or objectives()]
    fixed = {"grouping": grouping, "config": config or FitConfig(), "every": every}
    return study(trajectory, experiments, jobs, **fixed)


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """The loss summed over tasks, and both scores, at every recorded step of every fit."""
    key = ["kind", "objective", "seed", "step"]
    scores = {name: (name, "first") for name in ("anp", "kept_margin") if name in table}
    return table.groupby(key, sort=False).agg(loss=("loss", "sum"), **scores)


def disagreement(table: pd.DataFrame) -> pd.DataFrame:
    """Per fit: how far a falling loss means a rising ANP.

    Columns: objective, seed; correlation, Spearman's of minus the loss and the ANP over steps, NaN
    where one of them never changes; against, the share of stretches between recorded steps over
    which the loss fell and the ANP fell too; lost, the best ANP of the fit minus the last;
    kept_lost, the same of the kept margin, where it is stored.
    """
    rows = []
    honest = totals(table[table.kind == "none"])
    for (spec, seed), some in honest.groupby(["objective", "seed"], sort=False):
        loss, anp = some.loss.diff().iloc[1:], some.anp.diff().iloc[1:]
        agree = float(spearman(-some.loss.to_numpy(), some.anp.to_numpy()))
        against = ((loss < 0) & (anp < 0)).mean()
        lost = some.anp.max() - some.anp.iloc[-1]
        row = {"objective": spec, "seed": seed, "correlation": agree, "against": against}
        if "kept_margin" in some:
            row["kept_lost"] = some.kept_margin.max() - some.kept_margin.iloc[-1]
        rows.append({**row, "lost": lost})
    return pd.DataFrame(rows)


def balance(table: pd.DataFrame) -> pd.DataFrame:
    """Per fit: how evenly the norms of the tasks' gradients are shared, means over steps.

    Columns: kind, objective, seed; tasks, their number T; effective_tasks, 1 / sum of squared
    shares, 1 to T; largest, the largest share; strained, the corrupted task's share.
    """
    rows = []
    for (kind, spec, seed), some in table.groupby(["kind", "objective", "seed"], sort=False):
        wide = some.pivot(index="step", columns="task", values="share")
        row = {"kind": kind, "objective": spec, "seed": seed, "tasks": wide.shape[1]}
        row["effective_tasks"] = (1 / (wide**2).sum(axis=1)).mean()
        row |= {"largest": wide.max(axis=1).mean(), "strained": wide[some.strained.iloc[0]].mean()}
        rows.append(row)
    return pd.DataFrame(rows)
