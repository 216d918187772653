"""What the paper leaves open: each setting changed alone, with paired intervals; and the effort.

The default is the paper's Algorithm 1: Adam from 1/T with step size 0.01, four passes, Jensen-
Shannon divergence. Coefficients are fitted without labels and scored on test rows, once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import own_experts
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.studies.predictions import packed
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.methods import METHODS

DEFAULT = "default"
COLUMNS: Mapping[str, tuple[str, ...]] = {  # by stored table: what its methods say
    **{"changed": ("setting", "value"), "start": ("setting", "value")},
    **{"kinds": ("grouping", "coefficients"), "read": ("reading", "inputs")},
    **{"needed": ("inputs",), "wrong": ("kind", "share"), "answers": ("optimizer",)},
}
KNOBS: Mapping[str, tuple] = {
    "init": (0.0, 0.5, 1.0),
    "lr": (1e-3, 3e-2, 1e-1),
    "epochs": (1, 8),
}


@dataclass(frozen=True)
class Effort:
    """How much a size of the chapter runs.

    tasks: merged in the ablations; large: in the one on the start, where 1/T and 0.5 differ most.
    inputs: per task of the default. published: 200, the paper's data set size of one coefficient
    per task. steps: of the fits on few or wrong inputs. counts: of inputs. shares: of wrong ones.
    several: numbers of tasks in the race of optimisers, which all see `pool` inputs a task; adam:
    steps of Adam; passes: of the others. rows: test rows a task.
    """

    tasks: int
    large: int
    inputs: int
    published: int
    steps: int
    knobs: Mapping[str, tuple]
    groupings: tuple[str, ...]
    counts: tuple[int, ...]
    shares: tuple[float, ...]
    several: tuple[int, ...]
    pool: int
    adam: int
    passes: int
    rows: int

    @property
    def merge_rows(self) -> int:
        """Unlabelled inputs per task that the studies draw from."""
        return max(self.inputs, 2 * self.published, 2 * self.pool, *self.counts)


EFFORTS: Mapping[str, Effort] = {
    "smoke": Effort(
        tasks=2,
        large=3,
        inputs=8,
        published=8,
        steps=4,
        knobs={"init": (0.0,), "lr": (1e-1,), "epochs": (1,)},
        groupings=("task", "layer"),
        counts=(0, 4),
        shares=(1.0,),
        several=(2,),
        pool=8,
        adam=10,
        passes=4,
        rows=40,
    ),
    "default": Effort(
        tasks=2,
        large=4,
        inputs=16,
        published=16,
        steps=16,
        knobs={"init": (0.0, 1.0), "lr": (1e-1,), "epochs": (1,)},
        groupings=("task", "layer"),
        counts=(0, 1, 4, 16),
        shares=(0.5, 1.0),
        several=(2,),
        pool=16,
        adam=60,
        passes=12,
        rows=100,
    ),
    "full": Effort(
        tasks=4,
        large=8,
        inputs=32,
        published=200,
        steps=32,
        knobs=KNOBS,
        groupings=("task", "layer"),
        counts=(0, 1, 4, 16, 100, 400),
        shares=(0.5, 1.0),
        several=(2, 8),
        pool=16,
        adam=400,
        passes=40,
        rows=300,
    ),
}


def answered(
    bench: Experiment, what: Sequence, fit: Callable[[], Float[Tensor, " N"]]
) -> list[dict]:
    """A merged model's answers on the test rows, from the cache or found now.

    what: all that decides the fit, beside the bench and the code.
    """

    def find() -> list[dict]:
        return evaluate(bench.problem, fit(), bench.test).to_dict("records")

    return kept(bench, find, "protocol", *what)


def experts_answers(bench: Experiment) -> list[dict]:
    """Every expert's answers on its own task's test rows."""

    def find() -> list[dict]:
        return own_experts(bench, bench.test).to_dict("records")

    return kept(bench, find, "protocol", "experts")


def with_experts(
    rows: Sequence[Mapping], benches: Mapping[int, Experiment], **labels: object
) -> pd.DataFrame:
    """The rows and those of the experts under these labels, as `packed` keeps them."""
    alone = [
        {**row, "method": "expert", "seed": seed}
        for seed, bench in benches.items()
        for row in experts_answers(bench)
    ]
    return packed({**labels, **row} for row in [*rows, *alone])


def with_options(bench: Experiment, seed: int, **options: object) -> list[dict]:
    """The answers of DivMerge with these options."""
    options = {"seed": seed, **options}
    return answered(
        bench,
        ["options", options],
        lambda: METHODS["divmerge"](bench.problem, progress=False, **options),
    )


def variants(knobs: Mapping[str, Sequence], num_tasks: int) -> dict[str, dict]:
    """Options of the default and of every change of one setting, by `setting=value`.

    A start that is 1/T anyway is left out.
    """
    found: dict[str, dict] = {DEFAULT: {}}
    for knob, values in knobs.items():
        for value in values:
            if knob != "init" or abs(value - 1 / num_tasks) > 1e-9:
                found[f"{knob}={value}"] = {knob: value}
    return found


def ablation(
    benches: Mapping[int, Experiment],
    knobs: Mapping[str, Sequence],
    *,
    groupings: Sequence[str],
    inputs: int,
) -> pd.DataFrame:
    """DivMerge with one setting changed at a time, against its default at the same grouping.

    benches: by seed, of the same tasks; inputs: per task. Predictions, see `packed`: by tasks
    (their number) and grouping, the method is `default` or `setting=value`.
    """
    number, parts = num_tasks(benches), []
    for grouping in groupings:
        rows: list[dict] = []
        changes = variants(knobs, number)
        jobs = [(seed, label) for seed in benches for label in changes]
        for seed, label in tqdm(jobs, f"settings, per {grouping}", leave=False):
            options = {"grouping": grouping, "inputs": inputs, **changes[label]}
            found = with_options(benches[seed], seed, **options)
            rows += [{**row, "method": label, "seed": seed} for row in found]
        parts.append(with_experts(rows, benches, grouping=grouping, tasks=number))
    return pd.concat(parts, ignore_index=True)


def significant(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose paired interval of the ANP leaves 0 out."""
    return table[(table.from_low > 0) | (table.from_high < 0)]


def layers(
    benches: Mapping[int, Experiment], groupings: Sequence[str], *, inputs: int
) -> pd.DataFrame:
    """What a layer may be: predictions of DivMerge; the method is `grouping=coefficients`."""
    rows: list[dict] = []
    layout, number = next(iter(benches.values())).problem.vectors.layout, num_tasks(benches)
    for seed, bench in benches.items():
        for grouping in groupings:
            method = f"{grouping}={number * len(groups_of(layout, grouping)[0])}"
            found = with_options(bench, seed, grouping=grouping, inputs=inputs)
            rows += [{**row, "method": method, "seed": seed} for row in found]
    return with_experts(rows, benches, tasks=number)


def readings(
    benches: Mapping[int, Experiment], groupings: Sequence[str], *, published: int
) -> pd.DataFrame:
    """The paper's data set size read per task, and read in total, each with four epochs.

    published: the size of one coefficient per task; twice as many otherwise. Predictions by tasks
    and grouping; the method is `reading=inputs` (per task).
    """
    number, parts = num_tasks(benches), []
    for grouping in groupings:
        size = published if grouping == "task" else 2 * published
        inputs = {"per task": size, "in total": max(1, size // number)}
        rows: list[dict] = []
        jobs = [(seed, reading) for seed in benches for reading in inputs]
        for seed, reading in tqdm(jobs, f"data set size, per {grouping}", leave=False):
            found = with_options(benches[seed], seed, grouping=grouping, inputs=inputs[reading])
            method = f"{reading}={inputs[reading]}"
            rows += [{**row, "method": method, "seed": seed} for row in found]
        parts.append(with_experts(rows, benches, grouping=grouping, tasks=number))
    return pd.concat(parts, ignore_index=True)


def num_tasks(benches: Mapping[int, Experiment]) -> int:
    """The number of tasks that every bench merges."""
    return len(next(iter(benches.values())).problem.vectors.tasks)
