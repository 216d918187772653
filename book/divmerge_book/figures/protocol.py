"""Figures of the protocol: each draws on the Axes it is given and returns it.

Tables come from `studies.protocol`, `learning_curve` and `convergence`. Colours are seaborn's
colour-blind palette, each with a marker of its own; grey stands for references.
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from divmerge_book.figures import PALETTE
from divmerge_book.figures.beyond import Look, percent
from divmerge_book.studies.learning_curve import INPUT_SHIFTS
from divmerge_book.studies.predictions import WORDS, of_score
from divmerge_core.merging.fit import OPTIMIZERS

GREY = PALETTE[7]
LEVELS: Mapping[str, Look] = {"task": (0, "o"), "block": (4, "D"), "layer": (1, "s")}
FINDERS: Mapping[str, Look] = {
    **{"adam": (7, "o"), "annealed_adam": (0, "^"), "lbfgs": (2, "s")},
    "gauss_newton": (3, "D"),
}
# Gauss-Newton is in stored tables; the package no longer has it.
FOUND_BY = {name: OPTIMIZERS.facts[name]["label"] for name in OPTIMIZERS}
FOUND_BY |= {"gauss_newton": "Gauss-Newton"}
SAID = {"init": "start", "lr": "step size", "epochs": "epochs"}


def changes(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """What each setting changed alone does to a score: paired differences from the default.

    table: scores of `ablation`, for one number of tasks. One row per setting and value, a marker
    per grouping; the line at 0 is the default.
    """
    rows = of_score(table[table.setting != "default"], score)
    labels = list(dict.fromkeys(zip(rows.setting, rows.value, strict=True)))
    groupings = list(dict.fromkeys(rows.grouping))
    for number, grouping in enumerate(groupings):
        place, marker = LEVELS[grouping]
        own = rows[rows.grouping == grouping]
        heights = [
            labels.index(pair) + 0.26 * (number - (len(groupings) - 1) / 2)
            for pair in zip(own.setting, own.value, strict=True)
        ]
        style = {"color": PALETTE[place], "linewidth": 2}
        ax.hlines(heights, own.from_low, own.from_high, alpha=0.5, **style)
        ax.plot(
            own.difference,
            heights,
            marker,
            label=f"per {grouping}",
            markersize=6,
            **{**style, "linewidth": 0},
        )
    ax.axvline(0, color="black", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(labels)), [f"{SAID.get(s, s)} {v}" for s, v in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel(f"{WORDS[score]} minus the default's, points")
    percent(ax, "x")
    return ax


def needed(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """A score by the number of unlabelled inputs per task; 0 is the start, 1/T.

    table: scores of `amounts`. Bands are 95 % intervals.
    """
    counts = sorted(table.inputs.unique())
    for grouping, own in of_score(table, score).groupby("grouping", sort=False):
        place, marker = LEVELS[grouping]
        own = own.sort_values("inputs")
        at = [counts.index(count) for count in own.inputs]
        ax.plot(at, own.score, marker=marker, color=PALETTE[place], label=f"per {grouping}")
        ax.fill_between(at, own.low, own.high, color=PALETTE[place], alpha=0.15, linewidth=0)
    ax.set_xticks(range(len(counts)), [str(count) for count in counts])
    ax.set(xlabel="unlabelled inputs per task", ylabel=f"{WORDS[score]}, %")
    percent(ax)
    return ax


def by_kind(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """What shifted inputs cost, by kind and share: a score minus that on right ones.

    table: scores of `wrong_inputs`, for one grouping. The row `none` is the start, 1/T, without any
    fit.
    """
    table = of_score(table, score)
    shares = sorted(share for share in table.share.unique() if share > 0)
    kinds = ["none", *INPUT_SHIFTS]
    for number, share in enumerate(shares):
        own = table[(table.share == share) & table.kind.isin(kinds)]
        if number < len(shares) - 1:
            own = own[own.kind != "none"]
        heights = [
            kinds.index(kind) + (0.22 * (number - (len(shares) - 1) / 2) if kind != "none" else 0)
            for kind in own.kind
        ]
        style = {"color": PALETTE[(1, 0, 2, 4)[number % 4]]}
        ax.hlines(heights, own.from_low, own.from_high, alpha=0.5, linewidth=2, **style)
        label = f"{round(100 * share)} % of the inputs"
        ax.plot(own.difference, heights, "so^D"[number % 4], markersize=6, label=label, **style)
    ax.axvline(0, color="black", linewidth=1, linestyle="--")
    names = ["no inputs: 1/T", *(INPUT_SHIFTS.facts[kind]["label"] for kind in INPUT_SHIFTS)]
    ax.set_yticks(range(len(kinds)), names)
    ax.set_ylim(len(kinds) - 0.5, -0.5)
    ax.set_xlabel(f"{WORDS[score]} minus right inputs', points")
    percent(ax, "x")
    return ax


def both_sides(ax: Axes, table: pd.DataFrame) -> Axes:
    """Proposition 3 at all inputs wrong: the objective's change, per task, beside the bound.

    table: of `shifts`; tasks, their number. One marker per seed.
    """
    for number, (model, marker) in enumerate((("average", "o"), ("DivMerge", "s"))):
        own = table[table.model == model]
        heights = [list(INPUT_SHIFTS).index(kind) + 0.2 * (number - 0.5) for kind in own.kind]
        style = {"color": PALETTE[(0, 1)[number]], "alpha": 0.8}
        ax.plot(own.apart / own.bound, heights, marker, label=model, markersize=6, **style)
    ax.axvline(1, color="black", linewidth=1, linestyle="--", label="the paper's bound")
    ax.axvline(0.5, color="black", linewidth=1, linestyle=":", label="what a range of log 2 allows")
    ax.set_yticks(
        range(len(INPUT_SHIFTS)), [INPUT_SHIFTS.facts[kind]["label"] for kind in INPUT_SHIFTS]
    )
    ax.set_ylim(len(INPUT_SHIFTS) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.set_xlabel("change of the objective, share of the bound")
    return ax


def falling(ax: Axes, courses: pd.DataFrame, target: float, *, x: str = "passes") -> Axes:
    """The loss of every optimiser by passes or by inputs read; the line is Adam's last loss.

    courses: of `convergence`, for one number of tasks and one grouping. The lowest loss up to each
    point is drawn for the optimisers that keep their best one. Those of a stored table that the
    package no longer has are drawn too.
    """
    for name, (place, marker) in FINDERS.items():
        own = courses[courses.optimizer == name].sort_values("passes", kind="stable")
        if own.empty:
            continue
        loss = own.loss if name.endswith("adam") else own.loss.cummin()
        at = own[x].where(own[x] > 0)  # the start has no place on a logarithmic axis
        style = {"color": PALETTE[place], "marker": marker, "markevery": max(1, len(own) // 9)}
        ax.plot(at, loss, label=FOUND_BY[name], markersize=5, **style)
    ax.axhline(target, color=GREY, linewidth=1, linestyle="--")
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())  # a short range would name all of its ticks
    names = {"passes": "forward-backward passes", "read": "inputs read per task"}
    ax.set(xlabel=names.get(x, x), ylabel="loss on all inputs, nats")
    return ax
