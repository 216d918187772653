"""Figures of the cost of merging; tables of `kernel_benchmarks`.

Colours: green for this package, grey for autograd on dictionaries, others for peers, black for the
machine's limits.
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import IMPLEMENTATIONS as LOOKS
from divmerge_book.figures.styles import PALETTE
from divmerge_book.kernel_benchmarks.implementations import IMPLEMENTATIONS

LABELS = {name: IMPLEMENTATIONS.facts[name]["label"] for name in IMPLEMENTATIONS}
LABELS |= {"ours_buffer": "divmerge_core, gradient buffer"}


def time_curve(ax: Axes, table: pd.DataFrame, part: str, along: str) -> Axes:
    """Milliseconds of one part against `tasks` or `parameters`, and the bandwidth's floor.

    table: rows of `summary` that differ in `along` only. Bars are quartiles over rounds.
    """
    rows = table[(table.part == part) & (table.contestant != "copy")].sort_values(along)
    looks = {name: (LABELS[name], LOOKS[name]) for name in dict.fromkeys(rows.contestant)}
    plot.lines(ax, rows, along, "milliseconds", looks, by="contestant", ends=("low", "high"))
    floor = rows[rows.contestant == "ours"]
    limit = {"label": "floor: copy bandwidth", "zorder": 0}
    ax.plot(floor[along], floor.milliseconds * floor.floor, "k--", **limit)
    ax.set(xscale="log", yscale="log", title=part)
    if along == "tasks":
        plot.ticks(ax, floor.tasks)
    return plot.finish(ax, "tasks T" if along == "tasks" else "parameters N", "milliseconds")


def bars(ax: Axes, table: pd.DataFrame, column: str, floors: Mapping[str, float | int]) -> Axes:
    """Numbers moved or held, in units of N: a bar per implementation, forward, then backward."""
    rows = table[table.contestant != "copy"].pivot_table(column, "contestant", "part", sort=False)
    names, left = [LABELS[name] for name in rows.index], 0
    for part, alpha in (("forward", 1.0), ("backward", 0.5)):
        values, shades = rows[part].fillna(0).to_numpy(), [LOOKS[n]["color"] for n in rows.index]
        ax.barh(names, values, left=left, color=shades, alpha=alpha)
        left = left + values
    for y, total in enumerate(left):
        ax.annotate(f" {total:.1f}", (total, y), va="center", fontsize=9)
    for text, floor in floors.items():
        plot.reference(ax, floor, style="--", label=text)
    ax.set_xlim(0, 1.12 * max(left))
    if not ax.yaxis_inverted():  # axes that share it may have done so
        ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return ax


def roofline(
    ax: Axes, table: pd.DataFrame, *, gigabytes: float | int, gigaflops: float | int
) -> Axes:
    """Operations per second against operations per byte moved, and the machine's two limits.

    gigabytes: copy bandwidth per second. gigaflops: rate of a large matrix product. table: rows of
    `summary` of one model size. A merge does 2 T N operations each way.
    """
    knee = gigaflops / gigabytes
    xs = [0.02, knee, 20 * knee]
    ax.plot(xs, [gigabytes * 0.02, gigaflops, gigaflops], "k-", linewidth=1.5)
    middle, right = (0.2 * knee, 0.2 * gigaflops), (20 * knee, 0.9 * gigaflops)
    ax.annotate("copy bandwidth  ", middle, ha="right", va="bottom", fontsize=9)
    ax.annotate("matrix product", right, ha="right", va="top", fontsize=9)
    for row in table[table.contestant != "copy"].itertuples():
        operations, look = 2 * row.tasks * row.parameters, LOOKS[row.contestant]
        rate = operations / (1e-3 * row.milliseconds) / 1e9
        intensity = operations / (4 * row.moved * row.parameters)
        face = look["color"] if row.part == "forward" else "none"
        more = {"markerfacecolor": face, "markersize": 7, "linestyle": "none"}
        ax.plot(intensity, rate, label=f"{LABELS[row.contestant]}, {row.part}", **look, **more)
    words = "operations per byte moved", "operations per second / $10^9$"
    return plot.finish(ax, *words, xscale="log", yscale="log")


def step_shares(ax: Axes, times: Mapping[str, float]) -> Axes:
    """One bar of a step's parts, in percent of the step; the merge's own parts in green."""
    left, whole = 0.0, sum(times.values())
    for name, value in times.items():
        share, shade = 100 * value / whole, PALETTE[2 if "merge" in name else 7]
        ax.barh(0, share, left=left, color=shade, edgecolor="white")
        place = "right" if left + share > 99 else "left" if left == 0 else "center"
        x = {"left": left, "right": left + share, "center": left + share / 2}[place]
        ax.annotate(f"{name}\n{share:.0f} %", (x, 0.44), ha=place, va="bottom", fontsize=9)
        left += share
    ax.grid(visible=False)
    return plot.finish(ax, "share of a step, %", xlim=(0, 100), ylim=(-0.5, 1.2), yticks=[])
