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

from divmerge_core.bench import Bench
from divmerge_core.cells import kept
from divmerge_core.coefficients import Coefficients
from divmerge_core.encoders import classifier_forward
from divmerge_core.experts import Expert, Recipe, fine_tune
from divmerge_core.fitting import expert_logits
from divmerge_core.kernels.stores import dense
from divmerge_core.problem import Diverged
from divmerge_core.registry import Registry
from divmerge_core.splits import Splits
from divmerge_core.studies.arrivals import accuracies, expert_accuracies
from divmerge_core.studies.objectives import Posed, Rule, answers, fit, learned, merge, pose
from divmerge_core.tasks import TASKS
from divmerge_core.tuning import shares

SHARPER = 5.0  # what an over-confident expert's logits are multiplied by
STRAINS = Registry("strain")  # name -> function(bench, task number, seed) -> Strained


@dataclass(frozen=True)
class Strained:
    """A bench with one expert changed. retarget: what becomes of that expert's logits, or None."""

    bench: Bench
    retarget: Callable[[Tensor], Tensor] | None = None


@STRAINS.register("left_out", label="left out")
def left_out(bench: Bench, number: int, seed: int) -> Strained:
    """The expert is not merged at all: what its presence is compared with."""
    tasks = bench.problem.vectors.tasks
    return Strained(bench.select([task for n, task in enumerate(tasks) if n != number]))


@STRAINS.register("none", label="as it is")
def none(bench: Bench, number: int, seed: int) -> Strained:
    """Every expert as it is: what an honest expert costs the others."""
    return Strained(bench)


@STRAINS.register("noise", label="noise for weights")
def noise(bench: Bench, number: int, seed: int) -> Strained:
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
def permuted_labels(bench: Bench, number: int, seed: int) -> Strained:
    """An expert that was fine-tuned as the others, on labels shuffled among the train rows."""
    task, old = TASKS[bench.problem.vectors.tasks[number]], bench.experts[number]
    twisted = replace(
        task,
        read=lambda: permuted(task.read(), seed),
        origin=lambda: f"{task.origin()} permuted {seed}",
    )
    expert = fine_tune(bench.base, twisted, Recipe(**old.manifest["recipe"]), seed=seed)
    return Strained(with_expert(bench, number, expert))


def with_expert(bench: Bench, number: int, expert: Expert) -> Bench:
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
def wrong(bench: Bench, number: int, seed: int) -> Strained:
    """The expert's weights as they are; its answers moved on to the next class, as sure as ever."""
    return Strained(bench, lambda logits: logits.roll(1, dims=-1))


@STRAINS.register("overconfident", label="over-confident answers")
def overconfident(bench: Bench, number: int, seed: int) -> Strained:
    """The expert's weights as they are; its logits SHARPER times as large."""
    return Strained(bench, lambda logits: SHARPER * logits)


def posed_under(strained: Strained, spec: str, number: int) -> Posed:
    """The fit of an objective, with the changed expert's answers for targets."""
    posed = pose(strained.bench, spec)
    if strained.retarget is None:
        return posed
    targets: list = list(expert_logits(posed.problem))
    targets[number] = [strained.retarget(logits) for logits in targets[number]]
    return replace(posed, targets=targets)


# --- what it costs the others ---------------------------------------------------------------------


def strains(
    benches: Mapping[int, Bench],
    *,
    specs: Sequence[str],
    kinds: Sequence[str],
    groupings: Sequence[str],
    rule: Rule | None = None,
) -> pd.DataFrame:
    """Every strain x objective x grouping x seed: what is left of the honest tasks.

    The n-th seed strains the n-th task. Columns: kind, objective, grouping, seed, task (the
    strained one), honest (mean over the other tasks of merged over expert accuracy, on test rows),
    cost (honest where the expert is left out, which every fit is also run for, minus this),
    coefficient (of the strained task, mean over groups), diverged (then scored where the fit
    starts). An honest expert costs the others too: that is the kind `none`.
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
                label = {"kind": kind, "objective": spec, "grouping": grouping, "seed": seed}
                label["task"] = bench.problem.vectors.tasks[number]
                rows.append({**label, **found})
    table, key = pd.DataFrame(rows), ["objective", "grouping", "seed"]
    without = table[table.kind == "left_out"].set_index(key).honest
    spared = without.loc[list(table[key].itertuples(index=False))].to_numpy()
    table = table.assign(cost=spared - table.honest)
    return table[table.kind.isin(kinds)].reset_index(drop=True)


def strain(
    bench: Bench,
    make: Callable[[], Strained],
    number: int,
    spec: str,
    grouping: str,
    rule: Rule,
) -> dict:
    """One fit beside the strained expert that `make` gives, scored on the honest tasks."""
    strained = make()
    vectors, failed = strained.bench.problem.vectors, False
    try:
        coeffs = fit(posed_under(strained, spec, number), grouping, rule.rate, rule)
    except Diverged:
        failed = True
        coeffs = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping)().detach()
    alone, tasks = expert_accuracies(bench), bench.problem.vectors.tasks
    honest = [task for n, task in enumerate(tasks) if n != number]
    found = accuracies(strained.bench, merge(vectors, coeffs, grouping), honest)
    ratios = [value / alone[task] for value, task in zip(found, honest, strict=True)]
    share = coeffs[number].mean().item() if tasks == vectors.tasks else float("nan")
    return {"honest": sum(ratios) / len(ratios), "coefficient": share, "diverged": failed}


def temperatures(
    benches: Mapping[int, Bench],
    *,
    specs: Sequence[str],
    values: Sequence[float],
    grouping: str,
    rule: Rule | None = None,
) -> pd.DataFrame:
    """Every objective x temperature x seed: objective, temperature, seed, anp (on test rows)."""
    rule, rows = rule or Rule(), []
    jobs = [(seed, spec, value) for seed in benches for spec in specs for value in values]
    for seed, spec, value in (bar := tqdm(jobs, "temperatures", leave=False)):
        bar.set_postfix_str(f"seed {seed}, {spec}, {value:g}")
        bench = benches[seed]
        found = learned(bench, spec, grouping, rule.rate, rule, value)
        done = shares(pd.DataFrame(answers(bench, found["coefficients"], grouping)))
        alone = expert_accuracies(bench).values()
        anp = sum(m / e for m, e in zip(done, alone, strict=True)) / len(done)
        label = {"objective": spec, "temperature": value, "seed": seed}
        rows.append({**label, "anp": anp, "diverged": found["diverged"]})
    return pd.DataFrame(rows)
