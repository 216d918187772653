"""Several merged models instead of one: how many, which experts share one, and what that stores.

Every finished piece is kept in the cache, so an interrupted study goes on where it stopped.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies.continual_merging import SHARE, accuracies, by_task, expert_accuracies
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.methods.clustered import evidence, misfits
from divmerge_core.methods.continual import Merging, join, linear_places, untouched


class Groups:
    """OPCM's merge of any group of experts, in the order given, each group worked out once.

    A group's accuracy and its misfits with a newcomer are kept in the cache.
    """

    def __init__(self, bench: Experiment, start: float = 0.5, recent: int = 12):
        self.bench, self.start = bench, start
        self.places = linear_places(bench.problem)
        self.merging = lru_cache(maxsize=recent)(self._merging)

    def delta(self, member: int) -> Float[Tensor, " N"]:
        vectors = self.bench.problem.vectors
        return next(iter(dense(vectors.select([vectors.tasks[member]]).deltas)))

    def _merging(self, members: tuple[int, ...]) -> Merging:
        if not members:
            return untouched(self.bench.problem)
        before = self.merging(members[:-1])
        return join(before, self.delta(members[-1]), self.places, SHARE, True)

    def model(self, members: tuple[int, ...]) -> Float[Tensor, " N"]:
        return self.bench.problem.vectors.base + self.merging(members).offset

    def errors(self, members: tuple[int, ...], task: int) -> Float[Tensor, " n"]:
        """How far a group that this expert joins answers from it, per input (see `misfits`).

        Of no group, how far base plus `start` times the task vector does: a new group's likelihood.
        """

        def find() -> list[float]:
            delta = self.delta(task)
            offset = self.merging((*members, task)).offset if members else self.start * delta
            return misfits(self.bench.problem, task, delta, [offset])[0].tolist()

        found = kept(self.bench, find, "misfit", members, task, self.start)
        return torch.tensor(found, dtype=torch.float64)

    def reached(self, members: tuple[int, ...]) -> list[float]:
        """Test accuracies of a group's tasks, answered by its model."""
        names = [self.bench.problem.vectors.tasks[member] for member in members]
        return accuracies(self.bench, self.model(members), names)

    def scores(self, groups: Sequence[tuple[int, ...]]) -> list[float]:
        """Test accuracy of every task, answered by its group's model, in the tasks' order."""
        tasks, found = self.bench.problem.vectors.tasks, {}
        for members in groups:
            reached = kept(self.bench, partial(self.reached, members), "group", members)
            found |= dict(zip(members, reached, strict=True))
        return [found[task] for task in range(len(tasks))]


def arranged(groups: Groups, *, zeta: float, sigma: float = 0.25) -> list[tuple[int, ...]]:
    """The groups that `dp_mixture` forms: the same choices, from misfits that are worked out once.

    So a sweep over zeta and sigma costs hardly more than one mixture.
    """
    found: list[tuple[int, ...]] = []
    for task in range(len(groups.bench.problem.vectors.tasks)):
        errors = [groups.errors(members, task) for members in (*found, ())]
        sizes = [len(members) for members in found]
        chosen = int(evidence(errors, sizes, zeta=zeta, sigma=sigma, posterior="log").argmax())
        found[chosen : chosen + 1] = [(*(found[chosen] if chosen < len(found) else ()), task)]
    return found


def members_of(labels: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups of equal labels, in order of their first member."""
    return [
        tuple(t for t, label in enumerate(labels) if label == one) for one in dict.fromkeys(labels)
    ]


def k_means(gram: np.ndarray, count: int, *, restarts: int = 20, seed: int = 0) -> list[int]:
    """Labels of Lloyd's algorithm on vectors known by their inner products, best of some restarts.

    Raises ValueError unless there are 1 to T clusters.
    """
    if not 1 <= count <= len(gram):
        raise ValueError(f"{len(gram)} vectors make 1 to {len(gram)} clusters, not {count}")
    values, axes = np.linalg.eigh(gram)
    points = axes * np.sqrt(values.clip(0))  # [T, T]: the same distances
    generator, best = np.random.default_rng(seed), (math.inf, [])
    for _ in range(restarts):
        centres = points[generator.permutation(len(points))[:count]]
        for _ in range(100):
            distances = ((points[:, None] - centres) ** 2).sum(-1)  # [T, L]
            labels = distances.argmin(1)
            filled = [
                points[labels == one].mean(0) for one in range(count) if (labels == one).any()
            ]
            if len(filled) < count or np.allclose(filled, centres):
                break
            centres = np.stack(filled)
        spread = distances.min(1).sum()
        if len(filled) == count and spread < best[0] - 1e-12:
            best = spread, labels.tolist()
    return best[1]


def random_labels(num_tasks: int, count: int, seed: int) -> list[int]:
    """Labels of a random partition into `count` groups, none of them empty."""
    generator = random.Random(seed)
    labels = [*range(count), *(generator.randrange(count) for _ in range(num_tasks - count))]
    generator.shuffle(labels)
    return labels


def mixture(
    bench: Experiment,
    *,
    zetas: Sequence[float],
    sigmas: Sequence[float] = (0.25,),
    draws: int = 3,
) -> pd.DataFrame:
    """The mixture of merged models over zeta, and other ways to keep as many models.

    Columns: how (dp_mixture, k_means, random), zeta (as text, for inf) and sigma (both of
    dp_mixture), draw (of random), models (L), groups (which tasks share one), bytes, anp,
    and `arrivals.by_task`. OPCM merges every group of every way.
    """
    groups, problem, rows = Groups(bench), bench.problem, []
    base = problem.vectors.base.nbytes
    alone, num_tasks = [*expert_accuracies(bench).values()], len(bench.problem.vectors.tasks)

    def add(how: str, found: list[tuple[int, ...]], **labels: object) -> None:
        reached = groups.scores(found)
        text = " | ".join(", ".join(problem.vectors.tasks[t] for t in group) for group in found)
        row = {"how": how, "models": len(found), "bytes": len(found) * base}
        row |= {"anp": float(np.mean(np.array(reached) / alone))}
        rows.append({**row, **by_task(bench, reached), "groups": text, **labels})

    pairs = [(zeta, sigma) for sigma in sigmas for zeta in zetas]
    for zeta, sigma in tqdm(pairs, "mixtures", leave=False):
        add("dp_mixture", arranged(groups, zeta=zeta, sigma=sigma), zeta=f"{zeta:g}", sigma=sigma)
    rows_of = torch.stack(list(dense(problem.vectors.deltas)))
    gram = (rows_of @ rows_of.T).double().cpu().numpy()
    counts = sorted({row["models"] for row in rows})
    for count in tqdm(counts, "other groups", leave=False):
        add("k_means", members_of(k_means(gram, count)))
        for draw in range(draws if 1 < count < num_tasks else 0):
            add("random", members_of(random_labels(num_tasks, count, draw)), draw=draw)
    return pd.DataFrame(rows)
