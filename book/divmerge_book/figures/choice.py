"""Figures of the choice of divergence; tables of `studies.choice` and `robustness`.

Grey lines are the objectives that are not singled out.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import OBJECTIVES, PALETTE, mark, numbered
from divmerge_book.studies.objective_fits import named
from divmerge_book.studies.predictions import WORDS, of_score
from divmerge_book.studies.robustness import CORRUPTIONS
from divmerge_core.divergences import DIVERGENCES, facts_of

ALPHA = 0.05  # corrected p below it: a filled marker
FLOOR = 1e-8  # smallest value that a logarithmic axis shows
LEFT_EDGE = -12  # points of ANP: smaller differences are drawn there


def looks_of(table: pd.DataFrame, **more) -> dict:
    """Names and looks of a table's objectives: black for the labels' loss, grey for the rest."""
    other = {"color": "0.75", "marker": ""}
    return {
        spec: (named(spec), {**OBJECTIVES.get(spec, other), **more})
        for spec in dict.fromkeys(table.objective)
    }


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
    words = "merged model's log-odds for the right answer, nats"
    return plot.finish(ax, words, yscale="log", legend=8)


def fisher_ratios(ax: Axes, table: pd.DataFrame) -> Axes:
    """D over half the Fisher metric for small steps, a point per random direction.

    table: objective, ratio. Where all points of a row coincide, D is a multiple of the Fisher
    metric; the bar marks the declared multiple.
    """
    ratios = table.groupby("objective", sort=False).ratio
    curvatures = {spec: facts_of(spec)["curvature"] for spec in ratios.groups}
    looks = {True: mark(0, "o"), False: mark(1, "s")}
    rows = {named(spec): (own, looks[bool(curvatures[spec])]) for spec, own in ratios}
    plot.strip(ax, rows, jitter=0.25, bar="none", markersize=3, alpha=0.5)
    for y, curvature in enumerate(curvatures.values()):
        if curvature:
            ax.vlines(curvature, y - 0.4, y + 0.4, color="black", linewidth=1)
    return plot.finish(ax, "D / (half the Fisher metric), one point per direction", xscale="log")


def forest(ax: Axes, table: pd.DataFrame, *, order: Sequence[str], score: str = "anp") -> Axes:
    """Differences of a score from js with their intervals, a row per objective, a colour per T.

    table: of `summary`, one grouping. Filled markers: the corrected p is below 0.05. Differences
    below `LEFT_EDGE` points are drawn there, with their value.
    """
    table = of_score(table, score)
    looks = numbered(sorted(table["count"].unique()), markers="os^", form="T = {}")
    for (count, (label, look)), shift in zip(
        looks.items(), plot.dodge(len(looks), 0.26), strict=True
    ):
        some = table[table["count"] == count].set_index("objective").loc[list(order)]
        for y, row in enumerate(some.itertuples(), 0):
            values = [100 * value for value in (row.difference, row.from_low, row.from_high)]
            face = look["color"] if row.holm < ALPHA else "white"
            drawn = [max(value, LEFT_EDGE) for value in values]
            plot.intervals(ax, y + shift, *drawn, **{**look, "markerfacecolor": face})
            if values[0] < LEFT_EDGE:
                how = {"fontsize": 7, "va": "center", "ha": "right", "color": look["color"]}
                ax.text(LEFT_EDGE - 1.2, y + shift, f"{values[0]:.0f}", **how)
        ax.plot([], [], label=label, linestyle="none", **look)
    plot.label_rows(ax, map(named, order))
    if (100 * table.difference < LEFT_EDGE).any():
        ax.set_xlim(left=LEFT_EDGE - 5)
    return plot.finish(ax, f"{WORDS[score]} minus that of js, points", at={0: "-"})


def by_temperature(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """A score over temperature, a line per objective: means over seeds, bars 95 % intervals.

    table: scores of `temperatures`.
    """
    table = of_score(table, score).sort_values("temperature", kind="stable")
    table[["score", "low", "high"]] *= 100
    how = {"by": "objective", "ends": ("low", "high"), "step": 0.06, "ordinal": True}
    plot.lines(ax, table, "temperature", "score", looks_of(table), linewidth=1.2, **how)
    return plot.finish(ax, "temperature", f"{WORDS[score]} on test rows, %")


def corruption_costs(ax: Axes, table: pd.DataFrame, *, score: str = "anp") -> Axes:
    """How much one expert, plain or corrupted, costs the others: a marker per objective.

    table: of `corruption_costs`, one grouping. Large markers: means over seeds; small ones: seeds.
    """
    rows = {k: CORRUPTIONS.facts[k]["label"] for k in CORRUPTIONS if k in set(table.kind)}
    column, looks = "cost" if score == "anp" else "kept_cost", looks_of(table)
    mean = table.groupby(["objective", "kind"], sort=False)[column].mean().reset_index()
    how = {"row": "kind", "group": "objective", "value": column, "ends": None}
    for some, size, alpha in ((table, 3, 0.6), (mean, 7, 1)):
        some = some.assign(**{column: 100 * some[column]})
        shown = looks if size == 7 else {spec: (None, look) for spec, (_, look) in looks.items()}
        how |= {"markersize": size, "alpha": alpha}
        plot.forest(ax, some, rows, shown, step=0.8 / len(looks), **how)
    for y in range(1, len(rows)):
        ax.axhline(y - 0.5, color="0.85", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    return plot.finish(ax, f"the others lose, points of {WORDS[score]}", at={0: "-"})


def task_curves(ax: Axes, table: pd.DataFrame, column: str) -> Axes:
    """Each task's share of the gradient, loss or coefficient over steps: means over seeds.

    table: of `trajectories`, one objective and kind. column: share, loss or coefficient.
    """
    places = zip(dict.fromkeys(table.task), (0, 1, 2, 3, 4, 5, 8), "os^DvPX", strict=False)
    looks = {task: (task, mark(n, marker, linewidth=1.2)) for task, n, marker in places}
    scaled = table.assign(**{column: table[column] * (100 if column == "share" else 1)})
    plot.lines(ax, scaled, "step", column, looks, by="task", markersize=4)
    equal = {100 / table.task.nunique(): ":"} if column == "share" else {}
    return plot.finish(ax, "step", at_y=equal)


def per_objective(
    ax: Axes, table: pd.DataFrame, column: str, *, order: Sequence[str], scale: float | int = 1
) -> Axes:
    """One small point per seed of every objective, a bar at the mean."""
    values, looks = scale * table.set_index("objective")[column], (mark(1, "s"), mark(0, "o"))
    plot.strip(ax, {named(spec): (values[[spec]], looks[spec in DIVERGENCES]) for spec in order})
    return ax
