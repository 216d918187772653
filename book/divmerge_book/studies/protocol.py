"""What the paper leaves open: each setting changed alone, with paired intervals.

The default is the paper's Algorithm 1: Adam from 1/T with step size 0.01, four passes, Jensen-
Shannon divergence. Coefficients are fitted without labels and scored on test rows, once. Tables are
predictions, see `predictions.packed`; a label `tasks` is the number of tasks.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pandas as pd

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.studies.predictions import with_experts
from divmerge_book.studies.study import study
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.methods import METHODS

DEFAULT = "default"
COLUMNS: Mapping[str, tuple[str, ...]] = {  # by stored table: what its methods say
    **{"changed": ("setting", "value"), "start": ("setting", "value")},
    **{"kinds": ("grouping", "coefficients"), "read": ("reading", "inputs")},
    **{"needed": ("inputs",), "wrong": ("kind", "share"), "answers": ("optimizer",)},
}


def rows_needed(settings: SimpleNamespace) -> int:
    """Unlabelled inputs per task that the studies of a size draw from."""
    return max(settings.inputs, 2 * settings.published, 2 * settings.pool, *settings.counts)


def num_tasks(experiments: Mapping[int, Experiment]) -> int:
    """The number of tasks that every experiment merges."""
    return len(next(iter(experiments.values())).problem.vectors.tasks)


def divmerge(
    experiment: Experiment, *, seed: int, options: Mapping, **labels: object
) -> pd.DataFrame:
    """Test predictions of DivMerge with these options."""
    flat = METHODS["divmerge"](experiment.problem, progress=False, seed=seed, **options)
    return evaluate(experiment.problem, flat, experiment.test)


def predicted(
    experiments: Mapping[int, Experiment], jobs: Sequence[Mapping], labels: Sequence[str]
) -> pd.DataFrame:
    """Predictions of DivMerge and of the experts: jobs hold a method, labels, and options."""
    rows = study(divmerge, experiments, jobs, method="divmerge")
    rows["tasks"] = num_tasks(experiments)
    return with_experts(rows, experiments, [*labels, "tasks"])


def variants(grid: Mapping[str, Sequence], num_tasks: int) -> dict[str, dict]:
    """Options of the default and of every change of one setting, by `setting=value`.

    A start that is 1/T anyway is left out.
    """
    changes = {
        f"{setting}={value}": {setting: value}
        for setting, values in grid.items()
        for value in values
        if setting != "init" or abs(value - 1 / num_tasks) > 1e-9
    }
    return {DEFAULT: {}, **changes}


def ablation(
    experiments: Mapping[int, Experiment],
    grid: Mapping[str, Sequence],
    *,
    groupings: Sequence[str],
    inputs: int,
) -> pd.DataFrame:
    """DivMerge with one setting changed at a time: the method is `default` or `setting=value`.

    experiments: by seed, of the same tasks. inputs: per task. Labels: grouping, tasks.
    """
    jobs = [
        {"grouping": g, "method": name, "options": {"grouping": g, "inputs": inputs, **change}}
        for g in groupings
        for name, change in variants(grid, num_tasks(experiments)).items()
    ]
    return predicted(experiments, jobs, ["grouping"])


def layers(
    experiments: Mapping[int, Experiment], groupings: Sequence[str], *, inputs: int
) -> pd.DataFrame:
    """What a layer may be: the method is `grouping=coefficients`. Label: tasks."""
    layout = next(iter(experiments.values())).problem.vectors.layout
    jobs = []
    for grouping in groupings:
        count = num_tasks(experiments) * len(groups_of(layout, grouping)[0])
        options = {"grouping": grouping, "inputs": inputs}
        jobs.append({"method": f"{grouping}={count}", "options": options})
    return predicted(experiments, jobs, [])


def readings(
    experiments: Mapping[int, Experiment], groupings: Sequence[str], *, published: int
) -> pd.DataFrame:
    """The paper's data set size read per task, and read in total, each with four epochs.

    published: the size of one coefficient per task; twice as many otherwise. The method is
    `reading=inputs` (per task). Labels: grouping, tasks.
    """
    jobs, number = [], num_tasks(experiments)
    for grouping in groupings:
        size = published if grouping == "task" else 2 * published
        for reading, inputs in {"per task": size, "in total": max(1, size // number)}.items():
            options = {"grouping": grouping, "inputs": inputs}
            jobs.append({"grouping": grouping, "method": f"{reading}={inputs}", "options": options})
    return predicted(experiments, jobs, ["grouping"])


def significant(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose paired interval of the ANP leaves 0 out."""
    return table[(table.from_low > 0) | (table.from_high < 0)]
