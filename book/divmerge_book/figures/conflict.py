"""Figures of interference in weights; tables of `studies.layerwise_analysis`, `mergeability` and
`coefficient_analysis`.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures import short
from divmerge_book.figures.styles import KINDS, mark, numbered
from divmerge_book.studies.mergeability import INPUTS, LABELS, MERGES, OUTCOMES

COUNTED = {
    "all": ("all parameters", mark(7, "o")),
    "touched": ("without words that only shrank", mark(0, "s")),
    "largest fifth": ("largest fifth of each", mark(1, "D")),
}
COVARIATES = {
    **{"conflict": "sign conflict", "cosine": "cosine with the others", "norm": "share of length"},
    "js": "the JS of the average",
}


def place_label(name: str) -> str:
    """`encoder.layer.0 attention` -> `block 0, attention`; `embeddings norm` keeps its words."""
    words = short(name).rsplit(" ", 1)
    return "embeddings" if words == ["embeddings", "embedding"] else ", ".join(words)


def pair_map(ax: Axes, values: pd.DataFrame, *, label: str, limit: float | int) -> Axes:
    """A number for every pair of tasks, without the diagonal; white is 0, colours end at limit."""
    mask = np.eye(len(values), dtype=bool)
    return plot.heat_map(ax, values, label=label, mask=mask, **plot.diverging(0, limit))


def sign_conflict(ax: Axes, table: pd.DataFrame) -> Axes:
    """Sign conflict of every pair, one row per way to count; a bar at the mean.

    table: of `pair_table`. The dashed line is the conflict of random signs.
    """
    values = table.groupby("counted").conflict
    rows = {label: (values.get_group(name), look) for name, (label, look) in COUNTED.items()}
    plot.strip(ax, rows, jitter=0.18)
    words = "share of parameters pushed in opposite directions"
    return plot.finish(ax, words, xlim=(0, 0.6), at={0.5: "--"})


def by_place(ax: Axes, table: pd.DataFrame, column: str, *, label: str) -> Axes:
    """Conflict or cosine of pairs in every place, in order of depth: means, bars to the extremes.

    table: of `conflict_by_place`.
    """
    found = plot.spread(table, ["place", "kind"], column)
    places = {place: place_label(place) for place in found.place}
    looks = {kind: (kind, {**look, "markersize": 7}) for kind, look in KINDS.items()}
    plot.forest(ax, found, places, looks, row="place", group="kind", step=0, width=2.5)
    ax.grid(axis="y", visible=False)
    return plot.finish(ax, label)


def length_shares(ax: Axes, table: pd.DataFrame, column: str = "share") -> Axes:
    """Every task vector's squared length, %, place by task. table: of `norms_by_place`."""
    wide = 100 * table.pivot_table(column, "place", "task", sort=False).rename(index=place_label)
    how = {"label": "share of the squared length, %", "fmt": ".0f", "cmap": "viridis", "vmin": 0}
    return plot.heat_map(ax, wide, **how)


def spectrum(ax: Axes, table: pd.DataFrame, layer: str) -> Axes:
    """Shares of one layer's squared norm by singular direction, a line per task.

    table: of `spectrum_table`. Both axes are logarithmic; the dotted line is equal shares.
    """
    some = table[table.layer == layer]
    for (_, look), row in zip(numbered(some.task).values(), some.itertuples(), strict=True):
        every = sorted({int(n) - 1 for n in np.geomspace(1, len(row.energy), 12)})
        how = {"linewidth": 1.2, "markevery": every, "label": f"{row.task}, {row.stable:.1f}"}
        plot.line(ax, np.arange(1, 1 + len(row.energy)), np.array(row.energy), **how, **look)
    legend = {"title": "task, stable rank", "fontsize": 8, "title_fontsize": 8, "loc": "lower left"}
    scales = {"xscale": "log", "yscale": "log", "ylim": (1e-6, 1.5)}
    words = "singular direction, largest first", "share of the squared norm"
    return plot.finish(ax, *words, **scales, legend=legend, at_y={1 / len(row.energy): ":"})


def alignment(ax: Axes, table: pd.DataFrame) -> Axes:
    """SAR over its cut-off, filled markers, and its chance level, open and dashed.

    table: of `alignment_table`, means over tasks and layers.
    """
    for name, chance, words, look in (
        ("merged", "chance", "with the sum of all", mark(0, "o")),
        ("partner", "chance_partner", "with one other task", mark(1, "s")),
    ):
        plot.line(ax, table.residual, table[name], label=words, **look)
        look |= {"linestyle": "--", "markerfacecolor": "white"}
        plot.line(ax, table.residual, table[chance], label=f"{words}, by chance", **look)
    words = "cut-off: share of the norm that may be left out", "alignment ratio, SAR"
    return plot.finish(ax, *words, ylim=(0, 1.02), legend=8)


def damage_correlations(ax: Axes, table: pd.DataFrame, damage: str) -> Axes:
    """Rank correlation of every predictor with one damage: a marker per method.

    table: rows of `correlations` of one view. The grey band contains the largest of all
    |correlations| in 95 % of permutations: markers inside it are not significant.
    """
    some = table[table.damage == damage]
    rows = {name: LABELS[name] for name in some.dropna(subset=["rho"]).number.unique()}
    looks = {m: (MERGES.facts[m]["label"], look) for m, (_, look) in numbered(some.method).items()}
    band = some[~some.number.isin(INPUTS)].threshold.max()
    ax.axvspan(-band, band, color="0.9", zorder=0)
    how = {"row": "number", "group": "method", "value": "rho", "step": 0.15}
    plot.forest(ax, some, rows, looks, width=1, markersize=4, **how)
    ax.set_title(OUTCOMES[damage], fontsize=9)
    return plot.finish(ax, "rank correlation with damage", xlim=(-1.02, 1.02), at={0: "-"})


def damage_scatter(ax: Axes, table: pd.DataFrame, number: str, damage: str, method: str) -> Axes:
    """One predictor against one damage, a point per task of a pair, a colour per damaged task.

    table: of `pairs`; means over seeds.
    """
    keys = ["task", "partner"]
    mean = table[table.method == method].groupby(keys, sort=False)[[number, damage]].mean()
    mean = mean.reset_index()
    plot.scatter(ax, mean, number, damage, numbered(mean.task), by="task")
    return plot.finish(ax, LABELS[number], OUTCOMES[damage])


def group_map(
    ax: Axes, table: pd.DataFrame, column: str, *, label: str, middle: float | int
) -> Axes:
    """A column of `coefficient_analysis.fitted`, group by task, mean over seeds; white is `middle`.

    table: rows of one grouping and one number of tasks.
    """
    wide = table.pivot_table(column, "group", "task", sort=False).rename(index=short)
    how = plot.diverging(middle, float((wide - middle).abs().to_numpy().max()) or 1.0)
    plot.heat_map(ax, wide, label=label, annot=wide.size <= 80, **how)
    ax.tick_params(axis="y", labelsize=8)
    return ax
