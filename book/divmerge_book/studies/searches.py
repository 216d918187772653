"""Searches for a path per task: evolution, and baselines with the same number of scores.

A path says for every group of parameters whose task vector to take, and how much of it (see
`methods.paths`). All searches start from the task's own expert and request the same number of
scores: accuracies on the task's validation rows.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies.evaluator import accuracies, expert_accuracies
from divmerge_book.studies.study import study
from divmerge_core.methods import METHODS
from divmerge_core.methods.paths import Path, Paths, Pool
from divmerge_core.registry import Registry

SEARCHES = Registry("search")  # name -> function(experiment, score, seed) -> Paths
CHILDREN = 4  # of a generation, as published
GROUPING = "block"


@dataclass
class ValidationScore:
    """Validation accuracy of a task's model, `calls` times per task; `given` holds all scores."""

    experiment: Experiment
    calls: int
    given: list[float] = field(default_factory=list)

    def __call__(self, flat: Float[Tensor, " N"], task: int) -> float:
        validation = replace(self.experiment, test=self.experiment.validation)
        self.given += accuracies(validation, flat, [validation.problem.vectors.tasks[task]])
        return self.given[-1]

    def of_paths(self, paths: Paths) -> float:
        """Of the current task: evolution scores each task `calls` times in a row."""
        task = len(self.given) // self.calls
        return self(paths.flats[task], task)

    def best(self) -> list[float]:
        """The highest accuracy up to every call, mean over tasks."""
        rows = np.reshape(self.given, (-1, self.calls))
        return np.maximum.accumulate(rows, axis=1).mean(axis=0).tolist()


def evolution(
    experiment: Experiment, score: ValidationScore, seed: int, *, size_base: float = 1.0
) -> Paths:
    """`layer_evolution`, where a task is scored by its own accuracy alone, as published."""
    options = {"steps": (score.calls - 1) // CHILDREN, "children": CHILDREN, "grouping": GROUPING}
    options |= {"size_base": size_base, "seed": seed, "progress": False}
    return METHODS["layer_evolution"](experiment.problem, score=score.of_paths, **options)


SEARCHES.register("evolution", label="evolution")(evolution)
SEARCHES.register("evolution_small", label="evolution, size base 0.9")(
    partial(evolution, size_base=0.9)
)


def path_per_task(experiment: Experiment, find: Callable[[Pool, Path, int], Path]) -> Paths:
    """What `find(pool, the task's own expert, task)` returns for every task."""
    pool, tasks = Pool.of(experiment.problem, GROUPING), experiment.problem.vectors.tasks
    own = [Path(((task, 1.0),) * pool.segments.num_groups) for task in range(len(tasks))]
    paths = [find(pool, path, task) for task, path in enumerate(own)]
    return Paths(experiment.problem, [pool.model(p) for p in paths], paths, pool.segments)


@SEARCHES.register("random", label="random search")
def random_search(experiment: Experiment, score: ValidationScore, seed: int) -> Paths:
    """The best of the expert and of paths with uniformly random genes."""
    generator = random.Random(seed)

    def find(pool: Pool, own: Path, task: int) -> Path:
        drawn = [
            Path(tuple(generator.choice(pool.choices) for _ in own.genes))
            for _ in range(score.calls - 1)
        ]
        return max([own, *drawn], key=lambda path: score(pool.model(path), task))

    return path_per_task(experiment, find)


@SEARCHES.register("greedy", label="greedy, group by group")
def greedy_search(experiment: Experiment, score: ValidationScore, seed: int) -> Paths:
    """Group after group in turn: every other gene is scored, the best is taken if it improves.

    The last group may be incomplete, when the calls are spent.
    """

    def find(pool: Pool, own: Path, task: int) -> Path:
        best, highest, left = own, score(pool.model(own), task), score.calls - 1
        for group in cycle(range(pool.segments.num_groups)):
            if not left:
                return best
            genes = [gene for gene in pool.choices if gene != best.genes[group]][:left]
            paths = [Path((*best.genes[:group], gene, *best.genes[group + 1 :])) for gene in genes]
            values = [score(pool.model(path), task) for path in paths]
            left -= len(paths)
            if max(values) > highest:
                highest, best = max(values), paths[values.index(max(values))]

    return path_per_task(experiment, find)


def searched(
    experiment: Experiment, *, seed: int, rows: int, search: str, calls: int
) -> list[dict]:
    """One search, or `expert`: a row per call, the last with test accuracy, gap and bytes.

    Means over tasks; bytes of all distinct parameters that the paths need.
    """
    vectors = experiment.problem.vectors
    score = ValidationScore(experiment, 1 if search == "expert" else calls)
    if search == "expert":
        test = expert_accuracies(experiment).values()
        nbytes = len(vectors.tasks) * vectors.base.nbytes
        for task, name in enumerate(vectors.tasks):
            score(vectors.expert(name), task)
    else:
        paths = SEARCHES[search](experiment, score, seed)
        test, nbytes = accuracies(experiment, paths), paths.nbytes
    table = [{"call": n, "validation": value} for n, value in enumerate(score.best(), start=1)]
    mean = sum(test) / len(test)
    table[-1] |= {"test": mean, "bytes": nbytes, "gap": table[-1]["validation"] - mean}
    return table


def compare_searches(
    experiments: Mapping[tuple[int, int], Experiment], *, calls: int = 129
) -> pd.DataFrame:
    """Every search, and the experts, on every experiment: a row per call.

    experiments: by seed and validation rows per task. Columns: seed, rows, search, call, validation
    (best so far, mean over tasks); in the last call's row test, gap (validation minus test) and
    bytes. Raises ValueError unless calls is 1 plus a multiple of CHILDREN.
    """
    if calls < 1 + CHILDREN or (calls - 1) % CHILDREN:
        raise ValueError(f"calls must be 1 plus a multiple of {CHILDREN}, got {calls}")
    tables = []
    for (seed, rows), experiment in experiments.items():
        jobs = [{"rows": rows, "search": name} for name in (*SEARCHES, "expert")]
        tables.append(study(searched, {seed: experiment}, jobs, calls=calls))
    return pd.concat(tables, ignore_index=True)
