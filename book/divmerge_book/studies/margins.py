"""Kept margins: what is left of every expert's lead over the majority class of its test rows."""

from collections.abc import Sequence

import pandas as pd

from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.report import MARGIN

LISTS = {"accuracies": "accuracy", "experts": "expert", "majorities": "majority"}


def majorities(tasks: Sequence[str], rows: int) -> pd.Series:
    """By task: the share of the majority class among the first `rows` test rows, 0 to 1."""
    labels = {task: pd.Series(TASKS[task].load("test")["label"][:rows]) for task in tasks}
    shares = {task: some.value_counts(normalize=True).max() for task, some in labels.items()}
    return pd.Series(shares, dtype=float)


def scored(table: pd.DataFrame, majority: pd.Series | None = None) -> pd.DataFrame:
    """The rows with ratio, kept_margin and below (1 where below the majority class, else 0).

    table: task, accuracy and expert (the same seed's expert's accuracy on the task); seed where
    there are several. majority: by task; None: the table's column. ratio: accuracy over the
    expert's. kept_margin: accuracy above the majority over the expert's, mean over seeds, above it;
    see {eq}`kept-margin`. The last two are NaN for a task that does not count: whose expert is less
    than MARGIN above the majority.
    """
    names = [name for name in ("seed", "task") if name in table]
    experts = table.drop_duplicates(names).groupby("task").expert.mean()
    floor = (table.majority if majority is None else table.task.map(majority)).astype(float)
    lead = table.task.map(experts).astype(float) - floor
    kept, below = (table.accuracy - floor) / lead, 1.0 * (table.accuracy < floor)
    counted = {"kept_margin": kept.where(lead >= MARGIN), "below": below.where(lead >= MARGIN)}
    return table.assign(ratio=table.accuracy / table.expert, **counted)


def of_lists(table: pd.DataFrame, tasks: Sequence[Sequence[str]]) -> pd.DataFrame:
    """The rows with kept_margin (mean over tasks) and below (how many tasks).

    table: the columns LISTS hold a number for each of a row's `tasks`, or nothing. A table without
    them, as stored before they were, comes back as it is.
    """
    if not set(LISTS) <= set(table):
        return table
    rows = table.reset_index(drop=True)[[*LISTS]].assign(task=list(tasks))
    long = rows[rows.accuracies.notna()].explode(["task", *LISTS]).rename(columns=LISTS)
    groups = scored(long.astype(dict.fromkeys(LISTS.values(), float))).groupby(level=0)
    found = groups.agg({"kept_margin": "mean", "below": "sum"}).reindex(rows.index)
    return table.assign(**{name: found[name].to_numpy() for name in found})
