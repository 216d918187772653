"""Findings on divergence as a predictor of accuracy, from our own tables."""

from pathlib import Path

import pandas as pd

from divmerge_book.evaluation.stored_tables import ResultTable, load, named
from divmerge_book.figures.styles import CRITERIA, labels
from divmerge_book.findings import bullets, each, listed, scores, table_of, with_origin
from divmerge_book.studies.model_selection import model_scores, over_models, selection_regret
from divmerge_book.studies.random_merges import MEASURES, SAMPLERS

NAMES = labels(CRITERIA)


def spearman(mean: pd.DataFrame, **chosen: str) -> pd.DataFrame:
    """The rank correlations of `over_models`' second table with these values in its columns."""
    return mean[(mean[["how", *chosen]] == ["spearman", *chosen.values()]).all(axis=1)]


def crossed(cross: pd.DataFrame, majority: pd.Series, source: str) -> str:
    """How often an expert of another task is worse than the majority class.

    cross: of `random_merges`; majority: the majority class's share of test rows, by task.
    """
    others = cross[cross.task != cross.model]
    below = others.accuracy < others.task.map(majority)
    by_task = below.groupby(others.task, sort=False).mean()
    always = [f"`{task}`" for task in by_task.index[by_task == 1]]
    return (
        f"In {source}, {100 * below.mean():.0f} % of the accuracies of experts on other tasks are "
        f"below the majority class of the test rows. They all are on {listed(always, 'no task')}."
    )


def ranked(mean: pd.DataFrame, source: str) -> str:
    """Every criterion's rank correlation with a task's accuracy; mean: of `over_models`."""
    lines = []
    for (kind, among), rows in spearman(mean, goal="task").groupby(
        ["sampler", "among"], sort=False
    ):
        one = rows.set_index("criterion")
        lead = one.loc["reverse_kl"]
        last = f"{lead.lead:+.2f} [{lead.lead_low:+.2f}, {lead.lead_high:+.2f}]"
        values = [f"{value:.2f}" for value in one.value]
        lines.append([f"{SAMPLERS.facts[kind]['label']}: {among}", *values, last])
    heads = ["coefficients drawn for", *one.index.map(NAMES), f"{NAMES['reverse_kl']} minus JS"]
    table = table_of(heads, lines)
    minus = "Rank correlations with a task's accuracy, of minus each measure (of labels: plus)"
    return f"{minus}, in {source}:\n\n{table}"


def ranked_elsewhere(path: Path) -> str:
    """The `ranked` and `chosen` of another suite's stored models; empty where none are."""
    if not path.is_file():
        return ""
    run = ResultTable(*load(path), "the stored run", named(path))
    _, mean = over_models(run["models"], run["cross"])
    whole = model_scores(run["models"], run["cross"])
    tasks, encoder = len(run.facts["tasks"]), run.facts["encoder"]
    source = f"the stored run of `{run.facts['suite']}`, {tasks} tasks, with `{encoder}`"
    best = chosen(selection_regret(whole), whole, source)
    return with_origin(run, ranked(mean, source), best)


def by_task(of: pd.DataFrame, rows: int, source: str) -> str:
    """On how many tasks JS ranks models better than every other measure, and where it is worst.

    of: rows of the first table of `over_models`. rows: labelled validation rows per task.
    """
    by = of.groupby(["criterion", "task"]).value.mean().unstack("criterion")
    won = [f"{NAMES[n]} on {(by.js > by[n]).sum()}" for n in MEASURES if n != "js"]
    worst = by.js.idxmin()
    return (
        f"In {source} JS correlates more than {listed(won)} of {len(by)} tasks. Its lowest value "
        f"is {by.js.min():.2f}, on `{worst}`, where {rows} labels have {by.validation[worst]:.2f}."
    )


def leading(mean: pd.DataFrame, source: str) -> str:
    """Which label-free measure has the highest correlation, in how many draws and selections."""
    goals = {"task": "a task's accuracy", "sum": "the ANP", "kept_margin": "the kept margin"}
    parts = []
    for goal in (goal for goal in goals if goal in set(mean.goal)):
        pick = spearman(mean, goal=goal)
        pick = pick[pick.criterion.isin(MEASURES)]
        wide = pick.pivot_table("value", ["sampler", "among"], "criterion")
        first = wide.idxmax(axis=1).value_counts()
        parts.append(
            f"with {goals[goal]}, {listed(f'{NAMES[n]} in {count}' for n, count in first.items())} "
            f"of {len(wide)} rows (JS above entropy in {(wide.js > wide.entropy).sum()})"
        )
    start = f"In {source} the label-free measure with the highest rank correlation is, "
    return f"{start}{'; '.join(parts)}."


def chosen(lost: pd.DataFrame, whole: pd.DataFrame, source: str) -> str:
    """Test scores of the model that every criterion chooses among those drawn per task.

    lost: of `model_selection.selection_regret`; whole: of `model_selection.model_scores`.
    """
    task, seeds = lost[lost.sampler == "task"], whole[whole.sampler == "task"].groupby("seed")
    lines = []
    for column, words in scores(task).items():
        ranked = task.set_index("criterion")[column].sort_values(ascending=False)
        lines.append(
            f"Test {words} of the one chosen by: {each(ranked, '{:.1f} %', NAMES)}; of a random "
            f"one {100 * seeds[column].mean().mean():.1f} %, the highest of all "
            f"{100 * seeds[column].max().mean():.1f} %"
        )
    return (
        f"In {source} there are {task.models.iloc[0]} models per seed with coefficients per task. "
        f"{'. '.join(lines)}."
    )


def summary(mean: pd.DataFrame, lost: pd.DataFrame, whole: pd.DataFrame, source: str) -> str:
    """The findings over merged models; see `leading` and `chosen`."""
    return bullets((leading(mean, source), chosen(lost, whole, source)))
