"""The plots that all figures are made of: each draws on the Axes it is given.

A look is a mapping of matplotlib's `color`, `marker` and `linestyle`. `looks` maps the name of a
group to `(label, look)`, see `styles`, and sets the order; names that a table lacks are left out.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

Looks = Mapping  # name -> (label, look)
Number = float | int
BESIDE = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1.01, 1)}  # right of the axes


# --- axes -----------------------------------------------------------------------------------------
def ticks(ax: Axes, values: Iterable, labels: Iterable[str] | None = None, **how) -> None:
    """Ticks of the x axis at these values and at no others."""
    values = list(values)
    ax.set_xticks(values, [f"{v:g}" for v in values] if labels is None else list(labels), **how)
    ax.minorticks_off()


def reference(ax: Axes, value: Number, *, x: bool = True, style: str = "-", **how) -> None:
    """A black line at a value of x (or of y): no difference, chance, or the experts."""
    line = ax.axvline if x else ax.axhline
    line(value, **{"color": "black", "linewidth": 0.9, "linestyle": style, **how})


def finish(
    ax: Axes, x: str | None = None, y: str | None = None, *, percent: str = "",
    legend: int | Mapping | None = None, at: Mapping = {}, at_y: Mapping = {}, **settings,
) -> Axes:  # fmt: skip
    """Names of the axes and other `settings` of `Axes.set`; shares as percentages on `x` or `y`.

    legend: its arguments, or its size. at, at_y: reference lines, place -> dash.
    """
    names = {"xlabel": x, "ylabel": y}
    ax.set(**{name: words for name, words in names.items() if words is not None}, **settings)
    for along, places in ((True, at), (False, at_y)):
        for place, dash in places.items():
            reference(ax, place, x=along, style=dash)
    for axis in percent:
        getattr(ax, f"{axis}axis").set_major_formatter(
            lambda value, place: f"{round(100 * value, 6) + 0.0:.3g}"
        )
    if legend is not None:
        ax.legend(**(legend if isinstance(legend, Mapping) else {"fontsize": legend}))
    return ax


def label_rows(
    ax: Axes, labels: Iterable[str], *, size: Number | None = None, grid: bool = False
) -> None:
    """A row per label, the first at the top."""
    labels = list(labels)
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=grid)


def dodge(count: int, step: Number) -> np.ndarray:
    """Offsets of `count` groups from the middle of their row."""
    return step * (np.arange(count) - (count - 1) / 2)


def spread(table: pd.DataFrame, keys: Sequence[str], column: str) -> pd.DataFrame:
    """Mean, lowest and highest value of a column by `keys`: value, low, high."""
    found = table.groupby(list(keys), sort=False)[column].agg(["mean", "min", "max"])
    return found.set_axis(["value", "low", "high"], axis=1).reset_index()


def annotate(
    ax: Axes, points: Iterable[tuple], *, size: Number = 8, up: Number = 0, left: bool | None = None
) -> None:
    """Names beside points (x, y, name), `up` points higher, and moved where that is not free.

    left: names to the left of their points; None: to the left of those in the right half, or to the
    other side where only that has room.
    """
    scale, extent = 72 / ax.figure.dpi, ax.get_window_extent().intervalx * 72 / ax.figure.dpi
    points = sorted(points, key=lambda point: point[1])
    spots = [scale * ax.transData.transform(point[:2]) for point in points]
    taken = [(at - 5, at + 5, height) for at, height in spots]  # left, right and height, in points

    def free(low: float, high: float, height: float) -> bool:
        apart = (
            high < start or end < low or abs(height - y) > 0.8 * size for start, end, y in taken
        )
        return extent[0] < low and high < extent[1] and all(apart)

    for (x, y, text), (at, height) in zip(points, spots, strict=True):
        width, flip = 0.58 * size * len(text), at > extent.mean() if left is None else left
        sides = {True: (at - 7 - width, at - 7), False: (at + 7, at + 7 + width)}
        tries = [
            (side, up + step)
            for step in (0, 6, -6, 12, -12, 18, -18)
            for side in ((flip, not flip) if left is None else (flip,))
        ]
        side, shift = next((t for t in tries if free(*sides[t[0]], height + t[1])), tries[0])
        taken.append((*sides[side], height + shift))
        place = {"xytext": (-7 if side else 7, shift), "textcoords": "offset points"}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.2, "alpha": 0.7}
        place |= {"ha": "right" if side else "left", "va": "center"}
        ax.annotate(text, (x, y), fontsize=size, **place)


# --- rows of marks and bars -----------------------------------------------------------------------
def intervals(ax: Axes, y, value, low=None, high=None, *, label: str | None = None, **look) -> None:
    """Points at heights y with horizontal intervals. look: of marks; `width`, `bar`: of bars."""
    width, bar = look.pop("width", 1.4), look.pop("bar", look["color"])
    if low is not None:
        ax.hlines(y, low, high, color=bar, linewidth=width, alpha=0.6)
    ax.plot(value, y, label=label, **{"markersize": 5, **look, "linestyle": "none"})


def forest(
    ax: Axes, table: pd.DataFrame, rows: Mapping[str, str], looks: Looks, *, row: str, group: str,
    value: str = "value", ends: tuple[str, str] | None = ("low", "high"), step: Number = 0.16,
    **how,
) -> None:  # fmt: skip
    """A row per name, in it a point with its interval per group.

    rows: value of the column `row` -> label. ends: columns of the interval; None: points alone.
    """
    present = [name for name in looks if name in set(table[group])]
    for name, shift in zip(present, dodge(len(present), step), strict=True):
        label, look = looks[name]
        own = table[(table[group] == name) & table[row].isin(list(rows))]
        found = [own[end] for end in ends or ()]
        y = own[row].map(list(rows).index) + shift
        intervals(ax, y, own[value], *found, label=label, **{**look, **how})
    label_rows(ax, rows.values(), grid=True)


def strip(
    ax: Axes, rows: Mapping[str, tuple[Iterable[float], Mapping]], *, jitter: Number = 0.0,
    bar: str | None = None, **how,
) -> None:  # fmt: skip
    """A row per label: its values as points and a bar at their mean.

    rows: label -> (values, look). bar: its colour; None: that of the points.
    """
    draws = np.random.default_rng(0)
    for y, (values, look) in enumerate(rows.values()):
        values = np.asarray(values, float)
        heights = y + draws.uniform(-jitter, jitter, len(values))
        intervals(ax, heights, values, **{"alpha": 0.7, **look, **how})
        ax.vlines(values.mean(), y - 0.34, y + 0.34, color=bar or look["color"], linewidth=2)
    label_rows(ax, rows, grid=True)


def dumbbells(ax: Axes, rows: Mapping[str, tuple], *, size: Number = 8) -> None:
    """A row per label: a hollow and a filled mark with a line between them.

    rows: label -> (hollow value, filled value, look).
    """
    for y, (hollow, filled, look) in enumerate(rows.values()):
        ax.plot([hollow, filled], [y, y], color=look["color"], alpha=0.5, linewidth=2)
        intervals(ax, y, hollow, **{**look, "markersize": size, "markerfacecolor": "white"})
        intervals(ax, y, filled, **{**look, "markersize": size})
    label_rows(ax, rows, grid=True)


def diverging_bars(ax: Axes, table: pd.DataFrame, sides: Mapping[str, tuple]) -> None:
    """A row per index entry: bars to the left and to the right of 0, and `net` as a diamond.

    sides: column -> (sign, colour). Columns `<side>_low` and `<side>_high` become whiskers.
    """
    y = np.arange(len(table))
    for column, (sign, shade) in sides.items():
        down = table[column] - table[f"{column}_low"]
        ends = [down, table[f"{column}_high"] - table[column]][::sign]
        bars = {"height": 0.62, "color": shade, "alpha": 0.75, "label": column}
        ax.barh(y, sign * table[column], xerr=ends, **bars)
    ax.plot(table.net, y, "kD", markersize=6, label="net")
    reference(ax, 0)
    label_rows(ax, table.index)
    ax.xaxis.set_major_formatter(lambda value, place: f"{abs(value):g}")


# --- lines, points and maps -----------------------------------------------------------------------
def line(ax: Axes, x, y, low=None, high=None, *, band: bool = False, **look) -> None:
    """One line, with a band or with bars from low to high."""
    if low is not None and band:
        ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    elif low is not None:
        ax.vlines(x, low, high, color=look["color"], linewidth=1.2)
    ax.plot(x, y, **{"markersize": 5, **look})


def lines(
    ax: Axes, table: pd.DataFrame, x: str, y: str, looks: Looks, *, by: str,
    ends: tuple[str, str] | None = None, step: Number = 0.0, ordinal: bool = False, **how,
) -> None:  # fmt: skip
    """A line per group over x: means where x has several rows, in the order of x.

    ends: columns of the interval, for one row per x. step: how far apart groups stand in x.
    ordinal: values of x at equal distances, in the order of the table.
    """
    if ordinal:
        values = list(dict.fromkeys(table[x]))
        table = table.assign(**{x: table[x].map(values.index)})
        ticks(ax, range(len(values)), (str(v).removesuffix(".0") for v in values))
    present = [name for name in looks if name in set(table[by])]
    for name, shift in zip(present, dodge(len(present), step), strict=True):
        label, look = looks[name]
        own = table[table[by] == name].groupby(x)[[y, *(ends or ())]].mean()
        found = [own[end] for end in ends or ()]
        line(ax, own.index + shift if step else own.index, own[y], *found,
             label=label, **{**look, **how})  # fmt: skip


def scatter(ax: Axes, table: pd.DataFrame, x: str, y: str, looks: Looks, *, by: str, **how) -> None:
    """Points of x and y, a look per group."""
    for name, (label, look) in looks.items():
        own = table[table[by] == name]
        mark = {"markersize": 5, "alpha": 0.8, **look, **how, "linestyle": "none"}
        ax.plot(own[x], own[y], label=label, **mark)


def heat_map(ax: Axes, wide: pd.DataFrame, *, label: str, rotation: Number = 35, **how) -> Axes:
    """A number in every cell, with a colour bar. how: of `seaborn.heatmap`."""
    how = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 8}, **how}
    if how["annot"]:
        how["annot"] = wide.round(int(how["fmt"][1])) + 0.0  # no minus zero
    sns.heatmap(wide, ax=ax, cbar_kws={"label": label}, **how)
    ax.set(xlabel="", ylabel="")
    ax.grid(visible=False)
    ax.tick_params(axis="x", rotation=rotation, length=0)
    ax.tick_params(axis="y", rotation=0, length=0)
    return ax


def diverging(middle: Number, reach: Number) -> dict:
    """Colours of a heat map that are white at `middle` and end `reach` from it."""
    return {"cmap": "PRGn", "vmin": middle - reach, "vmax": middle + reach}
