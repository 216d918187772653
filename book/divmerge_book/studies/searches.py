"""Searches for a path per task: evolution, and what it must beat at the same number of scores.

A path says for every group of parameters whose task vector to take, and how much of it (see
`methods.paths`). All searches start from the task's own expert and ask for the same number of
scores: accuracies on the task's validation rows.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies.continual_merging import accuracies, expert_accuracies
from divmerge_core.methods import METHODS
from divmerge_core.methods.paths import Path, Paths, Pool
from divmerge_core.registry import Registry

SEARCHES = Registry("search")  # name -> function(bench, marks, seed) -> Paths
CHILDREN = 4  # of a generation, as published
GROUPING = "block"


@dataclass
class Marks:
    """Validation accuracy of a task's model, asked `calls` times per task; answers are noted."""

    bench: Experiment
    calls: int
    given: list[float] = field(default_factory=list)

    def __call__(self, flat: Float[Tensor, " N"], task: int) -> float:
        looked = replace(self.bench, test=self.bench.validation)
        name = self.bench.problem.vectors.tasks[task]
        self.given += accuracies(looked, flat, [name])
        return self.given[-1]

    def of_paths(self, paths: Paths) -> float:
        """Of the task whose turn it is: evolution asks about each `calls` times in a row."""
        task = len(self.given) // self.calls
        return self(paths.flats[task], task)

    def best(self) -> list[float]:
        """The highest accuracy up to every call, mean over tasks."""
        starts = range(0, len(self.given), self.calls)
        rows = [self.given[n : n + self.calls] for n in starts]
        highest = [[max(row[: n + 1]) for n in range(len(row))] for row in rows]
        return [sum(column) / len(column) for column in zip(*highest, strict=True)]


def evolution(bench: Experiment, marks: Marks, seed: int, *, size_base: float = 1.0) -> Paths:
    """`layer_evolution`, where a task is scored by its own accuracy alone, as published."""
    return METHODS["layer_evolution"](
        bench.problem,
        score=marks.of_paths,
        grouping=GROUPING,
        steps=(marks.calls - 1) // CHILDREN,
        children=CHILDREN,
        size_base=size_base,
        seed=seed,
        progress=False,
    )


SEARCHES.register("evolution", label="evolution")(evolution)
SEARCHES.register("evolution_small", label="evolution, size base 0.9")(
    partial(evolution, size_base=0.9)
)


def put_together(bench: Experiment, find: Callable[[Pool, Path, int], Path]) -> Paths:
    """What `find(pool, the task's own expert, task)` gives for every task."""
    pool, paths = Pool.of(bench.problem, GROUPING), []
    for task in range(len(bench.problem.vectors.tasks)):
        own = Path(((task, 1.0),) * pool.segments.num_groups)
        paths.append(find(pool, own, task))
    return Paths(bench.problem, [pool.model(path) for path in paths], paths, pool.segments)


@SEARCHES.register("random", label="random search")
def random_search(bench: Experiment, marks: Marks, seed: int) -> Paths:
    """The best of the expert and of paths with every gene drawn evenly."""
    generator = random.Random(seed)

    def find(pool: Pool, own: Path, task: int) -> Path:
        groups = range(pool.segments.num_groups)
        drawn = [
            Path(tuple(generator.choice(pool.choices) for _ in groups))
            for _ in range(marks.calls - 1)
        ]
        values = [marks(pool.model(path), task) for path in (own, *drawn)]
        return (own, *drawn)[values.index(max(values))]

    return put_together(bench, find)


@SEARCHES.register("greedy", label="greedy, group by group")
def greedy_search(bench: Experiment, marks: Marks, seed: int) -> Paths:
    """Group after group, again and again: every other gene is tried, the best is taken if better.

    The last group may be left half tried, when the calls are spent.
    """

    def find(pool: Pool, own: Path, task: int) -> Path:
        best, highest, left = own, marks(pool.model(own), task), marks.calls - 1
        for group in cycle(range(pool.segments.num_groups)):
            if not left:
                return best
            genes = [gene for gene in pool.choices if gene != best.genes[group]][:left]
            ways = [Path((*best.genes[:group], gene, *best.genes[group + 1 :])) for gene in genes]
            values = [marks(pool.model(way), task) for way in ways]
            left -= len(ways)
            if max(values) > highest:
                highest, best = max(values), ways[values.index(max(values))]

    return put_together(bench, find)


def searched(bench: Experiment, name: str, calls: int, seed: int) -> dict:
    """One search: best validation accuracy up to every call, test accuracy, bytes.

    Means over tasks; bytes of all distinct parameters that the paths need.
    """
    marks = Marks(bench, calls)
    paths = SEARCHES[name](bench, marks, seed)
    found = accuracies(bench, paths, bench.problem.vectors.tasks)
    test = sum(found) / len(found)
    return {"validation": marks.best(), "test": test, "bytes": paths.nbytes}


def searches(benches: Mapping[tuple[int, int], Experiment], *, calls: int = 129) -> pd.DataFrame:
    """Every search on every bench: a row per seed, validation rows, search and call.

    benches: by seed and number of validation rows per task. Columns: seed, rows, search, call,
    validation (mean over tasks of the best so far, on the rows searched); and in the last call's
    row test, gap (validation minus test) and bytes. The first call's row is the experts', whose
    test accuracy stands under the search `expert`. Raises ValueError unless calls is 1 plus a
    multiple of CHILDREN.
    """
    if calls < 1 + CHILDREN or (calls - 1) % CHILDREN:
        raise ValueError(f"calls must be 1 plus a multiple of {CHILDREN}, got {calls}")
    rows = []
    jobs = [(key, name) for key in benches for name in SEARCHES]
    for (seed, count), name in (bar := tqdm(jobs, "searches", leave=False)):
        bar.set_postfix_str(f"seed {seed}, {count} rows, {name}")
        bench = benches[seed, count]
        find = partial(searched, bench, name, calls, seed)
        found = kept(bench, find, "search for paths", name, calls, seed)
        label = {"seed": seed, "rows": count, "search": name}
        best = [{**label, "call": n, "validation": v} for n, v in enumerate(found["validation"], 1)]
        last = {"test": found["test"], "bytes": found["bytes"]}
        rows += [*best[:-1], {**best[-1], **last, "gap": best[-1]["validation"] - last["test"]}]
        if name == "evolution":
            rows.append(reference(bench, label, best[0]["validation"]))
    return pd.DataFrame(rows)


def reference(bench: Experiment, label: Mapping, validation: float) -> dict:
    """The experts' own row."""
    alone, base = list(expert_accuracies(bench).values()), bench.problem.vectors.base
    test = sum(alone) / len(alone)
    row = {"search": "expert", "call": 1, "validation": validation, "test": test}
    return {**label, **row, "gap": validation - test, "bytes": len(alone) * base.nbytes}
