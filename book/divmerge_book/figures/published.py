"""Figures of published experts: accuracy by task, and by the scale of the task vectors."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import PALETTE, style, title


def by_task(ax: Axes, scores: pd.DataFrame, *, what: str = "accuracy") -> Axes:
    """A row per task: a mark per method, bars where the expert and the unmerged base are.

    scores: methods by task, shares, with rows `expert` and `base`.
    """
    merged, places = scores.drop(index=["expert", "base"]), np.arange(scores.shape[1])
    shifts = plot.dodge(len(merged), 0.5 / max(1, len(merged) - 1))
    for shift, (method, row) in zip(shifts, merged.iterrows(), strict=True):
        plot.intervals(ax, places + shift, row, label=title(method), **style(method))
    bar = {"marker": "|", "markersize": 15, "markeredgewidth": 2}
    for method, shade in (("expert", "black"), ("base", PALETTE[3])):
        plot.intervals(ax, places, scores.loc[method], label=title(method), color=shade, **bar)
    plot.label_rows(ax, scores.columns)
    ax.set_xlabel(f"{what}, %")
    plot.finish(ax, percent="x")
    ax.set_title(f"{what} of every merge, task by task", fontsize=10)
    return ax


def scale_curve(ax: Axes, swept: pd.DataFrame, task: str) -> Axes:
    """The mean accuracy, and that of one task, over a method's scale; lines meet at the base.

    swept: of `leaderboard_summary.sweep`: method, scale, task, accuracy.
    """
    for method, rows in swept.groupby("method", sort=False):
        table = rows.pivot(index="scale", columns="task", values="accuracy")
        for words, values, dash in (("mean", table.mean(axis=1), "-"), (task, table[task], ":")):
            look = {**style(method), "markersize": 4, "linestyle": dash}
            plot.line(ax, table.index, values, label=f"{title(method)}, {words}", **look)
    ax.set(xlabel="scale of the task vectors", ylabel="accuracy, %")
    plot.finish(ax, percent="y")
    ax.set_title(f"the mean, and {task} alone", fontsize=10)
    return ax
