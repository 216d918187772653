"""Objectives under strain: other temperatures, and one expert that is not to be trusted.

Corruptions change one expert of a bench, or what the fit is told that it answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from divmerge_book.data.splits import Splits
from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.benchmark import references
from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.models.encoders import classifier_forward
from divmerge_book.models.finetuning import Expert, Recipe, fine_tune
from divmerge_book.studies.objective_fits import FitSpec, Rule, answers, fit, learned, merge, pose
from divmerge_book.studies.predictions import packed, report_of
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import expert_logits
from divmerge_core.merging.problem import Diverged
from divmerge_core.registry import Registry

SHARPER = 5.0  # what an over-confident expert's logits are multiplied by
STRAINS = Registry("strain")  # name -> function(bench, task number, seed) -> Strained


@dataclass(frozen=True)
class Strained:
    """A bench with one expert changed. retarget: what becomes of that expert's logits, or None."""

    bench: Experiment
    retarget: Callable[[Tensor], Tensor] | None = None


@STRAINS.register("left_out", label="left out")
def left_out(bench: Experiment, number: int, seed: int) -> Strained:
    """The expert is not merged at all: what its presence is compared with."""
    tasks = bench.problem.vectors.tasks
    return Strained(bench.select([task for n, task in enumerate(tasks) if n != number]))


@STRAINS.register("none", label="as it is")
def none(bench: Experiment, number: int, seed: int) -> Strained:
    """Every expert as it is: what an honest expert costs the others."""
    return Strained(bench)


@STRAINS.register("noise", label="noise for weights")
def noise(bench: Experiment, number: int, seed: int) -> Strained:
    """Every tensor of the task vector replaced by Gaussian noise of the same length."""
    vectors = bench.problem.vectors
    generator, deltas = torch.Generator().manual_seed(seed), dense(vectors.deltas).clone()
    for start, stop in vectors.layout.bounds:
        drawn = torch.randn(stop - start, generator=generator).to(deltas)
        part = deltas[number, start:stop]
        part.copy_(drawn * (part.square().sum() / drawn.square().sum()).sqrt())
    problem = replace(bench.problem, vectors=replace(vectors, deltas=deltas))
    return Strained(replace(bench, problem=problem))


def permuted(splits: Splits, seed: int) -> Splits:
    """The splits with the answers of the train rows shuffled among them."""
    rows = splits["train"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [(*row[:-1], rows[n][-1]) for row, n in zip(rows, order, strict=True)]
    return {**splits, "train": shuffled}


@STRAINS.register("permuted", label="trained on permuted labels")
def permuted_labels(bench: Experiment, number: int, seed: int) -> Strained:
    """An expert that was fine-tuned as the others, on labels shuffled among the train rows."""
    task, old = TASKS[bench.problem.vectors.tasks[number]], bench.experts[number]
    twisted = replace(
        task,
        read=lambda: permuted(task.read(), seed),
        origin=lambda: f"{task.origin()} permuted {seed}",
    )
    expert = fine_tune(bench.base, twisted, Recipe(**old.manifest["recipe"]), seed=seed)
    return Strained(with_expert(bench, number, expert))


def with_expert(bench: Experiment, number: int, expert: Expert) -> Experiment:
    """The bench with another expert, and its head, in one task's place."""
    vectors, experts = bench.problem.vectors, [*bench.experts]
    experts[number] = expert
    deltas = dense(vectors.deltas).clone()
    deltas[number] = vectors.layout.flatten(expert.state) - vectors.base
    problem = replace(
        bench.problem,
        vectors=replace(vectors, deltas=deltas),
        forward=classifier_forward(bench.base, [e.head for e in experts]),
    )
    return replace(bench, experts=experts, problem=problem)


@STRAINS.register("wrong", label="surely wrong answers")
def wrong(bench: Experiment, number: int, seed: int) -> Strained:
    """The expert's weights as they are; its answers moved on to the next class, as sure as ever."""
    return Strained(bench, lambda logits: logits.roll(1, dims=-1))


@STRAINS.register("overconfident", label="over-confident answers")
def overconfident(bench: Experiment, number: int, seed: int) -> Strained:
    """The expert's weights as they are; its logits SHARPER times as large."""
    return Strained(bench, lambda logits: SHARPER * logits)


def posed_under(strained: Strained, spec: str, number: int) -> FitSpec:
    """The fit of an objective, with the changed expert's answers for targets."""
    posed = pose(strained.bench, spec)
    if strained.retarget is None:
        return posed
    targets: list = list(expert_logits(posed.problem))
    targets[number] = [strained.retarget(logits) for logits in targets[number]]
    return replace(posed, targets=targets)


# --- what it costs the others ---------------------------------------------------------------------


def strains(
    benches: Mapping[int, Experiment],
    *,
    specs: Sequence[str],
    kinds: Sequence[str],
    groupings: Sequence[str],
    rule: Rule | None = None,
) -> pd.DataFrame:
    """Every strain x objective x grouping x seed: predictions on the honest tasks; see `costs`.

    The n-th seed strains the n-th task. Labels: strained (that task), coefficient (its own, mean
    over groups), diverged (then the answers are those where the fit starts); the method is
    `kind/objective/grouping`. Every fit is also run with the expert left out.
    """
    rule, rows = rule or Rule(), []
    every = dict.fromkeys(("left_out", *kinds))
    jobs = [(seed, kind) for seed in benches for kind in every]
    for seed, kind in (bar := tqdm(jobs, "strains", leave=False)):
        bench = benches[seed]
        number = list(benches).index(seed) % len(bench.experts)
        strained = cache(partial(STRAINS[kind], bench, number, seed))
        for spec in specs:
            for grouping in groupings:
                bar.set_postfix_str(f"seed {seed}, {kind}, {spec}, per {grouping}")
                find = partial(strain, bench, strained, number, spec, grouping, rule)
                found = kept(bench, find, "strain", kind, number, seed, spec, grouping, rule)
                label = {"method": f"{kind}/{spec}/{grouping}", "seed": seed}
                label["strained"] = bench.problem.vectors.tasks[number]
                label |= {name: found[name] for name in ("coefficient", "diverged")}
                rows += [{**label, **row} for row in found["rows"]]
    return packed([*rows, *experts_of(benches)])


def experts_of(benches: Mapping[int, Experiment]) -> list[dict]:
    """Every expert's answers on its own task's test rows, by seed."""
    label = {"method": "expert"}
    return [
        {**row, **label, "seed": seed}
        for seed, bench in benches.items()
        for row in references(bench, {})
        if row["method"] == "expert"
    ]


def costs(table: pd.DataFrame) -> pd.DataFrame:
    """What every strained expert costs the others, by both scores, a row per merged model.

    table: of `strains`. Columns: kind, objective, grouping, seed, task (the strained one), honest
    (ANP of the other tasks), kept_margin (theirs), below (how many of them are below the majority
    class), cost and kept_cost (the score where the expert is left out minus this), coefficient,
    diverged. An honest expert costs the others too: that is the kind `none`.
    """
    each = report_of(table).against_experts()
    each = each[each.counted].assign(below=lambda some: some.value < some.floor)
    groups = each.groupby(["method", "seed"], sort=False)
    means = groups[["ratio", "kept_margin"]].mean().assign(below=groups.below.sum())
    rows = table[table.method != "expert"].join(means, on=["method", "seed"])
    rows[["kind", "objective", "grouping"]] = rows.method.str.split("/", expand=True).to_numpy()
    rows = rows.rename(columns={"strained": "task", "ratio": "honest"})
    key = ["objective", "grouping", "seed"]
    without = rows[rows.kind == "left_out"].set_index(key)[["honest", "kept_margin"]]
    spared = without.loc[list(rows[key].itertuples(index=False))].to_numpy()
    rows[["cost", "kept_cost"]] = spared - rows[["honest", "kept_margin"]].to_numpy()
    rows = rows.drop(columns=["method", "answered", "predicted", "gold"])
    return rows[rows.kind != "left_out"].reset_index(drop=True)


def strain(
    bench: Experiment,
    make: Callable[[], Strained],
    number: int,
    spec: str,
    grouping: str,
    rule: Rule,
) -> dict:
    """One fit beside the strained expert that `make` gives: its answers on the honest tasks."""
    strained = make()
    vectors, failed = strained.bench.problem.vectors, False
    try:
        coeffs = fit(posed_under(strained, spec, number), grouping, rule.rate, rule)
    except Diverged:
        failed = True
        coeffs = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping)().detach()
    tasks, flat = bench.problem.vectors.tasks, merge(vectors, coeffs, grouping)
    found = evaluate(strained.bench.problem, flat, strained.bench.test)
    rows = found[found.task != tasks[number]].to_dict("records")
    share = coeffs[number].mean().item() if tasks == vectors.tasks else float("nan")
    return {"rows": rows, "coefficient": share, "diverged": failed}


def temperatures(
    benches: Mapping[int, Experiment],
    *,
    specs: Sequence[str],
    values: Sequence[float],
    grouping: str,
    rule: Rule | None = None,
) -> dict[str, pd.DataFrame]:
    """Every objective x temperature x seed: predictions (`rows`) and whether `fits` diverged.

    The method is `objective=temperature`. Fits: objective, temperature, seed, diverged.
    """
    rule, rows, fits = rule or Rule(), [], []
    jobs = [(seed, spec, value) for seed in benches for spec in specs for value in values]
    for seed, spec, value in (bar := tqdm(jobs, "temperatures", leave=False)):
        bar.set_postfix_str(f"seed {seed}, {spec}, {value:g}")
        bench = benches[seed]
        found = learned(bench, spec, grouping, rule.rate, rule, value)
        label = {"method": f"{spec}={value:g}", "seed": seed}
        rows += [{**row, **label} for row in answers(bench, found["coefficients"], grouping)]
        one = {"objective": spec, "temperature": value, "seed": seed}
        fits.append({**one, "diverged": found["diverged"]})
    return {"rows": packed([*rows, *experts_of(benches)]), "fits": pd.DataFrame(fits)}
