"""Figures of prediction churn, calibration and layers; tables of `studies.prediction_churn`.

Every function draws on the Axes it is given and returns it.
"""

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import PALETTE, methods, style, title

LOOKS = ("base", "average", "task_arithmetic", "divmerge/task", "divmerge/layer")
SIDES = {"lost": (-1, PALETTE[1]), "gained": (1, PALETTE[0])}
LAYER_LABELS = {
    "cka": "CKA with the expert",
    "shift": "shift from the expert, in its spreads",
    "common": "common share of the squared shift, %",
}


def churn(ax: Axes, table: pd.DataFrame) -> Axes:
    """Rows lost to the left, gained to the right, the net change as a diamond; a row per model.

    table: of `churn_intervals`; whiskers are 95 % intervals. The length of both bars is the churn.
    """
    wide = 100 * table.set_index(["model", "what"])[["value", "low", "high"]]
    models = [model for model in LOOKS if model in set(table.model)]
    rows = {
        f"{what}{end}": wide[column].unstack("what").loc[models, what]
        for what in ("lost", "gained", "net")
        for end, column in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    rows = pd.DataFrame(rows).rename(index=title)
    plot.diverging_bars(ax, rows, SIDES, "net")
    for y, net in enumerate(rows.net):
        place = {"xytext": (0, 12), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        ax.annotate(f"{net:+.1f}", (net, y), **place)
    ax.set_ylim(top=-0.7)
    return plot.finish(ax, "share of test rows, %, mean over tasks")


def churn_by_task(ax: Axes, table: pd.DataFrame, model: str) -> Axes:
    """`churn` of one model, a row per task, sorted by the net change. table: of `churn_by_task`."""
    mean = table[table.model == model].groupby("task", sort=False)[["lost", "gained", "net"]].mean()
    plot.diverging_bars(ax, 100 * mean.sort_values("net", ascending=False), SIDES, "net")
    return plot.finish(ax, "share of test rows, %", title=title(model))


def loss_by_margin(ax: Axes, table: pd.DataFrame) -> Axes:
    """Share of rows lost, by fifths of the expert's margin. table: of `flips_by_margin`."""
    auc = table.groupby("model").auc.first()
    looks = {m: (f"{label} (AUC {auc[m]:.2f})", look) for m, (label, look) in
             methods(name for name in LOOKS if name in auc).items()}  # fmt: skip
    plot.lines(ax, table, "part", "lost", looks, by="model")
    parts = table.groupby("part").margin.mean()
    plot.ticks(ax, parts.index, [f"{part}\n({100 * value:.0f})" for part, value in parts.items()])
    ax.set_ylim(bottom=0)
    return plot.finish(
        ax,
        "fifth of these rows by the expert's margin, 1 least sure (mean margin, points)",
        "lost, % of what the expert has right",
        percent="y",
    )


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
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
    ax.set_title("Experts" if model == "expert" else title(model), fontsize=10)
    return plot.finish(ax, percent="xy")


def calibration(ax: Axes, table: pd.DataFrame) -> Axes:
    """The calibration error of every model (filled) and that of chance (open); means over seeds.

    table: of `calibration_table`. Small points: seeds.
    """
    models = [model for model in ("expert", *LOOKS) if model in set(table.model)]
    mean = 100 * table.groupby("model")[["chance", "ece"]].mean()
    names = {m: "Experts" if m == "expert" else title(m) for m in models}
    plot.dumbbells(ax, {names[m]: (mean.chance[m], mean.ece[m], style(m)) for m in models})
    for y, model in enumerate(models):
        values = 100 * table[table.model == model].ece
        plot.intervals(
            ax, [y] * len(values), values, **{**style(model), "marker": ".", "markersize": 4}
        )
    ax.set_xlim(left=0)
    return plot.finish(ax, "expected calibration error, points")


def similarity_by_layer(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """cka, shift or common over depth, a line per model: means over tasks and seeds.

    table: of `layer_similarity`. Bands, for the base and DivMerge per layer: the middle half.
    """
    for model in (name for name in LOOKS if name in set(table.model)):
        some = table[table.model == model].groupby("layer")[column]
        half = [some.quantile(q) for q in (0.25, 0.75)]
        band = half if model in ("base", "divmerge/layer") else []
        mean, look = some.mean(), {"linewidth": 1.4, **style(model)}
        plot.line(ax, mean.index, mean, *band, band=True, label=title(model), **look)
    last = int(table.layer.max())
    plot.ticks(ax, range(last + 1), ["embed.", *map(str, range(1, last + 1))])
    ax.set(xlabel="layer", ylabel=LAYER_LABELS[column])
    if column == "common":
        plot.finish(ax, percent="y")
    ax.set_ylim(bottom=0)
    return ax
