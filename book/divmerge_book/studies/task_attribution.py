"""What goes with the losses of a subset: its pairs, its numbers, and the part of every task.

A loss is 1 minus a task's ratio, the share of its expert's accuracy that a merge gives up, or 1
minus its kept margin, where `column` says so. Tables are those of `scores` and `scaling.geometry`,
of one method at one seed.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from divmerge_book.evaluation.statistics import middle, pearson, ranks, reached
from divmerge_book.studies.scaling import JOIN
from divmerge_book.studies.scores import tasks_of

FORECASTS = {
    "sum": "pairs add up",
    "worst": "the worst pair decides",
    "mean": "mean of the pairs",
    "line": "line in the sum",
    "usual": "the task's usual loss",
}
WEIGHTS = {
    "cosine": "cosine, mean of pairs",
    "conflict": "sign conflict, mean of pairs",
    "growth": "growth of the summed length",
    "lengths": "longest over shortest",
}
COVARIATES = {
    **WEIGHTS,
    "js": "JS of the merge to the experts",
    "pairs": "loss of the pairs, mean",
    "floor": "floor: accuracy of the majority class",
}


# --- do the losses of pairs add up? ---------------------------------------------------------------
def pair_forecasts(table: pd.DataFrame, column: str = "ratio") -> pd.DataFrame:
    """What the pairs say that a task loses in larger subsets, beside what it does lose.

    Columns: subset, T, task, loss, and the loss alone (0 where it is unknown) plus the sum, worst
    and mean over partners of what the pairs lose beyond it. Rows without all their pairs are left
    out.
    """
    rows = table[["subset", "T", "task"]].assign(loss=1 - table[column])
    alone = rows[rows["T"] == 1].set_index("task").loss
    rows = rows.assign(alone=rows.task.map(alone).fillna(0.0).astype(float))
    pairs = rows.assign(partner=rows.subset.map(tasks_of)).explode("partner", ignore_index=True)
    pairs = pairs[pairs.partner != pairs.task]
    of_two = pairs[pairs["T"] == 2].assign(beyond=pairs.loss - pairs.alone)
    of_two = of_two[["task", "partner", "beyond"]]
    larger = pairs[pairs["T"] > 2].merge(of_two, "left", ["task", "partner"])
    groups = larger.groupby(["subset", "T", "task", "loss", "alone"], sort=False).beyond
    found = groups.agg(["sum", "max", "mean"]).set_axis(["sum", "worst", "mean"], axis=1)
    found = found[groups.count() == groups.size()].reset_index()
    said = found[["sum", "worst", "mean"]].add(found.alone, axis=0)
    return found[["subset", "T", "task", "loss"]].join(said)


def forecasts(table: pd.DataFrame, column: str = "ratio") -> pd.DataFrame:
    """`pair_forecasts` with two that are learned from the other subsets of the same T.

    line: least squares in `sum`. usual: the task's mean loss in them, or all tasks' where it is in
    none. NaN where a T has fewer than three subsets.
    """
    found = pair_forecasts(table, column).assign(line=np.nan, usual=np.nan)
    for (number, subset), own in found.groupby(["T", "subset"], sort=False):
        others = found[(found["T"] == number) & (found.subset != subset)]
        if others.subset.nunique() < 2:
            continue
        sums, loss = others["sum"], others.loss
        spread = sums.var(ddof=0)
        slope = sums.cov(loss, ddof=0) / spread if spread else 0.0
        usual = own.task.map(others.groupby("task").loss.mean()).fillna(loss.mean())
        found.loc[own.index, "line"] = loss.mean() + slope * (own["sum"] - sums.mean())
        found.loc[own.index, "usual"] = usual.astype(float)
    return found


def r_squared(loss: np.ndarray, forecast: np.ndarray) -> float:
    """Share of the variance of the losses that a forecast explains; NaN if they do not vary."""
    spread = float(((loss - loss.mean()) ** 2).sum())
    return 1 - float(((loss - forecast) ** 2).sum()) / spread if spread else float("nan")


def drawn_subsets(table: pd.DataFrame, draws: int) -> list[np.ndarray | slice]:
    """Row positions of the table as it is, and of samples of as many whole subsets of every T."""
    generator, samples = np.random.default_rng(0), [slice(None)]
    groups = [
        [rows.index.to_numpy() for _, rows in some.groupby("subset", sort=False)]
        for _, some in table.reset_index(drop=True).groupby("T", sort=False)
    ]
    for _ in range(draws):
        chosen = [(one, generator.integers(len(one), size=len(one))) for one in groups]
        samples.append(np.concatenate([one[n] for one, places in chosen for n in places]))
    return samples


def with_ends(values: Iterable[float]) -> tuple[float, float, float]:
    """The first of the values, and the middle 95 % of the others."""
    value, *drawn = map(float, values)
    return value, *map(float, middle(np.array(drawn)))


def skill(table: pd.DataFrame, *, draws: int = 500) -> pd.DataFrame:
    """How well each forecast does, for every T and, as T = 0, over all of them.

    Rows without a learned forecast are left out. Columns: forecast, T, subsets, r2, r2_low,
    r2_high, r, r_low, r_high: `r_squared` and the correlation, 95 % bootstrap intervals over
    subsets.
    """
    whole, rows = table.dropna().reset_index(drop=True), []
    for number, some in [(0, whole), *whole.groupby("T")] if len(whole) else []:
        samples, loss = drawn_subsets(some, draws), some.loss.to_numpy()
        for forecast in FORECASTS:
            row = {"forecast": forecast, "T": number, "subsets": some.subset.nunique()}
            for name, measure in (("r2", r_squared), ("r", pearson)):
                values = (measure(loss[s], some[forecast].to_numpy()[s]) for s in samples)
                ends = (name, f"{name}_low", f"{name}_high")
                row |= dict(zip(ends, with_ends(values), strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


# --- covariates of a subset -----------------------------------------------------------------------
def members(subsets: Iterable[str], tasks: Sequence[str]) -> Bool[np.ndarray, "S T"]:
    """Which tasks are in which subset."""
    return np.array([np.isin(tasks, tasks_of(subset)) for subset in subsets])


def mean_of_pairs(
    inside: Bool[np.ndarray, "S T"], square: Float[np.ndarray, "T T"]
) -> Float[np.ndarray, " S"]:
    """The mean over every subset's pairs of tasks; NaN where one of them is NaN."""
    one, count = inside.astype(float), inside.sum(1)
    apart = np.where(np.eye(len(square), dtype=bool), 0.0, square)
    total, unknown = (
        np.einsum("st,tu,su->s", one, entries, one)
        for entries in (np.nan_to_num(apart), np.isnan(apart))
    )
    return np.where(unknown > 0, np.nan, total / (count * (count - 1)))


def weight_numbers(
    inside: Bool[np.ndarray, "S T"], squares: Mapping[str, Float[np.ndarray, "T T"]]
) -> dict[str, Float[np.ndarray, " S"]]:
    """The numbers of WEIGHTS for every subset of two tasks or more.

    growth: the length of the sum of its task vectors over the root of their summed squared lengths;
    1 at right angles, the root of T where all are equal.
    """
    squared = np.diag(squares["inner"])
    total = np.einsum("st,tu,su->s", *(inside, squares["inner"], inside))
    longest, shortest = np.where(inside, squared, 0), np.where(inside, squared, np.inf)
    return {
        "cosine": mean_of_pairs(inside, squares["cosine"]),
        "conflict": mean_of_pairs(inside, squares["conflict"]),
        "growth": np.sqrt(np.maximum(total, 0.0) / (inside @ squared)),
        "lengths": np.sqrt(longest.max(1) / shortest.min(1)),
    }


def squares_of(geometry: pd.DataFrame) -> tuple[list[str], dict[str, Float[np.ndarray, "T T"]]]:
    """The tasks of a table of `scaling.geometry`, and inner, cosine and conflict as squares."""
    tasks = list(dict.fromkeys(geometry.task))
    wide = geometry.pivot(index="task", columns="other")
    names = ("inner", "cosine", "conflict")
    return tasks, {name: wide[name].loc[tasks, tasks].to_numpy(dtype=float) for name in names}


def with_numbers(
    scores: pd.DataFrame, geometry: pd.DataFrame, floor: Mapping[str, float]
) -> pd.DataFrame:
    """One method's `by_subset` rows of two tasks or more, with a column per number beside js.

    pairs: mean over the subset's pairs of 1 minus their ANP, NaN where one was not merged. floor:
    mean of the given ratios over the subset's tasks.
    """
    kept, (tasks, squares) = scores[scores["T"] > 1].reset_index(drop=True), squares_of(geometry)
    inside, lost = members(kept.subset, tasks), np.full((len(tasks), len(tasks)), np.nan)
    for two, anp in zip(inside[kept["T"] == 2], kept.anp[kept["T"] == 2], strict=True):
        lost[np.ix_(two, two)] = 1 - anp
    floors = pd.Series(floor, dtype=float)
    means = [floors.reindex(tasks_of(subset)).mean() for subset in kept.subset]
    numbers = weight_numbers(inside, squares) | {"pairs": mean_of_pairs(inside, lost)}
    return kept.assign(**numbers, floor=means)


def places(values: np.ndarray) -> np.ndarray:
    """Ranks from -1 (the smallest) to 1; equal values share their mean rank."""
    return 2 * (ranks(values) - 1) / max(len(values) - 1, 1) - 1


def rank_correlation(sizes: np.ndarray, values: np.ndarray, score: np.ndarray) -> float:
    """Spearman's of a number and a score among subsets of like size, over all sizes.

    Ranks are taken within every T with three known subsets or more. NaN where nothing varies.
    """
    known = np.isfinite(values)
    groups = [known & (sizes == size) for size in np.unique(sizes)]
    groups = [some for some in groups if some.sum() > 2]
    sides = ([places(side[some]) for some in groups] for side in (values, score))
    return float(pearson(*map(np.concatenate, sides))) if groups else float("nan")


def related(table: pd.DataFrame, column: str = "anp", *, draws: int = 500) -> pd.DataFrame:
    """Every number's `rank_correlation` with a score and its interval: number, rho, low, high.

    `pairs` counts above T = 2 only, where it is a forecast. 95 % bootstrap over subsets within T,
    which share tasks: intervals over other tasks would be wider, see `mantel`.
    """
    sizes, score = table["T"].to_numpy(), table[column].to_numpy()
    samples, rows = drawn_subsets(table, draws), []
    for name in COVARIATES:
        values = table[name].to_numpy(dtype=float)
        values = np.where(sizes > 2, values, np.nan) if name == "pairs" else values
        found = (rank_correlation(sizes[s], values[s], score[s]) for s in samples)
        rows.append((name, *with_ends(found)))
    return pd.DataFrame(rows, columns=["number", "rho", "low", "high"])


def mantel(
    table: pd.DataFrame, geometry: pd.DataFrame, *, draws: int = 199, seed: int = 0
) -> dict[str, float]:
    """For every number of weights, the two-sided p-value of its `rank_correlation` with the ANP.

    The share of random permutations of the tasks' names, the real one included, that go with the
    ANP at least as closely; NaN without a correlation. Source: Mantel 1967.
    """
    generator, (tasks, squares) = np.random.default_rng(seed), squares_of(geometry)
    inside, sizes, anp = members(table.subset, tasks), table["T"].to_numpy(), table.anp.to_numpy()

    def correlations(order: np.ndarray) -> list[float]:
        traded = {name: square[np.ix_(order, order)] for name, square in squares.items()}
        numbers = weight_numbers(inside, traded)
        return [abs(rank_correlation(sizes, numbers[name], anp)) for name in WEIGHTS]

    trades = [generator.permutation(len(tasks)) for _ in range(draws)]
    null = np.array([correlations(order) for order in (np.arange(len(tasks)), *trades)])
    return dict(zip(WEIGHTS, reached(null[0], null).tolist(), strict=True))


# --- single tasks ---------------------------------------------------------------------------------
def marginal(table: pd.DataFrame, column: str = "ratio") -> pd.DataFrame:
    """What adding a task does to those it joins: added, T (before), subset (before), change.

    A row for every two subsets of the table that differ by one task; change: mean over the tasks of
    `subset`.
    """
    own = table[["subset", "task", column]]
    steps = own.assign(added=own.subset.map(tasks_of)).explode("added", ignore_index=True)
    pairs = zip(steps.subset, steps.added, strict=True)
    steps["subset"] = [JOIN.join(t for t in tasks_of(s) if t != added) for s, added in pairs]
    both = steps.merge(own, on=["subset", "task"], suffixes=("", "_before"))
    both = both.assign(T=[len(tasks_of(subset)) for subset in both.subset])
    both["change"] = both[column] - both[f"{column}_before"]
    return both.groupby(["added", "T", "subset"], sort=False).change.mean().reset_index()


def shapley_values(table: pd.DataFrame, column: str = "ratio") -> pd.DataFrame:
    """By task: `marginal_effect`, on the tasks it joins, and `own_change`, its value minus 1.

    Means over subsets of a T and then over T (of two and more), as in a Shapley value; exact where
    the table holds all subsets. Source: Shapley 1953.
    """
    steps, own = marginal(table, column), table[table["T"] > 1]
    effect = steps.groupby(["added", "T"]).change.mean().groupby("added").mean()
    value = own.groupby(["task", "T"])[column].mean().groupby("task").mean()
    found = pd.DataFrame({"marginal_effect": effect, "own_change": value - 1})
    return found.rename_axis("task").sort_values("marginal_effect").reset_index()
