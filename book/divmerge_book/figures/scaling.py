"""Figures of what happens as more tasks are merged: each draws on the Axes it is given.

Tables come from `studies.scores`, `studies.additive` and `studies.task_attribution`. Colours are
seaborn's colour-blind palette, each with a marker of its own; black stands for references.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from divmerge_book.figures import PALETTE, title
from divmerge_book.figures.beyond import percent
from divmerge_book.figures.styles import LOOKS as LOOKS
from divmerge_book.figures.styles import Look, style
from divmerge_book.studies.additive import FORECASTS
from divmerge_book.studies.scores import SOURCES
from divmerge_book.studies.task_attribution import COVARIATES

SPREAD: Mapping[str, Look] = {"subsets": (0, "o"), "seeds": (1, "s"), "test rows": (7, "^")}


def by_count(ax: Axes, numbers: pd.Series | pd.Index) -> Axes:
    """An axis of numbers of tasks below, of percentages at the side."""
    ax.set_xticks(sorted(set(numbers)))
    ax.set_xlabel("tasks merged, $T$")
    percent(ax)
    return ax


def of_method(
    ax: Axes, intervals: pd.DataFrame, scores: pd.DataFrame, method: str, kept: pd.DataFrame
) -> Axes:
    """One method against T: a point per subset, the mean over them, and its interval as a band.

    intervals, kept: of `over_subsets`, of the ANP and, drawn as a broken line, of the kept margin.
    scores: of `by_subset`. Grey lines are the ANP of the other methods.
    """
    for _, rows in intervals.groupby("method", sort=False):
        ax.plot(rows["T"], rows.value, color="0.85", linewidth=1, zorder=0)
    own, first = intervals[intervals.method == method], scores.seed.iloc[0]
    some = scores[(scores.method == method) & (scores.seed == first)]
    colour = style(method)["color"]
    ax.plot(some["T"], some.anp, ".", color=colour, markersize=4, alpha=0.5)
    ax.fill_between(own["T"], own.low, own.high, color=colour, alpha=0.25, linewidth=0)
    ax.plot(own["T"], own.value, color=colour, linewidth=2)
    margin = kept[kept.method == method]
    ax.fill_between(margin["T"], margin.low, margin.high, color=colour, alpha=0.12, linewidth=0)
    ax.plot(margin["T"], margin.value, color=colour, linewidth=1.5, linestyle="--")
    ax.axhline(0, color="black", linewidth=0.5)
    ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
    ax.set_title(title(method), fontsize=9)
    return by_count(ax, own["T"])


def lines(ax: Axes, intervals: pd.DataFrame, methods: Sequence[str] | None = None) -> Axes:
    """The mean over subsets against T, a line per method; bars are 95 % intervals over subsets."""
    shown = [m for m in (methods or intervals.method.unique()) if m in set(intervals.method)]
    for place, method in enumerate(shown):
        rows = intervals[intervals.method == method]
        x = rows["T"] + 0.05 * (place - (len(shown) - 1) / 2)
        look = style(method)
        ax.vlines(x, rows.low, rows.high, color=look["color"], linewidth=1)
        ax.plot(x, rows.value, label=title(method), **look)
    return by_count(ax, intervals["T"])


def seeds(ax: Axes, table: pd.DataFrame, methods: Sequence[str] | None = None) -> Axes:
    """The mean over the same subsets at every seed: bars from the lowest to the highest seed.

    table: of `over_seeds`.
    """
    groups = table.groupby(["method", "T"], sort=False).value
    found = groups.agg(["mean", "min", "max"]).set_axis(["value", "low", "high"], axis=1)
    return lines(ax, found.reset_index(), methods)


def sources(ax: Axes, spreads: pd.DataFrame) -> Axes:
    """Standard deviation of the ANP against T by what varies: faint a method, strong their mean."""
    wide = spreads.dropna().pivot_table(index=["source", "method"], columns="T", values="sd")
    for source in SOURCES:
        if source not in wide.index:
            continue
        number, marker = SPREAD[source]
        some = wide.loc[source]
        ax.plot(some.columns, some.T, color=PALETTE[number], alpha=0.25, linewidth=0.8)
        strong = {"color": PALETTE[number], "marker": marker, "linewidth": 2, "label": source}
        ax.plot(some.columns, (some**2).mean() ** 0.5, **strong)
    ax.set_ylim(0, 1.25 * wide.max(axis=None))  # room for names
    ax.set_ylabel("standard deviation of ANP, points", fontsize=10)
    ax.legend(fontsize=9, ncols=3, loc="upper center")
    return by_count(ax, spreads["T"])


def printed(ax: Axes, table: pd.DataFrame, names: Mapping[str, str]) -> Axes:
    """A table of the paper, ANP against T: the columns in `names`, in the looks of our methods."""
    for column, method in names.items():
        ax.plot(table.index, table[column] / 100, label=column, **style(method))
    ax.set_title(table.attrs.get("heading", ""), fontsize=10)
    return by_count(ax, table.index)


# --- explanations ---------------------------------------------------------------------------------


def over_scales(ax: Axes, scores: pd.DataFrame, column: str = "anp") -> Axes:
    """A score against the coefficient that all task vectors share: a line per T, a ring at 1/T.

    scores: means of anp and kept_margin by T and scale, with `fixed` False in the rows of the
    average.
    """
    shades = sns.color_palette("cividis", scores["T"].nunique())
    for shade, (number, rows) in zip(shades, scores.groupby("T"), strict=True):
        rows = rows.sort_values("scale")
        ax.plot(rows.scale, rows[column], color=shade, marker=".", label=f"$T$ = {number}")
        mean = rows[~rows.fixed]
        ax.plot(mean.scale, mean[column], "o", markerfacecolor="none", color=shade, markersize=9)
    ax.set_xscale("log")
    ticks = sorted(scores.scale[scores.fixed].unique())
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    words = {"anp": "ANP, % of the experts", "kept_margin": "kept margin, %"}[column]
    ax.set(xlabel="coefficient of every task vector", ylabel=words)
    percent(ax)
    ax.legend(fontsize=8)
    return ax


def coefficients(ax: Axes, found: Mapping[str, pd.Series]) -> Axes:
    """Coefficients against T, a line per way to find them; black is 1/T, the average."""
    marks = ((1, "^"), (2, "h"), (0, "p"), (3, "v"))
    for (label, values), (number, marker) in zip(found.items(), marks, strict=False):
        ax.plot(values.index, values, marker=marker, color=PALETTE[number], label=label)
    numbers = np.unique(np.concatenate([values.index for values in found.values()]))
    ax.plot(numbers, 1 / numbers, color="black", linestyle="--", label="$1/T$")
    ax.set_xticks(numbers)
    ax.set_ylim(0, 1.5 * max(values.max() for values in found.values()))  # room for names
    ax.set(xlabel="tasks merged, $T$", ylabel="coefficient")
    ax.legend(fontsize=8, loc="upper right")
    return ax


def forecast(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """A task's loss in a subset against what the pairs say: a point per task and subset.

    table: of `forecasts`; the line is where the pairs are right.
    """
    shades = sns.color_palette("cividis", table["T"].nunique())
    for shade, (number, rows) in zip(shades, table.groupby("T"), strict=True):
        look = {"color": shade, "markersize": 6, "alpha": 0.6, "markeredgewidth": 0}
        ax.plot(rows[column], rows.loss, ".", label=f"$T$ = {number}", **look)
    ends = [table.loss.min(), table.loss.max()]
    ax.plot(ends, ends, color="black", linewidth=0.8, linestyle="--")
    ax.set(xlabel=f"forecast: {FORECASTS[column]}, %", ylabel="loss of a task, %")
    percent(ax)
    percent(ax, "x")
    return ax


def dots(ax: Axes, rows: pd.DataFrame, names: Mapping[str, str], key: str, value: str) -> Axes:
    """A row per name, in it a point with its interval per method.

    rows: method, the column `key`, `value`, low and high; `names` gives the rows' labels in order.
    """
    methods = list(rows.method.unique())
    for place, method in enumerate(methods):
        own = rows[rows.method == method].set_index(key).reindex(list(names))
        y = np.arange(len(names)) + 0.16 * (place - (len(methods) - 1) / 2)
        look = {**style(method), "linestyle": "none"}
        ax.hlines(y, own.low, own.high, color=look["color"], linewidth=1.2)
        ax.plot(own[value], y, label=title(method), **look)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(names)), list(names.values()), fontsize=9)
    ax.set_ylim(len(names) - 0.5, -0.5)
    return ax


def skills(ax: Axes, table: pd.DataFrame) -> Axes:
    """Share of the losses' variance that each forecast explains, over all T above 2.

    table: of `skill` for several methods. Below 0 a forecast is worse than a mean; what is below -1
    stands at the left edge.
    """
    rows = table[table["T"] == 0].rename(columns={"r2_low": "low", "r2_high": "high"})
    seen = rows.assign(**rows[["r2", "low", "high"]].clip(lower=-1))
    dots(ax, seen, FORECASTS, "forecast", "r2").set_xlim(-1.04, 1.04)
    ax.set_xlabel("$R^2$ of a task's loss")
    return ax


def correlations(ax: Axes, table: pd.DataFrame) -> Axes:
    """Rank correlation of every number with a score within T, a point with interval per method."""
    dots(ax, table, COVARIATES, "number", "rho")
    ax.set_xlim(-1.02, 1.02)
    ax.set_xlabel("rank correlation among subsets of like size")
    return ax


def parts(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every task's effect on others (bars) and its own loss (diamonds): of `shapley_values`."""
    y = np.arange(len(table))
    ax.barh(y, table.caused, color=PALETTE[0], height=0.6, label="done to others")
    ax.plot(table.suffered, y, "D", color=PALETTE[1], markersize=6, label="lost itself")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(y, table.task)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlabel("mean change, points")
    percent(ax, "x")
    return ax
