"""The plane of two task vectors: what its models are worth, and where methods end on it.

Accuracies and divergences are those of test rows. Every finished piece is kept in the cache, so an
interrupted study goes on where it stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation import cache
from divmerge_book.evaluation.experiment import SIZES, Experiment, Size
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, search
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.interference.behaviour import DISTANCES, answers
from divmerge_core.divergences import js
from divmerge_core.merging.problem import Batch
from divmerge_core.methods import METHODS, parse

EFFORTS: Mapping[str, Mapping[str, int]] = {
    "smoke": {"side": 6, "pairs": 2, "points": 5, "lines": 3, "rows": 20, "answered": 40},
    "default": {"side": 11, "pairs": 2, "points": 7, "lines": 4, "rows": 40, "answered": 100},
    "full": {"side": 16, "pairs": 2, "points": 7, "lines": 8, "rows": 150, "answered": 150},
}  # side: points along an axis; pairs: planes; points: along each of the lines; answered: rows
INPUTS = {"smoke": 32, "default": 32, "full": 32}  # unlabelled, per task, that fits see
TRIED = 3  # options of a method, at most, scored on validation rows
LOW, HIGH = -0.4, 1.6  # of the coefficients on a plane
MARKED = ("task_arithmetic", "adamerging/task", "divmerge/task")  # beside the average


def settings_of(size: str) -> Size:
    """What the methods on a plane may use: the size's own, with inputs as in INPUTS."""
    own, count = SIZES[size], INPUTS[size]
    tried = min(own.candidates or TRIED, TRIED)
    return replace(own, merge_rows=count, inputs=count, candidates=tried)


def some(exam: LabelledSplit, rows: int) -> LabelledSplit:
    """`rows` rows of an exam, taken evenly from its order, short texts to long; all if fewer."""
    total = len(exam.gold)
    if rows >= total:
        return exam
    chosen = torch.linspace(0, total - 1, rows).round().long()
    batches, start = [], 0
    for batch in exam.batches:
        stop = start + len(batch.weight)
        inside = chosen[(chosen >= start) & (chosen < stop)] - start
        if len(inside):
            inputs = {key: tensor[inside] for key, tensor in batch.inputs.items()}
            weight = torch.full_like(batch.weight[: len(inside)], 1 / len(inside))
            batches.append(Batch(inputs, weight))
        start = stop
    return LabelledSplit(batches, exam.gold[chosen])


def fewer(bench: Experiment, rows: int) -> Experiment:
    """The same bench with `rows` test rows per task."""
    digest = f"{bench.digest} {rows} test rows"
    return replace(bench, test=[some(exam, rows) for exam in bench.test], digest=digest)


def kept(bench: Experiment, find: Callable[[], list[dict]], *what: object) -> pd.DataFrame:
    """The rows that `find` gives, from the cache or found now."""
    return pd.DataFrame(cache.kept(bench, find, *what))


class Judge:
    """Answers of merged models on a bench's test rows, beside the experts'."""

    def __init__(self, bench: Experiment):
        self.bench, self.experts = bench, {}

    def expert(self, task: int) -> Float[Tensor, "B V"]:
        """The task's own expert's logits, worked out once."""
        if task not in self.experts:
            vectors = self.bench.problem.vectors
            self.experts[task] = self.logits(vectors.expert(vectors.tasks[task]), task)
        return self.experts[task]

    def logits(self, flat: Float[Tensor, " N"], task: int) -> Float[Tensor, "B V"]:
        return answers(self.bench.problem, flat, task, self.bench.test[task])

    def accuracy(self, logits: Float[Tensor, "B V"], task: int) -> float:
        return (logits.argmax(-1) == self.bench.test[task].gold).double().mean().item()

    def scored(self, logits: Float[Tensor, "B V"], task: int) -> dict[str, float]:
        """accuracy, its ratio to the expert's, js to the expert and nll of the gold answer (nats).

        Raises ValueError where the expert gets no row right.
        """
        expert, gold = self.accuracy(self.expert(task), task), self.bench.test[task].gold
        if not expert:
            raise ValueError(
                f"the expert of {self.bench.problem.vectors.tasks[task]!r} gets no test row right; "
                "give more rows or leave the task out"
            )
        found = self.accuracy(logits, task)
        return {
            "accuracy": found,
            "ratio": found / expert,
            "js": js(self.expert(task), logits).double().mean().item(),
            "nll": torch.nn.functional.cross_entropy(logits, gold).item(),
        }

    def total(self, flat: Float[Tensor, " N"]) -> dict:
        """What a point of the plane is worth: `worth` of both tasks."""
        tasks = range(len(self.bench.test))
        return self.worth([self.scored(self.logits(flat, task), task) for task in tasks])

    def worth(self, each: Sequence[Mapping[str, float]]) -> dict:
        """js summed over tasks, anp, and lists as of `arrivals.by_task`. each: of `scored`."""
        golds = [exam.gold for exam in self.bench.test]
        lists = {"accuracies": [one["accuracy"] for one in each]}
        lists["experts"] = [self.accuracy(self.expert(task), task) for task in range(len(each))]
        lists["majorities"] = [gold.bincount().max().item() / len(gold) for gold in golds]
        found = {"js": sum(one["js"] for one in each)}
        found["anp"] = sum(one["ratio"] for one in each) / len(each)
        return rounded(found) | {key: [round(v, 5) for v in some] for key, some in lists.items()}


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """The same numbers with five digits."""
    return {key: round(value, 5) for key, value in values.items()}


# --- the plane of two task vectors ----------------------------------------------------------------


def axis(side: int) -> list[float]:
    """The coefficients along an axis of a plane. Raises ValueError where 0 is not among them."""
    if side < 6 or side % 5 != 1:
        raise ValueError(f"side must be 6, 11, 16 and so on, so that 0 is met; got {side}")
    return [round(LOW + (HIGH - LOW) * n / (side - 1), 6) for n in range(side)]


def grid(bench: Experiment, side: int) -> list[dict]:
    """The points of the plane of a bench's two tasks: l1, l2, and `Judge.worth`.

    disagreement and apart are the disentanglement error there, by answers and by js. What is said
    with one vector alone is worked out once and not for each point.
    """
    judge, vectors, values = Judge(bench), bench.problem.vectors, axis(side)
    alone = [  # [task][coefficient]: logits of the base with one vector
        {value: judge.logits(vectors.select([task]).merge([value]), n) for value in values}
        for n, task in enumerate(vectors.tasks)
    ]
    points = []
    bar = tqdm([(a, b) for a in values for b in values], " + ".join(vectors.tasks), leave=False)
    for pair in bar:
        flat = vectors.merge(pair)
        point = {"l1": pair[0], "l2": pair[1], "disagreement": 0.0, "apart": 0.0}
        scored = []
        for task, value in enumerate(pair):
            logits = judge.logits(flat, task)
            scored.append(judge.scored(logits, task))
            for name, column in (("disagreement", "disagreement"), ("js", "apart")):
                point[column] += DISTANCES[name](alone[task][value], logits).mean().item()
        points.append(rounded(point) | judge.worth(scored))
    return points


def planes(bench: Experiment, pairs: Sequence[str], *, side: int, rows: int) -> pd.DataFrame:
    """`grid` of every pair of tasks, written `a+b`. Columns: pair, and those of `grid`."""
    parts = []
    for pair in tqdm(pairs, "planes", leave=False):
        looked = fewer(bench.select(pair.split("+")), rows)
        parts.append(kept(looked, partial(grid, looked, side), "plane", side, LOW, HIGH))
        parts[-1].insert(0, "pair", pair)
    return pd.concat(parts, ignore_index=True)


def path_of(bench: Experiment, spec: str, size: Size, seed: int) -> list[dict]:
    """The coefficients of two tasks that a method passes through: a row per step."""
    wanted = replace(size, candidates=None) if spec == "task_arithmetic" else size
    tried = candidates(spec, wanted, seed, {}, bench.problem)
    options = tried[search(Merges(bench, spec), tried).best]
    if spec == "task_arithmetic":
        return [{"step": 0, "l1": options["scale"], "l2": options["scale"]}]
    steps = []

    def callback(step) -> None:
        first, second = step.coeffs[:, 0].tolist()
        steps.append({"step": step.number, "l1": round(first, 5), "l2": round(second, 5)})

    METHODS[parse(spec)[0]](bench.problem, **options, callback=callback, progress=False)
    return steps


def solutions(bench: Experiment, size: Size, seed: int = 0) -> list[dict]:
    """Where the methods end on a bench's plane, and the way there: method, step, l1, l2.

    The last row of a method has `Judge.total` too. Options are chosen on validation rows, out of
    as many as the size says; the scale of task arithmetic out of all.
    """
    judge, vectors, rows = Judge(bench), bench.problem.vectors, []
    ways = {"average": [{"step": 0, "l1": 0.5, "l2": 0.5}]}
    ways |= {spec: path_of(bench, spec, size, seed) for spec in MARKED}
    for method, steps in ways.items():
        found = judge.total(vectors.merge([steps[-1]["l1"], steps[-1]["l2"]]))
        rows += [{"method": method, **step, **dict.fromkeys(found)} for step in steps]
        rows[-1] |= found
    return rows


def marks(
    bench: Experiment, pairs: Sequence[str], size: Size, *, rows: int, seed: int = 0
) -> pd.DataFrame:
    """`solutions` of every pair of tasks. Columns: pair, and those of `solutions`."""
    parts = []
    what = (size.candidates, size.inputs, size.epochs, seed)
    for pair in tqdm(pairs, "methods on planes", leave=False):
        looked = fewer(bench.select(pair.split("+")), rows)
        parts.append(kept(looked, partial(solutions, looked, size, seed), "solutions", *what))
        parts[-1].insert(0, "pair", pair)
    return pd.concat(parts, ignore_index=True)
