"""Figures of the protocol; tables of `studies.protocol`, `learning_curve` and `convergence`.

Every function draws on the Axes it is given and returns it.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import GREY, GROUPINGS, OPTIMISERS, mark
from divmerge_book.studies.learning_curve import INPUT_SHIFTS
from divmerge_book.studies.predictions import WORDS, of_score
from divmerge_core.merging.fit import OPTIMIZERS

# Gauss-Newton is in stored tables; the package no longer has it.
OPTIMISER_LABELS = {name: OPTIMIZERS.facts[name]["label"] for name in OPTIMIZERS}
OPTIMISER_LABELS |= {"gauss_newton": "Gauss-Newton"}
SETTINGS = {"init": "start", "lr": "step size", "epochs": "epochs"}
FROM_DEFAULT = {"value": "difference", "ends": ("from_low", "from_high")}


def ablation(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """Effect of each setting changed alone on a score: paired differences from the default.

    table: scores of `ablation`, for one number of tasks. One row per setting and value, a marker
    per grouping; the line at 0 is the default.
    """
    rows = of_score(table[table.setting != "default"], score)
    words = [f"{SETTINGS.get(s, s)} {v}" for s, v in zip(rows.setting, rows.value, strict=True)]
    names = {name: name for name in dict.fromkeys(words)}
    how = {"row": "words", "group": "grouping", "step": 0.26, "width": 2, "markersize": 6}
    plot.intervals_by_row(ax, rows.assign(words=words), names, GROUPINGS, **how, **FROM_DEFAULT)
    plot.reference(ax, 0, style="--")
    return plot.finish(ax, f"{WORDS[score]} minus the default's, points", percent="x")


def learning_curve(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """A score by the number of unlabelled inputs per task; 0 is the start, 1/T.

    table: scores of `learning_curve`. Bands are 95 % intervals.
    """
    counts, table = sorted(table.inputs.unique()), of_score(table, score).sort_values("inputs")
    for grouping in (name for name in GROUPINGS if name in set(table.grouping)):
        own, (label, look) = table[table.grouping == grouping], GROUPINGS[grouping]
        at = [counts.index(count) for count in own.inputs]
        plot.line(ax, at, own.score, own.low, own.high, band=True, label=label, **look)
    plot.ticks(ax, range(len(counts)), map(str, counts))
    return plot.finish(ax, "unlabelled inputs per task", f"{WORDS[score]}, %", percent="y")


def shift_costs(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """Effect of shifted inputs, by kind and share: a score minus that on the right inputs.

    table: scores of `input_shifts`, for one grouping. The row `none` is the start, 1/T, without any
    fit.
    """
    rows = {
        "none": "no inputs: 1/T",
        **{kind: INPUT_SHIFTS.facts[kind]["label"] for kind in INPUT_SHIFTS},
    }
    table = of_score(table, score)
    shares = sorted(share for share in table.share.unique() if share > 0)
    looks = {
        share: (f"{round(100 * share)} % of the inputs", mark((1, 0, 2, 4)[n % 4], "so^D"[n % 4]))
        for n, share in enumerate(shares)
    }
    start = table.kind == "none"
    how = {"row": "kind", "group": "share", "width": 2, "markersize": 6, **FROM_DEFAULT}
    plot.intervals_by_row(ax, table[~start], rows, looks, step=0.22, **how)
    last = {shares[-1]: (None, looks[shares[-1]][1])}
    plot.intervals_by_row(ax, table[start], rows, last, **how)
    plot.reference(ax, 0, style="--")
    return plot.finish(ax, f"{WORDS[score]} minus right inputs', points", percent="x")


def proposition3(ax: Axes, table: pd.DataFrame) -> Axes:
    """Proposition 3 at all inputs wrong: the objective's change, per task, over the bound.

    table: of `proposition3`; tasks, their number. One marker per seed.
    """
    for model, look, shift in zip(
        ("average", "DivMerge"), (mark(0, "o"), mark(1, "s")), plot.dodge(2, 0.2), strict=True
    ):
        own = table[table.model == model]
        heights = own.kind.map(list(INPUT_SHIFTS).index) + shift
        plot.intervals(
            ax, heights, own.apart / own.bound, label=model, alpha=0.8, markersize=6, **look
        )
    plot.reference(ax, 1, style="--", label="the paper's bound")
    plot.reference(ax, 0.5, style=":", label="bound from the range of log 2")
    plot.label_rows(ax, [INPUT_SHIFTS.facts[kind]["label"] for kind in INPUT_SHIFTS])
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
