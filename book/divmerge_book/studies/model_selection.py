"""The tables of `random_merges`: correlations over models, and what choosing by them costs.

Intervals of correlations resample models within a seed of experts, which are as they are; those of
a choice are over seeds.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy import special

from divmerge_book.evaluation.statistics import CORRELATIONS, mean_interval, middle
from divmerge_book.studies.margins import scored
from divmerge_book.studies.random_merges import MEASURES

AMONG = {"all": 1.0, "best half": 0.5, "best tenth": 0.1}  # share kept, by validation ANP
CRITERIA = (*MEASURES, "validation")  # what a model may be chosen by; the last one needs labels
FEWEST = 5  # models that a correlation is worked out over
SET = ["sampler", "experts", "seed"]  # the models that a choice is made among


def model_scores(
    models: pd.DataFrame, cross: pd.DataFrame, majority: pd.Series | None = None
) -> pd.DataFrame:
    """Every model as one row: MEASURES (nats, summed over tasks), and ANP on two splits.

    Columns: SET, model, MEASURES, anp (on test rows), validation (ANP on validation rows); with a
    majority (share of test rows, by task) also kept_margin and below (how many tasks). cross has
    the experts' accuracies.
    """
    own = cross[cross.task == cross.model].set_index(["seed", "task"])
    own = own.loc[list(zip(models.seed, models.task, strict=True))]
    expert, known = own.accuracy.to_numpy(), own.validation.to_numpy()
    ratios = {"anp": models.accuracy / expert, "validation": models.validation / known}
    table = models.assign(**ratios, expert=expert)
    how = {**dict.fromkeys(MEASURES, "sum"), "anp": "mean", "validation": "mean"}
    if majority is not None:
        table, how = scored(table, majority), how | {"kept_margin": "mean", "below": "sum"}
    return table.groupby([*SET, "model"], sort=False).agg(how).reset_index()


def negative_divergence(table: pd.DataFrame, criterion: str) -> np.ndarray:
    """Minus a measure, so that high should be good; validation accuracy as it is."""
    values = table[criterion].to_numpy()
    return values if criterion == "validation" else -values


def top_models(whole: pd.DataFrame, among: str) -> np.ndarray:
    """Numbers of the rows with the highest validation ANP: the share that AMONG says."""
    count = round(AMONG[among] * len(whole))
    return np.argsort(-whole.validation.to_numpy(), kind="stable")[:count]


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """The mean along axis 1 over what is not NaN; NaN where nothing is defined."""
    count = np.isfinite(values).sum(1)
    return np.where(count, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)


def averaged(parts: Sequence[np.ndarray]) -> pd.DataFrame:
    """Means of `[criteria, goals, 1 + draws]` over goals and parts, by criterion, with intervals.

    These are the middle 95 % of the draws in which all criteria are defined.
    """
    every = mean_of_defined(np.concatenate(parts, axis=1))  # [criteria, 1 + draws]
    found = pd.DataFrame({"criterion": CRITERIA})
    for values, names in (
        (every, ("value", "low", "high")),
        (every - every[0], ("lead", "lead_low", "lead_high")),
    ):
        drawn = values[:, 1:][:, np.isfinite(values[:, 1:]).all(0)]
        found[list(names)] = np.stack([values[:, 0], *middle(drawn.T)], axis=1)
    return found


def over_models(
    models: pd.DataFrame,
    cross: pd.DataFrame,
    majority: pd.Series | None = None,
    *,
    draws: int = 200,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Correlations over models of closeness and success: by task, and averaged.

    Closeness is minus a measure, or the accuracy on labelled validation rows; success is a task's
    test accuracy, or, for the goals `sum` and (with a majority) `kept_margin`, the ANP and the kept
    margin, with closeness summed over tasks. among: of AMONG, where these are FEWEST models or
    more. First table: SET, among, how, task, criterion, value. Second: means over tasks, sets of
    experts and seeds without NaN: sampler, among, how, goal (`task` or another), criterion, value,
    low, high (95 %, resampled models), lead, lead_low, lead_high (value minus js's, paired).
    """
    scores = {"sum": "anp"} | ({} if majority is None else {"kept_margin": "kept_margin"})
    whole = dict(iter(model_scores(models, cross, majority).groupby(SET, sort=False)))
    each, parts = [], defaultdict(list)
    for key, some in models.groupby(SET, sort=False):
        tasks, sums = list(dict.fromkeys(some.task)), whole[key][list(scores.values())]
        wide = some.pivot(index="task", columns="model", values=[*CRITERIA, "accuracy"]).loc[tasks]
        close = np.stack([negative_divergence(wide, name) for name in CRITERIA])
        totals = [close.sum(1, keepdims=True)] * len(scores)
        close = np.concatenate([close, *totals], axis=1)  # [criteria, goals, M]
        goals = np.concatenate([wide["accuracy"], sums.T])  # [goals, M]
        places = {"task": slice(len(tasks))}
        places |= {name: slice(n, n + 1) for n, name in enumerate(scores, start=len(tasks))}
        for among, how in product(AMONG, CORRELATIONS):
            rows = top_models(whole[key], among)
            if (count := len(rows)) < FEWEST:
                continue
            drawn = np.random.default_rng(seed).integers(count, size=(draws, count))
            rows = rows[np.concatenate([np.arange(count)[None], drawn])]  # [1 + draws, count]
            found = CORRELATIONS[how](close[..., rows], goals[:, rows])
            names = {"index": "criterion", "columns": "task"}
            table = pd.DataFrame(found[..., 0], CRITERIA, [*tasks, *scores]).rename_axis(**names)
            labels = dict(zip(SET, key, strict=True))
            long = table.stack().rename("value").reset_index()
            each.append(long.assign(**labels, among=among, how=how))
            for goal, place in places.items():
                parts[labels["sampler"], among, how, goal].append(found[:, place])
    labels = ["sampler", "among", "how", "goal"]
    means = [averaged(p).assign(**dict(zip(labels, k, strict=True))) for k, p in parts.items()]
    return pd.concat(each, ignore_index=True), pd.concat(means, ignore_index=True)


def best_of_n_probability(count: int, drawn: int) -> np.ndarray:
    """How likely the model of each rank is the best of `drawn` taken without replacement, `[M]`.

    The best has rank 0. Raises ValueError unless 1 <= drawn <= count.
    """
    if not 1 <= drawn <= count:
        raise ValueError(f"of {count} models 1 to {count} can be drawn, got {drawn}")
    worse = count - 1 - np.arange(count)  # the others are drawn out of these
    return special.comb(worse, drawn - 1) / special.comb(count, drawn)


def choices(whole: pd.DataFrame, counts: Sequence[int] | None = None) -> pd.DataFrame:
    """What the model is like that a criterion chooses out of `candidates` random ones of a set.

    An exact mean over all sets of candidates. Columns: SET, candidates, criterion, anp, rank (among
    all, 1 is best), and kept_margin and below where `whole` has them. Criteria: CRITERIA; `test`,
    the highest ANP on test rows, which nobody knows; `none`, the mean of all models. counts: of
    candidates, those above the number of models left out; None: all models.
    """
    rows = []
    for key, some in whole.groupby(SET, sort=False):
        labels = dict(zip(SET, key, strict=True))
        reached = some.assign(rank=some.anp.rank(ascending=False, method="min"))
        names = ["anp", "rank", "kept_margin", "below"]
        reached = reached[[name for name in names if name in reached]].astype(float)
        scores = {name: negative_divergence(some, name) for name in CRITERIA}
        scores["test"] = some.anp.to_numpy()
        for count in [len(some)] if counts is None else [n for n in counts if n <= len(some)]:
            label = {**labels, "candidates": count}
            chance = best_of_n_probability(len(some), count)
            for name, score in scores.items():
                values = chance @ reached.iloc[np.argsort(-score, kind="stable")].to_numpy()
                found = dict(zip(reached.columns, values, strict=True))
                rows.append({**label, "criterion": name, **found})
            rows.append({**label, "criterion": "none", **reached.mean()})
    return pd.DataFrame(rows)


def selection_regret(whole: pd.DataFrame) -> pd.DataFrame:
    """What a choice among all models of a set costs against the best by test, in points of ANP.

    Means over the sets of a seed, then over seeds. The best by test is the best of noisy scores, so
    every regret is somewhat too large. Columns: sampler, criterion, anp (%), regret, low, high
    (Student's 95 % interval over seeds of experts, NaN for one), rank (1 is best), models (in the
    smallest set), and kept_margin (%) and below where `whole` has them.
    """
    table, keys = choices(whole), ["sampler", "criterion"]
    best = table[table.criterion == "test"].set_index(SET).anp.rename("best")
    table = table[table.criterion.isin(CRITERIA)].join(best, on=SET)
    table = table.assign(regret=table.best - table.anp).rename(columns={"candidates": "models"})
    percent = [name for name in ("anp", "regret", "kept_margin") if name in table]
    table[percent] *= 100
    means = dict.fromkeys([*percent, "rank", *(n for n in ["below"] if n in table)], "mean")
    seeds = table.groupby([*keys, "seed"], sort=False).agg(means | {"models": "min"})
    groups = seeds.groupby(keys, sort=False)
    ends = np.array([mean_interval(regret.to_numpy()) for _, regret in groups.regret])
    found = groups.agg(means | {"models": "min"}).reset_index()
    return found.assign(low=ends[:, 0], high=ends[:, 1])


def squares(cross: pd.DataFrame, measure: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Closeness and accuracy of every seed's experts, `[T, T]`: rows tasks, columns models."""
    for _, some in cross.groupby("seed", sort=False):
        tasks = list(dict.fromkeys(some.task))
        wide = some.pivot(index="task", columns="model").loc[tasks]
        yield -wide[measure][tasks].to_numpy(), wide["accuracy"][tasks].to_numpy()
