"""Figures of the chapter on whether divergence predicts accuracy; tables of `studies.correlations`,
`model_selection` and `published.paper_reanalysis`. Every function draws on the Axes it is given.
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
NO_LINE = {"linestyle": "none"}


def expert_scatter(ax: Axes, closeness: np.ndarray, accuracy: np.ndarray, name: str) -> Axes:
    """One task: accuracy of all experts against minus their divergence; its own is a star.

    closeness, accuracy: `[T]`, the own expert first. The line is the least-squares fit of the
    others alone, over their range.
    """
    x, y = closeness[1:], 100 * accuracy[1:]
    ax.plot(x, y, markersize=5, **mark(0, "o", **NO_LINE))
    ax.plot(closeness[0], 100 * accuracy[0], markersize=11, **mark(3, "*", **NO_LINE))
    slope, shift = np.polyfit(x, y, 1)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, slope * ends + shift, color=PALETTE[0], linewidth=1)
    ax.set_title(name, fontsize=10)
    ax.locator_params(axis="x", nbins=3)
    ax.tick_params(labelsize=8)
    return ax


def own_expert_effect(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every task's correlation as printed and without its own expert, and what that expert adds.

    table: rows of `correlations.by_task` of one kind of correlation. Bars: middle 95 % of the
    correlation when the others' accuracies are exchanged, over all orders; the tick is the mean.
    """
    y = np.arange(len(table))
    how = {"width": 7, "marker": "|", "markersize": 11, "markeredgecolor": "black"}
    bars = {"color": PALETTE[7], **how}
    plot.intervals(ax, y, table.alone, table.alone_low, table.alone_high, **bars)
    for height, row in zip(y, table.itertuples(), strict=True):
        for column in ("kept", "value"):
            ax.plot(getattr(row, column), height, **OWN[column][1], **NO_LINE)
    plot.label_rows(ax, table.task)
    plot.reference(ax, 0)
    ax.set_xlim(-1.05, 1.05)
    return ax


def own_expert_legend(ax: Axes) -> None:
    """What the marks of `own_expert_effect` mean, below the axes' figure."""
    marks = [
        ax.plot([], [], alpha=0.6 if "linewidth" in look else 1,
                **look, **({} if "linewidth" in look else NO_LINE))[0]
        for _, look in OWN.values()
    ]  # fmt: skip
    words = [label for label, _ in OWN.values()]
    ax.figure.legend(marks, words, ncols=3, loc="lower center", fontsize=9)


def two_tables(ax: Axes, table: pd.DataFrame, labels: tuple[str, str]) -> Axes:
    """ANP of merging two models in two tables, method by method.

    table: rows of `paper_reanalysis.two_tables` of one kind of tasks. Bars: the margin printed with
    the first value; labels: names of the first (open) and the second table (filled).
    """
    high = (table.pairs + table.margin).clip(upper=100)
    first = mark(0, "o", markerfacecolor="white", markersize=7, width=6, bar=PALETTE[7])
    y = np.arange(len(table))
    plot.intervals(ax, y, table.pairs, table.pairs - table.margin, high, label=labels[0], **first)
    for height, value in zip(y, table["row"], strict=True):
        label = labels[1] if height == 0 else None
        plot.intervals(ax, height, value, label=label, **mark(3, "D", markersize=6))
    plot.label_rows(ax, table.method)
    return plot.finish(
        ax,
        "ANP of merging two models, %",
        legend={
            "fontsize": 8,
            "loc": "lower center",
            "bbox_to_anchor": (0.5, 1.0),
            "ncols": 2,
            "frameon": False,
        },
    )


def js_gains(ax: Axes, table: pd.DataFrame) -> Axes:
    """Printed ANP of JS minus that of KL, in points, by number of tasks.

    table: rows of `paper_reanalysis.js_and_kl` without Table 3.
    """
    for (tasks, level), some in table.groupby(["tasks", "level"], sort=False):
        look = mark(*((0, "o") if tasks == "classification" else (1, "s")))
        if level != "layer":
            look |= {"markerfacecolor": "white", "linestyle": "--"}
        plot.line(ax, some["T"], some.gain, label=f"{tasks}, per {level}", **look)
    plot.reference(ax, 0, x=False)
    ax.set(xlabel="models merged, T", ylabel="JS minus KL, points of ANP")
    plot.ticks(ax, sorted(table["T"].unique()))
    ax.legend(**plot.BESIDE)
    return ax


def model_scatter(ax: Axes, whole: pd.DataFrame, criterion: str, column: str = "anp") -> Axes:
    """A test score of every model against a measure, nats summed over tasks; a colour per seed."""
    looks = {
        seed: (f"seed {seed}", look)
        for seed, (_, look) in numbered(sorted(whole.seed.unique()), markers="os^Dv").items()
    }
    plot.scatter(ax, whole, criterion, column, looks, by="seed", markersize=3.5, alpha=0.6)
    ax.set_xlabel(f"{CRITERIA[criterion][0]}, nats, sum over tasks", fontsize=9)
    plot.finish(ax, percent="y")
    return ax


def correlation_rows(ax: Axes, table: pd.DataFrame, rows: Mapping[str, Mapping]) -> Axes:
    """Mean correlations with intervals: a row per selection, a mark per criterion.

    table: the second table of `over_models`; rows: words -> columns' values that select.
    """
    parts = [
        table[(table[list(chosen)] == pd.Series(chosen)).all(axis=1)].assign(words=words)
        for words, chosen in rows.items()
    ]
    names = {words: words for words in rows}
    how = {"row": "words", "group": "criterion", "step": 0.14, "markersize": 6}
    plot.intervals_by_row(ax, pd.concat(parts), names, CRITERIA, **how)
    plot.reference(ax, 0)
    return ax


def correlations_by_task(ax: Axes, table: pd.DataFrame) -> Axes:
    """Correlations over models of every task: small marks seeds, large ones their mean.

    table: rows of the first table of `over_models`, of one sampler, selection and kind.
    """
    tasks = list(dict.fromkeys(table.task))
    names = [name for name in CRITERIA if name in set(table.criterion)]
    for name, shift in zip(names, plot.dodge(len(names), 0.15), strict=True):
        (label, look), some = CRITERIA[name], table[table.criterion == name]
        small = {"markersize": 3.5, "alpha": 0.5, **look, **NO_LINE}
        ax.plot(some.task.map(tasks.index) + shift, some.value, **small)
        mean = some.groupby("task", sort=False).value.mean().loc[tasks]
        large = {"markersize": 7, **look, **NO_LINE}
        ax.plot(np.arange(len(tasks)) + shift, mean, label=label, **large)
    plot.ticks(ax, range(len(tasks)), tasks, rotation=25, ha="right")
    plot.reference(ax, 0, x=False)
    ax.grid(axis="x", visible=False)
    return ax


def selection_curve(ax: Axes, table: pd.DataFrame, column: str = "anp") -> Axes:
    """A test score of the model that every criterion chooses, over the number of candidates.

    table: rows of `choices` of one sampler; means over sets of experts and seeds.
    """
    plot.lines(ax, table, "candidates", column, CRITERIA, by="criterion")
    ax.set_xscale("log")
    plot.ticks(ax, sorted(table.candidates.unique()))
    return plot.finish(ax, "random candidates to choose from", percent="y")
