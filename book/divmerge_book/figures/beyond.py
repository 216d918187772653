"""Figures of methods beyond one merged vector; tables of `studies.plans`."""

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures import styles
from divmerge_book.figures.styles import PALETTE, numbered, title
from divmerge_book.studies.continual_merging import BATCH
from divmerge_book.studies.corrupted_experts import CORRUPTIONS
from divmerge_book.studies.searches import SEARCHES

CLUSTERING_LABELS, SELECTOR_LABELS, ROUTING_LABELS = (
    styles.labels(looks) for looks in (styles.CLUSTERINGS, styles.SELECTORS, styles.ROUTING)
)
SEARCHERS = {n: (SEARCHES.facts[n]["label"], look) for n, look in styles.SEARCHERS.items()}
WORDS = {  # column -> label of an axis
    "ratio": "accuracy on the tasks seen, % of expert",
    "anp": "ANP on test rows, %",
    "kept_margin": "kept margin on test rows, %",
}
HEADS = {  # column -> head of a table
    **{"anp": "ANP, %", "kept_margin": "kept margin, %", "below": "tasks below majority"},
    **{"finds": "weights of an answer", "milliseconds": "ms per row", "slower": "times a model"},
}


def continual_curve(ax: Axes, table: pd.DataFrame, column: str = "ratio") -> Axes:
    """Scores on the tasks seen so far, relative to their experts, after every arrival.

    table: of `margins.scored`; column: ratio or kept_margin. Lines are means over orders, bands
    from the lowest to the highest; open markers at the right are the methods that see all experts
    at once.
    """
    means = table.groupby(["method", "order", "arrived"])[column].mean().reset_index()
    found, last = plot.spread(means, ["method", "arrived"], column), table.arrived.max()
    ends = {"ends": ("low", "high"), "band": True}
    plot.lines(ax, found, "arrived", "value", styles.CONTINUAL, by="method", **ends)
    whole = found[found.arrived == last].set_index("method").value
    for method, (_, look) in styles.CONTINUAL.items():
        batch = whole[BATCH[method]]
        ax.plot(last + 0.35, batch, markerfacecolor="none", markersize=7, **look)
    plot.ticks(ax, range(1, last + 1))
    return plot.finish(ax, "experts that have arrived", WORDS[column], percent="y")


def scores_by_order(ax: Axes, found: pd.DataFrame, column: str) -> Axes:
    """One point per random order of every continual method, a bar at the mean.

    found: of `backward_transfer`; column: ratio, kept_margin or bwt. Black diamonds are the methods
    that see all experts at once.
    """
    values = {method: own[column] for method, own in found.groupby("method")}
    rows = {label: (values[method], look) for method, (label, look) in styles.CONTINUAL.items()}
    plot.strip(ax, rows, jitter=0.16)
    for y, method in enumerate(styles.CONTINUAL):
        batch = values[BATCH[method]]
        ax.plot(batch, y + 0 * batch, "kD", markerfacecolor="none", markersize=7)
    return plot.finish(ax, percent="x")


def model_counts(ax: Axes, table: pd.DataFrame) -> Axes:
    """How many models the mixture keeps, over zeta, a line per sigma."""
    own = table[table.how == "dp_mixture"].replace({"zeta": {"inf": r"$\infty$"}})
    looks = numbered(own.sigma, markers="os^", form="$\\sigma$ = {:g}")
    plot.lines(ax, own, "zeta", "models", looks, by="sigma", ordinal=True)
    ax.tick_params(axis="x", rotation=90, labelsize=8)
    ax.set_yticks(range(1, int(own.models.max()) + 1))
    return plot.finish(ax, r"$\zeta$, the weight of a new model", "models $L$", legend=9)


def score_by_size(ax: Axes, table: pd.DataFrame, column: str = "anp") -> Axes:
    """ANP (or kept_margin) against megabytes stored, for three ways to cluster the experts."""
    for how, (label, look) in styles.CLUSTERINGS.items():
        some = table[table.how == how].drop_duplicates(["models", "groups"]).sort_values("bytes")
        plot.line(ax, some.bytes / 1e6, some[column], label=label, markersize=6, alpha=0.85, **look)
    return plot.finish(ax, "stored, MB", WORDS[column], percent="y")


def selection_by_corruption(ax: Axes, table: pd.DataFrame, kind: str, column: str) -> Axes:
    """Every way to choose from a pool over the corrupted share: means over seeds, bars to extremes.

    column: auc, mass, anp or kept_margin. A share of 0 is the pool without corruption.
    """
    some = table[table.kind.isin([kind, "none"])].dropna(subset=[column])
    each = some.groupby(["method", "share", "seed"], sort=False)[column].mean().reset_index()
    found = plot.spread(each, ["method", "share"], column)
    found[["value", "low", "high"]] = found[["value", "low", "high"]].astype(float)
    how = {"by": "method", "ends": ("low", "high"), "step": 0.012, "linewidth": 1.2}
    plot.lines(ax, found, "share", "value", styles.SELECTORS, **how)
    shares = sorted(some.share.unique())
    plot.ticks(ax, shares, [f"{100 * share:.0f}" for share in shares])
    ax.set_title(CORRUPTIONS.facts[kind]["label"])
    of_column = {"at_y": {0.5: ":"}} if column == "auc" else {"percent": "y"}
    return plot.finish(ax, "corrupted share of the pool, %", **of_column)


def search_curves(ax: Axes, table: pd.DataFrame) -> Axes:
    """Best validation accuracy so far over score calls, mean over tasks and seeds."""
    plot.lines(ax, table, "call", "validation", SEARCHERS, by="search", marker="")
    words = "score calls per task", "best validation accuracy, %"
    return plot.finish(ax, *words, percent="y", legend=8)


def generalisation_gaps(ax: Axes, table: pd.DataFrame) -> Axes:
    """Validation (open) and test accuracy (filled) of what every search returns: means."""
    mean = table.dropna(subset=["test"]).groupby("search")[["validation", "test"]].mean()
    looks = {"expert": ("the experts", {"color": "black", "marker": "o"}), **SEARCHERS}
    plot.dumbbells(ax, {label: (*mean.loc[name], look) for name, (label, look) in looks.items()})
    return plot.finish(ax, "accuracy, %", percent="x")


def proxy_tuning(ax: Axes, table: pd.DataFrame) -> Axes:
    """Accuracy of every model of the fusion study: small points per task, bars the mean."""
    tasks = table.groupby(["model", "task"], sort=False).accuracy.mean()
    names = list(dict.fromkeys(table.model))
    for y, name in enumerate(names):
        plain = name in ("large base", "small expert", "large expert")
        shade, values = PALETTE[7 if plain else 0 if name.endswith("own") else 1], tasks[name]
        ax.barh(y, values.mean(), color=shade, alpha=0.45, height=0.7)
        plot.intervals(ax, y + 0 * values, values, color=shade, marker="o", markersize=4)
        ax.annotate(f"{100 * values.mean():.1f}", (0.01, y), va="center", fontsize=9)
    plot.label_rows(ax, names)
    return plot.finish(ax, "accuracy on test rows, %", percent="x")


def score_against_cost(ax: Axes, table: pd.DataFrame, column: str, score: str = "anp") -> Axes:
    """A score against what inference costs: `models` stored, or times `slower` than one model.

    Colour and marker say where the weights of an answer come from.
    """
    plot.scatter(ax, table, column, score, styles.ROUTING, by="finds", markersize=8)
    ax.margins(x=0.12, y=0.1)
    plot.reference(ax, 1, x=False, style="--")
    ax.set_xscale("log", base=2)
    plot.annotate(ax, zip(table[column], table[score], table.method.map(title), strict=True))
    ax.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    unit = {"models": "stored, in models", "slower": "time per row, in plain models"}[column]
    return plot.finish(ax, unit, WORDS[score], percent="y")
