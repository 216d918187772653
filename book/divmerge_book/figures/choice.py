"""Figures of what to minimise: each draws on the Axes it is given and returns it.

Tables come from `studies.choice`, `robustness` and `trajectories`. Colours are of seaborn's
colour-blind palette, each with a marker of its own; grey lines are the other objectives.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import PALETTE
from divmerge_book.studies.objective_fits import named
from divmerge_book.studies.predictions import WORDS, of_score
from divmerge_book.studies.robustness import CORRUPTIONS
from divmerge_book.studies.trajectories import totals
from divmerge_core.divergences import DIVERGENCES, facts_of

Look = tuple[int, str]  # place in the palette, marker
LOOKS: Mapping[str, Look] = {
    **{"js": (2, "o"), "kl": (0, "s"), "reverse_kl": (1, "^"), "chi_squared": (3, "D")},
    **{"total_variation": (4, "v"), "squared_l2": (5, "P"), "logit_mse": (6, "X")},
    **{"hidden_cosine": (8, "<"), "entropy": (9, ">")},
}
ORACLE = "labels"
TASKS: Sequence[Look] = ((0, "o"), (1, "s"), (2, "^"), (3, "D"), (4, "v"), (5, "P"), (8, "X"))
COUNTS: Sequence[Look] = ((0, "o"), (1, "s"), (2, "^"))
STYLES = ("-", "--", "-.", ":")
SURE = 0.05  # corrected p below it: a filled marker
FLOOR = 1e-8  # of what a logarithmic axis shows
FAR = -12  # points of ANP: what lies further left stands there


def style(spec: str) -> dict:
    """Colour and marker of an objective: black for the oracle, grey where it is not singled out."""
    if spec == ORACLE:
        return {"color": "black", "marker": "*"}
    number, marker = LOOKS.get(spec, (7, ""))
    return {"color": PALETTE[number] if spec in LOOKS else "0.75", "marker": marker}


def values(ax: Axes, table: pd.DataFrame, specs: Sequence[str], column: str) -> Axes:
    """A divergence's value or pull over the merged model's log-odds, a line per divergence.

    table: objective, odds, and the column to draw.
    """
    for place, spec in enumerate(specs):
        some = table[table.objective == spec]
        line = {"color": PALETTE[place % 10], "linestyle": STYLES[place % 4]}
        ax.plot(some.odds, some[column].clip(lower=FLOOR), label=named(spec), **line)
    ax.set_yscale("log")
    ax.set_xlabel("merged model's log-odds for the right answer, nats")
    ax.legend(fontsize=8)
    return ax


def directions(ax: Axes, table: pd.DataFrame) -> Axes:
    """D over half the Fisher metric for small steps, a point per random direction.

    table: objective, ratio. Where all points of a row fall together, D is the Fisher metric up to
    the factor at which they lie; the bar marks the declared one.
    """
    names = list(dict.fromkeys(table.objective))
    draws = np.random.default_rng(0)
    for y, spec in enumerate(names):
        ratio = table[table.objective == spec].ratio
        jitter = draws.uniform(-0.25, 0.25, len(ratio))
        bound = facts_of(spec)["curvature"]
        shade = PALETTE[0] if bound else PALETTE[1]
        ax.plot(ratio, y + jitter, "o" if bound else "s", color=shade, markersize=3, alpha=0.5)
        if bound:
            ax.plot([bound] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1)
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), [named(spec) for spec in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("D / (half the Fisher metric), one point per direction")
    return ax


def forest(ax: Axes, table: pd.DataFrame, *, order: Sequence[str], score: str = "anp") -> Axes:
    """Differences of a score from js with their intervals, a row per objective, a colour per T.

    table: of `compared`, one grouping. Filled markers: the corrected p is below 0.05. What is below
    `FAR` points stands at the left edge with its value, so that the rest can be seen.
    """
    table = of_score(table, score)
    counts = sorted(table["count"].unique())
    for place, count in enumerate(counts):
        number, marker = COUNTS[place % len(COUNTS)]
        shade = PALETTE[number]
        some = table[table["count"] == count].set_index("objective")
        for y, spec in enumerate(order):
            row, at = some.loc[spec], y + 0.26 * (place - (len(counts) - 1) / 2)
            span = [100 * row.from_low, 100 * row.from_high]
            ax.plot(np.clip(span, FAR, None), [at, at], color=shade, linewidth=1.4)
            face, value = shade if row.holm < SURE else "white", 100 * row.difference
            ax.plot(max(value, FAR), at, marker, color=shade, markerfacecolor=face, ms=5)
            if value < FAR:
                ax.text(FAR + 0.9, at, f"{value:.0f}", fontsize=8, va="center", color=shade)
        ax.plot([], [], marker, color=shade, label=f"T = {count}")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(order)), [named(spec) for spec in order])
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlabel(f"{WORDS[score]} minus that of js, points")
    return ax


def tempered(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """A score over temperature, a line per objective: means over seeds, bars 95 % intervals.

    table: scores of `temperatures`; of one stored by seed, bars are from lowest to highest.
    """
    if "seed" in table:
        groups = table.groupby(["objective", "temperature"], sort=False).anp
        table = groups.agg(anp="mean", low="min", high="max").reset_index()
    table = of_score(table, score)
    specs = list(dict.fromkeys(table.objective))
    for place, spec in enumerate(specs):
        own = table[table.objective == spec].sort_values("temperature")
        errors = [100 * (own.score - own.low), 100 * (own.high - own.score)]
        x = own.temperature.to_numpy() * 2 ** (0.06 * (place - (len(specs) - 1) / 2))
        ax.errorbar(x, 100 * own.score, yerr=errors, label=named(spec), ms=5, lw=1.2, **style(spec))
    ax.set_xscale("log", base=2)
    shown = sorted(table.temperature.unique())
    ax.set_xticks(shown, [f"{value:g}" for value in shown])
    ax.minorticks_off()
    ax.set(xlabel="temperature", ylabel=f"{WORDS[score]} on test rows, %")
    ax.legend(fontsize=8)
    return ax


def strained(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """What one expert costs the others, honest or strained: a row each, a marker per objective.

    table: of `costs`, one grouping. Large markers: means over seeds; small ones: seeds.
    """
    kinds = [kind for kind in CORRUPTIONS if kind in set(table.kind)]
    specs = list(dict.fromkeys(table.objective))
    for place, spec in enumerate(specs):
        for y, kind in enumerate(kinds):
            some = table[(table.kind == kind) & (table.objective == spec)]
            at = y + 0.8 * ((place + 0.5) / len(specs) - 0.5)
            cost = 100 * some["cost" if score == "anp" else "kept_cost"]
            look = style(spec)
            ax.plot(cost, [at] * len(cost), linestyle="none", ms=3, alpha=0.6, **look)
            label = named(spec) if y == 0 else None
            ax.plot(cost.mean(), at, ms=7, linestyle="none", label=label, **look)
    ax.axvline(0, color="black", linewidth=0.8)
    for y in range(1, len(kinds)):
        ax.axhline(y - 0.5, color="0.85", linewidth=0.8)
    ax.set_yticks(range(len(kinds)), [CORRUPTIONS.facts[kind]["label"] for kind in kinds])
    ax.set_ylim(len(kinds) - 0.5, -0.5)
    ax.set_xlabel(f"the others lose, points of {WORDS[score]}")
    return ax


def by_task(ax: Axes, table: pd.DataFrame, column: str, *, ms: float = 4) -> Axes:
    """Each task's share of the pull, loss or coefficient over steps: means over seeds.

    table: of `courses`, one objective and kind. column: share, loss or coefficient. ms: of
    markers, points.
    """
    tasks = list(dict.fromkeys(table.task))
    for (number, marker), task in zip(TASKS, tasks, strict=False):
        mean = table[table.task == task].groupby("step")[column].mean()
        scale = 100 if column == "share" else 1
        line = {"color": PALETTE[number], "marker": marker, "ms": ms, "lw": 1.2}
        ax.plot(mean.index, scale * mean, label=task, **line)
    if column == "share":
        ax.axhline(100 / len(tasks), color="black", linewidth=0.8, linestyle=":")
    ax.set_xlabel("step")
    return ax


def travelled(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """Loss (in units of the first), ANP or kept margin (%) over steps, a line per objective.

    table: of `courses`, without strain. Means over seeds.
    """
    whole = totals(table).reset_index()
    if column == "loss":
        first = whole.groupby(["objective", "seed"]).loss.transform("first")
        whole["loss"] = whole.loss / first
    else:
        whole[column] *= 100
    for spec in dict.fromkeys(whole.objective):
        mean = whole[whole.objective == spec].groupby("step")[column].mean()
        shown = spec in LOOKS or spec == ORACLE
        label = named(spec) if shown else None
        front = {"lw": 1.4, "zorder": 3} if shown else {"lw": 0.8, "zorder": 1}
        ax.plot(mean.index, mean, label=label, ms=4, **style(spec), **front)
    ax.set_xlabel("step")
    return ax


def per_objective(
    ax: Axes, table: pd.DataFrame, column: str, *, order: Sequence[str], scale: float = 1
) -> Axes:
    """One small point per seed of every objective, a bar at the mean."""
    for y, spec in enumerate(order):
        found = scale * table[table.objective == spec][column]
        shade = PALETTE[0] if spec in DIVERGENCES else PALETTE[1]
        mark = "o" if spec in DIVERGENCES else "s"
        ax.plot(found, [y] * len(found), mark, color=shade, alpha=0.7, markersize=5)
        ax.plot([found.mean()] * 2, [y - 0.35, y + 0.35], color=shade, linewidth=2)
    ax.set_yticks(range(len(order)), [named(spec) for spec in order])
    ax.set_ylim(len(order) - 0.5, -0.5)
    return ax
