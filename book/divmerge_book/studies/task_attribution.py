"""Numbers of a subset that may go with its ANP, and the part that each single task plays.

Tables are those of `scores` and of `scaling.geometry`, at one seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float

from divmerge_book.evaluation.statistics import middle, pearson, ranks
from divmerge_book.studies.additive import drawn_subsets
from divmerge_book.studies.scores import tasks_of

WEIGHTS = {
    "cosine": "cosine, mean of pairs",
    "conflict": "sign conflict, mean of pairs",
    "growth": "growth of the summed length",
    "lengths": "longest over shortest",
}
BEHAVIOUR = {
    "js": "JS of the merge to the experts",
    "pairs": "loss of the pairs, mean",
    "floor": "floor: accuracy of the majority class",
}
COVARIATES = {**WEIGHTS, **BEHAVIOUR}


@dataclass(frozen=True)
class Geometry:
    """How task vectors stand to each other: products, cosines, shares of opposite signs."""

    tasks: tuple[str, ...]
    inner: Float[np.ndarray, "T T"]
    cosine: Float[np.ndarray, "T T"]
    conflict: Float[np.ndarray, "T T"]

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Geometry":
        """From a table of `scaling.geometry`."""
        tasks = tuple(dict.fromkeys(table.task))
        wide = table.pivot(index="task", columns="other").reindex(list(tasks))
        names = ("inner", "cosine", "conflict")
        squares = {name: wide[name][list(tasks)].to_numpy(dtype=float) for name in names}
        return cls(tasks, **squares)

    def traded(self, order: Sequence[int]) -> "Geometry":
        """The same vectors under each other's names."""
        cut = np.ix_(order, order)
        return replace(
            self, inner=self.inner[cut], cosine=self.cosine[cut], conflict=self.conflict[cut]
        )

    def numbers(self, subset: str) -> dict[str, float]:
        """Of a subset's task vectors: cosine, conflict, growth, lengths.

        cosine, conflict: means over pairs. growth: the length of their sum over the root of their
        summed squared lengths; 1 at right angles, the root of T where all are equal. lengths: the
        longest over the shortest.
        """
        places = [self.tasks.index(task) for task in tasks_of(subset)]
        cut, pairs = np.ix_(places, places), np.triu_indices(len(places), 1)
        squares = self.inner[cut].diagonal()
        return {
            "cosine": float(self.cosine[cut][pairs].mean()),
            "conflict": float(self.conflict[cut][pairs].mean()),
            "growth": float(np.sqrt(max(self.inner[cut].sum(), 0.0) / squares.sum())),
            "lengths": float(np.sqrt(squares.max() / squares.min())),
        }


def with_numbers(
    scores: pd.DataFrame, geometry: Geometry, floor: Mapping[str, float]
) -> pd.DataFrame:
    """One method's `by_subset` rows of two tasks or more, with a column per number beside js.

    pairs: mean over the subset's pairs of what the same method loses on them (1 minus their ANP);
    NaN where one was not merged. floor: mean of the given ratios over the subset's tasks.
    """
    kept = scores[scores["T"] > 1].reset_index(drop=True)
    lost = {frozenset(tasks_of(r.subset)): 1 - r.anp for r in kept[kept["T"] == 2].itertuples()}

    def of_pairs(tasks: list[str]) -> float:
        two = [frozenset([a, b]) for n, a in enumerate(tasks) for b in tasks[n + 1 :]]
        return float(np.mean([lost.get(pair, np.nan) for pair in two]))

    rows = [
        {
            **geometry.numbers(name),
            "pairs": of_pairs(tasks_of(name)),
            "floor": float(np.mean([floor[task] for task in tasks_of(name) if task in floor])),
        }
        for name in kept.subset
    ]
    return pd.concat([kept, pd.DataFrame(rows)], axis=1)


def places(values: np.ndarray) -> np.ndarray:
    """Ranks from -1 (the smallest) to 1; equal values share their mean rank."""
    return 2 * (ranks(values) - 1) / max(len(values) - 1, 1) - 1


def rank_correlation(sizes: np.ndarray, values: np.ndarray, anp: np.ndarray) -> float:
    """Spearman's of a number and the ANP among subsets of like size, over all sizes.

    Ranks are taken within every T that has three subsets or more with a number, so that what T
    itself says is left out. NaN where nothing varies.
    """
    ranked = []
    for size in np.unique(sizes):
        some = (sizes == size) & np.isfinite(values)
        if some.sum() > 2:
            ranked.append((places(values[some]), places(anp[some])))
    if not ranked:
        return float("nan")
    return float(pearson(*(np.concatenate(parts) for parts in zip(*ranked, strict=True))))


def columns_of(
    table: pd.DataFrame, name: str, column: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T, a number and a score. `pairs` is asked about T above 2 only, where it is a forecast."""
    sizes, values = table["T"].to_numpy(), table[name].to_numpy(dtype=float)
    asked = np.where(sizes > 2, values, np.nan) if name == "pairs" else values
    return sizes, asked, table[column].to_numpy()


def related(table: pd.DataFrame, column: str = "anp", *, draws: int = 500) -> pd.DataFrame:
    """Every number's `rank_correlation` with a score and its 95 % interval.

    table: of `with_numbers`; column: anp or kept_margin. Columns: number, rho, low, high. Bootstrap
    over subsets within T. Subsets share tasks, so the intervals are narrower than those over other
    tasks would be: see `mantel`.
    """
    samples, rows = drawn_subsets(table, draws), []
    for name in COVARIATES:
        columns = columns_of(table, name, column)
        low, high = middle(np.array([rank_correlation(*(c[s] for c in columns)) for s in samples]))
        rows.append((name, rank_correlation(*columns), float(low), float(high)))
    return pd.DataFrame(rows, columns=["number", "rho", "low", "high"])


def mantel(
    table: pd.DataFrame, geometry: Geometry, *, draws: int = 199, seed: int = 0
) -> dict[str, float]:
    """For every number of weights, the p-value of its `rank_correlation`, two-sided.

    The share of random trades of names among task vectors, the real one included, that go with the
    ANP at least as closely. Tasks trade, not subsets, which share tasks. NaN without a correlation.
    Source: Mantel 1967.
    """
    generator, sizes, anp = np.random.default_rng(seed), table["T"].to_numpy(), table.anp.to_numpy()
    real = {name: abs(rank_correlation(sizes, table[name].to_numpy(), anp)) for name in WEIGHTS}
    hits = dict.fromkeys(WEIGHTS, 1)
    for _ in range(draws):
        other = geometry.traded(generator.permutation(len(geometry.tasks)).tolist())
        found = [other.numbers(name) for name in table.subset]
        for name in WEIGHTS:
            values = np.array([numbers[name] for numbers in found])
            hits[name] += abs(rank_correlation(sizes, values, anp)) >= real[name] - 1e-12
    return {n: hits[n] / (1 + draws) if np.isfinite(real[n]) else float("nan") for n in WEIGHTS}


# --- single tasks ---------------------------------------------------------------------------------


def marginal(table: pd.DataFrame, column: str = "ratio") -> pd.DataFrame:
    """What adding a task does to those it joins: added, T (before), subset, change.

    table: of `ratios`, one method; column: ratio or kept_margin. change: mean over the tasks of
    `subset` of their value with the added one minus that without. A row for every two subsets of
    the table that differ by one task.
    """
    found = {
        frozenset(tasks_of(name)): some.set_index("task")[column]
        for name, some in table.groupby("subset", sort=False)
    }
    named = {frozenset(tasks_of(name)): name for name in table.subset.unique()}
    rows = []
    for larger, after in found.items():
        for added in tasks_of(named[larger]):
            before = found.get(larger - {added})
            if before is not None and len(before):
                change = float((after.loc[before.index] - before).mean())
                rows.append((added, len(larger) - 1, named[larger - {added}], change))
    return pd.DataFrame(rows, columns=["added", "T", "subset", "change"])


def shapley_values(table: pd.DataFrame, column: str = "ratio") -> pd.DataFrame:
    """By task: `caused`, what adding it does to others, and `suffered`, what it loses itself.

    table, column: as of `marginal`. caused: `marginal`, mean over subsets of a T and then over T,
    as in a Shapley value. suffered: its own value minus 1, averaged alike over T of two and more.
    Where the table holds all subsets both are exact. Source: Shapley 1953.
    """
    steps, own = marginal(table, column), table[table["T"] > 1]
    caused = steps.groupby(["added", "T"]).change.mean().groupby("added").mean()
    suffered = own.groupby(["task", "T"])[column].mean().groupby("task").mean() - 1
    found = pd.DataFrame({"caused": caused, "suffered": suffered})
    return found.rename_axis("task").sort_values("caused").reset_index()
