"""Summaries of a table of accuracies beyond its mean: normalised scores, worst task, base.

Works on printed tables (`paper.frame("methods", "fusionbench")`) and on measured ones alike.
"""

import pandas as pd

from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.statistics import share_half_width
from divmerge_book.published.paper import frame

EXPERT = "Fine-tuned (STL)"
SCALED = {"Task Arithmetic": ("task arithmetic", 0.5), "Ties-Merging": ("ties", 0.6)}
# FusionBench's names of methods, and those here. Our RegMean averages GPT-2's Conv1D matrices.
METHODS_HERE = {
    EXPERT: "expert",
    "Simple Average": "average",
    "Fisher Merging": "fisher",
    "RegMean": "regmean",
    "Task Arithmetic": "task_arithmetic",
    "Ties-Merging": "ties",
}


def published() -> pd.DataFrame:
    """FusionBench's table of GPT-2 on GLUE as shares: methods by task, `expert` and `base` first.

    The base row is its task arithmetic at scale 0: the unmerged base with the experts' heads.
    """
    printed = frame("methods", "fusionbench") / 100
    base = frame("task arithmetic", "fusionbench").loc[[0.0]].set_axis(["base"])
    table = pd.concat([printed.loc[[EXPERT]], base, printed.drop(EXPERT)])
    return table.rename(index=METHODS_HERE).rename_axis("method")


def summary(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Per method, what its mean hides.

    Columns: mean; normalised, the mean of accuracy over the expert's; worst, the smallest of these
    ratios, and worst_task; below_base, the tasks on which the unmerged base with the task's head
    is more accurate. accuracies: methods by task, shares, with rows `expert` and `base`.
    """
    merged = accuracies.drop(index=["expert", "base"])
    ratio, below = merged / accuracies.loc["expert"], merged < accuracies.loc["base"]
    columns = {"mean": merged.mean(axis=1), "normalised": ratio.mean(axis=1)}
    columns |= {"worst": ratio.min(axis=1), "worst_task": ratio.idxmin(axis=1)}
    columns["below_base"] = below.apply(lambda row: ", ".join(row.index[row]), axis=1)
    return pd.DataFrame(columns)


def margins(accuracies: pd.DataFrame, rows: pd.Series) -> pd.DataFrame:
    """Half the width of a 95 % interval that test rows alone give: per task, and of the `mean`.

    rows: how many were scored, by task. Source: `statistics.share_half_width`.
    """
    half = share_half_width(accuracies, rows[accuracies.columns])
    return half.assign(mean=(half**2).sum(axis=1) ** 0.5 / len(accuracies.columns))


def scored_rows() -> pd.Series:
    """How many rows FusionBench scored, by task."""
    return frame("rows", "fusionbench").loc["validation"]


def sweep() -> pd.DataFrame:
    """FusionBench's accuracies by scaling factor, long: method, scale, task, accuracy."""
    parts = {
        METHODS_HERE[method]: frame(part, "fusionbench")
        .reset_index()
        .melt("scale", var_name="task", value_name="accuracy")
        for method, (part, _) in SCALED.items()
    }
    return pd.concat(parts, names=["method", None]).reset_index("method")


def measured(report: Report) -> pd.DataFrame:
    """Accuracies (or ROUGE-1) of a Report, methods by task, with rows `expert` and `base`."""
    exact = report.metrics().query("metric in ('accuracy', 'rouge1')")
    return exact.pivot_table("value", "method", "task", sort=False)
