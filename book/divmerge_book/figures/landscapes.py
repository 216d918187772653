"""Figures of planes, lines and costs between experts; tables of `studies.landscapes` and
`pairwise_interference`. Every function draws on the Axes it is given and returns it.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import mark, style, title
from divmerge_book.studies.pairwise_interference import RULES, matrix

# column of the plane's table -> words, colour map, unit (None: nats), lowest, highest
SHADES: Mapping[str, tuple[str, str, str | None, float, float | None]] = {
    "anp": ("ANP", "viridis", "%", 0.3, 1.0),
    "kept_margin": ("kept margin", "viridis", "%", -1.0, 1.0),
    "js": ("JS, sum of both tasks", "viridis_r", None, 0.0, None),
    "disagreement": (r"$\xi$, share of answers", "magma_r", "%", 0.0, 1.0),
    "apart": (r"$\xi$, by JS", "magma_r", None, 0.0, None),
}
MARKS = ("average", "task_arithmetic", "adamerging/task", "divmerge/task")
UNITS = {"accuracy": "accuracy lost, points", "js": "JS from expert $i$, nats"}


def plane(ax: Axes, table: pd.DataFrame, column: str, *, colorbar: bool = True) -> Axes:
    """One measure over the two coefficients of a pair: a coloured square per point measured.

    table: of `planes`, for one pair; column: anp, kept_margin, js, disagreement or apart. Stars are
    the experts and the cross is the base.
    """
    words, shades, unit, low, high = SHADES[column]
    wide = table.pivot(index="l2", columns="l1", values=column)
    factor = 100 if unit else 1
    high = float(table[column].max()) if high is None else high
    image = ax.pcolormesh(
        wide.columns, wide.index, factor * wide, shading="nearest", cmap=shades,
        vmin=factor * low, vmax=factor * high, rasterized=True,
    )  # fmt: skip
    if colorbar:
        ends = {"anp": "min", "kept_margin": "min", "disagreement": "max"}.get(column, "neither")
        ax.figure.colorbar(image, ax=ax, label=f"{words}, {unit or 'nats'}", extend=ends)
    first, second = table.pair.iloc[0].split("+")
    ax.plot([1, 0], [0, 1], "*", color="white", markeredgecolor="black", markersize=13)
    ax.plot(0, 0, "X", color="white", markeredgecolor="black", markersize=8)
    ax.set(xlabel=f"$\\lambda$ of {first}", ylabel=f"$\\lambda$ of {second}", aspect="equal")
    ax.set(xticks=[0, 0.5, 1, 1.5], yticks=[0, 0.5, 1, 1.5])
    ax.grid(visible=False)
    return ax


def end_points(ax: Axes, marks: pd.DataFrame) -> Axes:
    """Where the methods end on a plane, and the paths of DivMerge's and AdaMerging's fits.

    marks: of `studies.landscapes.marks`, for one pair.
    """
    for method in MARKS:
        look = style(method)
        steps = marks[marks.method == method].sort_values("step")
        if len(steps) > 1:
            ax.plot(steps.l1, steps.l2, color="black", linewidth=2.6)
            ax.plot(steps.l1, steps.l2, color=look["color"], linewidth=1.4)
        end = steps.iloc[-1]
        look |= {"markeredgecolor": "black", "markersize": 8, "linestyle": "none"}
        ax.plot(end.l1, end.l2, label=title(method), **look)
    return ax


def cost_map(ax: Axes, table: pd.DataFrame, column: str, *, rule: str = "added") -> Axes:
    """What expert j (column) costs task i (row): points of accuracy, or JS in hundredths of a nat.

    table: of `costs`. Red is a cost, blue a gain; the range is the same for every rule.
    """
    wide = 100 * matrix(table, rule, column)
    limit = 100 * float(table[column].abs().quantile(0.97))
    label = {**UNITS, "js": "JS from expert $i$, nats / 100"}[column]
    shades = (
        {"cmap": "vlag", "vmin": -limit} if column == "accuracy" else {"cmap": "Reds", "vmin": 0}
    )
    plot.heat_map(ax, wide, label=label, rotation=90, fmt=".0f", square=True, vmax=limit, **shades)
    ax.set_facecolor("0.9")
    return plot.finish(ax, "expert $j$ added", "damaged task $i$")


def cost_decomposition(ax: Axes, table: pd.DataFrame, column: str = "js") -> Axes:
    """Every ordered pair as a point under each rule, bars at the mean.

    table: of `costs`; means over seeds.
    """
    scaled = table.assign(**{column: table[column] * (100 if column == "accuracy" else 1)})
    every = scaled.groupby(["rule", "task", "other"])[column].mean()
    shades = {"added": 1, "shuffled": 7, "averaged": 0, "halved": 7}
    rows = {RULES.facts[n]["label"]: (every[n], mark(shades[n], "o", markersize=4)) for n in RULES}
    plot.points_by_row(ax, rows, jitter=0.22, bar="black")
    return plot.finish(ax, UNITS[column])


def interpolation(ax: Axes, table: pd.DataFrame, column: str = "accuracy") -> Axes:
    """Both tasks' accuracy (or js, nll) on the line from expert a to expert b.

    table: of `segments`, for one pair. The dashed line is the mean of the two, which defines the
    barrier; bands run over seeds.
    """
    first, second = table.pair.iloc[0].split("+")
    looks = {first: (first, mark(0, "o")), second: (second, mark(1, "s"))}
    found = plot.spread(table, ["task", "at"], column)
    ends = {"ends": ("low", "high"), "band": True, "markersize": 4}
    plot.lines(ax, found, "at", "value", looks, by="task", **ends)
    both = table.groupby("at")[column].mean()
    ax.plot(both.index, both, "k--", linewidth=1.3, label="mean of both")
    plot.ticks(ax, [0, 0.5, 1], [first, "average", second])
    if column == "accuracy":
        plot.finish(ax, percent="y")
    return ax


def barrier_plot(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every pair's barrier of test error, against the mean of the ends and against the chord.

    table: of `barriers`; points are means over seeds, sorted; lines join the two of a pair.
    """
    mean = 100 * table.groupby("pair")[["error", "error_chord"]].mean()
    mean = mean.sort_values("error", ascending=False)
    y = np.arange(len(mean))
    ax.hlines(y, mean.error_chord, mean.error, color="0.7", linewidth=1)
    plot.intervals(
        ax, y, mean.error, label="above the mean of the ends", **mark(1, "o", markersize=6)
    )
    plot.intervals(ax, y, mean.error_chord, label="above the chord", **mark(0, "D", markersize=6))
    plot.label_rows(ax, [pair.replace("+", " + ") for pair in mean.index], size=8)
    return plot.finish(ax, "barrier of the test error, points")
