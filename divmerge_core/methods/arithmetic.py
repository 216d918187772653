"""Methods that need nothing but the weights: sums of task vectors, trimmed or not."""

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.stores import dense
from divmerge_core.methods import METHODS
from divmerge_core.problem import MergeProblem


@METHODS.register(
    "average",
    source="Wortsman et al. 2022",
    needs="nothing",
    cost="weights",
    symmetric=True,
    search=(),
)
def average(problem: MergeProblem) -> Float[Tensor, " N"]:
    """The mean of the experts: every coefficient 1/T."""
    num_tasks = len(problem.vectors.tasks)
    return problem.vectors.merge([1 / num_tasks] * num_tasks)


@METHODS.register(
    "task_arithmetic",
    source="Ilharco et al. 2023",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    search=tuple({"scale": scale} for scale in (0.3, 0.2, 0.4, 0.5, 0.7, 1.0)),
)
def task_arithmetic(problem: MergeProblem, *, scale: float = 0.3) -> Float[Tensor, " N"]:
    """Base plus `scale` times the sum of task vectors: one coefficient for all tasks."""
    return problem.vectors.merge([scale] * len(problem.vectors.tasks))


@METHODS.register(
    "ties",
    source="Yadav et al. 2023",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    search=tuple({"scale": scale} for scale in (1.0, 0.5, 1.5, 2.0, 2.5, 3.0)),
)
def ties(problem: MergeProblem, *, keep: float = 0.2, scale: float = 1.0) -> Float[Tensor, " N"]:
    """Trim, elect sign, disjoint mean: `scale` times the mean of the entries that agree.

    Each task vector keeps its largest `keep` share of entries over the whole model; every
    coordinate takes the sign of the sum of what is left, and the mean of the entries of that sign.
    Raises ValueError unless keep is in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}; 0.2 keeps the largest fifth")
    deltas = dense(problem.vectors.deltas)
    drop = deltas.shape[1] - max(1, round(keep * deltas.shape[1]))
    trimmed = deltas.clone()
    for row in trimmed:  # one task at a time: a magnitude copy of all T would double the memory
        size = row.abs()
        row[size < size.kthvalue(drop + 1).values] = 0
    sign = trimmed.sum(dim=0).sign()  # [N]
    agree = (trimmed * sign) > 0  # [T, N]
    total = torch.where(agree, trimmed, 0).sum(dim=0)
    return problem.vectors.base + scale * total / agree.sum(dim=0).clamp(min=1)
