"""Figures of published experts: accuracies task by task, and what a scale does to them."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from divmerge_book.figures import PALETTE, title
from divmerge_book.figures.styles import style

OWN = {"fisher": {"color": PALETTE[8], "marker": "v"}}  # methods without a look elsewhere


def by_task(ax: Axes, scores: pd.DataFrame, *, what: str = "accuracy") -> Axes:
    """A line per task: a mark per method, bars where the expert and the unmerged base stand.

    scores: methods by task, shares, with rows `expert` and `base`.
    """
    merged = scores.drop(index=["expert", "base"])
    places = np.arange(len(scores.columns))
    steps = np.linspace(-0.25, 0.25, len(merged)) if len(merged) > 1 else [0]  # or marks overlap
    for step, (method, row) in zip(steps, merged.iterrows(), strict=True):
        look = {**style(method), **OWN.get(method, {}), "linestyle": ""}
        ax.plot(row, places + step, label=title(method), **look)
    for method, colour in (("expert", "black"), ("base", PALETTE[3])):
        marks = {"marker": "|", "markersize": 15, "markeredgewidth": 2, "linestyle": ""}
        ax.plot(scores.loc[method], places, color=colour, label=title(method), **marks)
    ax.set_yticks(places, scores.columns)
    ax.set_ylim(len(places) - 0.4, -0.6)
    ax.set_xlabel(what)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_title(f"{what} of every merge, task by task", fontsize=10)
    return ax


def over_scales(ax: Axes, swept: pd.DataFrame, task: str) -> Axes:
    """The mean accuracy, and that of one task, as a method's scale grows; lines meet at the base.

    swept: of `leaderboard_summary.sweep`: method, scale, task, accuracy.
    """
    for method, rows in swept.groupby("method", sort=False):
        table = rows.pivot(index="scale", columns="task", values="accuracy")
        look = {**style(method), "markersize": 4}
        ax.plot(table.mean(axis=1), label=f"{title(method)}, mean", **{**look, "linestyle": "-"})
        ax.plot(table[task], label=f"{title(method)}, {task}", **{**look, "linestyle": ":"})
    ax.set_xlabel("scale of the task vectors")
    ax.set_ylabel("accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_title(f"the mean, and {task} alone", fontsize=10)
    return ax
