"""How fast optimizers find Lambda: loss on all inputs by passes, inputs read and seconds."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.studies.input_shifts import sample_inputs, seeded
from divmerge_book.studies.predictions import scored, with_experts
from divmerge_book.studies.protocol import COLUMNS, divergence_sum
from divmerge_book.studies.study import study
from divmerge_core.divergences import js
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import OPTIMIZERS, Step, fit_coefficients
from divmerge_core.merging.merged_model import expert_logits
from divmerge_core.merging.problem import MergeProblem, Pairs

ANNEALED_LR = 0.1  # few steps have to go as far
POINTS = 20  # of Adam's trajectory
FIT = ["tasks", "grouping", "optimizer"]  # what distinguishes fits: tasks is their number


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
            point = {"step": step.number, "read": self.before if self.ahead else self.read}
            point |= {"seconds": time.perf_counter() - self.start, "coeffs": step.coeffs}
            self.points.append(point)
        self.before = self.read


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
    """One fit: its points (step, passes, inputs per task, seconds, loss), its end, predictions.

    pool: inputs per task that it sees. adam: steps of Adam; passes: of the others. unseen: the loss
    on as many other inputs at the end; then: where the loss first meets `target`, or at the end.
    The loss is the mean over all inputs. Passes are forward-backward passes: steps of Adam on one
    batch of every task; passes over all inputs of the others.
    """
    part = experiment.select(subset)
    drawn = sample_inputs(part.problem.batches, 2 * pool, seeded(seed))
    problem, unseen = (
        replace(part.problem, batches=[own[half::2] for own in drawn]) for half in (0, 1)
    )
    vectors, targets = problem.vectors, expert_logits(problem)
    longest = max(map(len, problem.batches))
    options = {
        "adam": {"epochs": max(1, adam // longest)},
        "annealed_adam": {"epochs": max(1, passes // longest), "lr": ANNEALED_LR},
    }.get(optimizer, {"epochs": passes})
    every = sum(len(batch.weight) for own in problem.batches for batch in own)
    stochastic = optimizer.endswith("adam")
    stride = max(1, options["epochs"] * longest // POINTS) if stochastic else 1
    recorder = Recorder(stride, stochastic)
    coefficients = Coefficients(vectors.layout, len(subset), grouping=grouping)
    options |= {"targets": targets, "callback": recorder, "progress": False, "seed": seed}
    counted = recorder.counted(problem)
    flat = fit_coefficients(counted, coefficients, js, optimizer=optimizer, **options).detach()
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


def unfolded(fits: pd.DataFrame, labels: Sequence[str], column: str) -> pd.DataFrame:
    """A row per record of a column of lists of records, with the fit's labels."""
    long = fits[[*labels, column]].explode(column, ignore_index=True)
    return long[list(labels)].join(pd.DataFrame(list(long[column])))


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

    Courses: FIT and the points of `fit_trajectory`. Ends: FIT, start, target (Adam's last loss),
    reached (the lowest loss), passes, read and seconds when the target was met (or missing), then,
    unseen. Answers: predictions by tasks and grouping, the method is the optimizer, Adam first.
    """
    parts, experiments = [], {seed: experiment}
    fixed = {"pool": pool, "adam": adam, "passes": passes}
    for job in [{"subset": list(s), "grouping": g} for s in subsets for g in groupings]:
        adam_alone = [{**job, "optimizer": "adam", "target": None}]
        first = study(fit_trajectory, experiments, adam_alone, **fixed)
        job["target"] = first.points[0][-1]["loss"]
        jobs = [{**job, "optimizer": name} for name in OPTIMIZERS if name != "adam"]
        rest = study(fit_trajectory, experiments, jobs, **fixed)
        parts.append(pd.concat([first.assign(target=job["target"]), rest]))
    fits = pd.concat(parts, ignore_index=True)
    fits = fits.assign(tasks=fits.subset.map(len), method=fits.optimizer)
    courses = unfolded(fits, [*FIT, "target"], "points")
    met = courses[courses.loss <= courses.target].groupby(FIT, sort=False)
    ends = courses.groupby(FIT, sort=False).agg(start=("loss", "first"), reached=("loss", "min"))
    ends = ends.join(met[["passes", "read", "seconds"]].first()).reset_index()
    ends = ends.merge(fits[[*FIT, "target", "then", "unseen"]], on=FIT, validate="1:1")
    rows = unfolded(fits, ["tasks", "grouping", "method", "seed"], "rows")
    answers = with_experts(rows, experiments, ["tasks", "grouping"])
    return {"courses": courses.drop(columns="target"), "ends": ends, "answers": answers}


def with_scores(measured: ResultTable) -> ResultTable:
    """The run with the scores of its answers, and differences from Adam's, beside its ends."""
    done = scored(measured, COLUMNS)
    if "answers" not in done.tables:
        return done
    answers = done["answers"].drop(columns="method")
    ends = done["ends"].merge(answers, on=FIT, validate="1:1")
    return replace(done, tables={**done.tables, "ends": ends})
