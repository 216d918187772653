"""Several merged models instead of one: how many, which experts share one, and their bytes."""

import random
from collections.abc import Sequence
from functools import lru_cache

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

START = 0.5  # share of its task vector that a new group starts from
Members = tuple[int, ...]  # tasks that share a model, in the order of joining


class Groups:
    """OPCM's merge of any group of experts; accuracies and residuals are kept in the cache."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.tasks, self.base = experiment.problem.vectors.tasks, experiment.problem.vectors.base
        self.places = linear_places(experiment.problem)
        self.merge = lru_cache(maxsize=12)(self._merge)

    def delta(self, member: int) -> Float[Tensor, " N"]:
        (row,) = dense(self.experiment.problem.vectors.select([self.tasks[member]]).deltas)
        return row

    def _merge(self, members: Members) -> Merging:
        if not members:
            return untouched(self.experiment.problem)
        return join(self.merge(members[:-1]), self.delta(members[-1]), self.places, SHARE, True)

    def residuals(self, members: Members, task: int) -> Float[Tensor, " n"]:
        """Distance of a group's model from this expert after it joins, per input.

        Without members: of base plus START times the task vector, a new group's likelihood.
        """

        def find() -> list[float]:
            delta = self.delta(task)
            offset = self.merge((*members, task)).offset if members else START * delta
            return residuals(self.experiment.problem, task, delta, [offset])[0].tolist()

        found = cached(self.experiment, find, "misfit", members, task, START)
        return torch.tensor(found, dtype=torch.float64)

    def accuracies_of(self, members: Members) -> list[float]:
        """Test accuracies of a group's tasks with its model."""

        def find() -> list[float]:
            model = self.base + self.merge(members).offset
            return accuracies(self.experiment, model, [self.tasks[one] for one in members])

        return cached(self.experiment, find, "group", members)

    def scores(self, groups: Sequence[Members]) -> list[float]:
        """Test accuracy of every task with its group's model, in the tasks' order."""
        pairs = [pair for one in groups for pair in zip(one, self.accuracies_of(one), strict=True)]
        return [accuracy for _, accuracy in sorted(pairs)]


def assignments(groups: Groups, *, zeta: float, sigma: float = 0.25) -> list[Members]:
    """The groups that `dp_mixture` forms; a sweep over zeta and sigma shares their residuals."""
    found: list[Members] = []
    for task in range(len(groups.tasks)):
        errors = [groups.residuals(members, task) for members in (*found, ())]
        options = {"zeta": zeta, "sigma": sigma, "posterior": "log"}
        chosen = int(posterior_score(errors, [*map(len, found)], **options).argmax())
        found[chosen : chosen + 1] = [(*(found[chosen] if chosen < len(found) else ()), task)]
    return found


def members_of(labels: Sequence[int]) -> list[Members]:
    """Groups of equal labels, in order of their first member."""
    return [
        tuple(t for t, label in enumerate(labels) if label == one) for one in dict.fromkeys(labels)
    ]


def k_means(gram: np.ndarray, count: int) -> list[int]:
    """k-means labels of vectors with these inner products; ValueError unless 1 to T clusters."""
    if not 1 <= count <= len(gram):
        raise ValueError(f"{len(gram)} vectors make 1 to {len(gram)} clusters, not {count}")
    values, axes = np.linalg.eigh(gram)
    points, found = axes * np.sqrt(values.clip(0)), []  # [T, T]: the same distances
    how = {"iter": 100, "minit": "points", "missing": "raise"}
    for seed in range(20):
        try:
            centres, labels = kmeans2(points, count, **how, rng=seed)
        except ClusterError:  # an empty cluster
            continue
        found.append((((points - centres[labels]) ** 2).sum(), labels.tolist()))
    return min(found, default=(0, []))[1]


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
    groups, vectors, found = Groups(experiment), experiment.problem.vectors, []
    for sigma in sigmas:
        for zeta in tqdm(zetas, "mixtures", leave=False):
            labels = {"how": "dp_mixture", "zeta": f"{zeta:g}", "sigma": sigma}
            found.append((labels, assignments(groups, zeta=zeta, sigma=sigma)))
    deltas = torch.stack(list(dense(vectors.deltas)))
    gram = (deltas @ deltas.T).double().cpu().numpy()
    for count in sorted({len(members) for _, members in found}):
        found.append(({"how": "k_means"}, members_of(k_means(gram, count))))
        for draw in range(draws if 1 < count < len(vectors.tasks) else 0):
            labels = random_labels(len(vectors.tasks), count, draw)
            found.append(({"how": "random", "draw": draw}, members_of(labels)))
    return pd.DataFrame(
        {
            **labels,
            "models": len(members),
            "bytes": len(members) * vectors.base.nbytes,
            **scores_by_task(experiment, groups.scores(members)),
            "groups": " | ".join(", ".join(vectors.tasks[t] for t in one) for one in members),
        }
        for labels, members in tqdm(found, "partitions", leave=False)
    )
