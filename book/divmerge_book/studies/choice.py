"""Which objective: every divergence and the baseline objectives, fitted under one protocol.

All fits start at 1/T, see the same unlabelled inputs in the same order, take as many steps of Adam,
and have the same few step sizes to choose from on validation rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pandas as pd
from tqdm import tqdm

from divmerge_book.evaluation.experiment import SIZES, Experiment, prepare
from divmerge_book.studies.objective_fits import (
    START,
    FitConfig,
    fit_and_predict,
    fit_result,
    objectives,
)
from divmerge_book.studies.predictions import compared, with_experts
from divmerge_book.studies.study import Experiments, study

REFERENCE = "js"


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
        fits = [fit_result(one, objective, grouping, rate, config) for one in experiments]
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
            fit = {"grouping": grouping, "objective": spec, "rate": rate}
            jobs.append({**label, **fit, "method": f"{spec}/{grouping}"})
    rows = study(fit_and_predict, experiments, jobs, config=config)
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
