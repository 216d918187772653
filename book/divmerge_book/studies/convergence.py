"""How fast optimizers find Lambda: loss on all inputs by passes, inputs read and seconds."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.studies.learning_curve import divergence_sum, sample_inputs, seeded
from divmerge_book.studies.predictions import scored, with_experts
from divmerge_book.studies.protocol import COLUMNS
from divmerge_book.studies.study import study
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import OPTIMIZERS, Step, fit_coefficients
from divmerge_core.merging.merged_model import expert_logits
from divmerge_core.merging.problem import MergeProblem, Pairs

ANNEALED_LR = 0.1  # few steps have to go as far
POINTS = 20  # of Adam's trajectory


@dataclass
class Recorder:
    """Inputs read, seconds and coefficients at every few steps of a fit.

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


def budget(optimizer: str, adam: int, passes: int, batches: int) -> dict:
    """Options of one fit: `adam` steps of Adam, annealed or not `passes` of the others."""
    if optimizer == "adam":
        return {"epochs": max(1, adam // batches)}
    if optimizer == "annealed_adam":
        return {"epochs": max(1, passes // batches), "lr": ANNEALED_LR}
    return {"epochs": passes}


def fit_trajectory(
    experiment: Experiment,
    *,
    seed: int,
    subset: Sequence[str],
    grouping: str,
    optimizer: str,
    pool: int,
    adam: int,
    passes: int,
    target: float | None,
) -> list[dict]:
    """One fit: its points (step, passes, inputs per task, seconds, loss), and its end.

    pool: inputs per task that the fit sees. unseen: the loss on as many other inputs at the end;
    then: where the loss first meets `target`, the end without one.

    The loss is the mean over all inputs that the fit may see, whatever its steps look at. Passes
    are forward-backward passes: steps of Adam on one batch of every task; passes over all inputs of
    the others.
    """
    part = experiment.select(subset)
    drawn = sample_inputs(part.problem.batches, 2 * pool, seeded(seed))
    problem, unseen = (
        replace(part.problem, batches=[own[half::2] for own in drawn]) for half in (0, 1)
    )
    vectors, targets = problem.vectors, expert_logits(problem)
    longest = max(map(len, problem.batches))
    options = budget(optimizer, adam, passes, longest)
    every = sum(len(batch.weight) for own in problem.batches for batch in own)
    stochastic = optimizer.endswith("adam")
    stride = max(1, options["epochs"] * longest // POINTS) if stochastic else 1
    recorder = Recorder(stride, stochastic)
    coefficients = Coefficients(vectors.layout, len(subset), grouping=grouping)
    flat = fit_coefficients(
        recorder.counted(problem),
        coefficients,
        DIVERGENCES["js"],
        targets=targets,
        callback=recorder,
        progress=False,
        optimizer=optimizer,
        seed=seed,
        **options,
    ).detach()
    points, then = [], None
    for point in recorder.points:
        coeffs, read = point.pop("coeffs"), point["read"]
        merged = grouped_merge(vectors.base, vectors.deltas, coeffs, coefficients.segments)
        loss = divergence_sum(problem, merged, targets)
        passed = point["step"] if stochastic else read / every
        points.append({**point, "read": read / len(subset), "passes": passed, "loss": loss})
        if then is None and target is not None and loss <= target:
            then = divergence_sum(unseen, merged)
    last = divergence_sum(unseen, flat)
    rows = evaluate(part.problem, flat, part.test).to_dict("records")
    then = last if target is None else then
    return [{"points": points, "then": then, "unseen": last, "rows": rows}]


def convergence(
    experiment: Experiment,
    subsets: Sequence[Sequence[str]],
    *,
    groupings: Sequence[str],
    pool: int,
    adam: int,
    passes: int,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Every optimizer on every subset of tasks and grouping: courses, ends, and answers.

    pool: inputs per task that all fits see. adam: steps of Adam; passes: of the others. Courses:
    tasks (their number), grouping, optimizer, passes, read (inputs per task), seconds, loss (nats,
    on all inputs). Ends: tasks, grouping, optimizer, start, target (Adam's last loss), reached (the
    lowest loss), passes, read and seconds when the target was met (missing where it was not), then
    (the loss on as many other inputs at that point), unseen (the same at the end). Answers:
    predictions by tasks and grouping, the method is the optimizer, Adam first.
    """
    courses, ends, answers, experiments = [], [], [], {seed: experiment}
    fixed = {"pool": pool, "adam": adam, "passes": passes}
    others = [name for name in OPTIMIZERS if name != "adam"]
    for job in [{"subset": list(s), "grouping": g} for s in subsets for g in groupings]:
        adam_first = [{**job, "optimizer": "adam", "target": None}]
        first = study(fit_trajectory, experiments, adam_first, **fixed)
        target = first.points[0][-1]["loss"]
        jobs = [{**job, "optimizer": name, "target": target} for name in others]
        fits = pd.concat([first, study(fit_trajectory, experiments, jobs, **fixed)])
        label = {"tasks": len(job["subset"]), "grouping": job["grouping"]}
        for fit in fits.itertuples():
            named = {**label, "optimizer": fit.optimizer}
            courses += [{**named, **point} for point in fit.points]
            ends.append(
                {**named, **end(fit.points, target), "then": fit.then, "unseen": fit.unseen}
            )
            answers += [{**label, "method": fit.optimizer, "seed": seed, **row} for row in fit.rows]
    predictions = with_experts(pd.DataFrame(answers), experiments, ["tasks", "grouping"])
    tables = {"courses": pd.DataFrame(courses), "ends": pd.DataFrame(ends)}
    return {**tables, "answers": predictions}


def end(points: Sequence[Mapping], target: float) -> dict:
    """Where a fit started and ended, and when it first met the target."""
    met = next((point for point in points if point["loss"] <= target), {})
    first = {name: met.get(name) for name in ("passes", "read", "seconds")}
    reached = min(point["loss"] for point in points)
    return {"start": points[0]["loss"], "target": target, "reached": reached, **first}


def with_scores(measured: ResultTable) -> ResultTable:
    """The run with the scores of its answers, and differences from Adam's, beside its ends."""
    done = scored(measured, COLUMNS)
    if "answers" not in done.tables:
        return done
    key = ["tasks", "grouping", "optimizer"]
    ends = done["ends"].merge(done["answers"].drop(columns="method"), on=key, validate="1:1")
    return replace(done, tables={**done.tables, "ends": ends})
