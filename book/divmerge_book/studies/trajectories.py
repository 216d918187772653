"""On the way: losses, gradients, coefficients and scores of every task while a fit runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import validation_scores
from divmerge_book.evaluation.statistics import spearman
from divmerge_book.studies.objective_fits import FitSpec, Rule, Targets, fit, merge, only_seen
from divmerge_book.studies.robustness import STRAINS, posed_under
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import Step, expert_logits
from divmerge_core.merging.problem import Diverged


def pulls(
    posed: FitSpec, coeffs: Float[Tensor, "T G"], grouping: str, targets: Targets
) -> Iterator[tuple[float, float]]:
    """Per task: its loss on all its inputs, and the length of that loss's gradient in Lambda."""
    vectors = posed.problem.vectors
    segments = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping).segments
    flat = grouped_merge(vectors.base, vectors.deltas, coeffs.to(vectors.base), segments)
    parameters = vectors.layout.unflatten(flat.requires_grad_())
    for task, batches in enumerate(posed.problem.batches):
        logits = posed.problem.forward(parameters, [(task, batch) for batch in batches])
        terms = zip(batches, targets[task], logits, strict=True)
        loss = sum(b.weight @ posed.loss(e, z) for b, e, z in terms) / len(batches)
        (slope,) = torch.autograd.grad(loss, flat)
        yield loss.item(), grouped_inner(slope, vectors.deltas, segments).norm().item()


@dataclass
class Watch:
    """Notes every task's loss, pull, coefficient and the validation ANP, every few steps."""

    bench: Experiment
    posed: FitSpec
    grouping: str
    every: int
    last: int
    rows: list[dict]

    def __call__(self, step: Step) -> None:
        if step.number % self.every and step.number != self.last:
            return
        seen = replace(self.posed, problem=only_seen(self.posed.problem))
        targets = self.posed.targets or expert_logits(self.posed.problem)
        found = list(pulls(seen, step.coeffs, self.grouping, targets))
        vectors, whole = self.posed.problem.vectors, sum(pull for _, pull in found)
        anp, margin = validation_scores(self.bench, merge(vectors, step.coeffs, self.grouping))
        for task, (loss, pull) in enumerate(found):
            row = {"step": step.number, "task": vectors.tasks[task], "loss": loss, "pull": pull}
            row |= {"share": pull / whole if whole else np.nan, "anp": anp, "kept_margin": margin}
            self.rows.append({**row, "coefficient": step.coeffs[task].mean().item()})


def course(
    bench: Experiment,
    kind: str,
    number: int,
    seed: int,
    spec: str,
    grouping: str,
    rule: Rule,
    every: int,
) -> dict:
    """One fit's `rows`, see `courses`, and whether it `diverged`; kept in the cache."""

    def find() -> dict:
        posed = posed_under(STRAINS[kind](bench, number, seed), spec, number)
        last, failed = rule.epochs * max(map(len, posed.problem.batches)), False
        watch = Watch(bench, posed, grouping, every, last, [])
        try:
            fit(posed, grouping, rule.rate, rule, watch)
        except Diverged:
            failed = True
        return {"rows": watch.rows, "diverged": failed}

    return kept(bench, find, "course", kind, number, seed, spec, grouping, rule, every)


def courses(
    benches: Mapping[int, Experiment],
    *,
    specs: Sequence[str],
    grouping: str,
    kinds: Sequence[str] = ("none",),
    rule: Rule | None = None,
    every: int = 4,
) -> pd.DataFrame:
    """Every objective's fit, watched every few steps: a row per step and task.

    Columns: kind (of STRAINS; the n-th seed strains the n-th task), strained, objective, seed,
    step, task, loss (of the task, on all its inputs), pull (length of that loss's gradient in
    Lambda), share (of the tasks' pulls), coefficient (mean over groups), anp and kept_margin (of
    the whole, on validation rows). A fit that diverged ends early.
    """
    rule, rows = rule or Rule(), []
    jobs = [(kind, seed, spec) for kind in kinds for seed in benches for spec in specs]
    for kind, seed, spec in (bar := tqdm(jobs, "courses", leave=False)):
        bar.set_postfix_str(f"{kind}, seed {seed}, {spec}")
        bench = benches[seed]
        number = list(benches).index(seed) % len(bench.experts)
        found = course(bench, kind, number, seed, spec, grouping, rule, every)
        label = {"kind": kind, "strained": bench.problem.vectors.tasks[number]}
        label |= {"objective": spec, "seed": seed}
        rows += [{**label, **row} for row in found["rows"]]
    return pd.DataFrame(rows)


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """The loss summed over tasks, and both scores, at every noted step of every course."""
    key = ["kind", "objective", "seed", "step"]
    scores = {name: (name, "first") for name in ("anp", "kept_margin") if name in table}
    return table.groupby(key, sort=False).agg(loss=("loss", "sum"), **scores)


def disagreement(table: pd.DataFrame) -> pd.DataFrame:
    """Per course: how far a falling loss is a rising ANP.

    Columns: objective, seed; correlation, Spearman's of minus the loss and the ANP over steps, NaN
    where one of them never changes; against, the share of stretches between noted steps over which
    the loss fell and the ANP fell too; lost, the best ANP on the way minus the last; kept_lost,
    the same of the kept margin, where it is stored.
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
    """Per course: how evenly the tasks pull.

    Columns: kind, objective, seed; tasks, their number T; even, the effective number of tasks
    1 / sum of squared shares, 1 to T, mean over steps; largest, the largest share, mean over steps;
    strained, the strained task's share, mean over steps.
    """
    rows = []
    for (kind, spec, seed), some in table.groupby(["kind", "objective", "seed"], sort=False):
        wide = some.pivot(index="step", columns="task", values="share")
        row = {"kind": kind, "objective": spec, "seed": seed, "tasks": wide.shape[1]}
        row |= {"even": (1 / (wide**2).sum(axis=1)).mean(), "largest": wide.max(axis=1).mean()}
        rows.append({**row, "strained": wide[some.strained.iloc[0]].mean()})
    return pd.DataFrame(rows)
