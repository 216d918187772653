"""Figures of published experts: accuracy by task, and by the scale of the task vectors."""

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import PALETTE, methods, title

BARS = {"expert": "black", "base": PALETTE[3]}


def by_task(ax: Axes, scores: pd.DataFrame, *, what: str = "accuracy") -> Axes:
    """A row per task: a mark per method, bars where the expert and the unmerged base are.

    scores: methods by task, shares, with rows `expert` and `base`.
    """
    merged = scores.index.drop(list(BARS))
    table = scores.rename_axis("method").melt(var_name="task", ignore_index=False).reset_index()
    how = {"row": "task", "group": "method", "ends": None}
    rows = {task: task for task in scores}
    plot.forest(ax, table, rows, methods(merged), step=0.5 / max(1, len(merged) - 1), **how)
    bar = {"marker": "|", "markersize": 15, "markeredgewidth": 2}
    for method, shade in BARS.items():
        bar |= {"label": title(method), "color": shade}
        plot.intervals(ax, range(len(rows)), scores.loc[method], **bar)
    ax.set_title(f"{what} of every merge, task by task", fontsize=10)
    return plot.finish(ax, f"{what}, %", percent="x")


def scale_curve(ax: Axes, swept: pd.DataFrame, task: str) -> Axes:
    """The mean accuracy, and that of one task, over a method's scale; lines meet at the base.

    swept: of `leaderboard_summary.sweep`: method, scale, task, accuracy.
    """
    for some, words, dash in ((swept, "mean", "-"), (swept[swept.task == task], task, ":")):
        looks = {m: (f"{label}, {words}", {**look, "markersize": 4, "linestyle": dash})
                 for m, (label, look) in methods(swept.method).items()}  # fmt: skip
        plot.lines(ax, some, "scale", "accuracy", looks, by="method")
    ax.set_title(f"the mean, and {task} alone", fontsize=10)
    return plot.finish(ax, "scale of the task vectors", "accuracy, %", percent="y")
