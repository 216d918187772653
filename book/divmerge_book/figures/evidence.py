"""Figures of the chapter on whether divergence predicts accuracy; tables of `studies.correlations`,
`model_selection` and `published.paper_reanalysis`.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import CRITERIA, PALETTE, mark, numbered

OWN = {  # what is drawn of a correlation -> words, look
    "kept": ("with the own expert", mark(3, "*", markersize=10)),
    "alone": ("own expert alone, others exchanged", {"color": PALETTE[7], "linewidth": 7}),
    "value": ("without the own expert", mark(0, "o", markersize=6)),
}


def expert_scatter(ax: Axes, closeness: np.ndarray, accuracy: np.ndarray, name: str) -> Axes:
    """One task: accuracy of all experts against minus their divergence; its own is a star.

    closeness, accuracy: `[T]`, the own expert first. The line is the least-squares fit of the
    others alone, over their range.
    """
    x, y = closeness[1:], 100 * accuracy[1:]
    plot.intervals(ax, y, x, **mark(0, "o"))
    plot.intervals(ax, 100 * accuracy[0], closeness[0], **mark(3, "*", markersize=11))
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=PALETTE[0], linewidth=1)
    ax.set_title(name, fontsize=10)
    ax.locator_params(axis="x", nbins=3)
    ax.tick_params(labelsize=8)
    return ax


def own_expert_effect(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every task's correlation as printed and without its own expert, and what that expert adds.

    table: rows of `correlations.by_task` of one kind of correlation. Bars: middle 95 % of the
    correlation when the others' accuracies are exchanged, over all orders; the tick is the mean.
    """
    y, how = np.arange(len(table)), {"width": 7, "markersize": 11, "markeredgecolor": "black"}
    plot.intervals(ax, y, table.alone, table.alone_low, table.alone_high, **mark(7, "|"), **how)
    for height, row in zip(y, table.itertuples(), strict=True):
        for column in ("kept", "value"):
            plot.intervals(ax, height, getattr(row, column), **OWN[column][1])
    plot.label_rows(ax, table.task)
    return plot.finish(ax, xlim=(-1.05, 1.05), at={0: "-"})


def own_expert_legend(ax: Axes) -> None:
    """What the marks of `own_expert_effect` mean, below the axes' figure."""
    marks = [
        ax.plot([], [], **({"alpha": 0.6} if "linewidth" in look else {"ls": "none"}), **look)[0]
        for _, look in OWN.values()
    ]
    words = [label for label, _ in OWN.values()]
    ax.figure.legend(marks, words, ncols=3, loc="lower center", fontsize=9)


def two_tables(ax: Axes, table: pd.DataFrame, labels: tuple[str, str]) -> Axes:
    """ANP of merging two models in two tables, method by method.

    table: rows of `paper_reanalysis.two_tables` of one kind of tasks. Bars: the margin printed with
    the first value; labels: names of the first (open) and the second table (filled).
    """
    y, high = np.arange(len(table)), (table.pairs + table.margin).clip(upper=100)
    first = mark(0, "o", markerfacecolor="white", markersize=7, width=6, bar=PALETTE[7])
    plot.intervals(ax, y, table.pairs, table.pairs - table.margin, high, label=labels[0], **first)
    for height, value in zip(y, table["row"], strict=True):
        label = labels[1] if height == 0 else None
        plot.intervals(ax, height, value, label=label, **mark(3, "D", markersize=6))
    plot.label_rows(ax, table.method)
    legend = {"fontsize": 8, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
    words = "ANP of merging two models, %"
    return plot.finish(ax, words, legend={**legend, "frameon": False})


def js_gains(ax: Axes, table: pd.DataFrame) -> Axes:
    """Printed ANP of JS minus that of KL, in points, by number of tasks.

    table: rows of `paper_reanalysis.js_and_kl` without Table 3.
    """
    hollow = {"markerfacecolor": "white", "linestyle": "--"}
    kinds = {"classification": mark(0, "o"), "generation": mark(1, "s")}
    for (tasks, level), some in table.groupby(["tasks", "level"], sort=False):
        look = kinds[tasks] | ({} if level == "layer" else hollow)
        plot.line(ax, some["T"], some.gain, label=f"{tasks}, per {level}", **look)
    plot.ticks(ax, sorted(table["T"].unique()))
    words = "models merged, T", "JS minus KL, points of ANP"
    return plot.finish(ax, *words, legend=plot.BESIDE, at_y={0: "-"})


def model_scatter(ax: Axes, whole: pd.DataFrame, criterion: str, column: str = "anp") -> Axes:
    """A test score of every model against a measure, nats summed over tasks; a colour per seed."""
    looks = numbered(sorted(whole.seed.unique()), markers="os^Dv", form="seed {}")
    plot.scatter(ax, whole, criterion, column, looks, by="seed", markersize=3.5, alpha=0.6)
    ax.set_xlabel(f"{CRITERIA[criterion][0]}, nats, sum over tasks", fontsize=9)
    return plot.finish(ax, percent="y")


def correlation_rows(ax: Axes, table: pd.DataFrame, rows: Mapping[str, Mapping]) -> Axes:
    """Mean correlations with intervals: a row per selection, a mark per criterion.

    table: the second table of `over_models`; rows: words -> columns' values that select.
    """
    parts = [table.merge(pd.DataFrame([{**own, "words": words}])) for words, own in rows.items()]
    how = {"row": "words", "group": "criterion", "step": 0.14, "markersize": 6}
    plot.forest(ax, pd.concat(parts), {words: words for words in rows}, CRITERIA, **how)
    return plot.finish(ax, at={0: "-"})


def selection_curve(ax: Axes, table: pd.DataFrame, column: str = "anp") -> Axes:
    """A test score of the model that every criterion chooses, over the number of candidates.

    table: rows of `choices` of one sampler; means over sets of experts and seeds.
    """
    plot.lines(ax, table, "candidates", column, CRITERIA, by="criterion")
    ax.set_xscale("log")
    plot.ticks(ax, sorted(table.candidates.unique()))
    return plot.finish(ax, "random candidates to choose from", percent="y")
