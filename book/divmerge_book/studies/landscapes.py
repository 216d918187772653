"""The plane of two task vectors: accuracy and divergence on it, and the coefficients methods find.

All scores are on test rows.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from divmerge_book.evaluation.experiment import SIZES, Experiment, Size
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, search
from divmerge_book.interference.behaviour import DISTANCES
from divmerge_book.studies.evaluator import Evaluator, fewer_rows
from divmerge_book.studies.study import study
from divmerge_core.methods import METHODS, parse

INPUTS = 32  # unlabelled, per task, that fits use
CANDIDATES = 3  # options of a method, at most, scored on validation rows
LOW, HIGH = -0.4, 1.6  # of the coefficients on a plane
MARKED = ("task_arithmetic", "adamerging/task", "divmerge/task")  # beside the average


def settings_of(size: str) -> Size:
    """The size with INPUTS inputs and at most CANDIDATES candidates, for methods on a plane."""
    own = SIZES[size]
    count = min(own.candidates or CANDIDATES, CANDIDATES)
    return replace(own, merge_rows=INPUTS, inputs=INPUTS, candidates=count)


def axis(side: int) -> list[float]:
    """The coefficients along an axis of a plane. Raises ValueError where 0 is not among them."""
    if side < 6 or side % 5 != 1:
        raise ValueError(f"side must be 6, 11, 16 and so on, so that 0 is included; got {side}")
    return [round(LOW + (HIGH - LOW) * n / (side - 1), 6) for n in range(side)]


def grid(experiment: Experiment, *, seed: int, pair: str, side: int, rows: int) -> list[dict]:
    """Points of the plane of tasks `a+b`: l1, l2, disagreement, apart, and `Evaluator.totals`.

    disagreement and apart: disentanglement errors by predictions and by JS. The logits of one task
    vector alone are computed once and not for each point.
    """
    evaluator = Evaluator(fewer_rows(experiment.select(pair.split("+")), rows))
    vectors, values = evaluator.experiment.problem.vectors, axis(side)
    alone = [  # [task][coefficient]
        {value: evaluator.logits(vectors.select([name]).merge([value]), task) for value in values}
        for task, name in enumerate(vectors.tasks)
    ]
    points = []
    for coefficients in ((a, b) for a in values for b in values):
        flat = vectors.merge(coefficients)
        logits = [evaluator.logits(flat, task) for task in (0, 1)]
        point = dict(zip(("l1", "l2"), coefficients, strict=True))
        for column, name in (("disagreement", "disagreement"), ("apart", "js")):
            errors = [DISTANCES[name](alone[t][coefficients[t]], logits[t]) for t in (0, 1)]
            point[column] = round(sum(error.mean().item() for error in errors), 5)
        scores = [evaluator.score(some, task) for task, some in enumerate(logits)]
        points.append(point | evaluator.totals(scores))
    return points


def planes(
    experiment: Experiment, pairs: Sequence[str], *, seed: int = 0, side: int, rows: int
) -> pd.DataFrame:
    """`grid` of every pair of tasks, written `a+b`, with the column pair."""
    jobs = [{"pair": pair} for pair in pairs]
    return study(grid, {seed: experiment}, jobs, side=side, rows=rows)


def trajectory(experiment: Experiment, spec: str, size: Size, seed: int) -> list[dict]:
    """The coefficients of two tasks along a method's fit: step, l1, l2."""
    wanted = replace(size, candidates=None) if spec == "task_arithmetic" else size
    options = candidates(spec, wanted, seed, {}, experiment.problem)
    options = options[search(Merges(experiment, spec), options).best]
    if spec == "task_arithmetic":
        return [{"step": 0, "l1": options["scale"], "l2": options["scale"]}]
    steps = []

    def callback(step) -> None:
        first, second = step.coeffs[:, 0].tolist()
        steps.append({"step": step.number, "l1": round(first, 5), "l2": round(second, 5)})

    METHODS[parse(spec)[0]](experiment.problem, **options, callback=callback, progress=False)
    return steps


def solutions(experiment: Experiment, *, seed: int, pair: str, size: Size, rows: int) -> list[dict]:
    """Every method's coefficients on the plane of `a+b` at each step: method, step, l1, l2.

    The last row of a method has `Evaluator.totals` too. Options are chosen on validation rows out
    of the size's candidates; the scale of task arithmetic out of all.
    """
    evaluator = Evaluator(fewer_rows(experiment.select(pair.split("+")), rows))
    table, steps = [], {"average": [{"step": 0, "l1": 0.5, "l2": 0.5}]}
    steps |= {spec: trajectory(evaluator.experiment, spec, size, seed) for spec in MARKED}
    for method, some in steps.items():
        flat = evaluator.experiment.problem.vectors.merge([some[-1]["l1"], some[-1]["l2"]])
        scores = [evaluator.score(evaluator.logits(flat, task), task) for task in (0, 1)]
        found = evaluator.totals(scores)
        table += [{"method": method, **step, **dict.fromkeys(found)} for step in some]
        table[-1] |= found
    return table


def marks(
    experiment: Experiment, pairs: Sequence[str], size: Size, *, seed: int = 0, rows: int
) -> pd.DataFrame:
    """`solutions` of every pair of tasks, with the column pair."""
    jobs = [{"pair": pair} for pair in pairs]
    return study(solutions, {seed: experiment}, jobs, size=size, rows=rows)
