"""Which objective: every divergence, and what stands beside divergences, fitted under one rule.

All fits start at 1/T, see the same unlabelled inputs in the same order, take as many steps of Adam,
and have the same few step sizes to choose from on validation rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pandas as pd
from tqdm import tqdm

from divmerge_book.evaluation.benchmark import references
from divmerge_book.evaluation.experiment import SIZES, Experiment, prepare
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.studies.objective_fits import Rule, answers, learned, objectives
from divmerge_book.studies.predictions import (
    BELOW,
    corrected,
    estimates,
    packed,
    report_of,
    samples,
    scored,
)

REFERENCE = "js"


def middlemost(counts: Sequence[int]) -> int:
    return sorted(counts)[len(counts) // 2]


@dataclass(frozen=True)
class Effort:
    """How much a size runs.

    specs, groupings, counts: of `ablation`. inputs: unlabelled rows per task. validation, test:
    rows per task. stressed, kinds, temperatures: of `stress`. watched: objectives whose course is
    noted, at `followed` seeds and every so many steps.
    """

    specs: tuple[str, ...]
    groupings: tuple[str, ...]
    counts: tuple[int, ...]
    inputs: int
    validation: int
    test: int
    rule: Rule
    stressed: tuple[str, ...]
    kinds: tuple[str, ...]
    temperatures: tuple[float, ...]
    watched: tuple[str, ...]
    followed: int = 1
    every: int = 4

    @property
    def middle(self) -> int:
        """The number of tasks at which step sizes are chosen and everything is strained."""
        return middlemost(self.counts)

    def prepared(
        self, size: str, suite: str, tasks: Sequence[str], seeds: Sequence[int], **options: str
    ) -> dict[int, Experiment]:
        """The suite's benches by seed, with as many rows as this effort asks for."""
        rows = {"merge_rows": self.inputs, "validation_rows": self.validation}
        own = replace(SIZES[size], **rows, test_rows=self.test, precision="float32")
        tasks = list(tasks) or None
        return {seed: prepare(suite, tasks, size=own, seed=seed, **options) for seed in seeds}


EFFORTS = {
    "smoke": Effort(
        specs=("js", "kl", "entropy", "labels"),
        groupings=("task",),
        counts=(2,),
        inputs=8,
        validation=30,
        test=60,
        rule=Rule(epochs=2, rates=(3e-2,)),
        stressed=("js", "kl"),
        kinds=("none", "wrong"),
        temperatures=(1.0, 4.0),
        watched=("js", "kl"),
    ),
    "default": Effort(
        specs=("js", "kl", "reverse_kl", "squared_l2", "hidden_cosine", "entropy", "labels"),
        groupings=("task", "layer"),
        counts=(2,),
        inputs=16,
        validation=50,
        test=150,
        rule=Rule(),
        stressed=("js", "kl"),
        kinds=("none", "noise", "wrong", "overconfident"),
        temperatures=(1.0, 4.0),
        watched=("js", "kl", "hidden_cosine", "entropy", "labels"),
    ),
    "full": Effort(
        specs=tuple(objectives()),
        groupings=("task", "block", "layer"),
        counts=(2, 4, 8),
        inputs=24,
        validation=50,
        test=150,
        rule=Rule(),
        stressed=("js", "kl", "reverse_kl", "squared_l2", "logit_mse"),
        kinds=("none", "noise", "permuted", "wrong", "overconfident"),
        temperatures=(1.0, 2.0, 4.0, 8.0),
        watched=tuple(objectives()),
        followed=2,
        every=6,
    ),
}


def chosen_rate(benches: Sequence[Experiment], spec: str, grouping: str, rule: Rule) -> float:
    """The step size with the highest validation ANP, mean over benches; of equal ones the first."""

    def score(rate: float) -> float:
        found = [learned(bench, spec, grouping, rate, rule)["validation"] for bench in benches]
        return sum(found) / len(found)

    return max(rule.rates, key=score)


def start(bench: Experiment, label: Mapping) -> list[dict]:
    """Rows of the method `start`: the merge at 1/T, where every fit begins."""
    share = [1 / len(bench.experts)] * len(bench.experts)
    rows = answers(bench, [[value] for value in share], "task")
    return [{**label, **row, "method": "start"} for row in rows]


def ablation(
    benches: Mapping[int, Experiment],
    *,
    specs: Sequence[str],
    groupings: Sequence[str],
    counts: Sequence[int],
    rule: Rule | None = None,
) -> dict[str, pd.DataFrame]:
    """Every objective x grouping x number of tasks x seed: predictions (`scores`) and `fits`.

    benches: by seed, of all tasks; counts: how many of them, from the first on. The step size is
    chosen once for every objective and grouping, at the middle count, over all seeds: few rows of
    one seed would choose by luck, and bad luck of js would be good luck of all others. Scores:
    what `summary` reads, for the search `searched`, and for `same`, where all take rule.rate, at
    that count.
    Fits: search, count, grouping, objective, seed, rate, validation (ANP), diverged. Raises
    ValueError where js, the reference of all differences, is missing.
    """
    rule = rule or Rule()
    if REFERENCE not in specs:
        raise ValueError(f"differences are from {REFERENCE!r}; add it to {list(specs)}")
    middle, (tasks, *_) = middlemost(counts), [b.problem.vectors.tasks for b in benches.values()]
    looked = [bench.select(tasks[:middle]) for bench in benches.values()]
    pairs = list(product(groupings, specs))
    rates = {
        (grouping, spec): chosen_rate(looked, spec, grouping, rule)
        for grouping, spec in tqdm(pairs, "step sizes", leave=False)
    }
    jobs = [("searched", count, seed) for count in counts for seed in benches]
    jobs += [("same", middle, seed) for seed in benches]
    rows, fits = [], []
    for search, count, seed in (bar := tqdm(jobs, "objectives", leave=False)):
        bench = benches[seed].select(tasks[:count])
        label = {"search": search, "count": count, "seed": seed}
        rows += [row for row in references(bench, label) if row["method"] == "expert"]
        rows += start(bench, label)
        for grouping, spec in pairs:
            bar.set_postfix_str(f"{count} tasks, seed {seed}, {spec}, per {grouping}")
            rate = rates[grouping, spec] if search == "searched" else rule.rate
            found = learned(bench, spec, grouping, rate, rule)
            method = {"method": f"{spec}/{grouping}"}
            done = answers(bench, found["coefficients"], grouping)
            rows += [{**label, **row, **method} for row in done]
            what = {"search": search, "count": count, "grouping": grouping, "objective": spec}
            kept = {name: found[name] for name in ("validation", "diverged")}
            fits.append({**what, "seed": seed, "rate": rate, **kept})
    return {"scores": packed(rows), "fits": pd.DataFrame(fits)}


def summary(table: pd.DataFrame, *, draws: int = 2000) -> pd.DataFrame:
    """Both scores of every `objective/grouping`, and differences from js of that grouping.

    table: predictions, by search and count. Columns: search, count, objective, grouping, and those
    of `predictions.compared`, with 95 % paired intervals over seeds and test rows; p is two-sided,
    NaN for js itself, and corrected within a search. The merge at 1/T, where all fits start, is the
    objective `start`, ungrouped, without differences.
    """
    found = []
    for (search, count), some in table.groupby(["search", "count"], sort=False):
        report = report_of(some)
        sampled, below = samples(report, draws=draws), report.below_majority().set_index("method")
        for method in some.method[some.method != "expert"].unique():
            spec, _, grouping = method.partition("/")
            row = estimates(sampled, method, f"{REFERENCE}/{grouping}" if grouping else None)
            label = {"search": search, "count": count, "objective": spec, "grouping": grouping}
            found.append({**label, **row, **below.loc[method, BELOW]})
    parts = [part for _, part in pd.DataFrame(found).groupby("search", sort=False)]
    return pd.concat(map(corrected, parts), ignore_index=True)


def compared(measured: ResultTable) -> ResultTable:
    """A run of `ablation` with its scores; those stored without predictions under today's names."""
    done = scored(measured, {}, summary)
    old = {f"difference_{end}": f"from_{end}" for end in ("low", "high")}
    return replace(done, tables={**done.tables, "scores": done["scores"].rename(columns=old)})
