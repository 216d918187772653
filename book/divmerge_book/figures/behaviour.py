"""Figures of what merging does to answers and layers: each draws on its Axes and returns it.

Tables come from `studies.flips`. Every model looks as `figures.styles` says.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import PALETTE, title
from divmerge_book.figures.beyond import percent
from divmerge_book.figures.styles import style

LOOKS = ("base", "average", "task_arithmetic", "divmerge/task", "divmerge/layer")


def turned(ax: Axes, table: pd.DataFrame) -> Axes:
    """Rows lost to the left, rows gained to the right, the net as a diamond; per model.

    table: of `resampled`; whiskers are 95 % intervals. The bar's whole length is the gross change.
    """
    wide = table.set_index(["model", "what"])
    models = [model for model in LOOKS if model in set(table.model)]
    for y, model in enumerate(models):
        for what, sign, colour in (("lost", -1, PALETTE[1]), ("gained", 1, PALETTE[0])):
            row = wide.loc[model, what]
            ends = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
            errors = ends if sign > 0 else ends[::-1]
            style = {"color": colour, "alpha": 0.75, "label": what if y == 0 else None}
            ax.barh(y, 100 * sign * row.value, xerr=errors, height=0.6, **style)
        net = wide.loc[model, "net"]
        ax.plot(100 * net.value, y, "kD", markersize=7, label="net" if y == 0 else None)
        ax.annotate(f"{100 * net.value:+.1f}", (100 * net.value, y), xytext=(0, 13),
                    textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(models)), [title(model) for model in models])
    ax.set_ylim(len(models) - 0.5, -0.7)
    ax.xaxis.set_major_formatter(lambda value, place: f"{abs(value):g}")
    ax.set_xlabel("share of test rows, %, mean over tasks")
    ax.grid(axis="y", visible=False)
    return ax


def by_task(ax: Axes, table: pd.DataFrame, model: str) -> Axes:
    """The same for one model, a row per task: lost to the left, gained to the right.

    table: of `studies.flips.turned`; means over seeds.
    """
    mean = table[table.model == model].groupby("task", sort=False)[["lost", "gained", "net"]].mean()
    mean = 100 * mean.sort_values("net")
    y = np.arange(len(mean))
    ax.barh(y, -mean.lost, color=PALETTE[1], alpha=0.75, height=0.65, label="lost")
    ax.barh(y, mean.gained, color=PALETTE[0], alpha=0.75, height=0.65, label="gained")
    ax.plot(mean.net, y, "kD", markersize=6, label="net")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(y, mean.index)
    ax.xaxis.set_major_formatter(lambda value, place: f"{abs(value):g}")
    ax.set(xlabel="share of test rows, %", title=title(model))
    ax.grid(axis="y", visible=False)
    return ax


def margins(ax: Axes, table: pd.DataFrame) -> Axes:
    """Share lost, from the rows that the expert was least sure of to those it was surest of.

    table: of `by_margin`.
    """
    for model in LOOKS:
        some = table[table.model == model]
        if len(some):
            label = f"{title(model)} (AUC {some.auc.iloc[0]:.2f})"
            ax.plot(some.part, some.lost, label=label, **style(model))
    parts = table.groupby("part").margin.mean()
    names = [f"{part}\n({100 * value:.0f})" for part, value in parts.items()]
    ax.set_xticks(list(parts.index), names)
    ax.set_ylim(bottom=0)
    percent(ax)
    ax.set(ylabel="lost, % of what the expert has right")
    ax.set_xlabel("fifth of these rows by the expert's margin, 1 least sure (mean margin, points)")
    return ax


def reliability(ax: Axes, table: pd.DataFrame, model: str, *, bins: int = 10) -> Axes:
    """Accuracy against confidence of one model, point size by rows; the line is what is promised.

    table: of `diagram` with as many `bins`. The bars at the bottom are the shares of rows, on the
    same scale. Raises ValueError for a table with more bins than that.
    """
    if table.bin.max() >= bins:
        raise ValueError(
            f"the table has a bin {table.bin.max()}, counted from 0, but bins is {bins}: give the "
            "number of bins that `diagram` was called with"
        )
    some, shade = table[table.model == model], style(model)["color"]
    share = some["count"] / some["count"].sum()
    ax.bar((some.bin + 0.5) / bins, share, width=0.9 / bins, color=shade, alpha=0.2)
    ax.plot([0, 1], [0, 1], color="0.4", linewidth=0.9, linestyle="--")
    ax.plot(some.confidence, some.accuracy, color=shade, linewidth=1)
    ax.scatter(some.confidence, some.accuracy, s=12 + 200 * share, color=shade, zorder=3)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_title("Experts" if model == "expert" else title(model), fontsize=10)
    ax.set_xticks([0, 0.5, 1])
    ax.set_yticks([0, 0.5, 1])
    percent(ax)
    percent(ax, "x")
    return ax


def calibration(ax: Axes, table: pd.DataFrame) -> Axes:
    """The calibration error of every model (filled) beside that of chance (open); means over seeds.

    table: of `calibrated`. Small points: seeds.
    """
    models = ["expert", *(model for model in LOOKS if model in set(table.model))]
    for y, model in enumerate(models):
        some = 100 * table[table.model == model][["ece", "chance"]]
        shade, marker = style(model)["color"], style(model)["marker"]
        ax.plot([some.chance.mean(), some.ece.mean()], [y, y], color=shade, alpha=0.4, linewidth=2)
        ax.plot(some.ece, [y] * len(some), ".", color=shade, markersize=4)
        ax.plot(some.ece.mean(), y, marker, color=shade, markersize=8)
        ax.plot(some.chance.mean(), y, marker, color=shade, markerfacecolor="white", markersize=8)
    names = ["Experts", *map(title, models[1:])]
    ax.set_yticks(range(len(models)), names)
    ax.set_ylim(len(models) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("expected calibration error, points")
    ax.grid(axis="y", visible=False)
    return ax


def layers(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """cka, shift or common over depth, a line per model: means over tasks and seeds.

    table: of `depths`. Bands, for the base and DivMerge per layer: the middle half.
    """
    for model in LOOKS:
        look, some = style(model), table[table.model == model].groupby("layer")[column]
        if not len(some):
            continue
        mean = some.mean()
        ax.plot(mean.index, mean, linewidth=1.4, label=title(model), **look)
        if model in ("base", "divmerge/layer"):
            low, high = some.quantile(0.25), some.quantile(0.75)
            ax.fill_between(mean.index, low, high, color=look["color"], alpha=0.12)
    last = int(table.layer.max())
    ax.set_xticks(range(last + 1), ["embed.", *map(str, range(1, last + 1))])
    named = {"cka": "CKA with the expert", "shift": "shift from the expert, in its spreads"}
    named |= {"common": "common share of the squared shift, %"}
    ax.set(xlabel="layer", ylabel=named[column])
    if column == "common":
        percent(ax)
    ax.set_ylim(bottom=0)
    return ax
