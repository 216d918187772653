"""How fast optimisers find Lambda: loss on all inputs by passes, inputs read and seconds."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.studies.learning_curve import divergence_sum, few
from divmerge_book.studies.predictions import scored
from divmerge_book.studies.protocol import COLUMNS, with_experts
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import OPTIMIZERS, Step, fit_coefficients
from divmerge_core.merging.merged_model import expert_logits
from divmerge_core.merging.problem import MergeProblem, Pairs

ANNEALED_LR = 0.1  # few steps have to go as far
POINTS = 20  # of Adam's course


@dataclass
class Log:
    """What a fit had read, how long it had taken and where it stood, at every few of its steps.

    ahead: whether a step has read its batch by the time it is seen, as Adam's has.
    """

    every: int
    ahead: bool
    read: int = 0
    before: int = 0
    start: float = field(default_factory=time.perf_counter)
    points: list[dict] = field(default_factory=list)

    def counted(self, problem: MergeProblem) -> MergeProblem:
        """The problem, with the inputs that its model reads counted in `read`."""

        def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
            self.read += sum(len(batch.weight) for _, batch in pairs)
            return problem.forward(parameters, pairs)

        return replace(problem, forward=forward)

    def __call__(self, step: Step) -> None:
        if step.loss is None or step.number % self.every == 0:
            took = time.perf_counter() - self.start
            read = self.before if self.ahead else self.read
            self.points.append(
                {"step": step.number, "read": read, "seconds": took, "coeffs": step.coeffs}
            )
        self.before = self.read


def plan(optimizer: str, adam: int, passes: int, batches: int) -> dict:
    """Options of one fit: `adam` steps of Adam, annealed or not `passes` of the others."""
    if optimizer == "adam":
        return {"epochs": max(1, adam // batches)}
    if optimizer == "annealed_adam":
        return {"epochs": max(1, passes // batches), "lr": ANNEALED_LR}
    return {"epochs": passes}


def course(
    bench: Experiment,
    problem: MergeProblem,
    unseen: MergeProblem,
    grouping: str,
    options: dict,
    target: float | None,
) -> dict:
    """One fit: its points (step, passes, inputs per task, seconds, loss), and its end.

    unseen: the problem with other inputs; its loss is worked out at the end, and where the loss
    first meets `target`.

    The loss is the mean over all inputs that the fit may see, whatever its steps look at. Passes
    are forward-backward passes: steps of Adam on one batch of every task; passes over all inputs of
    the others.
    """
    vectors, tasks = problem.vectors, len(problem.vectors.tasks)
    targets = expert_logits(problem)
    every = sum(len(batch.weight) for own in problem.batches for batch in own)
    stochastic = options["optimizer"].endswith("adam")
    steps = options["epochs"] * max(map(len, problem.batches))
    log = Log(max(1, steps // POINTS) if stochastic else 1, stochastic)
    coefficients = Coefficients(vectors.layout, tasks, grouping=grouping)
    flat = fit_coefficients(
        log.counted(problem),
        coefficients,
        DIVERGENCES["js"],
        targets=targets,
        watch=log,
        progress=False,
        **options,
    ).detach()
    points, then = [], None
    for point in log.points:
        merged = grouped_merge(
            vectors.base, vectors.deltas, point.pop("coeffs"), coefficients.segments
        )
        passes = point["step"] if stochastic else point["read"] / every
        read = point["read"] / tasks
        points.append(
            {**point, "read": read, "passes": passes}
            | {"loss": divergence_sum(problem, merged, targets)}
        )
        if then is None and target is not None and points[-1]["loss"] <= target:
            then = divergence_sum(unseen, merged)
    rows = evaluate(bench.problem, flat, bench.test).to_dict("records")
    last = divergence_sum(unseen, flat)
    then = last if target is None else then
    return {"points": points, "then": then, "unseen": last, "rows": rows}


def descents(
    bench: Experiment,
    subsets: Sequence[Sequence[str]],
    *,
    groupings: Sequence[str],
    pool: int,
    adam: int,
    passes: int,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Every optimiser on every subset of tasks and grouping: courses, ends, and answers.

    pool: inputs per task that all fits see. adam: steps of Adam; passes: of the others. Courses:
    tasks (their number), grouping, optimizer, passes, read (inputs per task), seconds, loss (nats,
    on all inputs). Ends: tasks, grouping, optimizer, start, target (Adam's last loss), reached (the
    lowest loss), passes, read and seconds when the target was met (missing where it was not), then
    (the loss on as many other inputs at that point), unseen (the same at the end). Answers:
    predictions by tasks and grouping, the method is the optimiser, Adam first.
    """
    courses, ends, answers = [], [], []
    jobs = [(subset, grouping) for subset in subsets for grouping in groupings]
    for subset, grouping in tqdm(jobs, "optimisers", leave=False):
        part = bench.select(subset)
        label = {"tasks": len(subset), "grouping": grouping}
        drawn = few(part.problem.batches, 2 * pool, torch.Generator().manual_seed(seed))
        seen, other = (
            replace(part.problem, batches=[own[half::2] for own in drawn]) for half in (0, 1)
        )
        found = {}
        for optimizer in tqdm(OPTIMIZERS, f"{len(subset)} tasks, per {grouping}", leave=False):
            options = plan(optimizer, adam, passes, max(map(len, seen.batches)))
            options |= {"optimizer": optimizer, "seed": seed}
            target = found["adam"]["points"][-1]["loss"] if found else None  # Adam is the first
            find = partial(course, part, seen, other, grouping, options, target)
            found[optimizer] = kept(part, find, "descent", grouping, pool, options, adam)
            courses += [{**label, "optimizer": optimizer, **p} for p in found[optimizer]["points"]]
        ends += [{**row, **label} for row in ended(found)]
        rows = [{**row, "method": n, "seed": seed} for n in found for row in found[n]["rows"]]
        answers.append(with_experts(rows, {seed: part}, **label))
    tables = {"courses": pd.DataFrame(courses), "ends": pd.DataFrame(ends)}
    return {**tables, "answers": pd.concat(answers, ignore_index=True)}


def ended(found: Mapping[str, dict]) -> list[dict]:
    """Where the fits of one problem ended, and when each met Adam's last loss."""
    target, rows = found["adam"]["points"][-1]["loss"], []
    for name, one in found.items():
        met = [point for point in one["points"] if point["loss"] <= target]
        first = {key: met[0][key] if met else None for key in ("passes", "read", "seconds")}
        lowest = min(point["loss"] for point in one["points"])
        row = {"optimizer": name, "start": one["points"][0]["loss"], "target": target}
        rows.append(
            row | {"reached": lowest, "then": one["then"], "unseen": one["unseen"], **first}
        )
    return rows


def with_scores(measured: ResultTable) -> ResultTable:
    """The run with the scores of its answers, and differences from Adam's, beside its ends."""
    done = scored(measured, COLUMNS)
    if "answers" not in done.tables:
        return done
    key = ["tasks", "grouping", "optimizer"]
    ends = done["ends"].merge(done["answers"].drop(columns="method"), on=key, validate="1:1")
    return replace(done, tables={**done.tables, "ends": ends})
