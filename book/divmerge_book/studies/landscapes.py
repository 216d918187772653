"""Two task vectors at a time: what each costs the other's task, the segment between their experts,
and accuracy and divergence on the plane that they span.

`costs`, `segment`, `grid` and `solutions` measure for a `study` whose jobs name the other expert or
a pair, `a+b`. All scores are on test rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import SIZES, Experiment, Size
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, search
from divmerge_book.interference.behaviour import DISTANCES, barrier
from divmerge_book.studies.evaluator import Evaluator, fewer_rows
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.methods import METHODS, parse
from divmerge_core.registry import Registry

RULES = Registry("rule")  # name -> function(task vector i, task vector j, j shuffled) -> change
for name, formula, rule in (
    ("added", r"$\theta_0 + \tau_i + \tau_j$", lambda i, j, noise: i + j),
    ("shuffled", r"$\theta_0 + \tau_i + \tau_j$, shuffled", lambda i, j, noise: i + noise),
    ("averaged", r"$\theta_0 + (\tau_i + \tau_j) / 2$", lambda i, j, noise: (i + j) / 2),
    ("halved", r"$\theta_0 + \tau_i / 2$", lambda i, j, noise: i / 2),
):
    RULES.register(name, label=formula)(rule)

INPUTS = 32  # unlabelled, per task, that fits use
CANDIDATES = 3  # options of a method, at most, scored on validation rows
LOW, HIGH = -0.4, 1.6  # of the coefficients on a plane
MARKED = ("task_arithmetic", "adamerging/task", "divmerge/task")  # beside the average


def permuted(row: Float[Tensor, " N"], layout: Layout, seed: int) -> Float[Tensor, " N"]:
    """A task vector with its entries shuffled within every tensor: noise of the same norms."""
    generator, result = torch.Generator().manual_seed(seed), row.clone()
    for start, stop in layout.bounds:
        order = torch.randperm(stop - start, generator=generator).to(row.device)
        result[start:stop] = row[start:stop][order]
    return result


def costs(experiment: Experiment, *, seed: int, other: str, rows: int) -> list[dict]:
    """Cost of task vector `other` (j) for every other task (i) under every rule of RULES.

    shuffled: with the entries of vector j shuffled. halved: half of vector i and nothing of j.
    Columns: rule, task (i), accuracy (lost, in shares of 1) and js (from expert i, nats).
    """
    evaluator, table = Evaluator(fewer_rows(experiment, rows)), []
    vectors = experiment.problem.vectors
    deltas = dense(vectors.deltas)
    own = deltas[vectors.tasks.index(other)]
    noise = permuted(own, vectors.layout, seed)
    for number, task in enumerate(vectors.tasks):
        before = evaluator.score(evaluator.experts[number], number)["accuracy"]
        for rule, change in RULES.items() if task != other else ():
            flat = vectors.base + change(deltas[number], own, noise)
            after = evaluator.score(evaluator.logits(flat, number), number)
            lost = round(before - after["accuracy"], 5)
            table.append({"rule": rule, "task": task, "js": after["js"], "accuracy": lost})
    return table


def matrix(table: pd.DataFrame, rule: str, column: str) -> pd.DataFrame:
    """A rule's cost, mean over seeds: a row per affected task, a column per added expert."""
    some, order = table[table.rule == rule], list(dict.fromkeys(table.other))
    wide = some.pivot_table(index="task", columns="other", values=column)
    return wide.reindex(index=order, columns=order)


def by_cost(table: pd.DataFrame, count: int) -> list[str]:
    """`count` pairs `a+b`, evenly spaced by rank, from the most to the least JS when added."""
    wide = matrix(table, "added", "js")
    both = {f"{a}+{b}": wide.loc[a, b] + wide.loc[b, a] for a, b in combinations(wide.index, 2)}
    ranked = sorted(both, key=lambda pair: -both[pair])
    places = torch.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().long()
    return [ranked[place] for place in places.tolist()]


def evaluator_of(experiment: Experiment, pair: str, rows: int) -> Evaluator:
    """The evaluator of a pair's two tasks."""
    return Evaluator(fewer_rows(experiment.select(pair.split("+")), rows))


def scored(evaluator: Evaluator, coefficients: Sequence[float]) -> tuple[list[Tensor], list[dict]]:
    """Both tasks' logits, and their `Evaluator.score`, at these coefficients of their vectors."""
    flat = evaluator.experiment.problem.vectors.merge(list(coefficients))
    logits = [evaluator.logits(flat, task) for task in (0, 1)]
    return logits, [evaluator.score(some, task) for task, some in enumerate(logits)]


def segment(experiment: Experiment, *, seed: int, pair: str, points: int, rows: int) -> list[dict]:
    """Along the segment from expert a (0) to b (1), each task with its own head.

    Columns: at, task, accuracy, js, nll. Raises ValueError for fewer than 3 points.
    """
    if points < 3:
        raise ValueError(f"points must be 3 or more, both ends and between; got {points}")
    evaluator, table = evaluator_of(experiment, pair, rows), []
    for at in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        named = zip(pair.split("+"), scored(evaluator, [1 - at, at])[1], strict=True)
        table += [{"at": round(at, 5), "task": task, **score} for task, score in named]
    return table


def barriers(table: pd.DataFrame) -> pd.DataFrame:
    """The barrier of every pair and seed: columns seed, pair, error, nll, error_chord, nll_chord.

    Of the test error and the cross-entropy of the labels (nats), each the mean of the pair's two
    tasks at every point; against the mean of the ends, and against the chord between them.
    """
    along = table.assign(error=1 - table.accuracy).groupby(["seed", "pair", "at"])
    groups = along[["error", "nll"]].mean().groupby(level=["seed", "pair"], sort=False)
    plain, chord = (
        groups.agg(lambda losses, kind=kind: barrier([*losses], reference=kind))
        for kind in ("mean", "chord")
    )
    return plain.join(chord.add_suffix("_chord")).reset_index()


def axis(side: int) -> list[float]:
    """The coefficients along an axis of a plane. Raises ValueError where 0 is not among them."""
    if side < 6 or side % 5 != 1:
        raise ValueError(f"side must be 6, 11, 16 and so on, so that 0 is included; got {side}")
    return [round(LOW + (HIGH - LOW) * n / (side - 1), 6) for n in range(side)]


def grid(experiment: Experiment, *, seed: int, pair: str, side: int, rows: int) -> list[dict]:
    """Points of a pair's plane: l1, l2, disagreement, apart, and `Evaluator.totals`.

    disagreement and apart: disentanglement errors by predictions and by JS.
    """
    evaluator, values, points = evaluator_of(experiment, pair, rows), axis(side), []
    vectors = evaluator.experiment.problem.vectors
    alone = [  # [task][coefficient]: the logits of one task vector alone, computed once
        {value: evaluator.logits(vectors.select([name]).merge([value]), task) for value in values}
        for task, name in enumerate(vectors.tasks)
    ]
    for both in product(values, repeat=2):
        logits, scores = scored(evaluator, both)
        point = dict(zip(("l1", "l2"), both, strict=True))
        for column, name in (("disagreement", "disagreement"), ("apart", "js")):
            errors = [DISTANCES[name](alone[t][both[t]], logits[t]).mean() for t in (0, 1)]
            point[column] = round(sum(error.item() for error in errors), 5)
        points.append(point | evaluator.totals(scores))
    return points


def settings_of(size: str) -> Size:
    """The size with INPUTS inputs and at most CANDIDATES candidates, for methods on a plane."""
    count = min(SIZES[size].candidates or CANDIDATES, CANDIDATES)
    return replace(SIZES[size], merge_rows=INPUTS, inputs=INPUTS, candidates=count)


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
    """Every method's coefficients on a pair's plane at each step: method, step, l1, l2.

    The last row of a method has `Evaluator.totals` too. Options are chosen on validation rows out
    of the size's candidates; the scale of task arithmetic out of all.
    """
    evaluator, table = evaluator_of(experiment, pair, rows), []
    steps = {"average": [{"step": 0, "l1": 0.5, "l2": 0.5}]}
    steps |= {spec: trajectory(evaluator.experiment, spec, size, seed) for spec in MARKED}
    for method, some in steps.items():
        found = evaluator.totals(scored(evaluator, [some[-1]["l1"], some[-1]["l2"]])[1])
        table += [{"method": method, **step, **dict.fromkeys(found)} for step in some]
        table[-1] |= found
    return table
