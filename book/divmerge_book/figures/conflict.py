"""Figures of interference in weights; tables of `studies.layerwise_analysis`, `mergeability` and
`coefficient_analysis`. Every function draws on the Axes it is given and returns it.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures import short
from divmerge_book.figures.styles import KINDS, mark, numbered
from divmerge_book.studies.mergeability import INPUTS, MERGES, OUTCOMES, label_of

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
    if words == ["embeddings", "embedding"]:
        return "embeddings"
    return ", ".join(words)


def pair_map(ax: Axes, values: pd.DataFrame, *, label: str, limit: float | int) -> Axes:
    """A number for every pair of tasks, without the diagonal; white is 0.

    values: tasks by tasks. limit: where the colours end.
    """
    values = values.round(2) + 0.0  # no minus zero
    plot.heat_map(
        ax, values, label=label, mask=np.eye(len(values), dtype=bool), **plot.diverging(0, limit)
    )
    return ax


def sign_conflict(ax: Axes, table: pd.DataFrame) -> Axes:
    """Sign conflict of every pair, one row per way to count; a bar at the mean.

    table: of `pair_table`. The dashed line is the conflict of random signs.
    """
    values = table.groupby("counted").conflict
    plot.points_by_row(
        ax, {label: (values.get_group(n), look) for n, (label, look) in COUNTED.items()},
        jitter=0.18,
    )  # fmt: skip
    plot.reference(ax, 0.5, style="--")
    ax.set_xlim(0, 0.6)
    return plot.finish(ax, "share of parameters pushed in opposite directions")


def by_place(ax: Axes, table: pd.DataFrame, column: str, *, label: str) -> Axes:
    """A number of pairs in every place, in order of depth: means, bars from lowest to highest pair.

    table: of `conflict_by_place`; column: conflict or cosine.
    """
    found = plot.spread(table, ["place", "kind"], column)
    for y, row in found.iterrows():
        plot.intervals(
            ax, y, row.value, row.low, row.high, width=2.5, **KINDS[row.kind], markersize=7
        )
    plot.label_rows(ax, map(place_label, found.place))
    return plot.finish(ax, label)


def length_shares(ax: Axes, table: pd.DataFrame, column: str = "share") -> Axes:
    """Every task vector's squared length over places, place by task, in per cent.

    table: of `norms_by_place`.
    """
    wide = 100 * table.pivot_table(column, "place", "task", sort=False).rename(index=place_label)
    plot.heat_map(
        ax, wide, label="share of the squared length, %", fmt=".0f", cmap="viridis", vmin=0
    )
    return ax


def spectrum(ax: Axes, table: pd.DataFrame, layer: str) -> Axes:
    """Shares of one layer's squared norm by singular direction, a line per task.

    table: of `spectrum_table`. Both axes are logarithmic; the dotted line is equal shares.
    """
    some = table[table.layer == layer]
    for (_, look), row in zip(numbered(some.task).values(), some.itertuples(), strict=True):
        every = sorted({int(n) - 1 for n in np.geomspace(1, len(row.energy), 12)})
        plot.line(ax, np.arange(1, 1 + len(row.energy)), np.array(row.energy), linewidth=1.2,
             markevery=every, label=f"{row.task}, {row.stable:.1f}", **look)  # fmt: skip
    plot.reference(ax, 1 / len(some.energy.iloc[0]), x=False, style=":")
    return plot.finish(
        ax,
        "singular direction, largest first",
        "share of the squared norm",
        xscale="log",
        yscale="log",
        ylim=(1e-6, 1.5),
        legend={
            "title": "task, stable rank",
            "fontsize": 8,
            "title_fontsize": 8,
            "loc": "lower left",
        },
    )


def alignment(ax: Axes, table: pd.DataFrame) -> Axes:
    """SAR over its cut-off, filled markers, and its chance level, open and dashed.

    table: of `alignment_table`, means over tasks and layers.
    """
    lines = {
        "merged": ("the sum of all", "chance"),
        "partner": ("one other task", "chance_partner"),
    }
    for (name, (said, chance)), look in zip(
        lines.items(), (mark(0, "o"), mark(1, "s")), strict=True
    ):
        plot.line(ax, table.residual, table[name], label=f"with {said}", **look)
        open_ = {"linestyle": "--", "markerfacecolor": "white", **look}
        plot.line(ax, table.residual, table[chance], label=f"with {said}, by chance", **open_)
    ax.set(xlabel="cut-off: share of the norm that may be left out", ylabel="alignment ratio, SAR")
    ax.set_ylim(0, 1.02)
    ax.legend(fontsize=8)
    return ax


def damage_correlations(ax: Axes, table: pd.DataFrame, damage: str) -> Axes:
    """Rank correlation of every predictor with one damage: a marker per method.

    table: rows of `correlations` of one view. The grey band holds what the largest of all
    |correlations| stays within in 95 % of permutations: markers inside it are not significant.
    """
    some = table[table.damage == damage]
    found = some.groupby("number", sort=False).rho.apply(lambda rho: rho.notna().any())
    rows = {name: label_of(name) for name in found.index[found]}
    looks = {m: (MERGES.facts[m]["label"], look) for m, (_, look) in numbered(some.method).items()}
    band = some[~some.number.isin(INPUTS)].threshold.max()
    ax.axvspan(-band, band, color="0.9", zorder=0)
    plot.reference(ax, 0)
    how = {"row": "number", "group": "method", "value": "rho", "step": 0.15}
    plot.intervals_by_row(ax, some, rows, looks, width=1, markersize=4, **how)
    ax.set(xlim=(-1.02, 1.02), xlabel="rank correlation with damage")
    ax.set_title(OUTCOMES[damage], fontsize=9)
    return ax


def damage_scatter(ax: Axes, table: pd.DataFrame, number: str, damage: str, method: str) -> Axes:
    """One predictor against one damage, a point per task of a pair, a colour per damaged task.

    table: of `pairs`; means over seeds.
    """
    some = table[table.method == method]
    mean = some.groupby(["task", "partner"], sort=False)[[number, damage]].mean().reset_index()
    plot.scatter(ax, mean, number, damage, numbered(mean.task), by="task")
    return plot.finish(ax, label_of(number), OUTCOMES[damage])


def group_map(
    ax: Axes, table: pd.DataFrame, column: str, *, label: str, middle: float | int
) -> Axes:
    """A column of `coefficient_table`, group by task, mean over seeds; white is `middle`.

    table: rows of one grouping and one number of tasks. The colours end as far from the middle as
    the furthest value.
    """
    wide = table.pivot_table(column, "group", "task", sort=False).rename(index=short)
    reach = float((wide - middle).abs().to_numpy().max()) or 1.0
    plot.heat_map(ax, wide, label=label, annot=wide.size <= 80, **plot.diverging(middle, reach))
    ax.tick_params(axis="y", labelsize=8)
    return ax


def coefficients_by_count(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every task's coefficients times T, over T: means over groups, bars from lowest to highest.

    table: rows of `coefficient_table` of one grouping, mean over seeds. The dashed line at 1 is
    the average of the experts.
    """
    mean = table.groupby(["task", "count", "group"], sort=False).coefficient.mean().reset_index()
    counts, looks = sorted(mean["count"].unique()), numbered(mean.task)
    found = plot.spread(
        mean.assign(times=mean.coefficient * mean["count"]), ["task", "count"], "times"
    )
    for (task, (label, look)), shift in zip(
        looks.items(), plot.dodge(len(looks), 0.07), strict=True
    ):
        own = found[found.task == task].sort_values("count")
        x = own["count"].map(counts.index) + shift
        plot.line(ax, x, own.value, own.low, own.high, label=label, linewidth=1, **look)
    plot.reference(ax, 1, x=False, style="--")
    plot.ticks(ax, range(len(counts)), map(str, counts))
    return plot.finish(
        ax, "tasks merged, $T$", r"$T\,\lambda_{tg}$", legend={"fontsize": 8, "ncols": 2}
    )
