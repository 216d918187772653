"""One search for every method, on validation rows; what each merge costs, and what it answers.

Every candidate is a dictionary of options from the method's registered `search`, published ones
first. Its merge is scored by the ANP on validation rows; the best is used.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
from torch import Tensor

from divmerge_book.evaluation.cache import cell, kept
from divmerge_book.evaluation.experiment import Experiment, Size
from divmerge_book.evaluation.metrics import AnySplit, commonest, evaluate, grades
from divmerge_book.evaluation.profiling import Meter, peak_bytes, seconds
from divmerge_book.evaluation.report import MARGIN
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.fit import Step
from divmerge_core.merging.problem import Diverged, Merged, MergeProblem
from divmerge_core.methods import METHODS, options_of, parse
from divmerge_core.methods.divmerge import limit


@dataclass
class Recorder:
    """A fit's course: its loss at every step, and coefficients and validation ANP now and then."""

    bench: Experiment
    points: int
    losses: list[float] = field(default_factory=list)
    course: list[dict] = field(default_factory=list)
    coeffs: Tensor | None = None
    every: int = 0

    def __call__(self, step: Step) -> None:
        if step.loss is not None:
            self.losses.append(round(step.loss, 6))
        self.coeffs = step.coeffs
        if self.points and (step.loss is None or step.number % self.every == 0):
            anp = validation_anp(self.bench, step.flat)
            mean = step.coeffs.mean(dim=1).tolist()  # [T], over groups
            self.course.append({"step": step.number, "anp": anp, "coefficients": mean})


@dataclass(frozen=True)
class Made:
    """A merge, its cost, and the fit's course where there is one."""

    merged: Merged
    cost: dict
    fit: dict | None


def shares(rows: pd.DataFrame) -> list[float]:
    """The share of right answers, or the mean grade, in every row of predictions."""
    return [float(grades(row.predicted, row.gold).mean()) for row in rows.itertuples()]


def own_experts(bench: Experiment, exams: Sequence[AnySplit], **labels: object) -> pd.DataFrame:
    """Every expert's answers on its own task."""
    parts = []
    for number, task in enumerate(bench.problem.vectors.tasks):
        alone = bench.problem.select([task])
        parts.append(evaluate(alone, bench.problem.vectors.expert(task), [exams[number]], **labels))
    return pd.concat(parts, ignore_index=True)


def validation_scores(bench: Experiment, merged: Merged) -> tuple[float, float]:
    """ANP and kept margin on validation rows, means over tasks.

    The kept margin is a mean over the tasks whose expert is at least MARGIN above the majority
    class of these rows, NaN where there is none. Raises ValueError where an expert gets none right.
    """
    experts = kept(
        bench, lambda: shares(own_experts(bench, bench.validation)), "experts on validation"
    )
    if not all(experts):
        raise ValueError(
            f"an expert gets no validation row right: {experts} for {bench.problem.vectors.tasks}; "
            "give it more training rows or leave its task out"
        )
    rows = evaluate(bench.problem, merged, bench.validation)
    floors = [commonest(row.predicted, row.gold).mean() for row in rows.itertuples()]
    found, expert, floor = map(np.array, (shares(rows), experts, floors))
    counted = expert - floor >= MARGIN
    leads = (found - floor)[counted] / (expert - floor)[counted]
    return float((found / expert).mean()), float(leads.mean()) if counted.any() else math.nan


def validation_anp(bench: Experiment, merged: Merged) -> float:
    """The first of `validation_scores`, which a search maximises."""
    return validation_scores(bench, merged)[0]


def candidates(
    spec: str, size: Size, seed: int, overrides: Mapping, problem: MergeProblem
) -> list[dict]:
    """What the search tries: the method's registered options, with length and seed filled in.

    No more than the size's `candidates`. Methods that learn from inputs pass over them as often
    as the size's `epochs` says. A method that itself searches with a validation score has one
    candidate, its published options, and about as many calls of the score as the size's `calls`.
    """
    name, fixed = parse(spec)
    facts, allowed = METHODS.facts[name], options_of(name)
    own = {"epochs": size.epochs, "seed": seed, "inputs": size.inputs, "steps": size.steps}
    if "passes" in facts:  # the option that counts steps of one batch per task
        own[facts["passes"]] = size.epochs * max(map(len, problem.batches))
    if "calls" in facts:  # of the score, per step
        own["steps"] = max(1, size.calls // facts["calls"](len(problem.vectors.tasks)))
    own = {key: value for key, value in {**own, **overrides}.items() if value is not None}
    own = {key: value for key, value in own.items() if key in allowed}
    count = 1 if "calls" in facts else size.candidates
    found = [{**option, **fixed, **own} for option in (facts["search"] or ({},))[:count]]
    return [option for n, option in enumerate(found) if option not in found[:n]]


def watched(bench: Experiment, name: str, options: Mapping, points: int) -> tuple[Recorder, str]:
    """A recorder for a fit of coefficients, and the fit's grouping."""
    default = inspect.signature(METHODS[name]).parameters["grouping"].default
    grouping = options.get("grouping", default)
    seen = limit(bench.problem, options.get("inputs"), grouping).batches
    steps = options["epochs"] * max(map(len, seen))
    return Recorder(bench, points, every=max(1, steps // max(1, points))), grouping


def told(recorder: Recorder, grouping: str) -> dict:
    """What a fit left behind: coefficients by task and group, losses, and its course."""
    vectors = recorder.bench.problem.vectors
    groups, _ = groups_of(vectors.layout, grouping)
    coefficients = [[round(value, 5) for value in row] for row in recorder.coeffs.tolist()]
    fit = {"tasks": list(vectors.tasks), "groups": list(groups), "coefficients": coefficients}
    return fit | {"losses": recorder.losses, "course": recorder.course}


def run_method(bench: Experiment, spec: str, options: Mapping, points: int = 0) -> Made:
    """Merge, with the cost noted.

    The cost: seconds; peak_bytes on top of the problem; stored_bytes of what comes out; inputs,
    how many unlabelled ones were looked at; calls of the validation score. Where the bench keeps
    unfinished fits, one that was killed goes on, and its seconds count from there. Raises Diverged,
    with the method and its options, where the merge ran off.
    """
    name, _ = parse(spec)
    meter, given, recorder = Meter(), {**options}, None
    if "watch" in options_of(name):
        recorder, grouping = watched(bench, name, options, points)
        given["watch"] = recorder
    if "score" in options_of(name):
        given["score"] = meter.score(partial(validation_anp, bench))
    unfinished = None
    if "checkpoint" in options_of(name) and bench.unfinished is not None:
        unfinished = given["checkpoint"] = (
            bench.unfinished / f"{cell(bench, run_method, spec, options, method=spec).stem}.pt"
        )
    device, held = bench.problem.vectors.base.device, []
    cost: dict[str, float] = {}

    def merge() -> None:
        held.append(METHODS[name](meter.problem(bench.problem), **given))

    def timed() -> None:
        cost["seconds"] = round(seconds(merge, device), 2)

    try:
        cost["peak_bytes"] = peak_bytes(timed, device)
    except Diverged as error:
        raise Diverged(f"{spec} with {dict(options)}: {error}") from error
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    merged = held.pop()
    cost |= {"stored_bytes": merged.nbytes, "inputs": len(meter.seen)}
    return Made(merged, cost | {"calls": meter.calls}, recorder and told(recorder, grouping))


@dataclass
class Merges:
    """A method's merges on one bench, made when first asked for.

    Where the method is the base plus `scale` times a change (its fact `linear` names that option),
    a second scale takes no second merge.
    """

    bench: Experiment
    spec: str
    points: int = 0
    made: list[tuple[dict, Made]] = field(default_factory=list)

    def __call__(self, options: dict) -> Made:
        for before, made in self.made:
            if before == options:
                return made
            if (ratio := self.ratio(before, options)) is not None:
                base = self.bench.problem.vectors.base
                return replace(made, merged=base + ratio * (made.merged - base))
        made = run_method(self.bench, self.spec, options, self.points)
        self.made.append((options, made))
        return made

    def ratio(self, before: dict, options: dict) -> float | None:
        """How many times the change before is the one asked for; None where it is no multiple."""
        name, _ = parse(self.spec)
        option = METHODS.facts[name].get("linear")
        if option is None:
            return None
        default = {option: inspect.signature(METHODS[name]).parameters[option].default}
        old, new = {**default, **before}, {**default, **options}
        scale, wanted = old.pop(option), new.pop(option)
        return wanted / scale if old == new and scale else None

    def forget(self, kept: Sequence[dict]) -> None:
        """Drop merges that nothing can be made of any more, but for those kept."""
        if "linear" not in METHODS.facts[parse(self.spec)[0]]:
            self.made = [(options, made) for options, made in self.made if options in kept]


@dataclass(frozen=True)
class Search:
    """What a search found: a record per candidate (options; score or error), the best's number."""

    records: list[dict]
    best: int


def attempt(merges: Merges, options: dict) -> dict:
    """A candidate's `options` and `score`, its validation ANP; or its `error`, if it diverged."""
    try:
        merged = merges(options).merged
    except Diverged as error:
        return {"options": options, "error": str(error)}
    return {"options": options, "score": validation_anp(merges.bench, merged)}


def search(merges: Merges, tried: Sequence[dict]) -> Search:
    """Score every candidate on validation rows; of equal ones the first is the best.

    The merges of the first (published) candidate and of the best are kept for later. A single
    candidate needs no score. Scores are kept in the cache. Raises Diverged where all candidates do.
    """
    if len(tried) == 1:
        return Search([{"options": tried[0]}], 0)
    records: list[dict] = []
    for options in tried:
        found = partial(attempt, merges, options)
        what = ("search", merges.spec, options)
        records.append(kept(merges.bench, found, *what, method=merges.spec))
        best = max(range(len(records)), key=lambda n: records[n].get("score", -math.inf))
        merges.forget([tried[0], tried[best]])
    if "score" not in records[best]:
        cause = records[0]["error"]
        raise Diverged(f"{merges.spec}: every candidate diverged; the first: {cause}")
    return Search(records, best)


def outcome(merges: Merges, options: dict) -> dict:
    """A method's test answers, cost and fit, from the cache or found now."""
    bench, spec = merges.bench, merges.spec

    def find() -> dict:
        made, rows = merges(options), []

        def answer() -> None:
            rows.append(evaluate(bench.problem, made.merged, bench.test))

        took = seconds(answer, bench.problem.vectors.base.device)
        count = sum(exam.rows for exam in bench.test)
        cost = {**made.cost, "answer_ms": round(1000 * took / count, 3)}  # per test row
        return {"rows": rows[0].to_dict("records"), "cost": cost, "fit": made.fit}

    return kept(bench, find, "test", spec, options, merges.points, method=spec)
