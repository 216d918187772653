"""One function per figure: each draws on the Axes it is given and returns it.

Colours are seaborn's colour-blind palette: green for DivMerge, blue for methods that learn without
the experts, grey for sums of weights, black for references.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from divmerge_core.report import MARGIN, Report, caption

BLUE, GREEN, GREY = (sns.color_palette("colorblind")[n] for n in (0, 2, 7))
TITLES = {
    "expert": "Experts, one per task",
    "base": "Base model",
    "divmerge": "DivMerge",
    "adamerging": "AdaMerging",
    "adamerging++": "AdaMerging++",
    "average": "Average",
    "task_arithmetic": "Task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "lines": "LiNeS",
    "running_average": "Running average",
    "sequential_task_arithmetic": "Sequential task arithmetic",
    "sequential_ties": "Sequential TIES",
    "opcm": "OPCM",
    "dp_mixture": "Dirichlet process mixture",
    "distillation": "Distillation",
    "surgery": "Representation surgery",
    "layer_evolution": "Layer evolution",
    "evolved_coefficients": "Evolved coefficients",
    "selection_policy": "Selection policy",
    "prodistill": "ProDistill",
    "breadcrumbs": "Breadcrumbs",
    "consensus": "Consensus",
    "pcb": "PCB-Merging",
    "emr": "EMR-Merging",
    "wemoe": "WEMoE",
    "twin": "Twin-Merging",
    "logits_fusion": "Logits fusion",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "knots": "KnOTS",
    "slerp": "Slerp",
    "multi_slerp": "Multi-slerp",
    "model_stock": "Model stock",
    "fisher": "Fisher merging",
    "regmean": "RegMean",
    "regmean_plus_plus": "RegMean++",
    "esm": "ESM",
    "esm_pp": "ESM++",
    "doge": "DOGE",
    "wudi": "WUDI",
}


def title(spec: str) -> str:
    """`divmerge/layer` -> `DivMerge, per layer`."""
    name, _, grouping = spec.partition("/")
    return TITLES.get(name, name) + (f", per {grouping}" if grouping else "")


def colour(spec: str):
    """The colour of a method's family."""
    name = spec.partition("/")[0]
    return {"divmerge": GREEN, "adamerging": BLUE}.get(name, GREY)


def line(spec: str) -> str:
    """The line style of a method's grouping."""
    return {"block": "--", "layer": ":"}.get(spec.partition("/")[2], "-")


def forest(ax: Axes, intervals: pd.DataFrame, *, statistic: str = "ANP") -> Axes:
    """Every method's value with its interval, one row each, in the order given.

    intervals: rows of `Report.intervals` of one suite and subset; the line at 100 % is the experts.
    """
    rows = intervals[intervals.method != "expert"].reset_index(drop=True)
    for y, row in rows.iterrows():
        shade = colour(row.method)
        ax.plot([row.low, row.high], [y, y], color=shade, linewidth=3, alpha=0.45)
        ax.plot(row.value, y, "o", color=shade, markersize=7)
        ax.annotate(
            f"{100 * row.value:.1f}",
            (row.value, y),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    ax.axvline(1, color="black", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(rows)), [title(method) for method in rows.method])
    ax.set_ylim(len(rows) - 0.5, -0.8)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlabel(f"{statistic}, % of the experts")
    ax.grid(axis="y", visible=False)
    return ax


def ratio_map(ax: Axes, metrics: pd.DataFrame) -> Axes:
    """Accuracy relative to the expert's, method by task, averaged over seeds.

    metrics: rows of `Report.metrics` for one suite and subset.
    """
    ratio = metrics[(metrics.metric == "ratio") & (metrics.method != "expert")]
    table = ratio.pivot_table(index="method", columns="task", values="value", sort=False)
    table.index = [title(method) for method in table.index]
    sns.heatmap(
        100 * table,
        ax=ax,
        annot=True,
        fmt=".0f",
        cmap="viridis",
        vmax=100,
        cbar_kws={"label": "accuracy, % of the expert's"},
    )
    ax.set(xlabel="task", ylabel="")
    ax.tick_params(axis="x", rotation=30)
    return ax


def short(group: str) -> str:
    """A group's name without the parts that all share."""
    for prefix in ("encoder.layer.", "model.layers."):
        group = group.replace(prefix, "block ")
    return group.removeprefix("model.").replace(".weight", ".w").replace(".bias", ".b")


def coefficient_map(ax: Axes, fit: Mapping) -> Axes:
    """Learned coefficients, group by task; white is 0.

    fit: an entry of `Report.fits`. With many groups every few get a label.
    """
    table = pd.DataFrame(
        np.array(fit["coefficients"]).T,
        index=[short(group) for group in fit["groups"]],
        columns=fit["tasks"],
    )
    limit = float(np.abs(table.values).max())
    sns.heatmap(
        table,
        ax=ax,
        cmap="PRGn",
        vmin=-limit,
        vmax=limit,
        annot=table.size <= 80,
        fmt=".2f",
        annot_kws={"fontsize": 8},
        yticklabels=True if len(table) <= 40 else max(1, len(table) // 14),
        cbar_kws={"label": "coefficient"},
    )
    ax.set(title=title(fit["method"]), xlabel="task", ylabel="parameters")
    ax.tick_params(axis="x", rotation=35)
    ax.tick_params(axis="y", rotation=0, labelsize=7 if len(table) > 12 else 9)
    return ax


def losses(ax: Axes, fits: list[Mapping], *, window: int = 8) -> Axes:
    """Objective over steps: each batch faint, the mean of `window` of them strong."""
    for fit in fits:
        loss = pd.Series(fit["losses"])
        shade = colour(fit["method"])
        ax.plot(loss, color=shade, alpha=0.2, linewidth=0.8)
        smooth = loss.rolling(window, min_periods=1).mean()
        ax.plot(smooth, line(fit["method"]), color=shade, label=title(fit["method"]))
    ax.set(xlabel="step", ylabel="objective, nats, summed over tasks")
    ax.legend(fontsize=8)
    return ax


def anp_course(ax: Axes, fits: list[Mapping]) -> Axes:
    """Validation ANP over steps, where the fits recorded it."""
    for fit in fits:
        course = pd.DataFrame(fit["course"])
        shade = colour(fit["method"])
        style = line(fit["method"])
        ax.plot(course.step, course.anp, style, marker="o", color=shade, label=title(fit["method"]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="step", ylabel="ANP on validation rows, %")
    ax.legend(fontsize=8)
    return ax


def largest(rows: pd.DataFrame) -> pd.DataFrame:
    """Those rows of a Report, or of its intervals, whose subset has the most tasks."""
    subset = max(rows.subset, key=lambda name: name.count("+"))
    return rows[rows.subset == subset]


def place(report: Report) -> str:
    """Where DivMerge stands on the largest subset, in sentences made of the report's numbers."""
    rows = largest(report.intervals())
    suite, subset = rows.suite.iloc[0], rows.subset.iloc[0]
    ranked = rows[~rows.method.isin(["expert", "base"])].sort_values("value", ascending=False)
    order = list(ranked.method)
    ours = ranked[ranked.method.str.startswith("divmerge")]
    best_other = ranked[~ranked.method.str.startswith("divmerge")].iloc[0]
    places = [
        f"{title(row.method)} is number {1 + order.index(row.method)} of {len(order)} "
        f"({100 * row.value:.1f} %)"
        for row in ours.itertuples()
    ]
    gap, low, high = report.difference(suite, subset, ours.iloc[0].method, best_other.method)
    tasks, counted = subset.split("+"), report.counted(suite)
    left_out = [task for task in tasks if task not in counted]
    note = (
        f" Not counted, as their experts do not beat the commonest answer by "
        f"{100 * MARGIN:.0f} points: {', '.join(left_out)}."
        if left_out
        else ""
    )
    return (
        f"On {suite}, T = {len(tasks)}, by ANP: {'; '.join(places)}. The best other method is "
        f"{title(best_other.method)} ({100 * best_other.value:.1f} %); the best DivMerge differs "
        f"from it by {100 * gap:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}].{note}"
    )


def score_table(report: Report, subset: str) -> pd.DataFrame:
    """ANP, worst ratio and mean accuracy of every method on a subset, in %, with intervals."""
    columns = {}
    for statistic in ("anp", "worst", "accuracy"):
        rows = report.intervals(statistic=statistic)
        rows = rows[rows.subset == subset].set_index("method")
        columns[f"{statistic}, %"] = [
            f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"
            for row in rows.itertuples()
        ]
    return pd.DataFrame(columns, index=[title(method) for method in rows.index])


def landing(results: Path) -> None:
    """Draw `landing.png` and write `landing.md` from every stored Report in a folder.

    Without stored Reports the text says that nothing has been measured yet.
    """
    reports = {path.stem: Report.load(path) for path in sorted(results.glob("*.json"))}
    if not reports:
        (results / "landing.md").write_text("No full-size results are stored yet.\n", "utf-8")
        return
    with sns.axes_style("whitegrid"):
        fig, axes = plt.subplots(
            1, len(reports), figsize=(4.6 * len(reports), 4.2), sharey=True, squeeze=False
        )
        for ax, (name, report) in zip(axes[0], reports.items(), strict=True):
            rows = largest(report.intervals())
            tasks, counted = rows.subset.iloc[0].count("+") + 1, len(report.counted(name))
            heading = f"{name}, {report.provenance['encoder']}\n{tasks} tasks, {counted} counted"
            forest(ax, rows).set_title(heading)
        fig.tight_layout()
        fig.savefig(results / "landing.png", dpi=160)
        plt.close(fig)
    lines = [
        "```{figure} results/landing.png",
        ":name: fig-landing",
        ":alt: Average normalised performance of every merging method with 95 % intervals",
        "Average normalised performance (ANP): merged over expert accuracy, averaged over tasks. "
        "Points are means over seeds of experts, bars 95 % bootstrap intervals over seeds and test "
        "rows; the dashed line is the experts.",
        "```",
        "",
    ]
    for name, report in reports.items():
        lines += [place(report), f"*({name}: {caption(report)})*", ""]
    (results / "landing.md").write_text("\n".join(lines), "utf-8")
