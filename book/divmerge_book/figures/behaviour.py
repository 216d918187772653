"""Figures of prediction churn, calibration and layers; tables of `studies.prediction_churn`."""

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import PALETTE, methods, style, title

LOOKS = ("base", "average", "task_arithmetic", "divmerge/task", "divmerge/layer")
BANDED = ("base", "divmerge/layer")
SIDES = {"lost": (-1, PALETTE[1]), "gained": (1, PALETTE[0])}
LAYER_LABELS = {
    "cka": "CKA with the expert",
    "shift": "shift, in the expert's spreads",
    "common": "common share of the squared shift, %",
}


def models_of(table: pd.DataFrame, *first: str) -> list[str]:
    """The models of a table, in the order of LOOKS."""
    return [model for model in (*first, *LOOKS) if model in set(table.model)]


def churn(ax: Axes, table: pd.DataFrame) -> Axes:
    """Rows lost to the left, gained to the right, the net change as a diamond; a row per model.

    table: of `churn_intervals`; whiskers are 95 % intervals. The length of both bars is the churn.
    """
    wide = 100 * table.pivot(index="model", columns="what", values=["value", "low", "high"])
    wide.columns = [f"{what}_{end}".removesuffix("_value") for end, what in wide.columns]
    wide = wide.loc[models_of(table)].rename(index=title)
    plot.diverging_bars(ax, wide, SIDES)
    place = {"xytext": (0, 12), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    for y, net in enumerate(wide.net):
        ax.annotate(f"{net:+.1f}", (net, y), **place)
    ax.set_ylim(top=-0.7)
    return plot.finish(ax, "share of test rows, %, mean over tasks")


def loss_by_margin(ax: Axes, table: pd.DataFrame) -> Axes:
    """Share of rows lost, by fifths of the expert's margin. table: of `flips_by_margin`."""
    auc, margin = table.groupby("model").auc.first(), table.groupby("part").margin.mean()
    looks = {
        model: (f"{label} (AUC {auc[model]:.2f})", look)
        for model, (label, look) in methods(models_of(table)).items()
    }
    plot.lines(ax, table, "part", "lost", looks, by="model")
    plot.ticks(ax, margin.index, [f"{n}\n({100 * value:.0f})" for n, value in margin.items()])
    ax.set_ylim(bottom=0)
    words = "fifth by the expert's margin, 1 least confident (mean margin, points)"
    return plot.finish(ax, words, "lost, % of what the expert has right", percent="y")


def reliability(ax: Axes, table: pd.DataFrame, model: str, *, bins: int = 10) -> Axes:
    """Accuracy against confidence of one model, point size by rows; dashed: calibrated.

    table: of `reliability_table` with as many `bins`. The bars at the bottom are the shares of
    rows, on the same scale. Raises ValueError for a table with more bins than that.
    """
    if table.bin.max() >= bins:
        raise ValueError(
            f"the table has a bin {table.bin.max()}, counted from 0, but bins is {bins}: give the "
            "number of bins of `reliability_table`"
        )
    some, shade = table[table.model == model], style(model)["color"]
    share = some["count"] / some["count"].sum()
    ax.bar((some.bin + 0.5) / bins, share, width=0.9 / bins, color=shade, alpha=0.2)
    ax.plot([0, 1], [0, 1], color="0.4", linewidth=0.9, linestyle="--")
    ax.plot(some.confidence, some.accuracy, color=shade, linewidth=1)
    ax.scatter(some.confidence, some.accuracy, s=12 + 200 * share, color=shade, zorder=3)
    ax.set_title("Experts" if model == "expert" else title(model), fontsize=10)
    thirds = {"xticks": [0, 0.5, 1], "yticks": [0, 0.5, 1], "aspect": "equal"}
    return plot.finish(ax, percent="xy", xlim=(0, 1), ylim=(0, 1), **thirds)


def similarity_by_layer(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """cka, shift or common over depth, a line per model: means over tasks and seeds.

    table: of `layer_similarity`. Bands, for the base and DivMerge per layer: the middle half.
    """
    found = table.groupby(["model", "layer"])[column].describe()
    for model, (label, look) in methods(models_of(table)).items():
        own = found.loc[model]
        band = [own["25%"], own["75%"]] if model in BANDED else []
        plot.line(ax, own.index, own["mean"], *band, band=True, label=label, linewidth=1.4, **look)
    last = int(table.layer.max())
    plot.ticks(ax, range(last + 1), ["embed.", *map(str, range(1, last + 1))])
    ax.set_ylim(bottom=0)
    return plot.finish(ax, "layer", LAYER_LABELS[column], percent="y" if column == "common" else "")
