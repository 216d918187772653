"""The same search for every method on validation rows; the cost of each merge, its predictions.

A candidate is a dictionary of options from the method's registered `search`, published ones first.
Its merge is scored by the ANP on validation rows; the best is used.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd

from divmerge_book.evaluation.cache import cache_path, cached
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate, grades, majority_class
from divmerge_book.evaluation.profiling import Meter, peak_bytes, seconds
from divmerge_book.evaluation.report import MARGIN
from divmerge_book.evaluation.sizes import Size
from divmerge_core.merging.fit import Step
from divmerge_core.merging.problem import Diverged, Merged, MergeProblem
from divmerge_core.methods import METHODS, options_of, parse
from divmerge_core.methods.divmerge import limit


def shares(rows: pd.DataFrame) -> list[float]:
    """The accuracy, or the mean grade, of every row of a Report."""
    return [float(grades(row.predicted, row.gold).mean()) for row in rows.itertuples()]


def own_experts(experiment: Experiment, splits: Sequence, **labels: object) -> pd.DataFrame:
    """Every expert's predictions on its own task."""
    problem = experiment.problem
    parts = [
        evaluate(problem.select([task]), problem.vectors.expert(task), [split], **labels)
        for task, split in zip(problem.vectors.tasks, splits, strict=True)
    ]
    return pd.concat(parts, ignore_index=True)


def written_rows(
    experiment: Experiment, rows: Sequence[dict], model: Callable[[str], Merged]
) -> list[dict]:
    """The rows of a language suite answered by generation; of others none.

    model: the weights for a task. Free text was generated for `rows` already, and is taken from
    them.
    """
    found, splits = [], experiment.written
    for number, (row, split) in enumerate(zip(rows, splits, strict=True) if splits else ()):
        given = split.references is not None
        new = {} if given else split.predictions(experiment.problem, model(row["task"]), number)
        found.append({**row, **new})
    return found


def validation_scores(experiment: Experiment, merged: Merged) -> tuple[float, float]:
    """ANP and kept margin on validation rows, means over tasks.

    The kept margin is a mean over the tasks whose expert is at least MARGIN above the majority
    class of these rows, NaN where there is none. Raises ValueError where an expert gets none right.
    """
    own = partial(own_experts, experiment, experiment.validation)
    expert = np.array(cached(experiment, lambda: shares(own()), "experts on validation"))
    if not expert.all():
        raise ValueError(
            f"an expert gets no validation row right: {expert} for "
            f"{experiment.problem.vectors.tasks}; give it more rows or leave its task out"
        )
    rows = evaluate(experiment.problem, merged, experiment.validation)
    floor = np.array([majority_class(row.predicted, row.gold).mean() for row in rows.itertuples()])
    found, counted = np.array(shares(rows)), expert - floor >= MARGIN
    kept = ((found - floor)[counted] / (expert - floor)[counted]).mean() if any(counted) else np.nan
    return float((found / expert).mean()), float(kept)


def validation_anp(experiment: Experiment, merged: Merged) -> float:
    """The first of `validation_scores`, which a search maximises."""
    return validation_scores(experiment, merged)[0]


def candidates(
    spec: str, size: Size, seed: int, overrides: Mapping, problem: MergeProblem
) -> list[dict]:
    """The candidates of the search: the method's registered options, with length and seed.

    No more than the size's `candidates`. The size's `epochs` is the number of passes over inputs. A
    method that searches with a validation score itself has one candidate, its published options,
    and about as many calls of the score as the size's `calls`.
    """
    name, fixed = parse(spec)
    facts, allowed = METHODS.facts[name], options_of(name)
    own = {"epochs": size.epochs, "seed": seed, "inputs": size.inputs, "steps": size.steps}
    if "passes" in facts:  # the option that counts steps of one batch per task
        own[facts["passes"]] = size.epochs * max(map(len, problem.batches))
    if "calls" in facts:  # of the score, per step
        own["steps"] = max(1, size.calls // facts["calls"](len(problem.vectors.tasks)))
    own = {k: v for k, v in {**own, **overrides}.items() if k in allowed and v is not None}
    count = 1 if "calls" in facts else size.candidates
    found = [{**option, **fixed, **own} for option in (facts["search"] or ({},))[:count]]
    return [option for n, option in enumerate(found) if option not in found[:n]]


@dataclass
class Recorder:
    """A fit's trajectory: the loss of every step; at some, mean coefficients and validation ANP."""

    experiment: Experiment
    every: int  # steps between two points; 0 for none
    losses: list[float] = field(default_factory=list)
    trajectory: list[dict] = field(default_factory=list)
    last: Step | None = None

    @classmethod
    def of(cls, experiment: Experiment, name: str, options: Mapping, points: int) -> "Recorder":
        """A recorder of about so many points of a method's fit."""
        used = {**defaults(name), **options}
        seen = limit(experiment.problem, used["inputs"], used["grouping"]).batches
        steps = options["epochs"] * max(map(len, seen))
        return cls(experiment, max(1, steps // points) if points else 0)

    def __call__(self, step: Step) -> None:
        if step.loss is not None:
            self.losses.append(round(step.loss, 6))
        self.last = step
        if self.every and (step.loss is None or step.number % self.every == 0):
            anp = validation_anp(self.experiment, step.flat)
            mean = step.coeffs.mean(dim=1).tolist()  # [T], over groups
            self.trajectory.append({"step": step.number, "anp": anp, "coefficients": mean})

    def summary(self) -> dict:
        """The coefficients by task (or component) and group, the losses and the trajectory."""
        coefficients = [[round(value, 5) for value in row] for row in self.last.coeffs.tolist()]
        names = {"tasks": list(self.last.scaled), "groups": list(self.last.groups)}
        fit = {**names, "coefficients": coefficients}
        return fit | {"losses": self.losses, "course": self.trajectory}


def defaults(name: str) -> dict[str, object]:
    """A method's options as they are where none is given."""
    parameters = inspect.signature(METHODS[name]).parameters
    return {option: parameter.default for option, parameter in parameters.items()}


@dataclass(frozen=True)
class Made:
    """A merge, its cost, and the fit's trajectory where there is one."""

    merged: Merged
    cost: dict
    fit: dict | None


def run_method(experiment: Experiment, spec: str, options: Mapping, points: int = 0) -> Made:
    """Merge and measure the cost.

    The cost: seconds; peak_bytes above the problem; stored_bytes of the result; inputs, the number
    of unlabelled ones read; calls of the validation score. Where the experiment has a folder for
    unfinished fits, a killed one resumes, and its seconds count from there. Raises Diverged, with
    the method and its options.
    """
    name, _ = parse(spec)
    meter, given, taken = Meter(), {**options}, options_of(name)
    recorder = unfinished = None
    if "callback" in taken:
        recorder = given["callback"] = Recorder.of(experiment, name, options, points)
    if "score" in taken:
        given["score"] = meter.score(partial(validation_anp, experiment))
    if "checkpoint" in taken and experiment.unfinished is not None:
        key = cache_path(experiment, run_method, spec, options, method=spec).stem
        unfinished = given["checkpoint"] = experiment.unfinished / f"{key}.pt"
    device, found = experiment.problem.vectors.base.device, {}

    def merge() -> None:
        found["merged"] = METHODS[name](meter.problem(experiment.problem), **given)

    def timed() -> None:
        found["seconds"] = round(seconds(merge, device), 2)

    try:
        peak = peak_bytes(timed, device)
    except Diverged as error:
        raise Diverged(f"{spec} with {dict(options)}: {error}") from error
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    merged = found["merged"]
    cost = {"seconds": found["seconds"], "peak_bytes": peak, "stored_bytes": merged.nbytes}
    cost |= {"inputs": len(meter.seen), "calls": meter.calls}
    return Made(merged, cost, recorder and recorder.summary())


@dataclass
class Merges:
    """A method's merges in one experiment, each made on first use.

    Where the merge is the base plus `scale` times a change (the method's fact `linear` names that
    option), another scale takes no second merge.
    """

    experiment: Experiment
    spec: str
    points: int = 0
    made: list[tuple[dict, Made]] = field(default_factory=list)

    def __post_init__(self):
        self.name, _ = parse(self.spec)
        self.linear = METHODS.facts[self.name].get("linear")

    def __call__(self, options: dict) -> Made:
        for before, made in self.made:
            if before == options:
                return made
            if (ratio := self.ratio(before, options)) is not None:
                base = self.experiment.problem.vectors.base
                return replace(made, merged=base + ratio * (made.merged - base))
        made = run_method(self.experiment, self.spec, options, self.points)
        self.made.append((options, made))
        return made

    def ratio(self, before: dict, options: dict) -> float | None:
        """The wanted change as a multiple of the one before; None where it is no multiple."""
        old, new = ({**defaults(self.name), **one} for one in (before, options))
        scale, wanted = old.pop(self.linear, 0), new.pop(self.linear, 0)
        return wanted / scale if old == new and scale else None

    def forget(self, wanted: Sequence[dict]) -> None:
        """Drop merges other than the wanted ones, where no other scale can be derived from them."""
        if self.linear is None:
            self.made = [(options, made) for options, made in self.made if options in wanted]


@dataclass(frozen=True)
class Search:
    """A record per candidate (options; score or error), and the number of the best."""

    records: list[dict]
    best: int


def attempt(merges: Merges, options: dict) -> dict:
    """A candidate's `options` and `score`, its validation ANP; or its `error`, if it diverged."""
    try:
        merged = merges(options).merged
    except Diverged as error:
        return {"options": options, "error": str(error)}
    return {"options": options, "score": validation_anp(merges.experiment, merged)}


def search(merges: Merges, tried: Sequence[dict]) -> Search:
    """Score every candidate on validation rows; of equal ones the first is the best.

    The merges of the first (published) candidate and of the best stay in memory. A single candidate
    needs no score. Scores are cached. Raises Diverged where all candidates do.
    """
    if len(tried) == 1:
        return Search([{"options": tried[0]}], 0)
    records: list[dict] = []
    for options in tried:
        what = ("search", merges.spec, options)
        make = partial(attempt, merges, options)
        records.append(cached(merges.experiment, make, *what, method=merges.spec))
        best = max(range(len(records)), key=lambda n: records[n].get("score", -math.inf))
        merges.forget([tried[0], tried[best]])
    if "score" not in records[best]:
        cause = records[0]["error"]
        raise Diverged(f"{merges.spec}: every candidate diverged; the first: {cause}")
    return Search(records, best)


def outcome(merges: Merges, options: dict) -> dict:
    """A method's test predictions, `rows` and `written`, its cost and fit: cached or computed."""
    experiment, spec = merges.experiment, merges.spec

    def find() -> dict:
        made, parts = merges(options), []

        def answer() -> None:
            parts.append(evaluate(experiment.problem, made.merged, experiment.test))

        took = seconds(answer, experiment.problem.vectors.base.device)
        count = sum(split.rows for split in experiment.test)
        cost = {**made.cost, "answer_ms": round(1000 * took / count, 3)}  # per test row
        rows = parts[0].to_dict("records")
        written = written_rows(experiment, rows, lambda task: made.merged)
        return {"rows": rows, "written": written, "cost": cost, "fit": made.fit}

    return cached(experiment, find, "test", spec, options, merges.points, method=spec)
