"""Accuracy against the number of merged tasks: the subsets, the merges, and their predictions.

Every row of a table is one merged model on one of its tasks: which test rows it gets right, and the
divergence of its answers from the expert's.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.benchmark import check_fit_for
from divmerge_book.evaluation.experiment import SIZES, Experiment, Size
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, search
from divmerge_book.interference.behaviour import expert_logits
from divmerge_book.interference.weights import cosine, sign_conflict
from divmerge_book.studies.sizes import settings
from divmerge_book.studies.study import Experiments, study
from divmerge_core.divergences import js
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import Merged

Subset = tuple[str, ...]
References = Mapping[str, Tensor]  # every task's expert's logits [B, V] on its test rows
JOIN = "+"  # between the tasks of a subset
EXPERT, MAJORITY = "expert", "commonest answer"  # references, as stored tables name them
FIXED = 0.3  # the scale at which all subsets are merged: task arithmetic's published one


def settings_of(size: str) -> tuple[Size, SimpleNamespace]:
    """Rows, recipe and budget of a size, and how much it runs; `full` has `default`'s rows."""
    chosen = settings("scaling", size)
    rows = SIZES["default" if size == "full" else size]
    return replace(rows, candidates=chosen.budget), chosen


def subsets_of(
    tasks: Sequence[str], count: int, *, whole: Sequence[int] = (), seed: int = 0
) -> list[Subset]:
    """`count` random subsets of every number of tasks from 2 on, or all where there are no more.

    By number of tasks, in random order within a number, in the order of the tasks within a subset.
    whole: numbers of tasks of which all are wanted; -1 is one less than there are. Raises
    ValueError for fewer than two tasks or no subset.
    """
    if len(tasks) < 2 or count < 1:
        raise ValueError(
            f"give two tasks or more and one subset or more, got {list(tasks)} and {count}"
        )
    found, wanted = [], {number if number > 0 else len(tasks) + number for number in whole}
    for number in range(2, len(tasks) + 1):
        every = list(combinations(tasks, number))
        few = len(every) if number in wanted else min(count, len(every))
        found += random.Random(f"{seed} {number}").sample(every, few)
    return found


def first_of_each(subsets: Sequence[Subset], count: int) -> list[Subset]:
    """The first `count` subsets of every number of tasks."""
    sizes = [len(subset) for subset in subsets]
    return [s for n, s in enumerate(subsets) if sizes[:n].count(len(s)) < count]


def plan(
    tasks: Sequence[str], chosen: SimpleNamespace
) -> tuple[list[Subset], list[Subset], list[Subset]]:
    """The subsets that a size merges: by every method, over fixed scales, and at one fixed scale.

    The last are single tasks and all subsets, or only the first ones where the size asks for fewer.
    Raises ValueError for a method that is unknown or does not merge every number of tasks.
    """
    main = subsets_of(tasks, chosen.subsets, whole=chosen.whole)
    for subset in first_of_each(main, 1):
        check_fit_for(chosen.methods, [subset], {})
    every = subsets_of(tasks, 1, whole=range(2, len(tasks) + 1)) if chosen.every else main
    return main, first_of_each(main, chosen.subsets), [(task,) for task in tasks] + every


def packed(right: Bool[Tensor, " B"]) -> str:
    """Which rows are right, as a hexadecimal number: a leading 1, then a bit per row."""
    return f"{int('1' + ''.join('01'[bit] for bit in right.tolist()), 2):x}"


def unpacked(text: str) -> list[bool]:
    """The inverse of `packed`."""
    return [bit == "1" for bit in f"{int(text, 16):b}"[1:]]


def references(experiment: Experiment) -> References:
    """Every expert's logits on its own test rows."""
    problem, batches = experiment.problem, [split.batches for split in experiment.test]
    return dict(zip(problem.vectors.tasks, expert_logits(problem, batches), strict=True))


@torch.no_grad()
def judged(experiment: Experiment, merged: Merged, experts: References) -> list[dict]:
    """A row per task: `right`, packed, and `js` to the expert, nats, mean over test rows."""
    problem, rows = experiment.problem, []
    for number, (task, split) in enumerate(
        zip(problem.vectors.tasks, experiment.test, strict=True)
    ):
        logits = torch.cat([problem.logits_of(merged, number, batch) for batch in split.batches])
        right = packed(logits.argmax(-1) == split.gold)
        far = js(experts[task], logits).double().mean().item()
        rows.append({"task": task, "right": right, "js": round(far, 5)})
    return rows


def reference_rows(experiment: Experiment, experts: References) -> list[dict]:
    """Every expert on its own task, and the rows on which the majority class is right."""
    rows = []
    for task, split in zip(experiment.problem.vectors.tasks, experiment.test, strict=True):
        common = split.gold.bincount().argmax()
        for name, answers in ((EXPERT, experts[task].argmax(-1)), (MAJORITY, common)):
            right = packed(answers == split.gold)
            rows.append({"method": name, "subset": task, "task": task, "right": right})
    return rows


def merge_and_judge(
    experiment: Experiment,
    *,
    experts: References,
    seed: int,
    method: str,
    subset: Sequence[str],
    options: dict,
    **labels: object,
) -> list[dict]:
    """One merge's rows, with every task's mean coefficient over groups where a fit found them."""
    chosen = experiment.select(subset)
    made = Merges(chosen, method)(options)
    rows = [{**row, "subset": JOIN.join(subset)} for row in judged(chosen, made.merged, experts)]
    for row, own in zip(rows, made.fit["coefficients"] if made.fit else [], strict=False):
        row["coefficient"] = round(sum(own) / len(own), 5)
    return rows


def scaling(
    experiments: Experiments,
    subsets: Sequence[Subset],
    *,
    methods: Sequence[str],
    size: Size,
    repeated: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every method on the same subsets: its answers, and the options that were found.

    The first seed merges all subsets, each other seed the first `repeated` of every T. Options are
    found once per method and T, on validation rows of the first seed, on the first subset of that
    T. Answers: seed, method, subset, task, right (`unpacked` reads it), js (nats), coefficient
    (mean over groups, where fitted); the subset of experts and of the majority class is their task.
    Found: method, T, options, tried.
    """
    first, few = next(iter(experiments)), first_of_each(subsets, repeated)
    best, found, answers = {}, [], []
    for subset in tqdm(first_of_each(subsets, 1), "options", leave=False):
        chosen = experiments[first].select(subset)
        for method in methods:
            tried = candidates(method, size, first, {}, chosen.problem)
            best[method, len(subset)] = number = search(Merges(chosen, method), tried).best
            options = {name: value for name, value in tried[number].items() if name != "seed"}
            named = {"method": method, "T": len(subset), "options": str(options)}
            found.append({**named, "tried": len(tried)})
    for seed, experiment in experiments.items():
        experts, jobs = references(experiment), []
        answers.append(pd.DataFrame(reference_rows(experiment, experts)).assign(seed=seed))
        for subset in subsets if seed == first else few:
            problem = experiment.problem.select(subset)
            for method in methods:
                tried = candidates(method, size, seed, {}, problem)
                options = tried[best[method, len(subset)]]
                jobs.append({"method": method, "subset": list(subset), "options": options})
        measure = partial(merge_and_judge, experts=experts)
        answers.append(study(measure, {seed: experiment}, jobs, method="method"))
    answers.sort(key=lambda table: "options" in table)  # references first
    columns = ["seed", "method", "subset", "task", "right", "js", "coefficient"]
    return pd.concat(answers, ignore_index=True).reindex(columns=columns), pd.DataFrame(found)


def fixed(
    experiments: Experiments, subsets: Sequence[Subset], scales: Sequence[float | None]
) -> pd.DataFrame:
    """Sums of task vectors with the same coefficient for every subset, whatever its size.

    None among the scales is 1/T: the average. Columns: seed, subset (also of one task), task,
    scale, fixed (False for the average), right, js.
    """
    jobs = []
    for subset in subsets:
        for scale in scales:
            share = 1 / len(subset) if scale is None else scale
            job = {"method": "task_arithmetic", "subset": list(subset), "options": {"scale": share}}
            jobs.append({**job, "scale": share, "fixed": scale is not None})
    tables = []
    for seed, experiment in experiments.items():
        measure = partial(merge_and_judge, experts=references(experiment))
        tables.append(study(measure, {seed: experiment}, jobs, method="task_arithmetic"))
    return pd.concat(tables)[["seed", "subset", "task", "scale", "fixed", "right", "js"]]


def geometry(experiment: Experiment) -> pd.DataFrame:
    """Every two task vectors: task, other, inner, cosine, conflict.

    inner: product, in squared parameter units; on the diagonal the squared length. conflict: share
    of parameters with opposite signs.
    """
    deltas, tasks = dense(experiment.problem.vectors.deltas), experiment.problem.vectors.tasks
    lengths = deltas.square().sum(dim=1).sqrt()  # `norm` loses digits over millions of numbers
    angles = cosine(deltas)
    found = {"inner": angles * torch.outer(lengths, lengths), "cosine": angles}
    found["conflict"] = sign_conflict(deltas)
    pairs = pd.MultiIndex.from_product([tasks, tasks], names=["task", "other"])
    columns = {name: square.flatten().tolist() for name, square in found.items()}
    return pd.DataFrame(columns, pairs).reset_index()
