"""Figures of the chapter on whether divergence predicts success."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from divmerge_book.figures import PALETTE

MARKS = {  # what a model is judged by: words, colour, marker
    "js": ("JS", PALETTE[2], "o"),
    "kl": ("KL(expert || merged)", PALETTE[1], "s"),
    "reverse_kl": ("KL(merged || expert)", PALETTE[4], "D"),
    "entropy": ("entropy", PALETTE[0], "v"),
    "validation": ("labelled validation rows", PALETTE[7], "P"),
    "test": ("the test rows themselves", "black", "*"),
    "none": ("a random model", "black", "_"),
}


def experts_asked(ax: Axes, closeness: np.ndarray, accuracy: np.ndarray, name: str) -> Axes:
    """One task: accuracy of all experts against minus their divergence; its own is a star.

    closeness, accuracy: `[T]`, the own expert first. The line is the least-squares fit of the
    others alone, over their range.
    """
    x, y = closeness[1:], 100 * accuracy[1:]
    ax.plot(x, y, "o", color=PALETTE[0], markersize=5)
    ax.plot(closeness[0], 100 * accuracy[0], "*", color=PALETTE[3], markersize=11)
    slope, shift = np.polyfit(x, y, 1)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, slope * ends + shift, color=PALETTE[0], linewidth=1)
    ax.set_title(name, fontsize=10)
    ax.locator_params(axis="x", nbins=3)
    ax.tick_params(labelsize=8)
    return ax


def trivial_point(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every task's correlation as printed, without the trivial point, and what that point brings.

    table: rows of `correlations.by_task` of one kind of correlation. Bars: middle 95 % of the
    correlation when the others' accuracies are exchanged, over all orders; the tick is the mean.
    """
    for y, row in enumerate(table.itertuples()):
        ax.plot([row.alone_low, row.alone_high], [y, y], color=PALETTE[7], linewidth=7, alpha=0.45)
        ax.plot(row.alone, y, "|", color="black", markersize=11)
        ax.plot(row.kept, y, "*", color=PALETTE[3], markersize=10)
        ax.plot(row.value, y, "o", color=PALETTE[0], markersize=6)
    ax.set_yticks(range(len(table)), list(table.task))
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlim(-1.05, 1.05)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    return ax


def trivial_legend(ax: Axes) -> None:
    """What the marks of `trivial_point` mean, below the axes' figure."""
    style = {"linestyle": "none"}
    marks = [
        ax.plot([], [], "*", color=PALETTE[3], markersize=10, **style)[0],
        ax.plot([], [], color=PALETTE[7], linewidth=7, alpha=0.45)[0],
        ax.plot([], [], "o", color=PALETTE[0], markersize=6, **style)[0],
    ]
    words = ["with the own expert", "own expert alone, others exchanged", "without the own expert"]
    ax.figure.legend(marks, words, ncols=3, loc="lower center", fontsize=9)


def two_values(ax: Axes, table: pd.DataFrame, labels: tuple[str, str]) -> Axes:
    """ANP of merging two models in two tables, method by method.

    table: rows of `rereading.two_tables` of one kind of tasks. Bars: the margin printed with the
    first value; labels: what the first (open) and the second (filled) are called.
    """
    for y, row in enumerate(table.itertuples()):
        ends = [row.pairs - row.margin, min(row.pairs + row.margin, 100)]
        ax.plot(ends, [y, y], color=PALETTE[7], linewidth=6, alpha=0.4)
        ax.plot(row.pairs, y, "o", color=PALETTE[0], markerfacecolor="white", markersize=7)
        ax.plot(row.row, y, "D", color=PALETTE[3], markersize=6)
    ax.plot([], [], "o", color=PALETTE[0], markerfacecolor="white", label=labels[0])
    ax.plot([], [], "D", color=PALETTE[3], label=labels[1])
    ax.set_yticks(range(len(table)), list(table.method))
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlabel("ANP of merging two models, %")
    ax.grid(axis="y", visible=False)
    ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return ax


def js_gains(ax: Axes, table: pd.DataFrame) -> Axes:
    """Printed ANP of JS minus that of KL, in points, by number of tasks.

    table: rows of `rereading.js_and_kl` without Table 3.
    """
    for (tasks, level), some in table.groupby(["tasks", "level"], sort=False):
        shade = PALETTE[0] if tasks == "classification" else PALETTE[1]
        filled = {"markerfacecolor": shade if level == "layer" else "white"}
        line = "-" if level == "layer" else "--"
        ax.plot(
            some["T"], some.gain, f"o{line}", color=shade, label=f"{tasks}, per {level}", **filled
        )
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="models merged, T", ylabel="JS minus KL, points of ANP")
    ax.set_xticks(sorted(table["T"].unique()))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def models_judged(ax: Axes, whole: pd.DataFrame, criterion: str, column: str = "anp") -> Axes:
    """A test score of every model against a measure, nats summed over tasks; a colour per seed."""
    for n, (seed, some) in enumerate(whole.groupby("seed")):
        style = {"color": PALETTE[(0, 1, 2, 3, 4)[n % 5]], "markersize": 3.5, "alpha": 0.6}
        ax.plot(some[criterion], some[column], "os^Dv"[n % 5], label=f"seed {seed}", **style)
    ax.set_xlabel(f"{MARKS[criterion][0]}, nats, sum over tasks", fontsize=9)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    return ax


def correlation_rows(ax: Axes, table: pd.DataFrame, rows: dict[str, dict]) -> Axes:
    """Mean correlations with intervals: a row per selection, a mark per criterion.

    table: the second table of `judging.over_models`; rows: words -> columns' values that select.
    """
    for y, chosen in enumerate(rows.values()):
        some = table[(table[list(chosen)] == pd.Series(chosen)).all(axis=1)]
        for n, name in enumerate(MARKS):
            for row in some[some.criterion == name].itertuples():
                shift = y + 0.14 * (n - 2)
                _, shade, marker = MARKS[name]
                ax.plot([row.low, row.high], [shift, shift], color=shade, linewidth=1.5)
                ax.plot(row.value, shift, marker, color=shade, markersize=6)
    for name in ("js", "kl", "reverse_kl", "entropy", "validation"):
        words, shade, marker = MARKS[name]
        ax.plot([], [], marker, color=shade, label=words)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    return ax


def by_task(ax: Axes, table: pd.DataFrame) -> Axes:
    """Correlations over models of every task: small marks seeds, large ones their mean.

    table: rows of the first table of `judging.over_models`, of one draw, selection and kind.
    """
    tasks = list(dict.fromkeys(table.task))
    for n, name in enumerate(("js", "kl", "reverse_kl", "entropy", "validation")):
        words, shade, marker = MARKS[name]
        some = table[table.criterion == name]
        x = some.task.map(tasks.index).to_numpy() + 0.15 * (n - 2)
        ax.plot(x, some.value, marker, color=shade, markersize=3.5, alpha=0.5)
        mean = some.groupby("task", sort=False).value.mean().loc[tasks]
        places = np.arange(len(tasks)) + 0.15 * (n - 2)
        ax.plot(places, mean, marker, color=shade, markersize=7, label=words)
    ax.set_xticks(range(len(tasks)), tasks, rotation=25, ha="right")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.grid(axis="x", visible=False)
    return ax


def choosing(ax: Axes, table: pd.DataFrame, column: str = "anp") -> Axes:
    """A test score of the model that every criterion chooses, over the number of candidates.

    table: rows of `model_selection.choices` of one draw; means over sets of experts and seeds.
    """
    mean = table.groupby(["criterion", "candidates"])[column].mean().unstack("criterion")
    for name, (words, shade, marker) in MARKS.items():
        line = {"test": "--", "none": ":"}.get(name, "-")
        ax.plot(mean.index, mean[name], line, marker=marker, color=shade, label=words, markersize=5)
    ax.set_xscale("log")
    ax.set_xticks(mean.index, mean.index)
    ax.minorticks_off()
    ax.set_xlabel("random candidates to choose from")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    return ax
