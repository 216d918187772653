"""Figures of what merging costs: each draws on the Axes it is given and returns it.

Colours: green for this package, grey for the usual way, blue and orange for peers, black for the
machine's own limits.
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import PALETTE
from divmerge_book.kernel_benchmarks.implementations import IMPLEMENTATIONS

COLOURS = {"ours": 2, "ours_buffer": 2, "dictionary": 7, "compiled": 4, "fusion_bench": 0}
COLOURS |= {"mergekit": 1, "liger": 1}
MARKERS = {"ours": "o", "dictionary": "s", "compiled": "D", "fusion_bench": "^", "mergekit": "v"}
LABELS = {"ours_buffer": "divmerge_core, gradient buffer"}
NUMBERS = {"forward": lambda tasks: tasks + 2, "backward": lambda tasks: tasks + 1}


def label(name: str) -> str:
    """An implementation's label."""
    return LABELS.get(name) or IMPLEMENTATIONS.facts[name]["label"]


def against(ax: Axes, table: pd.DataFrame, part: str, along: str) -> Axes:
    """Milliseconds of one part against `tasks` or `parameters`, and the bandwidth's floor.

    table: rows of `roofline.summary` that differ in `along` only. Bars are quartiles over rounds.
    """
    rows = table[table.part == part]
    for name, some in rows[rows.contestant != "copy"].groupby("contestant", sort=False):
        some = some.sort_values(along)
        errors = [some.milliseconds - some.low, some.high - some.milliseconds]
        style = {"color": PALETTE[COLOURS[name]], "marker": MARKERS[name], "markersize": 5}
        ax.errorbar(some[along], some.milliseconds, yerr=errors, label=label(name), **style)
    floor = rows[rows.contestant == "ours"].sort_values(along)
    times = floor.milliseconds * floor.floor
    ax.plot(floor[along], times, "k--", label="floor: copy bandwidth", zorder=0)
    ax.set(xscale="log", yscale="log", ylabel="milliseconds", title=part)
    ax.set_xlabel("tasks T" if along == "tasks" else "parameters N")
    if along == "tasks":
        ax.set_xticks(floor.tasks, floor.tasks)
        ax.minorticks_off()
    return ax


def bars(ax: Axes, table: pd.DataFrame, column: str, floors: Mapping[str, float | int]) -> Axes:
    """Numbers moved or held, in units of N, of forward and backward: a bar per implementation."""
    rows = table[table.contestant != "copy"].pivot_table(
        index="contestant", columns="part", values=column, sort=False
    )
    names, left = list(rows.index), 0
    for part, alpha in (("forward", 1.0), ("backward", 0.5)):
        values = rows[part].fillna(0).to_numpy()
        colours = [PALETTE[COLOURS[name]] for name in names]
        ax.barh([label(n) for n in names], values, left=left, color=colours, alpha=alpha)
        left = left + values
    for y, total in enumerate(left):
        ax.annotate(f" {total:.1f}", (total, y), va="center", fontsize=9)
    for text, floor in floors.items():
        ax.axvline(floor, color="k", linestyle="--", linewidth=1, label=text)
    ax.set_xlim(0, 1.12 * max(left))
    if not ax.yaxis_inverted():  # axes that share it may have done so
        ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return ax


def roof(ax: Axes, table: pd.DataFrame, *, gigabytes: float | int, gigaflops: float | int) -> Axes:
    """The roofline: what a kernel can reach, by how many sums it does per byte that it moves.

    gigabytes: copy bandwidth per second. gigaflops: rate of a large matrix product. table: rows of
    `roofline.summary` of one model size. A merge does 2 T N operations each way.
    """
    knee = gigaflops / gigabytes
    xs = [0.02, knee, 20 * knee]
    ax.plot(xs, [gigabytes * 0.02, gigaflops, gigaflops], "k-", linewidth=1.5)
    middle = (0.2 * knee, 0.2 * gigaflops)
    ax.annotate("copy bandwidth  ", middle, ha="right", va="bottom", fontsize=9)
    ax.annotate("matrix product", (2 * knee, gigaflops), va="bottom", fontsize=9)
    for row in table[table.contestant != "copy"].itertuples():
        operations = 2 * row.tasks * row.parameters
        rate = operations / (1e-3 * row.milliseconds) / 1e9
        intensity = operations / (4 * row.moved * row.parameters)
        fill = PALETTE[COLOURS[row.contestant]] if row.part == "forward" else "none"
        ax.plot(
            intensity, rate, MARKERS[row.contestant], color=PALETTE[COLOURS[row.contestant]],
            markerfacecolor=fill, markersize=7, label=f"{label(row.contestant)}, {row.part}",
        )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel="operations per byte moved", ylabel="operations per second / $10^9$")
    return ax


def shares(ax: Axes, times: Mapping[str, float]) -> Axes:
    """One bar of a step's parts, in percent of the step; the merge's own parts in green."""
    total, left = sum(times.values()), 0.0
    for name, value in times.items():
        share = 100 * value / total
        colour = PALETTE[2] if "merge" in name else PALETTE[7]
        ax.barh(0, share, left=left, color=colour, edgecolor="white")
        place = "right" if left + share > 99 else "left" if left == 0 else "center"
        x = {"left": left, "right": left + share, "center": left + share / 2}[place]
        ax.annotate(f"{name}\n{share:.0f} %", (x, 0.44), ha=place, va="bottom", fontsize=9)
        left += share
    ax.set(xlim=(0, 100), ylim=(-0.5, 1.2), yticks=[], xlabel="share of a step, %")
    ax.grid(visible=False)
    return ax
