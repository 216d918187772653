"""Figures of planes, lines and costs between experts: each draws on its Axes and returns it.

Tables come from `studies.landscapes` and `studies.costs`.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from divmerge_book.figures import PALETTE, title
from divmerge_book.figures.beyond import percent
from divmerge_book.figures.styles import style
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
    ax.set_xticks([0, 0.5, 1, 1.5])
    ax.set_yticks([0, 0.5, 1, 1.5])
    ax.grid(visible=False)
    return ax


def found(ax: Axes, marks: pd.DataFrame) -> Axes:
    """Where the methods end on a plane, and DivMerge's and AdaMerging's way there.

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


def costs(ax: Axes, table: pd.DataFrame, column: str, *, rule: str = "added") -> Axes:
    """What expert j (column) costs task i (row): points of accuracy, or JS in hundredths of a nat.

    table: of `studies.costs.costs`. Red is a cost, blue a gain; the range is the same for every
    rule.
    """
    wide = 100 * matrix(table, rule, column)
    limit = 100 * float(table[column].abs().quantile(0.97))
    label = {"accuracy": "accuracy lost, points", "js": "JS from expert $i$, nats / 100"}[column]
    sns.heatmap(
        wide,
        ax=ax,
        cmap="vlag" if column == "accuracy" else "Reds",
        vmin=-limit if column == "accuracy" else 0,
        vmax=limit,
        annot=True,
        fmt=".0f",
        annot_kws={"fontsize": 8},
        cbar_kws={"label": label},
        square=True,
    )
    ax.set_facecolor("0.9")
    ax.grid(visible=False)
    ax.set(xlabel="expert $j$ added", ylabel="task $i$ that pays")
    ax.tick_params(axis="x", rotation=90)
    ax.tick_params(axis="y", rotation=0)
    return ax


def causes(ax: Axes, table: pd.DataFrame, column: str = "js") -> Axes:
    """Every ordered pair as a point under each rule, bars at the mean: what part is whose.

    table: of `studies.costs.costs`; means over seeds.
    """
    draws = np.random.default_rng(0)
    every = table.groupby(["rule", "task", "other"])[column].mean()
    colours = {"added": 1, "shuffled": 7, "averaged": 0, "halved": 7}
    for y, rule in enumerate(RULES):
        values = 100 * every[rule].to_numpy() if column == "accuracy" else every[rule].to_numpy()
        jitter, shade = draws.uniform(-0.22, 0.22, len(values)), PALETTE[colours[rule]]
        ax.plot(values, y + jitter, "o", color=shade, markersize=4, alpha=0.6)
        ax.plot([values.mean()] * 2, [y - 0.36, y + 0.36], color="black", linewidth=2.2)
    ax.set_yticks(range(len(RULES)), [RULES.facts[rule]["label"] for rule in RULES])
    ax.set_ylim(len(RULES) - 0.5, -0.5)
    ax.set_xlabel({"accuracy": "accuracy lost, points", "js": "JS from expert $i$, nats"}[column])
    ax.grid(axis="y", visible=False)
    return ax


def line(ax: Axes, table: pd.DataFrame, column: str = "accuracy") -> Axes:
    """Both tasks' accuracy (or js, nll) on the way from expert a to expert b.

    table: of `segments`, for one pair. The dashed line is the mean of the two, which the barrier
    is read from; bands run over seeds.
    """
    first, second = table.pair.iloc[0].split("+")
    for task, number, marker in ((first, 0, "o"), (second, 1, "s")):
        some = table[table.task == task].groupby("at")[column].agg(["mean", "min", "max"])
        style = {"color": PALETTE[number], "marker": marker, "markersize": 4, "label": task}
        ax.plot(some.index, some["mean"], **style)
        ax.fill_between(some.index, some["min"], some["max"], color=PALETTE[number], alpha=0.15)
    both = table.groupby("at")[column].mean()
    ax.plot(both.index, both, "k--", linewidth=1.3, label="mean of both")
    ax.set_xticks([0, 0.5, 1], [first, "average", second])
    if column == "accuracy":
        percent(ax)
    return ax


def humps(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every pair's barrier of test error, against the mean of the ends and against the chord.

    table: of `barriers`; points are means over seeds, sorted; lines join the two of a pair.
    """
    mean = table.groupby("pair")[["error", "error_chord"]].mean().sort_values("error")
    y = np.arange(len(mean))
    ax.hlines(y, 100 * mean.error_chord, 100 * mean.error, color="0.7", linewidth=1)
    ax.plot(100 * mean.error, y, "o", color=PALETTE[1], label="above the mean of the ends")
    ax.plot(100 * mean.error_chord, y, "D", color=PALETTE[0], label="above the chord")
    ax.set_yticks(y, [pair.replace("+", " + ") for pair in mean.index], fontsize=8)
    ax.set_ylim(-0.7, len(mean) - 0.3)
    ax.set_xlabel("barrier of the test error, points")
    ax.grid(axis="y", visible=False)
    return ax
