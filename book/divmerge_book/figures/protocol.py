"""Figures of the protocol; tables of `studies.protocol` and `convergence`."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import GREY, GROUPINGS, OPTIMISERS, mark
from divmerge_book.studies.input_shifts import INPUT_SHIFTS
from divmerge_book.studies.predictions import WORDS, of_score
from divmerge_core.merging.fit import OPTIMIZERS

# Gauss-Newton is in stored tables; the package no longer has it.
OPTIMISER_LABELS = {name: OPTIMIZERS.facts[name]["label"] for name in OPTIMIZERS}
OPTIMISER_LABELS |= {"gauss_newton": "Gauss-Newton"}
SETTINGS = {"init": "start", "lr": "step size", "epochs": "epochs"}
SHIFTS = {kind: INPUT_SHIFTS.facts[kind]["label"] for kind in INPUT_SHIFTS}
FROM_DEFAULT = {"value": "difference", "ends": ("from_low", "from_high")}
FROM_DEFAULT |= {"width": 2, "markersize": 6}


def ablation(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """Effect of each setting changed alone on a score: paired differences from the default.

    table: scores of `ablation`, for one number of tasks. One row per setting and value, a marker
    per grouping; the line at 0 is the default.
    """
    rows = of_score(table[table.setting != "default"], score)
    rows = rows.assign(words=rows.setting.replace(SETTINGS) + " " + rows.value)
    names = {name: name for name in rows.words}
    how = {"row": "words", "group": "grouping", "step": 0.26, **FROM_DEFAULT}
    plot.forest(ax, rows, names, GROUPINGS, **how)
    words = f"{WORDS[score]} minus the default's, points"
    return plot.finish(ax, words, percent="x", at={0: "--"})


def learning_curve(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """A score by the number of unlabelled inputs per task; 0 is the start, 1/T.

    table: scores of `learning_curve`. Bands are 95 % intervals.
    """
    table = of_score(table, score).sort_values("inputs")
    how = {"by": "grouping", "ends": ("low", "high"), "band": True, "ordinal": True}
    plot.lines(ax, table, "inputs", "score", GROUPINGS, **how)
    return plot.finish(ax, "unlabelled inputs per task", f"{WORDS[score]}, %", percent="y")


def shift_costs(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """Effect of shifted inputs, by kind and share: a score minus that on the right inputs.

    table: scores of `input_shifts`, for one grouping. The row `none` is the start, 1/T, without any
    fit.
    """
    table = of_score(table, score)
    rows, none = {"none": "no inputs: 1/T", **SHIFTS}, table.kind == "none"
    looks = {
        share: (f"{round(100 * share)} % of the inputs", mark((1, 0, 2, 4)[n % 4], "so^D"[n % 4]))
        for n, share in enumerate(sorted(table.share[table.share > 0].unique()))
    }
    unnamed = {share: (None, look) for share, (_, look) in looks.items()}
    for some, own in ((table[~none], looks), (table[none], unnamed)):
        plot.forest(ax, some, rows, own, row="kind", group="share", step=0.22, **FROM_DEFAULT)
    words = f"{WORDS[score]} minus right inputs', points"
    return plot.finish(ax, words, percent="x", at={0: "--"})


def proposition3(ax: Axes, table: pd.DataFrame) -> Axes:
    """Proposition 3 at all inputs wrong: the objective's change, per task, over the bound.

    table: of `proposition3`; tasks, their number. One marker per seed.
    """
    looks = {"average": ("average", mark(0, "o")), "DivMerge": ("DivMerge", mark(1, "s"))}
    how = {"row": "kind", "group": "model", "value": "ratio", "ends": None, "step": 0.2}
    table = table.assign(ratio=table.apart / table.bound)
    plot.forest(ax, table, SHIFTS, looks, alpha=0.8, markersize=6, **how)
    plot.reference(ax, 1, style="--", label="the paper's bound")
    plot.reference(ax, 0.5, style=":", label="bound from the range of log 2")
    ax.grid(axis="y", visible=False)
    return plot.finish(ax, "change of the objective, share of the bound", xscale="log")


def convergence(ax: Axes, courses: pd.DataFrame, target: float | int, *, x: str = "passes") -> Axes:
    """The loss of every optimiser by passes or by inputs read; the line is Adam's last loss.

    courses: of `convergence`, for one number of tasks and one grouping. The lowest loss up to each
    point is drawn for the optimisers that keep their best one. Those of a stored table that the
    package no longer has are drawn too.
    """
    for name in (name for name in OPTIMISERS if name in set(courses.optimizer)):
        own = courses[courses.optimizer == name].sort_values("passes", kind="stable")
        loss = own.loss if name.endswith("adam") else own.loss.cummin()
        at = own[x].where(own[x] > 0)  # a logarithmic axis has no 0, where fits start
        every = {"markevery": max(1, len(own) // 9), "label": OPTIMISER_LABELS[name]}
        plot.line(ax, at, loss, **every, **OPTIMISERS[name])
    plot.reference(ax, target, x=False, style="--", color=GREY)
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())  # on a short range all minor ticks have labels
    names = {"passes": "forward-backward passes", "read": "inputs read per task"}
    return plot.finish(ax, names.get(x, x), "loss on all inputs, nats")
