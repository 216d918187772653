"""Figures of planes, lines and costs between experts; tables of `studies.landscapes`."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import mark, style, title
from divmerge_book.studies.landscapes import RULES, matrix

# column of the plane's table -> words, colour map, unit, lowest, highest, cut end of the colours
SHADES: Mapping[str, tuple[str, str, str, float, float | None, str]] = {
    "anp": ("ANP", "viridis", "%", 0.3, 1.0, "min"),
    "kept_margin": ("kept margin", "viridis", "%", -1.0, 1.0, "min"),
    "js": ("JS, sum of both tasks", "viridis_r", "nats", 0.0, None, "neither"),
    "disagreement": (r"$\xi$, share of answers", "magma_r", "%", 0.0, 1.0, "max"),
    "apart": (r"$\xi$, by JS", "magma_r", "nats", 0.0, None, "neither"),
}
MARKS = ("average", "task_arithmetic", "adamerging/task", "divmerge/task")
UNITS = {"accuracy": "accuracy lost, points", "js": "JS from expert $i$, nats"}


def plane(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """One measure over the two coefficients of a pair: a coloured square per point measured.

    table: of `grid`, for one pair; column: anp, kept_margin, js, disagreement or apart. Stars are
    the experts and the cross is the base.
    """
    words, shades, unit, low, high, extend = SHADES[column]
    factor = 100 if unit == "%" else 1
    wide = factor * table.pivot(index="l2", columns="l1", values=column)
    top = wide.max(axis=None) if high is None else factor * high
    how = {"shading": "nearest", "cmap": shades, "rasterized": True}
    image = ax.pcolormesh(wide.columns, wide.index, wide, vmin=factor * low, vmax=top, **how)
    bar = ax.figure.colorbar(image, ax=ax, location="top", extend=extend)
    bar.set_label(f"{words}, {unit}", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    look = {"color": "white", "markeredgecolor": "black", "linestyle": "none"}
    ax.plot([1, 0], [0, 1], marker="*", markersize=13, **look)
    ax.plot(0, 0, marker="X", markersize=8, **look)
    ax.grid(visible=False)
    names = (f"$\\lambda$ of {task}" for task in table.pair.iloc[0].split("+"))
    places = [0, 1]
    return plot.finish(ax, *names, aspect="equal", xticks=places, yticks=places)


def end_points(ax: Axes, marks: pd.DataFrame) -> Axes:
    """Where the methods end on a plane, and the paths of DivMerge's and AdaMerging's fits.

    marks: of `studies.landscapes.solutions`, for one pair.
    """
    for method in MARKS:
        look, steps = style(method), marks[marks.method == method].sort_values("step")
        if len(steps) > 1:
            ax.plot(steps.l1, steps.l2, color="black", linewidth=2.6)
            ax.plot(steps.l1, steps.l2, color=look["color"], linewidth=1.4)
        look |= {"markeredgecolor": "black", "markersize": 8, "linestyle": "none"}
        ax.plot(steps.l1.iloc[-1], steps.l2.iloc[-1], label=title(method), **look)
    return ax


def cost_map(ax: Axes, table: pd.DataFrame, column: str, *, rule: str = "added") -> Axes:
    """What expert j (column) costs task i (row): points of accuracy, or JS in hundredths of a nat.

    table: of `costs`. Red is a cost, blue a gain; the range is the same for every rule.
    """
    limit = 100 * float(table[column].abs().quantile(0.97))
    shades = {"accuracy": {"cmap": "vlag", "vmin": -limit}}.get(column, {"cmap": "Reds", "vmin": 0})
    how = {"rotation": 90, "fmt": ".0f", "square": True, "vmax": limit, **shades}
    label = UNITS[column] + (" / 100" if column == "js" else "")
    plot.heat_map(ax, 100 * matrix(table, rule, column), label=label, **how)
    ax.set_facecolor("0.9")
    return plot.finish(ax, "expert $j$ added", "damaged task $i$")


def cost_decomposition(ax: Axes, table: pd.DataFrame, column: str = "js") -> Axes:
    """Every ordered pair as a point under each rule, bars at the mean.

    table: of `costs`; means over seeds.
    """
    scale = 100 if column == "accuracy" else 1
    every = scale * table.groupby(["rule", "task", "other"])[column].mean()
    shades = {"added": 1, "shuffled": 7, "averaged": 0, "halved": 7}
    rows = {RULES.facts[n]["label"]: (every[n], mark(shades[n], "o", markersize=4)) for n in RULES}
    plot.strip(ax, rows, jitter=0.22, bar="black")
    return plot.finish(ax, UNITS[column])


def interpolation(ax: Axes, table: pd.DataFrame, column: str = "accuracy") -> Axes:
    """Both tasks' accuracy (or js, nll) on the line from expert a to expert b.

    table: of `segment`, for one pair. The dashed line is the mean of the two, which defines the
    barrier; bands run over seeds.
    """
    first, second = table.pair.iloc[0].split("+")
    looks = {first: (first, mark(0, "o")), second: (second, mark(1, "s"))}
    ends = {"ends": ("low", "high"), "band": True, "markersize": 4}
    found = plot.spread(table, ["task", "at"], column)
    plot.lines(ax, found, "at", "value", looks, by="task", **ends)
    both = table.groupby("at")[column].mean()
    ax.plot(both.index, both, "k--", linewidth=1.3, label="mean of both")
    plot.ticks(ax, [0, 0.5, 1], [first, "average", second])
    return plot.finish(ax, percent="y" if column == "accuracy" else "")
