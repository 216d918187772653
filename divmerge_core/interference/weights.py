"""How task vectors stand to one another: angles, opposite signs, and where they are long."""

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.coefficients import groups_of
from divmerge_core.kernels.stores import dense
from divmerge_core.vectors import TaskVectors


def cosine(deltas: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Cosine of the angle between every two task vectors.

    Between -1 and 1: above 0 where they point the same way on the whole, 0 at right angles, and 0
    where a task vector is zero and has no direction. Derived in notebooks/01_task_vectors.
    """
    inner = deltas @ deltas.T  # [T, T]
    lengths = inner.diagonal().sqrt()
    return (inner / torch.outer(lengths, lengths)).nan_to_num(nan=0.0).clamp(-1, 1)


def sign_conflict(deltas: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Share of parameters that two task vectors push in opposite directions.

    Between 0 and 1; parameters that either vector leaves unchanged do not count, and where none
    counts the share is 0. Source: Yadav et al. 2023, §3. Derived in notebooks/01_task_vectors.
    """
    signs = deltas.sign().to(torch.int8)  # the product of two tiny numbers would underflow
    shares = []
    for row in signs:  # one task at a time: all pairs at once would take T times the memory
        product = signs * row  # [T, N]
        opposite, counted = (product < 0).sum(dim=1), (product != 0).sum(dim=1)
        shares.append(opposite / counted.clamp(min=1))
    return torch.stack(shares).to(deltas.dtype)


def norms_by_group(vectors: TaskVectors, grouping: str) -> Float[Tensor, "T G"]:
    """Euclidean length of every task vector within each group of parameters, in parameter units.

    Groups come in the order of `groups_of`. Their squares sum to the squared length of the whole.
    Raises ValueError for an unknown grouping. Derived in notebooks/01_task_vectors.
    """
    names, numbers = groups_of(vectors.layout, grouping)
    deltas = dense(vectors.deltas)
    squares = deltas.new_zeros(len(vectors.tasks), len(names))
    for (start, stop), group in zip(vectors.layout.bounds, numbers, strict=True):
        # `norm` adds up millions of numbers with an error of 2e-4 in float32; `sum` does not
        squares[:, group] += deltas[:, start:stop].square().sum(dim=1)
    return squares.sqrt()
