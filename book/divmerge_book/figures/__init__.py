"""One function per figure: each draws on the Axes it is given and returns it.

Colours are seaborn's colour-blind palette: green for DivMerge, blue for methods that learn without
the experts, grey for sums of weights, black for references.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from divmerge_book.evaluation.metrics import graded, main_scores, own_scores, scores
from divmerge_book.evaluation.report import MARGIN, Report, caption
from divmerge_book.figures.styles import GREEN, PALETTE, TITLES, colour, title

__all__ = ["GREEN", "PALETTE", "TITLES", "colour", "title"]  # also of the modules below

FLOOR = -0.25  # a kept margin below it stands at a figure's left edge


def side_by_side(report: Report, subset: str) -> pd.DataFrame:
    """ANP and kept margin of every method on a subset, with 95 % intervals.

    Columns: method; value, low, high of the ANP; kept, kept_low, kept_high of the kept margin;
    below, the counted tasks on which the method is below the majority, out of `counted`.
    """
    suite = report.rows[report.rows.subset == subset].suite.iloc[0]
    anp, kept = (
        report.sampled(suite, subset, statistic=name).table() for name in ("anp", "kept_margin")
    )
    kept = kept.rename(columns={"value": "kept", "low": "kept_low", "high": "kept_high"})
    below = report.below_majority().query("suite == @suite and subset == @subset")
    table = anp.merge(kept.drop(columns="num_seeds"), on="method")
    return table.merge(below[["method", "below", "counted"]], on="method")


def forest(ax: Axes, table: pd.DataFrame, *, statistic: str = "ANP") -> Axes:
    """Every method's value with its interval, one row each, in the order given.

    table: rows of `Report.intervals` of one suite and subset, or of `side_by_side`, whose kept
    margins are hollow squares below the ANP and whose names say on how many tasks a method is below
    the majority. The line at 100 % is the experts. What is below FLOOR stands at the left edge.
    """
    rows = table[table.method != "expert"].reset_index(drop=True)
    names, both = [title(method) for method in rows.method], "kept" in rows
    for y, row in rows.iterrows():
        shade = colour(row.method)
        mark(ax, y, (row.value, row.low, row.high), marker="o", color=shade, markersize=7)
        if both:
            found = row.kept, row.kept_low, row.kept_high
            hollow = {"marker": "s", "markerfacecolor": "white", "markersize": 5}
            mark(ax, y + 0.4, found, color=shade, **hollow)
    ax.axvline(1, color="black", linewidth=1, linestyle="--")
    if both:
        ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
        names = [f"{name} ({k})" if k else name for name, k in zip(names, rows.below, strict=True)]
        statistic += " and kept margin"
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.3, -0.8)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlabel(f"{statistic}, % of the experts")
    ax.grid(axis="y", visible=False)
    return ax


def mark(ax: Axes, y: float | int, found: tuple[float, float, float], **style) -> None:
    """A value with its interval at a height, and the number above it."""
    value, low, high = (max(one, FLOOR) for one in found)
    ax.plot([low, high], [y, y], color=style["color"], linewidth=style["markersize"] / 2, alpha=0.4)
    ax.plot(value, y, **style)
    place = {"xytext": (0, 3 + style["markersize"] / 3), "textcoords": "offset points"}
    size = 4.5 + style["markersize"] / 2
    ax.annotate(f"{100 * found[0]:.1f}", (value, y), ha="center", fontsize=size, **place)


def ratio_map(ax: Axes, metrics: pd.DataFrame, metric: str = "ratio") -> Axes:
    """Accuracy relative to the expert's, method by task, averaged over seeds.

    metrics: rows of `Report.metrics` for one suite and subset. metric: `ratio`, or `kept_margin`
    for what is left of the expert's lead over the majority class.
    """
    rows = (metrics.metric == metric) & (metrics.method != "expert") & (metrics.task != "all")
    ratio = metrics[rows]
    table = ratio.pivot_table(index="method", columns="task", values="value", sort=False)
    table.index = [title(method) for method in table.index]
    sns.heatmap(
        100 * table,
        ax=ax,
        annot=True,
        fmt=".0f",
        cmap="viridis",
        vmin=100 * FLOOR if metric == "kept_margin" else None,
        vmax=100,
        cbar_kws={"label": "% of the expert's"},
    )
    ax.set(xlabel="task", ylabel="")
    ax.tick_params(axis="x", rotation=30)
    return ax


def short(group: str) -> str:
    """A group's name without the parts that all share."""
    for prefix in ("encoder.layer.", "model.layers."):
        group = group.replace(prefix, "block ")
    return group.removeprefix("model.").replace(".weight", ".w").replace(".bias", ".b")


def largest(rows: pd.DataFrame) -> pd.DataFrame:
    """Those rows of a Report, or of its intervals, whose subset has the most tasks."""
    subset = max(rows.subset, key=lambda name: name.count("+"))
    return rows[rows.subset == subset]


def percent(value: float, low: float, high: float) -> str:
    """`12.3 % [1.0, 23.4]`."""
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def place(report: Report) -> str:
    """Where DivMerge stands on the largest subset, in sentences made of the report's numbers."""
    rows = largest(report.rows)
    suite, subset = rows.suite.iloc[0], rows.subset.iloc[0]
    table = side_by_side(report, subset)
    ranked = table[~table.method.isin(["expert", "base"])]
    lines = []
    for name, column, statistic in (
        ("ANP", "value", "anp"),
        ("kept margin", "kept", "kept_margin"),
    ):
        order = ranked.sort_values(column, ascending=False)
        ours = order[order.method.str.startswith("divmerge")]
        places = [
            f"{title(row.method)} is number {1 + list(order.method).index(row.method)} of "
            f"{len(order)} ({100 * row[column]:.1f} %)"
            for _, row in ours.iterrows()
        ]
        other = order[~order.method.str.startswith("divmerge")].iloc[0]
        gap, low, high = report.difference(
            suite, subset, ours.iloc[0].method, other.method, statistic=statistic
        )
        lines.append(
            f"By {name}: {'; '.join(places)}. The best other method is {title(other.method)} "
            f"({100 * other[column]:.1f} %); the best DivMerge differs from it by "
            f"{100 * gap:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]."
        )
    tasks, counted = subset.split("+"), report.counted(suite)
    some = ranked[ranked.below > 0].sort_values("below", ascending=False)
    below = ", ".join(f"{title(row.method)} ({row.below})" for row in some.itertuples())
    lines.append(
        f"Below the majority class on one of {len(counted)} counted tasks or more: {below}."
        if below
        else "No method is below the majority class on a counted task."
    )
    left_out = [task for task in tasks if task not in counted]
    if left_out:
        lines.append(
            f"Not counted, as their experts do not beat the commonest answer by "
            f"{100 * MARGIN:.0f} points: {', '.join(left_out)}."
        )
    return f"On {suite}, T = {len(tasks)}. " + " ".join(lines)


def task_table(report: Report, subset: str) -> pd.DataFrame:
    """Accuracy (or mean grade) of every method on every task of a subset, averaged over seeds.

    After the tasks stand the metrics of their own that some have (see `Report.own_metric`); the
    last row is the majority class, which knows the test rows.
    """
    rows = report.rows[report.rows.subset == subset]
    tidy = scores(pd.concat([rows, constant(rows)], ignore_index=True))
    own = own_scores(tidy).query("metric in ('matthews', 'f1')")
    own = own.assign(task=own.task + ", " + own.metric)
    both = pd.concat([main_scores(tidy), own])
    return both.pivot_table("value", "method", "task", sort=False).rename(index=title)


def constant(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a Report that answer every task with its majority class; free text gets 0."""
    first = rows.drop_duplicates("task")
    answers = [
        [0.0] * len(row.predicted)
        if graded(row.gold)
        else [int(pd.Series(row.gold).mode()[0])] * len(row.gold)
        for row in first.itertuples()
    ]
    return first.assign(method="majority", predicted=answers)


def score_table(report: Report, subset: str) -> pd.DataFrame:
    """Scores of every method on a subset, in %, with intervals, and tasks below the majority.

    Columns: ANP, kept margin, worst ratio and mean accuracy (or grade) over counted tasks, and on
    how many of them the method is below the majority.
    """
    suite = report.rows[report.rows.subset == subset].suite.iloc[0]
    names = {"anp": "ANP", "kept_margin": "kept margin", "worst": "worst", "accuracy": "accuracy"}
    columns = {}
    for statistic, name in names.items():
        rows = report.sampled(suite, subset, statistic=statistic).table()
        columns[f"{name}, %"] = [
            percent(row.value, row.low, row.high).replace(" %", "") for row in rows.itertuples()
        ]
    below = report.below_majority().query("suite == @suite and subset == @subset")
    below = below.set_index("method").loc[rows.method]
    columns["below the majority"] = [f"{r.below} of {r.counted}" for r in below.itertuples()]
    return pd.DataFrame(columns, index=[title(method) for method in rows.method])


def landing(results: Path) -> None:
    """Draw `landing.png` and write `landing.md` from every stored Report in a folder.

    Without stored Reports the text says that nothing has been measured yet.
    """
    reports = {path.stem: Report.load(path) for path in sorted(results.glob("*.json"))}
    if not reports:
        (results / "landing.md").write_text("No full-size results are stored yet.\n", "utf-8")
        return
    with sns.axes_style("whitegrid"):
        fig, axes = plt.subplots(1, len(reports), figsize=(5.6 * len(reports), 5.2), squeeze=False)
        for ax, (name, report) in zip(axes[0], reports.items(), strict=True):
            subset = largest(report.rows).subset.iloc[0]
            tasks, counted = subset.count("+") + 1, len(report.counted(name))
            heading = f"{name}, {report.provenance['encoder']}\n{tasks} tasks, {counted} counted"
            forest(ax, side_by_side(report, subset)).set_title(heading)
        fig.tight_layout()
        fig.savefig(results / "landing.png", dpi=160)
        plt.close(fig)
    methods = set.union(*(set(report.rows.method) for report in reports.values()))
    merges = len(methods - {"expert", "base"})
    lines = [
        "```{figure} results/landing.png",
        ":name: fig-landing",
        f":alt: ANP and kept margin of {merges} merges and the base model with 95 % intervals, "
        f"one panel for each of {len(reports)} suites",
        "Filled: average normalised performance (ANP), merged over expert accuracy. Hollow: kept "
        "margin, how far the merge is above the commonest answer over how far the expert is. Both "
        "are means over the counted tasks and over seeds of experts, bars 95 % intervals over "
        "seeds and test rows; the dashed line is the experts, the dotted one the commonest answer. "
        "In brackets: on how many counted tasks a method is below the commonest answer.",
        "```",
        "",
    ]
    for name, report in reports.items():
        lines += [place(report), f"*({name}: {caption(report)})*", ""]
    (results / "landing.md").write_text("\n".join(lines), "utf-8")
