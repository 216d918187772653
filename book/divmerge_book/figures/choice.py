"""Figures of the choice of divergence; tables of `studies.choice`, `robustness` and `trajectories`.

Every function draws on the Axes it is given and returns it. Grey lines are the objectives that are
not singled out.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import OBJECTIVES, PALETTE, mark, numbered
from divmerge_book.studies.objective_fits import named
from divmerge_book.studies.predictions import WORDS, of_score
from divmerge_book.studies.robustness import CORRUPTIONS
from divmerge_book.studies.trajectories import totals
from divmerge_core.divergences import DIVERGENCES, facts_of

ALPHA = 0.05  # corrected p below it: a filled marker
FLOOR = 1e-8  # smallest value that a logarithmic axis shows
LEFT_EDGE = -12  # points of ANP: smaller differences are drawn there


def look(spec: str) -> dict:
    """Colour and marker of an objective: black for the labels' loss, grey for those in the rest."""
    return OBJECTIVES.get(spec, {"color": "0.75", "marker": ""})


def objective_values(ax: Axes, table: pd.DataFrame, specs: Sequence[str], column: str) -> Axes:
    """A divergence's value or gradient norm over the merged model's log-odds, a line each.

    table: objective, odds, and the column to draw.
    """
    looks = {
        spec: (named(spec), {"color": PALETTE[n % 10], "linestyle": ("-", "--", "-.", ":")[n % 4]})
        for n, spec in enumerate(specs)
    }
    shown = table.assign(**{column: table[column].clip(lower=FLOOR)})
    plot.lines(ax, shown, "odds", column, looks, by="objective")
    ax.set_yscale("log")
    return plot.finish(ax, "merged model's log-odds for the right answer, nats", legend=8)


def fisher_ratios(ax: Axes, table: pd.DataFrame) -> Axes:
    """D over half the Fisher metric for small steps, a point per random direction.

    table: objective, ratio. Where all points of a row coincide, D is a multiple of the Fisher
    metric; the bar marks the declared multiple.
    """
    curvatures = {spec: facts_of(spec)["curvature"] for spec in dict.fromkeys(table.objective)}
    looks = {True: mark(0, "o"), False: mark(1, "s")}
    ratios = table.groupby("objective").ratio
    rows = {named(spec): (ratios.get_group(spec), looks[bool(c)]) for spec, c in curvatures.items()}
    plot.points_by_row(ax, rows, jitter=0.25, bar="none", markersize=3, alpha=0.5)
    for y, curvature in enumerate(curvatures.values()):
        if curvature:
            ax.plot([curvature] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1)
    return plot.finish(ax, "D / (half the Fisher metric), one point per direction", xscale="log")


def forest(ax: Axes, table: pd.DataFrame, *, order: Sequence[str], score: str = "anp") -> Axes:
    """Differences of a score from js with their intervals, a row per objective, a colour per T.

    table: of `summary`, one grouping. Filled markers: the corrected p is below 0.05. Differences
    below `LEFT_EDGE` points are drawn there, with their value.
    """
    table = of_score(table, score)
    looks = numbered(sorted(table["count"].unique()), markers="os^")
    for (count, (label, own)), shift in zip(
        looks.items(), plot.dodge(len(looks), 0.26), strict=True
    ):
        some = table[table["count"] == count].set_index("objective").loc[list(order)]
        ends = 100 * some[["from_low", "from_high", "difference"]].clip(lower=LEFT_EDGE / 100)
        for y, (value, row) in enumerate(zip(ends.itertuples(), some.itertuples(), strict=True)):
            face = own["color"] if row.holm < ALPHA else "white"
            found = (y + shift, value.difference, value.from_low, value.from_high)
            plot.intervals(ax, *found, markerfacecolor=face, **own)
            if 100 * row.difference < LEFT_EDGE:
                place, said = (LEFT_EDGE + 0.9, y + shift), f"{100 * row.difference:.0f}"
                ax.text(*place, said, fontsize=8, va="center", color=own["color"])
        ax.plot([], [], label=f"T = {label}", linestyle="none", **own)
    plot.reference(ax, 0)
    plot.label_rows(ax, map(named, order))
    return plot.finish(ax, f"{WORDS[score]} minus that of js, points")


def by_temperature(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """A score over temperature, a line per objective: means over seeds, bars 95 % intervals.

    table: scores of `temperatures`; of one stored by seed, bars are from lowest to highest.
    """
    if "seed" in table:
        groups = table.groupby(["objective", "temperature"], sort=False).anp
        table = groups.agg(anp="mean", low="min", high="max").reset_index()
    table = of_score(table, score).sort_values("temperature", kind="stable")
    specs = list(dict.fromkeys(table.objective))
    for spec, shift in zip(specs, plot.dodge(len(specs), 0.06), strict=True):
        own = table[table.objective == spec]
        found = [100 * own[name] for name in ("score", "low", "high")]
        plot.line(
            ax, own.temperature * 2**shift, *found, label=named(spec), linewidth=1.2, **look(spec)
        )
    ax.set_xscale("log", base=2)
    plot.ticks(ax, sorted(table.temperature.unique()))
    return plot.finish(ax, "temperature", f"{WORDS[score]} on test rows, %", legend=8)


def corruption_costs(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """How much one expert, plain or corrupted, costs the others: a marker per objective.

    table: of `corruption_costs`, one grouping. Large markers: means over seeds; small ones: seeds.
    """
    kinds = [kind for kind in CORRUPTIONS if kind in set(table.kind)]
    specs, column = list(dict.fromkeys(table.objective)), "cost" if score == "anp" else "kept_cost"
    for spec, shift in zip(specs, plot.dodge(len(specs), 0.8 / len(specs)), strict=True):
        own = table[(table.objective == spec) & table.kind.isin(kinds)]
        plot.intervals(ax, own.kind.map(kinds.index) + shift, 100 * own[column],
                  **{**look(spec), "markersize": 3, "alpha": 0.6})  # fmt: skip
        mean = 100 * own.groupby("kind")[column].mean()
        heights = [kinds.index(kind) + shift for kind in mean.index]
        plot.intervals(ax, heights, mean, label=named(spec), markersize=7, **look(spec))
    plot.reference(ax, 0)
    for y in range(1, len(kinds)):
        ax.axhline(y - 0.5, color="0.85", linewidth=0.8)
    plot.label_rows(ax, [CORRUPTIONS.facts[kind]["label"] for kind in kinds])
    return plot.finish(ax, f"the others lose, points of {WORDS[score]}")


def task_curves(ax: Axes, table: pd.DataFrame, column: str, *, markersize: float | int = 4) -> Axes:
    """Each task's share of the gradient, loss or coefficient over steps: means over seeds.

    table: of `trajectories`, one objective and kind. column: share, loss or coefficient.
    markersize: in points.
    """
    looks = {task: mark(n, marker) for task, (n, marker) in zip(
        dict.fromkeys(table.task), zip((0, 1, 2, 3, 4, 5, 8), "os^DvPX", strict=True), strict=False
    )}  # fmt: skip
    scaled = table.assign(**{column: table[column] * (100 if column == "share" else 1)})
    looks = {task: (task, {**own, "linewidth": 1.2}) for task, own in looks.items()}
    plot.lines(ax, scaled, "step", column, looks, by="task", markersize=markersize)
    if column == "share":
        plot.reference(ax, 100 / table.task.nunique(), x=False, style=":")
    return plot.finish(ax, "step")


def training_curve(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """Loss (relative to the first), ANP or kept margin (%) over steps, a line per objective.

    table: of `trajectories`, without corruption. Means over seeds.
    """
    whole = totals(table).reset_index()
    first = whole.groupby(["objective", "seed"]).loss.transform("first")
    whole[column] = whole.loss / first if column == "loss" else 100 * whole[column]
    front, back = {"linewidth": 1.4, "zorder": 3}, {"linewidth": 0.8, "zorder": 1}
    looks = {
        spec: (named(spec), {**look(spec), **front}) if spec in OBJECTIVES
        else (None, {**look(spec), **back})
        for spec in dict.fromkeys(whole.objective)
    }  # fmt: skip
    plot.lines(ax, whole, "step", column, looks, by="objective", markersize=4)
    return plot.finish(ax, "step")


def per_objective(
    ax: Axes, table: pd.DataFrame, column: str, *, order: Sequence[str], scale: float | int = 1
) -> Axes:
    """One small point per seed of every objective, a bar at the mean."""
    values = scale * table.set_index("objective")[column]
    plot.points_by_row(ax, {
        named(spec): (values[[spec]], mark(0, "o") if spec in DIVERGENCES else mark(1, "s"))
        for spec in order
    })  # fmt: skip
    return ax
