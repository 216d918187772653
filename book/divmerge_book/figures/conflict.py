"""Figures of interference in weights: each draws on the Axes it is given and returns it.

Tables come from `studies.placement`, `studies.prediction` and `studies.responses`. Colours are
seaborn's colour-blind palette, each with a marker of its own; black stands for references.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from divmerge_book.figures import PALETTE, short
from divmerge_book.studies.mergeability import INPUTS, MERGES, OUTCOMES, label_of

MARKERS = "osD^vPX*"
Look = tuple[int, str]  # place in the palette, marker
KINDS: Mapping[str, Look] = {
    **{"embedding": (4, "D"), "attention": (0, "o"), "MLP": (1, "s")},
    **{"norm": (2, "^"), "other": (7, "x")},
}
COUNTS = {
    **{"all": "all parameters", "touched": "without words that only shrank"},
    "largest fifth": "largest fifth of each",
}
CLUES = {
    **{"conflict": "sign conflict", "cosine": "cosine with the others", "norm": "share of length"},
    "js": "the JS of the average",
}


def place(name: str) -> str:
    """`encoder.layer.0 attention` -> `block 0, attention`; `embeddings norm` keeps its words."""
    words = short(name).rsplit(" ", 1)
    if words[0] == "embeddings":
        return "embeddings" if words[1] == "embedding" else f"embeddings, {words[1]}"
    return ", ".join(words)


def pair_map(ax: Axes, values: pd.DataFrame, *, label: str, limit: float) -> Axes:
    """A number for every pair of tasks, without the diagonal; white is 0.

    values: tasks by tasks. limit: where the colours end.
    """
    hidden, values = np.eye(len(values), dtype=bool), values.round(2) + 0.0  # no minus zero
    style = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 8}, "cmap": "PRGn"}
    bar = {"label": label}
    sns.heatmap(values, mask=hidden, ax=ax, vmin=-limit, vmax=limit, cbar_kws=bar, **style)
    ax.grid(False)
    ax.tick_params(axis="x", rotation=35, length=0)
    ax.tick_params(axis="y", rotation=0, length=0)
    ax.set(xlabel="", ylabel="")
    return ax


def counted(ax: Axes, table: pd.DataFrame) -> Axes:
    """Sign conflict of every pair, one row per way to count; a bar at the mean.

    table: of `pair_counts`. The dashed line is what tossed coins give.
    """
    draws = np.random.default_rng(0)
    for y, (name, said) in enumerate(COUNTS.items()):
        values = table[table.counted == name].conflict
        jitter = draws.uniform(-0.18, 0.18, len(values))
        number = (7, 0, 1)[y]
        ax.plot(values, y + jitter, MARKERS[y], color=PALETTE[number], alpha=0.7, markersize=5)
        ax.plot([values.mean()] * 2, [y - 0.32, y + 0.32], color=PALETTE[number], linewidth=2.5)
        ax.annotate(said, (0.005, y - 0.36), fontsize=9)
    ax.axvline(0.5, color="black", linewidth=0.9, linestyle="--")
    ax.set_yticks([])
    ax.set_ylim(len(COUNTS) - 0.5, -0.6)
    ax.set_xlim(0, 0.6)
    ax.set_xlabel("share of parameters pushed in opposite directions")
    return ax


def by_place(ax: Axes, table: pd.DataFrame, column: str, *, label: str) -> Axes:
    """A number of pairs in every place, in order of depth: means, bars from lowest to highest pair.

    table: of `conflict_places`; column: conflict or cosine.
    """
    names = list(dict.fromkeys(table.place))
    for y, name in enumerate(names):
        some = table[table.place == name]
        number, marker = KINDS[some.kind.iloc[0]]
        values = some[column]
        style = {"color": PALETTE[number], "linewidth": 2.5}
        ax.plot([values.min(), values.max()], [y, y], alpha=0.4, **style)
        ax.plot(values.mean(), y, marker, markersize=7, **style)
    ax.set_yticks(range(len(names)), [place(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.grid(axis="y", visible=False)
    return ax


def shared_out(ax: Axes, table: pd.DataFrame, column: str = "share") -> Axes:
    """Every task vector's squared length over places, place by task, in per cent.

    table: of `length_places`.
    """
    wide = table.pivot_table(column, "place", "task", sort=False)
    wide.index = [place(name) for name in wide.index]
    style = {"annot": True, "fmt": ".0f", "annot_kws": {"fontsize": 8}, "cmap": "viridis"}
    bar = {"label": "share of the squared length, %"}
    sns.heatmap(100 * wide, ax=ax, vmin=0, cbar_kws=bar, **style)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(axis="x", rotation=35, length=0)
    ax.tick_params(axis="y", rotation=0, length=0)
    return ax


def spectrum(ax: Axes, table: pd.DataFrame, layer: str) -> Axes:
    """Shares of one layer's squared norm by singular direction, a line per task.

    table: of `spectrum_table`. Both axes are logarithmic; flat would be equal shares, the dotted
    line.
    """
    some = table[table.layer == layer]
    for number, row in enumerate(some.itertuples()):
        shares = np.array(row.energy)
        steps = np.arange(1, 1 + len(shares))
        style = {"color": PALETTE[number % 10], "marker": MARKERS[number % 8], "markersize": 4}
        every = sorted({int(n) for n in np.geomspace(1, len(shares), 12)})
        ax.plot(steps, shares, linewidth=1.2, markevery=[n - 1 for n in every],
                label=f"{row.task}, {row.stable:.1f}", **style)  # fmt: skip
    ax.axhline(1 / len(shares), color="black", linewidth=0.9, linestyle=":")
    ax.set(xscale="log", yscale="log", ylim=(1e-6, 1.5))
    ax.set(xlabel="singular direction, largest first", ylabel="share of the squared norm")
    ax.legend(title="task, stable rank", fontsize=8, title_fontsize=8, loc="lower left")
    return ax


def aligned(ax: Axes, table: pd.DataFrame) -> Axes:
    """SAR over its cut-off, filled markers, beside its chance level, open and dashed.

    table: of `alignment_table`, means over tasks and layers.
    """
    lines = {"merged": "the sum of all", "partner": "one other task"}
    for number, (name, said) in enumerate(lines.items()):
        style = {"color": PALETTE[number], "marker": MARKERS[number]}
        ax.plot(table.residual, table[name], label=f"with {said}", **style)
        chance = "chance" if name == "merged" else "chance_partner"
        ax.plot(table.residual, table[chance], linestyle="--", markerfacecolor="white",
                label=f"with {said}, by chance", **style)  # fmt: skip
    ax.set(xlabel="cut-off: share of the norm that may be left out", ylabel="alignment ratio, SAR")
    ax.set_ylim(0, 1.02)
    ax.legend(fontsize=8)
    return ax


def told(ax: Axes, table: pd.DataFrame, damage: str) -> Axes:
    """Rank correlation of every number with one damage: a marker per method, bars 95 % intervals.

    table: rows of `correlations` of one view. The grey band holds what the largest of all
    |correlations| stays within in 95 % of permutations: a marker inside it has found nothing.
    """
    some = table[table.damage == damage]
    names = [n for n in dict.fromkeys(some.number) if some[some.number == n].rho.notna().any()]
    methods = list(dict.fromkeys(some.method))
    band = some[~some.number.isin(INPUTS)].threshold.max()
    ax.axvspan(-band, band, color="0.9", zorder=0)
    ax.axvline(0, color="black", linewidth=0.8)
    for y, name in enumerate(names):
        for n, method in enumerate(methods):
            row = some[(some.number == name) & (some.method == method)].iloc[0]
            height = y + 0.15 * (n - (len(methods) - 1) / 2)
            style = {"color": PALETTE[n], "linewidth": 1}
            ax.plot([row.low, row.high], [height] * 2, alpha=0.6, **style)
            label = MERGES.facts[method]["label"] if y == 0 else None
            ax.plot(row.rho, height, MARKERS[n], markersize=4, label=label, **style)
    ax.set_yticks(range(len(names)), [label_of(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(xlim=(-1.02, 1.02), xlabel="rank correlation with damage", title=OUTCOMES[damage])
    ax.title.set_fontsize(9)
    return ax


def against(ax: Axes, table: pd.DataFrame, number: str, damage: str, method: str) -> Axes:
    """One number against one damage, a point per task of a pair, a colour per task that is hurt.

    table: of `pairs`; means over seeds.
    """
    some = table[table.method == method]
    mean = some.groupby(["task", "partner"], sort=False)[[number, damage]].mean().reset_index()
    for n, (task, own) in enumerate(mean.groupby("task", sort=False)):
        style = {"color": PALETTE[n % 10], "markersize": 5, "alpha": 0.85, "label": task}
        ax.plot(own[number], own[damage], MARKERS[n % 8], **style)
    ax.set(xlabel=label_of(number), ylabel=OUTCOMES[damage])
    return ax


def group_map(ax: Axes, table: pd.DataFrame, column: str, *, label: str, middle: float) -> Axes:
    """A column of `coefficient_table`, group by task, mean over seeds; white is `middle`.

    table: rows of one grouping and one number of tasks. The colours end as far from the middle as
    the furthest value.
    """
    wide = table.pivot_table(column, "group", "task", sort=False)
    wide.index = [short(name) for name in wide.index]
    reach = float((wide - middle).abs().to_numpy().max()) or 1.0
    style = {"annot": wide.size <= 80, "fmt": ".2f", "annot_kws": {"fontsize": 8}}
    bounds = {"vmin": middle - reach, "vmax": middle + reach, "cmap": "PRGn"}
    sns.heatmap(wide, ax=ax, cbar_kws={"label": label}, **bounds, **style)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(axis="x", rotation=35, length=0)
    ax.tick_params(axis="y", rotation=0, length=0, labelsize=8)
    return ax


def growing(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every task's coefficients times T, over T: means over groups, bars from lowest to highest.

    table: rows of `coefficient_table` of one grouping, mean over seeds. The dashed line at 1 is
    the average of the experts.
    """
    mean = table.groupby(["task", "count", "group"], sort=False).coefficient.mean().reset_index()
    counts = sorted(mean["count"].unique())
    tasks = list(dict.fromkeys(mean.task))
    for n, task in enumerate(tasks):
        own = mean[mean.task == task]
        scaled = own.assign(times=own.coefficient * own["count"]).groupby("count").times
        x = np.array([counts.index(count) for count in scaled.mean().index])
        x = x + 0.07 * (n - (len(tasks) - 1) / 2)
        middle = scaled.mean()
        bars = [middle - scaled.min(), scaled.max() - middle]
        style = {"color": PALETTE[n % 10], "marker": MARKERS[n % 8], "markersize": 5}
        ax.errorbar(x, middle, yerr=bars, linewidth=1, label=task, **style)
    ax.axhline(1, color="black", linewidth=0.9, linestyle="--")
    ax.set_xticks(range(len(counts)), counts)
    ax.set(xlabel="tasks merged, $T$", ylabel=r"$T\,\lambda_{tg}$")
    ax.legend(fontsize=8, ncols=2)
    return ax
