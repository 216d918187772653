"""From right answers to ANP by the number of merged tasks, and the sources of its variance.

Tables of answers are those of `scaling`: a row per merged model and task.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from divmerge_book.evaluation import stored_tables
from divmerge_book.evaluation.report import MARGIN
from divmerge_book.evaluation.statistics import mean_interval, row_means
from divmerge_book.studies.scaling import EXPERT, JOIN, MAJORITY, unpacked

SOURCES = ("subsets", "seeds", "test rows")


def tasks_of(subset: str) -> list[str]:
    """The tasks of a subset's name."""
    return subset.split(JOIN)


def accuracies(rows: pd.DataFrame) -> pd.Series:
    """Every row's accuracy."""
    return pd.Series([np.mean(unpacked(right)) for right in rows.right], rows.index, dtype=float)


def reference_means(answers: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of the experts and of the majority class, means over seeds; a row per task."""
    own = answers[answers.method.isin([EXPERT, MAJORITY])]
    table = pd.DataFrame({"task": own.task, "method": own.method, "value": accuracies(own)})
    return table.pivot_table("value", "task", "method", sort=False)


def floor(answers: pd.DataFrame) -> pd.Series:
    """The majority class's accuracy over the expert's, means over seeds, by counted task.

    A task counts in the ANP where its expert beats the majority class by MARGIN. Raises ValueError
    where none does.
    """
    means = reference_means(answers)
    counted = means[means[EXPERT] >= means[MAJORITY] + MARGIN]
    if counted.empty:
        raise ValueError(
            f"no expert of {', '.join(means.index)} beats the majority class by "
            f"{100 * MARGIN:.0f} points, so no task counts in the ANP; give other tasks, or a "
            f"larger size, which trains them longer"
        )
    return counted[MAJORITY] / counted[EXPERT]


def merged_rows(rows: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The rows of merged models on counted tasks, with T, which counts the other tasks too."""
    merged = rows[~rows.method.isin([EXPERT, MAJORITY]) & rows.task.isin(floor(answers).index)]
    return merged.assign(T=[len(tasks_of(subset)) for subset in merged.subset])


def ratios(rows: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The rows of merged models on counted tasks with T, accuracy, ratio and kept_margin.

    rows: of `scaling` or, with a method, of `fixed`; answers: of `scaling`, for the
    experts. ratio: over the same seed's expert's accuracy. kept_margin: accuracy above the majority
    class's over the expert's, mean over seeds, above it.
    """
    own = answers[answers.method == EXPERT].set_index(["seed", "task"])
    merged, means = merged_rows(rows, answers), reference_means(answers)
    expert = accuracies(own).loc[list(zip(merged.seed, merged.task, strict=True))].to_numpy()
    usual, least = (merged.task.map(means[name]).astype(float) for name in (EXPERT, MAJORITY))
    exact = accuracies(merged)
    scores = {"ratio": exact / expert, "kept_margin": (exact - least) / (usual - least)}
    return merged.assign(accuracy=exact, **scores).reset_index(drop=True)


def by_subset(table: pd.DataFrame) -> pd.DataFrame:
    """A row per seed, method and subset of `ratios`: T, anp, worst (ratio), kept_margin, js."""
    groups = table.groupby(["seed", "method", "subset", "T"], sort=False)
    names = {"anp": ("ratio", "mean"), "worst": ("ratio", "min")}
    return groups.agg(**names, kept_margin=("kept_margin", "mean"), js=("js", "mean")).reset_index()


def first_seed(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed, which merged all subsets."""
    return scores[scores.seed == scores.seed.iloc[0]]


def shared(scores: pd.DataFrame) -> pd.DataFrame:
    """Those rows of `by_subset` whose subset every seed merged."""
    seeds = scores.groupby("subset").seed.nunique()
    return scores[scores.subset.map(seeds) == scores.seed.nunique()]


def with_interval(table: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """The groups' number of subsets, and the mean of a column with Student's 95 % interval."""
    groups = table.groupby(list(by), sort=False)[column]
    found = groups.agg(subsets="size", value="mean").reset_index()
    ends = [mean_interval(values.to_numpy()) for _, values in groups]
    return found.assign(**dict(zip(("low", "high"), np.reshape(ends, (-1, 2)).T, strict=True)))


def over_subsets(scores: pd.DataFrame, *, statistic: str = "anp") -> pd.DataFrame:
    """The mean over subsets at the first seed: method, T, subsets, value, low, high.

    statistic: anp, kept_margin, worst or js. The 95 % interval, NaN for a single subset, is for
    other tasks like these, if subsets were independent: where all subsets were merged the mean is
    exact for this suite.
    """
    return with_interval(first_seed(scores), ["method", "T"], statistic)


def stored_means(path: Path) -> pd.DataFrame:
    """`over_subsets` of the answers stored at `path`."""
    rows = stored_tables.load(path)[0]["answers"]
    return over_subsets(by_subset(ratios(rows, rows)))


def by_scale(curves: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Means over subsets and seeds: anp, kept_margin by T, fixed (False: the average), scale.

    curves: of `scaling.fixed`, with a method; answers: of `scaling`.
    """
    keys, tried = ["T", "fixed", "scale"], ratios(curves, answers).rename(columns={"ratio": "anp"})
    per = tried.groupby([*keys, "subset"])[["anp", "kept_margin"]].mean()
    return per.groupby(keys).mean().reset_index()


def over_seeds(scores: pd.DataFrame, *, statistic: str = "anp") -> pd.DataFrame:
    """The mean over the subsets that all seeds merged: a row per method, T and seed, as `value`."""
    groups = shared(scores).groupby(["method", "T", "seed"], sort=False)
    return groups[statistic].mean().rename("value").reset_index()


def differences(
    scores: pd.DataFrame, method: str, others: Sequence[str], *, statistic: str = "anp"
) -> pd.DataFrame:
    """A statistic of `method` minus that of each other, on the same subsets at the first seed.

    Columns: other, T, subsets, value, low, high (Student's 95 %), won (share of subsets).
    """
    wide = first_seed(scores).pivot_table(statistic, ["T", "subset"], "method", sort=False)
    gaps = -wide[list(others)].sub(wide[method], axis=0)
    gaps = gaps.melt(var_name="other", value_name="gap", ignore_index=False).reset_index()
    won = (gaps.gap > 0).groupby([gaps.other, gaps["T"]]).mean().rename("won")
    return with_interval(gaps, ["other", "T"], "gap").join(won, on=["other", "T"])


def row_errors(answers: pd.DataFrame, *, draws: int = 400) -> pd.DataFrame:
    """The standard error of every ANP from its test rows: seed, method, subset, T, error.

    Bootstrap over every task's test rows, the same for merged model and expert.
    """
    generator, merged, drawn = np.random.default_rng(0), merged_rows(answers, answers), []
    own = answers[answers.method == EXPERT].set_index(["seed", "task"]).right
    for task, some in merged.groupby("task", sort=False):
        seeds = list(some.seed.unique())
        right = [*some.right, *(own[seed, task] for seed in seeds)]
        means = row_means(np.stack([unpacked(one) for one in right], axis=1), draws, generator)[1:]
        expert = means[:, [len(some) + seeds.index(seed) for seed in some.seed]]
        drawn.append(pd.DataFrame((means[:, : len(some)] / expert).T, index=some.index))
    keys = [merged[name] for name in ("seed", "method", "subset", "T")]
    means = pd.concat(drawn).loc[merged.index].groupby(keys, sort=False).mean()
    return means.std(axis=1).rename("error").reset_index()


def spreads(answers: pd.DataFrame) -> pd.DataFrame:
    """Standard deviations (`sd`) of the ANP by source, method and T.

    subsets: over subsets at the first seed. seeds: over seeds of the same subset, root mean square
    over subsets. test rows: the error of one merge's ANP, root mean square; the first two contain
    it in part. NaN where there is one subset or one seed.
    """
    scores, errors, keys = by_subset(ratios(answers, answers)), row_errors(answers), ["method", "T"]
    variances = {
        "subsets": first_seed(scores).groupby(keys, sort=False).anp.var(),
        "seeds": shared(scores).groupby([*keys, "subset"], sort=False).anp.var(),
        "test rows": errors.set_index(keys).error ** 2,
    }
    means = {name: values.groupby(keys, sort=False).mean() for name, values in variances.items()}
    return (pd.concat(means, names=["source"]) ** 0.5).rename("sd").reset_index()
