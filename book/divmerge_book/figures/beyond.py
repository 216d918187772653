"""Figures of what one vector cannot do: each draws on the Axes it is given and returns it.

Tables come from `studies`. Colours are seaborn's colour-blind palette, each with a marker of its
own; black stands for references.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import PALETTE, title
from divmerge_book.studies.continual_merging import BATCH
from divmerge_book.studies.corrupted_experts import CORRUPTIONS
from divmerge_book.studies.searches import SEARCHES

Look = tuple[int, str]  # place in the palette, marker
ARRIVING: Mapping[str, Look] = {
    **{"opcm": (0, "o"), "running_average": (7, "s")},
    **{"sequential_task_arithmetic": (1, "^"), "sequential_ties": (4, "D")},
}
WAYS: Mapping[str, Look] = {"dp_mixture": (0, "o"), "k_means": (1, "s"), "random": (7, "x")}
NAMES = {"dp_mixture": "mixture", "k_means": "k-means", "random": "random groups"}
JUDGES: Mapping[str, Look] = {
    **{"policy": (0, "o"), "leave_one_out": (1, "s"), "cosine": (2, "^"), "norm": (4, "D")},
    **{"shuffled": (7, "x"), "all": (5, "v"), "oracle": (3, "*")},
}
SAID = {
    **{"policy": "learned policy", "leave_one_out": "leave one out", "cosine": "cosine"},
    **{"norm": "norm", "shuffled": "policy, shuffled reward", "all": "merge all"},
    "oracle": "honest only",
}
SEARCHING: Mapping[str, Look] = {
    **{"evolution": (0, "o"), "evolution_small": (9, "P"), "random": (7, "s")},
    "greedy": (1, "^"),
}
FINDING: Mapping[str, Look] = {"one": (2, "o"), "input": (1, "s"), "task": (0, "^")}
WHERE = {"one": "one set for all", "input": "read from the input", "task": "the task's number"}


def percent(ax: Axes, axis: str = "y") -> None:
    """Shares as percentages on an axis whose label names the unit."""
    getattr(ax, f"{axis}axis").set_major_formatter(
        lambda value, place: f"{round(100 * value, 2):g}"
    )


WORDS = {  # column -> label of an axis
    **{"ratio": "accuracy on the tasks seen, % of expert", "anp": "ANP on test rows, %"},
    "kept_margin": "kept margin on test rows, %",
}
HEADS = {  # column -> head of a table
    **{"anp": "ANP, %", "kept_margin": "kept margin, %", "below": "tasks below majority"},
    **{"finds": "weights of an answer", "milliseconds": "ms per row", "slower": "times a model"},
}


def arriving(ax: Axes, table: pd.DataFrame, column: str = "ratio") -> Axes:
    """Scores on the tasks seen so far, relative to their experts, after every arrival.

    table: of `margins.scored`; column: ratio or kept_margin. Lines are means over orders, bands
    from the lowest to the highest; open markers at the right are the methods that see all experts
    at once.
    """
    means = table.groupby(["method", "order", "arrived"])[column].mean()
    last = table.arrived.max()
    for method, (number, marker) in ARRIVING.items():
        wide = means[method].unstack("arrived")
        style = {"color": PALETTE[number], "marker": marker}
        ax.plot(wide.columns, wide.mean(), label=title(method), markersize=5, **style)
        ax.fill_between(wide.columns, wide.min(), wide.max(), color=style["color"], alpha=0.15)
        batch = means[BATCH[method], -1, last]
        ax.plot(last + 0.35, batch, markerfacecolor="none", markersize=7, **style)
    ax.set_xticks(range(1, last + 1))
    ax.set(xlabel="experts that have arrived", ylabel=WORDS[column])
    percent(ax)
    return ax


def by_order(ax: Axes, found: pd.DataFrame, column: str) -> Axes:
    """One point per random order of every continual method, a bar at the mean.

    found: of `forgetting`; column: ratio, kept_margin or bwt. Black diamonds are the methods that
    see all experts at once.
    """
    draws = np.random.default_rng(0)
    for y, (method, (number, marker)) in enumerate(ARRIVING.items()):
        values = found[found.method == method][column]
        jitter = draws.uniform(-0.16, 0.16, len(values))
        ax.plot(values, y + jitter, marker, color=PALETTE[number], alpha=0.7, markersize=5)
        ax.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=PALETTE[number], linewidth=2)
        batch = found[found.method == BATCH[method]][column]
        ax.plot(batch, [y] * len(batch), "kD", markerfacecolor="none", markersize=7)
    ax.set_yticks(range(len(ARRIVING)), [title(method) for method in ARRIVING])
    ax.set_ylim(len(ARRIVING) - 0.5, -0.5)
    percent(ax, "x")
    return ax


def model_counts(ax: Axes, table: pd.DataFrame) -> Axes:
    """How many models the mixture keeps, over zeta, a line per sigma."""
    own = table[table.how == "dp_mixture"]
    values = list(dict.fromkeys(own.zeta))
    for number, (sigma, some) in enumerate(own.groupby("sigma", sort=False)):
        style = {"marker": "os^"[number % 3], "color": PALETTE[(0, 1, 2)[number % 3]]}
        ax.plot(range(len(values)), some.models, label=f"$\\sigma$ = {sigma:g}", **style)
    names = ["$\\infty$" if value == "inf" else value for value in values]
    ax.set_xticks(range(len(values)), names, rotation=45)
    ax.set_yticks(range(1, int(own.models.max()) + 1))
    ax.set(xlabel=r"$\zeta$, the weight of a new model", ylabel="models $L$")
    ax.legend(fontsize=9)
    return ax


def worth(ax: Axes, table: pd.DataFrame, column: str = "anp") -> Axes:
    """ANP (or kept_margin) against megabytes stored, for three ways to group experts."""
    for how, (number, marker) in WAYS.items():
        some = table[table.how == how].drop_duplicates(["models", "groups"]).sort_values("bytes")
        style = {"color": PALETTE[number], "marker": marker, "label": NAMES[how]}
        line = "none" if how == "random" else "-"
        ax.plot(some.bytes / 1e6, some[column], linestyle=line, markersize=6, alpha=0.85, **style)
    ax.set(xlabel="stored, MB", ylabel=WORDS[column])
    percent(ax)
    ax.legend(fontsize=9)
    return ax


def judged(ax: Axes, table: pd.DataFrame, kind: str, column: str) -> Axes:
    """Every way to choose from a pool over the corrupted share: means over seeds, bars to extremes.

    column: auc, mass, anp or kept_margin. A share of 0 is the pool without corruption.
    """
    some = table[table.kind.isin([kind, "none"])].dropna(subset=[column])
    names = [name for name in JUDGES if name in set(some.method)]
    for place, method in enumerate(names):
        number, marker = JUDGES[method]
        mean = some[some.method == method].groupby(["share", "seed"])[column].mean().unstack("seed")
        middle = mean.mean(axis=1)
        errors = [middle - mean.min(axis=1), mean.max(axis=1) - middle]
        style = {"color": PALETTE[number], "marker": marker, "label": SAID[method]}
        x = mean.index.to_numpy() + 0.012 * (place - len(names) / 2)
        ax.errorbar(x, middle, yerr=errors, markersize=5, linewidth=1.2, **style)
    ax.set_xticks(sorted(some.share.unique()))
    ax.set_title(CORRUPTIONS.facts[kind]["label"])
    ax.set_xlabel("corrupted share of the pool, %")
    percent(ax, "x")
    if column == "auc":
        ax.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    else:
        percent(ax)
    return ax


def courses(ax: Axes, table: pd.DataFrame) -> Axes:
    """Best validation accuracy so far over score calls, mean over tasks and seeds."""
    for name, (number, _) in SEARCHING.items():
        mean = table[table.search == name].groupby("call").validation.mean()
        label = SEARCHES.facts[name]["label"]
        ax.plot(mean.index, mean, color=PALETTE[number], label=label)
    ax.set(xlabel="score calls per task", ylabel="best validation accuracy, %")
    percent(ax)
    ax.legend(fontsize=8)
    return ax


def gaps(ax: Axes, table: pd.DataFrame) -> Axes:
    """Validation (open) and test accuracy (filled) of what every search returns, means over seeds.

    The line between them is what the search promised and did not keep.
    """
    names = ["expert", *SEARCHING]
    mean = table.dropna(subset=["test"]).groupby("search")[["validation", "test"]].mean()
    for y, name in enumerate(names):
        number, marker = SEARCHING.get(name, (0, "o"))
        colour = "black" if name == "expert" else PALETTE[number]
        low, high = mean.test[name], mean.validation[name]
        ax.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.5)
        ax.plot(high, y, marker, color=colour, markerfacecolor="white", markersize=8)
        ax.plot(low, y, marker, color=colour, markersize=8)
    labels = ["the experts", *(SEARCHES.facts[name]["label"] for name in SEARCHING)]
    ax.set_yticks(range(len(names)), labels)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("accuracy, %")
    percent(ax, "x")
    return ax


def steering(ax: Axes, table: pd.DataFrame) -> Axes:
    """Accuracy of every model of the fusion study: small points per task, bars the mean."""
    names = list(dict.fromkeys(table.model))
    tasks = table.groupby(["model", "task"]).accuracy.mean()
    for y, name in enumerate(names):
        plain = name in ("large base", "small expert", "large expert")
        colour = PALETTE[7] if plain else PALETTE[0 if name.endswith("own") else 1]
        ax.barh(y, tasks[name].mean(), color=colour, alpha=0.45, height=0.7)
        ax.plot(tasks[name], [y] * len(tasks[name]), "o", color=colour, markersize=4)
        note = f"{100 * tasks[name].mean():.1f}"
        ax.annotate(note, (0.01, y), va="center", fontsize=9)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("accuracy on test rows, %")
    percent(ax, "x")
    ax.grid(axis="y", visible=False)
    return ax


def priced(ax: Axes, table: pd.DataFrame, column: str, score: str = "anp") -> Axes:
    """A score against what answering costs: `models` stored, or times `slower` than one model.

    Colour and marker say where the weights of an answer come from.
    """
    for finds, (number, marker) in FINDING.items():
        some = table[table.finds == finds]
        style = {"color": PALETTE[number], "markersize": 8, "label": WHERE[finds]}
        ax.plot(some[column], some[score], marker, **style)
    ax.margins(y=0.1)
    point = np.ptp(ax.get_ylim()) / (72 * ax.figure.get_figheight() * ax.get_position().height)
    taken: list[tuple[float, float]] = []  # x and y of the labels so far, lowest first
    for _, row in table.sort_values(score).iterrows():
        x, y = float(row[column]), float(row[score])
        y = max([y, *(low + 10 * point for other, low in taken if 0.6 < x / other < 1.6)])
        taken.append((x, y))
        right = x > np.sqrt(table[column].max())
        style = {"ha": "right" if right else "left", "va": "center", "fontsize": 8}
        shift = (-7 if right else 7, (y - row[score]) / point)
        ax.annotate(
            title(row.method), (x, row[score]), xytext=shift, textcoords="offset points", **style
        )
    ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    unit = {"models": "stored, in models", "slower": "time per row, in plain models"}[column]
    ax.set(xlabel=unit, ylabel=WORDS[score])
    percent(ax)
    return ax
