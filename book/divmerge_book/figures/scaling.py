"""Figures of what happens as more tasks are merged; tables of `studies.scores` and
`task_attribution`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import LOOKS as LOOKS
from divmerge_book.figures.styles import PALETTE, SOURCES, mark, methods, style
from divmerge_book.studies.task_attribution import COVARIATES, FORECASTS

SCORES = {"anp": "ANP, % of the experts", "kept_margin": "kept margin, %"}


def by_count(ax: Axes, numbers: pd.Series | pd.Index, **more) -> Axes:
    """An x axis of numbers of tasks and a y axis of percentages."""
    plot.ticks(ax, sorted(set(numbers)))
    return plot.finish(ax, "tasks merged, $T$", percent="y", **more)


def shades(numbers: pd.Series) -> dict:
    """A colour per number of tasks, from dark to bright: looks of `primitives`."""
    counts = sorted(numbers.unique())
    colours = sns.color_palette("cividis", len(counts))
    return {n: (f"$T$ = {n}", {"color": c}) for n, c in zip(counts, colours, strict=True)}


def score_curve(ax: Axes, intervals: pd.DataFrame, shown: Sequence[str] | None = None) -> Axes:
    """The mean over subsets against T, a line per method; bars are 95 % intervals over subsets."""
    looks = methods(shown or intervals.method.unique())
    plot.lines(ax, intervals, "T", "value", looks, by="method", ends=("low", "high"), step=0.05)
    return by_count(ax, intervals["T"])


def seed_curve(ax: Axes, table: pd.DataFrame, shown: Sequence[str] | None = None) -> Axes:
    """`score_curve` with bars from the lowest to the highest seed. table: of `over_seeds`."""
    return score_curve(ax, plot.spread(table, ["method", "T"], "value"), shown)


def variance_sources(ax: Axes, spreads: pd.DataFrame) -> Axes:
    """Standard deviation of the ANP against T by what varies: faint a method, strong their mean."""
    wide = spreads.dropna().pivot_table(index=["source", "method"], columns="T", values="sd")
    for source in (name for name in SOURCES if name in wide.index):
        some, look = wide.loc[source], SOURCES[source]
        ax.plot(some.columns, some.T, color=look["color"], alpha=0.25, linewidth=0.8)
        plot.line(ax, some.columns, (some**2).mean() ** 0.5, linewidth=2, label=source, **look)
    ax.set_ylim(0, 1.25 * wide.max(axis=None))  # room for names
    ax.set_ylabel("standard deviation of ANP, points", fontsize=10)
    return by_count(ax, spreads["T"], legend={"fontsize": 9, "ncols": 3, "loc": "upper center"})


def printed_curve(ax: Axes, table: pd.DataFrame, names: Mapping[str, str]) -> Axes:
    """A table of the paper, ANP against T: the columns in `names`, in the styles of our methods."""
    for column, method in names.items():
        plot.line(ax, table.index, table[column] / 100, label=column, **style(method))
    ax.set_title(table.attrs.get("heading", ""), fontsize=10)
    return by_count(ax, table.index)


# --- explanations ---------------------------------------------------------------------------------
def scale_curve(ax: Axes, scores: pd.DataFrame, column: str = "anp") -> Axes:
    """A score against the coefficient that all task vectors share: a line per T, a ring at 1/T.

    scores: means of anp and kept_margin by T and scale, with `fixed` False in the rows of the
    average.
    """
    looks = shades(scores["T"])
    plot.lines(ax, scores, "scale", column, looks, by="T", marker=".")
    plain = {n: (None, look) for n, (_, look) in looks.items()}
    ring = {"marker": "o", "markerfacecolor": "none", "markersize": 9, "alpha": 1}
    plot.scatter(ax, scores[~scores.fixed], "scale", column, plain, by="T", **ring)
    ax.set_xscale("log")
    plot.ticks(ax, sorted(scores.scale[scores.fixed].unique()))
    words = "coefficient of every task vector"
    return plot.finish(ax, words, SCORES[column], percent="y", legend=8)


def coefficient_curve(ax: Axes, found: Mapping[str, pd.Series]) -> Axes:
    """Coefficients against T, a line per way to find them; black is 1/T, the average."""
    looks = ((1, "^"), (2, "h"), (0, "p"), (3, "v"))
    for (label, values), look in zip(found.items(), looks, strict=False):
        plot.line(ax, values.index, values, label=label, **mark(*look))
    numbers = np.unique(np.concatenate([values.index for values in found.values()]))
    ax.plot(numbers, 1 / numbers, color="black", linestyle="--", label="$1/T$")
    plot.ticks(ax, numbers)
    top = 1.5 * max(values.max() for values in found.values())  # room for names
    legend = {"fontsize": 8, "loc": "upper right"}
    return plot.finish(ax, "tasks merged, $T$", "coefficient", legend=legend, ylim=(0, top))


def forecast_scatter(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """A task's loss in a subset against its forecast from pairs: a point per task and subset.

    table: of `forecasts`; on the dashed line the forecast is right.
    """
    look = {"marker": ".", "markersize": 6, "alpha": 0.6, "markeredgewidth": 0}
    plot.scatter(ax, table, column, "loss", shades(table["T"]), by="T", **look)
    ends = [table.loss.min(), table.loss.max()]
    ax.plot(ends, ends, color="black", linewidth=0.8, linestyle="--")
    return plot.finish(ax, f"forecast: {FORECASTS[column]}, %", "loss of a task, %", percent="xy")


def correlations(ax: Axes, table: pd.DataFrame) -> Axes:
    """Rank correlation of every covariate with a score within T, by method."""
    looks = methods(table.method)
    plot.forest(ax, table, COVARIATES, looks, row="number", group="method", value="rho")
    words = "rank correlation among subsets of like size"
    return plot.finish(ax, words, xlim=(-1.02, 1.02), at={0: "-"})


def task_effects(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every task's marginal effect on the others (bars) and its own loss (diamonds).

    table: of `shapley_values`.
    """
    y = np.arange(len(table))
    ax.barh(y, table.marginal_effect, color=PALETTE[0], height=0.6, label="effect on others")
    plot.intervals(ax, y, table.own_change, label="own loss", **mark(1, "D", markersize=6))
    plot.label_rows(ax, table.task)
    return plot.finish(ax, "mean change, points", percent="x", at={0: "-"})
