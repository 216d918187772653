"""What our own tables say of divergence and success, in sentences."""

import pandas as pd

from divmerge_book.figures.styles import CRITERIA
from divmerge_book.findings import bullets, listed, scores
from divmerge_book.studies.model_selection import AMONG
from divmerge_book.studies.random_merges import MEASURES, SAMPLERS


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
        f"below the majority class of the test rows; all of them on: {listed(always, 'no task')}."
    )


def own_point(found: pd.DataFrame, source: str) -> str:
    """Mean rank correlations over experts with and without the task's own.

    found: by measure; columns `with own`, `own alone` and `without`.
    """
    lines = [
        f"{name}: {row['with own']:.2f} with the own expert, {row['without']:.2f} without it; the "
        f"own expert alone gives {row['own alone']:.2f}"
        for name, row in found.iterrows()
    ]
    return f"Means over tasks and seeds of rank correlations in {source}:\n\n{bullets(lines)}"


def ranked(mean: pd.DataFrame, source: str) -> str:
    """By draw and selection: every criterion's rank correlation with a task's accuracy.

    mean: the second table of `judging.over_models`.
    """
    pick = mean[(mean.how == "spearman") & (mean.goal == "task")]
    lines = []
    for (kind, among), rows in pick.groupby(["draws", "among"], sort=False):
        one = rows.set_index("criterion")
        said = ", ".join(f"{CRITERIA[name][0]} {one.value[name]:.2f}" for name in one.index)
        lead = one.loc["reverse_kl"]
        lines.append(
            f"**{SAMPLERS.facts[kind]['label']}, {among}**: {said}. Reverse KL minus JS: "
            f"{lead.lead:+.2f} [{lead.lead_low:+.2f}, {lead.lead_high:+.2f}]"
        )
    return f"Rank correlations with a task's accuracy in {source}:\n\n{bullets(lines)}"


def narrowed(mean: pd.DataFrame, source: str) -> str:
    """Which criteria correlate less among the best models than among all, with a task's accuracy.

    mean: the second table of `judging.over_models`; models drawn per task.
    """
    pick = mean[(mean.how == "spearman") & (mean.goal == "task") & (mean.draws == "task")]
    wide = pick.pivot(index="criterion", columns="among", values="value")
    shares = [name for name in AMONG if name in wide and name != "all"]
    if not shares:
        return f"In {source} there are too few models to look at the best of them alone."
    last = shares[-1]
    lower = [CRITERIA[name][0] for name in wide.index if wide[last][name] < wide["all"][name]]
    higher = [CRITERIA[name][0] for name in wide.index if wide[last][name] >= wide["all"][name]]
    return (
        f"In {source}, for coefficients drawn per task, the correlation among the {last} is lower "
        f"than among all models for {listed(lower)}, and not lower for {listed(higher)}."
    )


def by_task(of: pd.DataFrame, rows: int, source: str) -> str:
    """On how many tasks JS ranks models better than every other measure, and where it is worst.

    of: rows of the first table of `judging.over_models`. rows: labelled validation rows per task.
    """
    by = of.groupby(["criterion", "task"]).value.mean().unstack("criterion")
    won = [f"{CRITERIA[n][0]} on {(by.js > by[n]).sum()}" for n in MEASURES if n != "js"]
    worst = by.js.idxmin()
    return (
        f"In {source} JS is above {listed(won)} of {len(by)} tasks. Its lowest value is "
        f"{by.js.min():.2f}, on `{worst}`, where {rows} labels have {by.validation[worst]:.2f}."
    )


def leading(mean: pd.DataFrame, source: str) -> str:
    """Which label-free measure has the highest correlation, in how many draws and selections.

    mean: the second table of `judging.over_models`.
    """
    pick = mean[(mean.how == "spearman") & mean.criterion.isin(MEASURES)]
    parts = []
    goals = {"task": "a task's accuracy", "sum": "the ANP", "kept_margin": "the kept margin"}
    for goal, words in goals.items():
        if goal not in set(pick.goal):
            continue
        cells = pick[pick.goal == goal].pivot_table(
            index=["draws", "among"], columns="criterion", values="value"
        )
        first = cells.idxmax(axis=1).value_counts()
        above = int((cells.js > cells.entropy).sum())
        said = [f"{CRITERIA[name][0]} in {count}" for name, count in first.items()]
        parts.append(
            f"with {words}, {listed(said)} of {len(cells)} rows (JS above entropy in {above})"
        )
    return (
        f"In {source} the label-free measure with the highest rank correlation is, "
        f"{'; '.join(parts)}."
    )


def chosen(lost: pd.DataFrame, whole: pd.DataFrame, source: str) -> str:
    """Test scores of the model that every criterion chooses among those drawn per task.

    lost: of `model_selection.selection_regret`; whole: of `model_selection.model_scores`.
    """
    task = lost[lost.draws == "task"]
    seeds, said = whole[whole.draws == "task"].groupby("seed"), []
    for column, words in scores(task).items():
        ranked = task.sort_values(column, ascending=False)
        each = [
            f"{CRITERIA[n][0]} {v:.1f} %"
            for n, v in zip(ranked.criterion, ranked[column], strict=True)
        ]
        said.append(
            f"Test {words} of the one chosen by: {'; '.join(each)}; of a random one "
            f"{100 * seeds[column].mean().mean():.1f} %, of the best by test "
            f"{100 * seeds[column].max().mean():.1f} %"
        )
    return (
        f"In {source} there are {task.models.iloc[0]} models per seed with coefficients per task. "
        f"{'. '.join(said)}."
    )


def summary(mean: pd.DataFrame, lost: pd.DataFrame, whole: pd.DataFrame, source: str) -> str:
    """The findings over merged models; see `leading`, `narrowed` and `chosen`."""
    return bullets((leading(mean, source), narrowed(mean, source), chosen(lost, whole, source)))
