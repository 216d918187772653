"""From right answers to ANP by the number of merged tasks, with what subsets, seeds and test rows
each add to its spread.

Tables of answers are those of `scaling`: a row per merged model and task.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from divmerge_book.evaluation.report import MARGIN
from divmerge_book.evaluation.statistics import mean_interval, row_means
from divmerge_book.studies.scaling import EXPERT, JOIN, MAJORITY, unpacked

SOURCES = ("subsets", "seeds", "test rows")


def accuracy(right: str) -> float:
    """Share of right rows."""
    return float(np.mean(unpacked(right)))


def accuracies(rows: pd.DataFrame) -> pd.Series:
    """Every row's accuracy, in NumPy's numbers, also of a stored table's own kind of text."""
    return pd.Series([accuracy(right) for right in rows.right], rows.index, dtype=float)


def tasks_of(subset: str) -> list[str]:
    """The tasks of a subset's name."""
    return subset.split(JOIN)


def task_counts(rows: pd.DataFrame) -> list[int]:
    """Every row's number of merged tasks."""
    return [len(tasks_of(subset)) for subset in rows.subset]


def reference_means(answers: pd.DataFrame) -> pd.Series:
    """Accuracy of the experts and the majority class, by method and task, mean over seeds."""
    own = answers[answers.method.isin([EXPERT, MAJORITY])]
    return accuracies(own).groupby([own.method, own.task], sort=False).mean()


def counted(answers: pd.DataFrame) -> list[str]:
    """Tasks that count in the ANP: over seeds, the expert beats the majority class by MARGIN."""
    means = reference_means(answers)
    return [t for t in means[EXPERT].index if means[EXPERT, t] >= means[MAJORITY, t] + MARGIN]


def ratios(rows: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The rows of merged models with T, accuracy, ratio and kept_margin.

    ratio: accuracy over the same seed's expert's. kept_margin: how far the accuracy is above the
    majority class's, over how far the expert's is in the mean over seeds.

    rows: of `scaling` or, with a seed and a method, of `fixed`. answers: of `scaling`, for the
    experts. Tasks that do not count in the ANP are left out; T still counts them.
    """
    own = accuracies(answers[answers.method == EXPERT].set_index(["seed", "task"]))
    merged = rows[~rows.method.isin([EXPERT, MAJORITY]) & rows.task.isin(counted(answers))]
    exact = accuracies(merged)
    expert = own.loc[list(zip(merged.seed, merged.task, strict=True))].to_numpy()
    means = reference_means(answers)
    usual, least = (merged.task.map(means[name]).astype(float) for name in (EXPERT, MAJORITY))
    added = {"T": task_counts(merged), "accuracy": exact, "ratio": exact / expert}
    added["kept_margin"] = (exact - least) / (usual - least)
    return merged.assign(**added).reset_index(drop=True)


def floor(answers: pd.DataFrame) -> pd.Series:
    """By task: the ratio of the majority class of the test rows, mean over seeds."""
    means = reference_means(answers)
    return (means[MAJORITY] / means[EXPERT]).loc[counted(answers)]


def by_subset(table: pd.DataFrame) -> pd.DataFrame:
    """A row per seed, method and subset of `ratios`: T, anp, worst (ratio), kept_margin, js."""
    groups = table.groupby(["seed", "method", "subset", "T"], sort=False)
    found = groups.ratio.agg(["mean", "min"]).set_axis(["anp", "worst"], axis=1)
    means = groups[["kept_margin", "js"]].mean()
    return found.join(means).reset_index()


def over_subsets(scores: pd.DataFrame, *, statistic: str = "anp") -> pd.DataFrame:
    """The mean over subsets at the first seed, by method and T, and Student's 95 % interval.

    scores: of `by_subset`; statistic: anp, kept_margin, worst or js. Columns: method, T, subsets,
    value, low, high; NaN for a single subset. Where all subsets of a T were merged the mean is
    exact for this suite, and the interval says how far it would be from that of other tasks like
    these, if subsets were independent.
    """
    first, rows = scores[scores.seed == scores.seed.iloc[0]], []
    for (method, number), some in first.groupby(["method", "T"], sort=False):
        values = some[statistic].to_numpy()
        rows.append((method, number, len(some), values.mean(), *mean_interval(values)))
    return pd.DataFrame(rows, columns=["method", "T", "subsets", "value", "low", "high"])


def shared(scores: pd.DataFrame) -> pd.DataFrame:
    """Those rows of `by_subset` whose subset every seed merged."""
    seeds = scores.groupby("subset").seed.nunique()
    return scores[scores.subset.map(seeds) == scores.seed.nunique()]


def over_seeds(scores: pd.DataFrame, *, statistic: str = "anp") -> pd.DataFrame:
    """The mean over the subsets that all seeds merged: a row per method, T and seed, as `value`."""
    means = shared(scores).groupby(["method", "T", "seed"], sort=False)[statistic].mean()
    return means.rename("value").reset_index()


def row_errors(answers: pd.DataFrame, *, draws: int = 400) -> pd.DataFrame:
    """The standard error of every ANP from its test rows: seed, method, subset, T, error.

    Bootstrap: each draw resamples every task's test rows, the same for merged model and expert.
    """
    generator, kept, drawn = np.random.default_rng(0), counted(answers), []
    own = answers[answers.method == EXPERT].set_index(["seed", "task"]).right
    merged = answers[~answers.method.isin([EXPERT, MAJORITY]) & answers.task.isin(kept)]
    for task, some in merged.groupby("task", sort=False):
        seeds = list(some.seed.unique())
        right = [*some.right, *(own[seed, task] for seed in seeds)]
        means = row_means(np.stack([unpacked(one) for one in right], axis=1), draws, generator)[1:]
        expert = means[:, [len(some) + seeds.index(seed) for seed in some.seed]]
        drawn.append(pd.DataFrame((means[:, : len(some)] / expert).T, index=some.index))
    keys = [merged[name] for name in ("seed", "method", "subset")]
    means = pd.concat(drawn).loc[merged.index].groupby(keys, sort=False).mean()
    error = means.std(axis=1).rename("error").reset_index()
    return error.assign(T=task_counts(error))


def spreads(answers: pd.DataFrame) -> pd.DataFrame:
    """Standard deviations of the ANP by method and T, a row per source: subsets, seeds, test rows.

    subsets: over subsets at the first seed. seeds: over seeds of the same subset, root mean square
    over subsets. test rows: the error of one merge's ANP, root mean square. The first two are as
    measured: each holds the part of the third in which the merges compared differ. NaN where there
    is one subset or one seed.
    """
    scores = by_subset(ratios(answers, answers))
    first = scores[scores.seed == scores.seed.iloc[0]]
    keys = ["method", "T"]
    between = first.groupby(keys, sort=False).anp.std()
    within = shared(scores).groupby([*keys, "subset"], sort=False).anp.var()
    found = {
        "subsets": between,
        "seeds": within.groupby(keys, sort=False).mean() ** 0.5,
        "test rows": row_errors(answers).groupby(keys, sort=False).error.apply(rms),
    }
    return pd.concat(
        [sd.rename("sd").reset_index().assign(source=source) for source, sd in found.items()],
        ignore_index=True,
    )


def rms(values: pd.Series) -> float:
    """Root mean square."""
    return float((values**2).mean() ** 0.5)


def differences(
    scores: pd.DataFrame, method: str, others: Sequence[str], *, statistic: str = "anp"
) -> pd.DataFrame:
    """ANP of `method` minus that of each other, on the same subsets at the first seed, by T.

    statistic: anp, or another of `by_subset`. Columns: other, T, subsets, value, low, high (95 %,
    Student's over subsets), won (share of subsets).
    """
    first, rows = scores[scores.seed == scores.seed.iloc[0]], []
    wide = first.pivot_table(index=["T", "subset"], columns="method", values=statistic, sort=False)
    for other in others:
        gaps = wide[method] - wide[other]
        for number, some in gaps.groupby("T"):
            share, ends = float((some > 0).mean()), mean_interval(some.to_numpy())
            rows.append((other, number, len(some), some.mean(), *ends, share))
    names = ["other", "T", "subsets", "value", "low", "high", "won"]
    return pd.DataFrame(rows, columns=names)
