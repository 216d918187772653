"""Matrix pieces that several merging methods share."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.vectors import Layout


def polar(matrix: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """The nearest matrix with orthonormal rows or columns: U V^T of the thin SVD U S V^T.

    A zero matrix has no such factor and stays zero.
    """
    if not matrix.any():
        return torch.zeros_like(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def truncated(
    matrix: Float[Tensor, "M K"], rank: int
) -> tuple[Float[Tensor, "M r"], Float[Tensor, " r"], Float[Tensor, "r K"]]:
    """The leading `rank` singular triples (left, values, right) of a matrix, largest first."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def matrices(layout: Layout) -> Iterator[tuple[str, slice, tuple[int, ...]]]:
    """(name, place in the flat vector, shape) of every tensor with two axes."""
    for name, shape, (start, stop) in zip(layout.names, layout.shapes, layout.bounds, strict=True):
        if len(shape) == 2:
            yield name, slice(start, stop), shape
