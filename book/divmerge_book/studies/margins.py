"""Kept margins: what is left of every expert's lead over the majority class of its test rows."""

from collections.abc import Sequence

import pandas as pd

from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.report import MARGIN


def majorities(tasks: Sequence[str], rows: int) -> pd.Series:
    """By task: the share of the majority class among the first `rows` test rows, 0 to 1.

    What a constant prediction gets right on the rows that `bench.exam` takes.
    """
    shares = {}
    for task in tasks:
        labels = TASKS[task].load("test")["label"][:rows]
        shares[task] = max(map(labels.count, set(labels))) / len(labels)
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
    counts = lead >= MARGIN
    return table.assign(
        ratio=table.accuracy / table.expert,
        kept_margin=((table.accuracy - floor) / lead).where(counts),
        below=(table.accuracy < floor).astype(float).where(counts),
    )


LISTS = {"accuracies": "accuracy", "experts": "expert", "majorities": "majority"}


def of_lists(table: pd.DataFrame, tasks: Sequence[Sequence[str]]) -> pd.DataFrame:
    """The rows with kept_margin (mean over tasks) and below (how many tasks).

    table: the columns LISTS hold a number for each of a row's `tasks`, or nothing. A table without
    them, as stored before they were, comes back as it is.
    """
    if not set(LISTS) <= set(table):
        return table
    rows = table.reset_index(drop=True).assign(task=list(tasks))
    some = rows[rows.accuracies.notna()]
    long = some.explode(["task", *LISTS]).drop(columns=["accuracy"], errors="ignore")
    long = long.rename(columns=LISTS).astype(dict.fromkeys(LISTS.values(), float))
    groups = scored(long).groupby(level=0)
    found = {"kept_margin": groups.kept_margin.mean(), "below": groups.below.sum()}
    whole = pd.DataFrame(found).reindex(rows.index)
    return table.assign(**{name: whole[name].to_numpy() for name in found})
