"""Several merged models instead of one: how many, which experts share one, and their bytes."""

import contextlib
import math
import random
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import cached
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies.continual_merging import SHARE
from divmerge_book.studies.evaluator import accuracies, scores_by_task
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.methods.clustered import posterior_score, residuals
from divmerge_core.methods.continual import Merging, join, linear_places, untouched

Members = tuple[int, ...]  # tasks that share a model, in the order of joining


class Groups:
    """OPCM's merge of any group of experts; accuracies and residuals are kept in the cache."""

    def __init__(self, experiment: Experiment, start: float = 0.5):
        self.experiment, self.start = experiment, start
        self.places = linear_places(experiment.problem)
        self.merge = lru_cache(maxsize=12)(self._merge)

    def delta(self, member: int) -> Float[Tensor, " N"]:
        vectors = self.experiment.problem.vectors
        return next(iter(dense(vectors.select([vectors.tasks[member]]).deltas)))

    def _merge(self, members: Members) -> Merging:
        if not members:
            return untouched(self.experiment.problem)
        return join(self.merge(members[:-1]), self.delta(members[-1]), self.places, SHARE, True)

    def residuals(self, members: Members, task: int) -> Float[Tensor, " n"]:
        """Distance of a group's model from this expert after it joins, per input.

        See `clustered.residuals`.

        Without members: of base plus `start` times the task vector, a new group's likelihood.
        """

        def find() -> list[float]:
            delta = self.delta(task)
            offset = self.merge((*members, task)).offset if members else self.start * delta
            return residuals(self.experiment.problem, task, delta, [offset])[0].tolist()

        found = cached(self.experiment, find, "misfit", members, task, self.start)
        return torch.tensor(found, dtype=torch.float64)

    def accuracies_of(self, members: Members) -> list[float]:
        """Test accuracies of a group's tasks with its model."""
        vectors = self.experiment.problem.vectors
        model = vectors.base + self.merge(members).offset
        return accuracies(self.experiment, model, [vectors.tasks[member] for member in members])

    def scores(self, groups: Sequence[Members]) -> list[float]:
        """Test accuracy of every task with its group's model, in the tasks' order."""
        found = {}
        for members in groups:
            some = cached(self.experiment, partial(self.accuracies_of, members), "group", members)
            found |= dict(zip(members, some, strict=True))
        return [found[task] for task in sorted(found)]


def assignments(groups: Groups, *, zeta: float, sigma: float = 0.25) -> list[Members]:
    """The groups that `dp_mixture` forms; a sweep over zeta and sigma shares their residuals."""
    found: list[Members] = []
    for task in range(len(groups.experiment.problem.vectors.tasks)):
        errors = [groups.residuals(members, task) for members in (*found, ())]
        sizes = [len(members) for members in found]
        chosen = int(
            posterior_score(errors, sizes, zeta=zeta, sigma=sigma, posterior="log").argmax()
        )
        found[chosen : chosen + 1] = [(*(found[chosen] if chosen < len(found) else ()), task)]
    return found


def members_of(labels: Sequence[int]) -> list[Members]:
    """Groups of equal labels, in order of their first member."""
    return [
        tuple(t for t, label in enumerate(labels) if label == one) for one in dict.fromkeys(labels)
    ]


def k_means(gram: np.ndarray, count: int, *, restarts: int = 20, seed: int = 0) -> list[int]:
    """k-means labels of vectors with these inner products, best of some restarts.

    Raises ValueError unless there are 1 to T clusters.
    """
    if not 1 <= count <= len(gram):
        raise ValueError(f"{len(gram)} vectors make 1 to {len(gram)} clusters, not {count}")
    values, axes = np.linalg.eigh(gram)
    points = axes * np.sqrt(values.clip(0))  # [T, T]: the same distances
    best = (math.inf, [])
    for restart in range(restarts):
        with contextlib.suppress(ClusterError):  # an empty cluster
            centres, labels = kmeans2(
                points, count, iter=100, minit="points", missing="raise", rng=seed + restart
            )
            inertia = ((points - centres[labels]) ** 2).sum()
            best = min(best, (inertia, labels.tolist()))
    return best[1]


def random_labels(num_tasks: int, count: int, seed: int) -> list[int]:
    """Labels of a random partition into `count` non-empty groups."""
    generator = random.Random(seed)
    labels = [*range(count), *(generator.randrange(count) for _ in range(num_tasks - count))]
    generator.shuffle(labels)
    return labels


def mixture(
    experiment: Experiment,
    *,
    zetas: Sequence[float],
    sigmas: Sequence[float] = (0.25,),
    draws: int = 3,
) -> pd.DataFrame:
    """The mixture of merged models over zeta, and other partitions into as many models.

    Columns: how (dp_mixture, k_means, random), zeta (as text, for inf) and sigma (both of
    dp_mixture), draw (of random), models (L), groups (which tasks share one), bytes, and
    `scores_by_task`. OPCM merges every group.
    """
    groups, vectors, rows = Groups(experiment), experiment.problem.vectors, []

    def add(how: str, found: list[Members], **labels: object) -> None:
        text = " | ".join(", ".join(vectors.tasks[t] for t in group) for group in found)
        row = {"how": how, "models": len(found), "bytes": len(found) * vectors.base.nbytes}
        row |= scores_by_task(experiment, groups.scores(found))
        rows.append({**row, "groups": text, **labels})

    pairs = [(zeta, sigma) for sigma in sigmas for zeta in zetas]
    for zeta, sigma in tqdm(pairs, "mixtures", leave=False):
        add(
            "dp_mixture", assignments(groups, zeta=zeta, sigma=sigma), zeta=f"{zeta:g}", sigma=sigma
        )
    deltas = torch.stack(list(dense(vectors.deltas)))
    gram = (deltas @ deltas.T).double().cpu().numpy()
    for count in tqdm(sorted({row["models"] for row in rows}), "other groups", leave=False):
        add("k_means", members_of(k_means(gram, count)))
        for draw in range(draws if 1 < count < len(vectors.tasks) else 0):
            add("random", members_of(random_labels(len(vectors.tasks), count, draw)), draw=draw)
    return pd.DataFrame(rows)
