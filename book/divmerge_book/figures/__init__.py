"""One function per figure: each draws on the Axes it is given and returns it.

`primitives` has the plots that all figures are made of, `styles` the colours, markers and names.
Tables and sentences of a Report are here.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from divmerge_book.evaluation.metrics import graded, main_scores, own_scores, scores
from divmerge_book.evaluation.report import MARGIN, Report, caption
from divmerge_book.figures import primitives as plot
from divmerge_book.figures import schematics
from divmerge_book.figures.styles import GREEN, PALETTE, TITLES, colour, title

__all__ = ["GREEN", "PALETTE", "TITLES", "colour", "title"]  # also of the modules below

FLOOR = -0.25  # kept margins below it are drawn at a figure's left edge
STATISTICS = {"anp": "ANP", "kept_margin": "kept margin", "worst": "worst", "accuracy": "accuracy"}


def intervals_of(report: Report, subset: str, statistic: str) -> pd.DataFrame:
    """Value, low and high of a statistic on a subset, by method."""
    suite = report.rows[report.rows.subset == subset].suite.iloc[0]
    return report.sampled(suite, subset, statistic=statistic).table().set_index("method")


def below_majority(report: Report, subset: str) -> pd.DataFrame:
    """By method: `below` the majority class on how many tasks, out of `counted`."""
    return report.below_majority().query("subset == @subset").set_index("method")


def score_intervals(report: Report, subset: str) -> pd.DataFrame:
    """ANP and kept margin of every method on a subset, with 95 % intervals.

    Columns: method; value, low, high of the ANP; kept, kept_low, kept_high of the kept margin;
    below, the counted tasks on which the method is below the majority, out of `counted`.
    """
    kept = intervals_of(report, subset, "kept_margin").drop(columns="num_seeds")
    kept.columns = ["kept" if name == "value" else f"kept_{name}" for name in kept]
    below = below_majority(report, subset)[["below", "counted"]]
    return intervals_of(report, subset, "anp").join([kept, below]).reset_index()


def ranking(report: Report) -> pd.DataFrame:
    """`score_intervals` of the largest subset, the highest ANP first."""
    subset = largest(report.rows).subset.iloc[0]
    return score_intervals(report, subset).sort_values("value", ascending=False)


def forest(ax: Axes, table: pd.DataFrame) -> Axes:
    """Every method's scores with their intervals, one row each, in the order given.

    table: rows of `score_intervals`. Kept margins are hollow squares below the ANP, and labels give
    on how many tasks a method is below the majority. The line at 100 % is the experts. Values below
    FLOOR are drawn at it.
    """
    rows = table[table.method != "expert"].reset_index(drop=True)
    for y, row in rows.iterrows():
        look = {"color": colour(row.method)}
        numbered_interval(ax, y, (row.value, row.low, row.high), 7, marker="o", **look)
        look |= {"marker": "s", "markerfacecolor": "white"}
        numbered_interval(ax, y + 0.42, (row.kept, row.kept_low, row.kept_high), 5, **look)
    names = zip(rows.method.map(title), rows.below, strict=True)
    plot.label_rows(ax, [f"{name} ({count})" if count else name for name, count in names])
    ax.margins(x=0.1)
    ax.set_xlim(right=np.dot(ax.get_xlim(), (-0.1, 1.1)))  # room for numbers
    more = {"ylim": (len(rows) - 0.3, -0.8), "at": {1: "--", 0: ":"}, "percent": "x"}
    return plot.finish(ax, "ANP (filled), kept margin (hollow),\n% of the experts", **more)


def numbered_interval(ax: Axes, y: float | int, found: tuple, size: int, **look) -> None:
    """A value with its interval at a height, and the number in % to its right."""
    value, low, high = (max(one, FLOOR) for one in found)
    ax.plot([low, high], [y, y], color=look["color"], linewidth=size / 2, alpha=0.4)
    ax.plot(value, y, markersize=size, **look)
    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center_baseline"}
    place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    ax.annotate(f"{100 * found[0]:.1f}", (max(value, high), y), fontsize=4.5 + size / 2, **place)


def ratio_map(ax: Axes, metrics: pd.DataFrame, metric: str = "ratio") -> Axes:
    """Accuracy relative to the expert's, method by task, averaged over seeds.

    metrics: rows of `Report.metrics` for one suite and subset. metric: `ratio`, or `kept_margin`
    for the share of the expert's lead over the majority class that the merge keeps.
    """
    rows = metrics.query("metric == @metric and method != 'expert' and task != 'all'")
    table = rows.pivot_table("value", "method", "task", sort=False).rename(index=title)
    low = 100 * FLOOR if metric == "kept_margin" else None
    how = {"fmt": ".0f", "cmap": "viridis", "vmin": low, "vmax": 100, "annot_kws": {}}
    plot.heat_map(ax, 100 * table, label="% of the expert's", rotation=30, **how)
    return plot.finish(ax, "task")


def short(group: str) -> str:
    """A group's name without the parts that all share."""
    for prefix in ("encoder.layer.", "model.layers."):
        group = group.replace(prefix, "block ")
    return group.removeprefix("model.").replace(".weight", ".w").replace(".bias", ".b")


def largest(rows: pd.DataFrame) -> pd.DataFrame:
    """Those rows of a Report, or of its intervals, whose subset has the most tasks."""
    return rows[rows.subset == max(rows.subset, key=lambda name: name.count("+"))]


def without_one(report: Report, suite: str, subset: str, method: str, other: str) -> str:
    """The task without which two methods' kept margins differ most otherwise, and by how much."""
    some = report.against_experts().query("counted and suite == @suite and subset == @subset")
    kept = some.pivot_table("kept_margin", "task", "method")
    gap = 100 * (kept[method] - kept[other])
    if len(gap) < 2:
        return ""
    rest = (gap.sum() - gap) / (len(gap) - 1)
    task = (rest - gap.mean()).abs().idxmax()
    expert = some[(some.method == "expert") & (some.task == task)]
    return (
        f" Without `{task}`, whose experts are {100 * (expert.value - expert.floor).mean():.1f} "
        f"points above the majority class, it differs by {rest[task]:+.1f} points."
    )


def rank_summary(report: Report) -> str:
    """The rank of DivMerge on the largest subset, as a list with the report's numbers."""
    suite, subset = largest(report.rows)[["suite", "subset"]].iloc[0]
    ranked = score_intervals(report, subset).set_index("method").drop(["expert", "base"])
    lines = []
    for column, statistic in (("value", "anp"), ("kept", "kept_margin")):
        order = 100 * ranked[column].sort_values(ascending=False)
        own = order.index.str.startswith("divmerge")
        ours = order[own]
        places = [
            f"{title(method)} is number {1 + order.index.get_loc(method)} of {len(order)} "
            f"({value:.1f} %)"
            for method, value in ours.items()
        ]
        lines.append(f"By {STATISTICS[statistic]}: {'; '.join(places) or 'no DivMerge'}.")
        if not own.any() or own.all():
            continue
        pair = suite, subset, ours.index[0], (other := order.index[~own][0])
        gap, low, high = (100 * end for end in report.difference(*pair, statistic=statistic))
        lines[-1] += (
            f" The best other method is {title(other)} ({order[other]:.1f} %); the best DivMerge "
            f"differs from it by {gap:+.1f} points [{low:+.1f}, {high:+.1f}]."
        )
        if statistic == "kept_margin":
            lines[-1] += without_one(report, *pair)
    tasks, counted = subset.split("+"), report.counted(suite)
    lines.append(
        f"{(ranked.below > 0).sum()} of {len(ranked)} methods are below the majority class on at "
        f"least one of {len(counted)} counted tasks (see the figure)."
    )
    if left_out := [task for task in tasks if task not in counted]:
        lines.append(
            f"Not counted, as their experts do not beat the majority class by "
            f"{100 * MARGIN:.0f} points: {', '.join(left_out)}."
        )
    return "\n- ".join([f"On {suite}, {len(tasks)} tasks merged:\n", *lines])


def task_table(report: Report, subset: str) -> pd.DataFrame:
    """Accuracy (or mean grade) of every method on every task of a subset, averaged over seeds.

    Columns after the tasks: the metrics of their own that some have (see `own_scores`). The
    last row is the majority class of the test rows.
    """
    rows = report.rows[report.rows.subset == subset]
    tidy = scores(pd.concat([rows, majority_rows(rows)], ignore_index=True))
    own = own_scores(tidy).query("metric in ('matthews', 'f1')")
    both = pd.concat([main_scores(tidy), own.assign(task=own.task + ", " + own.metric)])
    return both.pivot_table("value", "method", "task", sort=False).rename(index=title)


def majority_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a Report that predict every task's majority class; free text gets 0."""
    first = rows.drop_duplicates("task")
    answers = [
        [0.0] * len(row.predicted)
        if graded(row.gold)
        else [int(pd.Series(row.gold).mode()[0])] * len(row.gold)
        for row in first.itertuples()
    ]
    return first.assign(method="majority", predicted=answers)


def percent_intervals(table: pd.DataFrame) -> list[str]:
    """`50.0 [40.0, 60.0]`: a share and its interval in every row, in %."""
    form = "{:.1f} [{:.1f},\N{NO-BREAK SPACE}{:.1f}]"
    return [form.format(*row) for row in 100 * table.to_numpy()]


def score_table(report: Report, subset: str) -> pd.DataFrame:
    """Scores of every method on a subset, in %, with intervals, and tasks below the majority.

    Columns: ANP, kept margin, worst ratio and mean accuracy (or grade) over counted tasks, and on
    how many of them the method is below the majority.
    """
    found = {name: intervals_of(report, subset, name) for name in STATISTICS}
    index = found["anp"].index
    columns = {
        f"{words}, %": percent_intervals(found[name].loc[index, ["value", "low", "high"]])
        for name, words in STATISTICS.items()
    }
    below = below_majority(report, subset).loc[index]
    columns["below the majority"] = [f"{r.below} of {r.counted}" for r in below.itertuples()]
    return pd.DataFrame(columns, index=[title(method) for method in index])


STORED = "https://github.com/divmerge/divmerge-book/blob/main/book/results"
LANDING = """```{{figure}} results/landing.svg
:name: fig-landing
:alt: ANP and kept margin of {merges} merges and the base model with 95 % intervals, \
one panel for each of {suites} suites
Filled: average normalised performance (ANP), merged over expert accuracy. Hollow: kept margin, \
how far the merge is above the majority class over how far the expert is. Both are means over the \
counted tasks and over seeds of experts, bars 95 % intervals over seeds and test rows; the dashed \
line is the experts, the dotted one the majority class. What is below {floor:.0f} % is drawn at \
the left edge. Green: DivMerge; blue: AdaMerging. In brackets: on how many counted tasks a method \
is below the majority class.
```
"""


def landing(results: Path) -> None:
    """Draw the method, and `landing.svg` and `landing.md` from every stored Report in a folder.

    A suite's is the one of `bases`, which has most methods, where it is stored. Without stored
    Reports the text says that nothing has been measured yet.
    """
    schematics.save(schematics.method, results / "method.svg", height=3.6)
    files = {path.stem: path for path in sorted(results.glob("*.json"))}
    for suite, name in (("embedded", "embedded_minilm"), ("glue_encoder", "glue_minilm")):
        if (more := results / "bases" / f"{name}.json").exists():
            files[suite] = more
    reports = {name: Report.load(path) for name, path in files.items()}
    if not reports:
        (results / "landing.md").write_text("No full-size results are stored yet.\n", "utf-8")
        return
    small = sns.plotting_context("notebook", font_scale=0.75)
    with sns.axes_style("whitegrid"), plt.rc_context({**small, "svg.hashsalt": "landing"}):
        ranked = {name: ranking(report) for name, report in reports.items()}
        shape = {"figsize": (7.5, 0.35 * max(map(len, ranked.values()))), "squeeze": False}
        fig, axes = plt.subplots(1, len(reports), **shape, layout="constrained")
        for ax, (name, report) in zip(axes[0], reports.items(), strict=True):
            subset = largest(report.rows).subset.iloc[0]
            tasks, counted = subset.count("+") + 1, len(report.counted(report.rows.suite[0]))
            heading = f"{name}, {report.provenance['encoder']}\n{tasks} tasks, {counted} counted"
            forest(ax, ranked[name]).set_title(heading)
        fig.savefig(results / "landing.svg", metadata={"Date": None})
        plt.close(fig)
    merges = len(set.union(*(set(r.rows.method) for r in reports.values())) - {"expert", "base"})
    lines = [LANDING.format(merges=merges, suites=len(reports), floor=100 * FLOOR)]
    for name, report in reports.items():
        file = files[name].relative_to(results).as_posix()
        link = f"stored in [`book/results/{file}`]({STORED}/{file})"
        lines += [rank_summary(report), "", f"*({name}: {caption(report)}; {link})*", ""]
    (results / "landing.md").write_text("\n".join(lines), "utf-8")
