"""Matrix pieces that several merging methods share."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.merging.task_vectors import Layout


def svd(matrix: Float[Tensor, "M K"]) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD (left [M, r], values [r], right [r, K]), values largest first.

    LAPACK's float32 routine does not converge on some finite matrices, mostly of low rank; these
    are decomposed in float64. Raises LinAlgError where that fails too, as for NaN.
    """
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        parts = torch.linalg.svd(matrix.double(), full_matrices=False)
        return tuple(part.to(matrix.dtype) for part in parts)


def polar(matrix: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """The nearest matrix with orthonormal rows or columns: U V^T of the thin SVD U S V^T.

    A zero matrix has no such factor and stays zero.
    """
    if not matrix.any():
        return torch.zeros_like(matrix)
    left, _, right = svd(matrix)
    return left @ right


def truncated(
    matrix: Float[Tensor, "M K"], rank: int
) -> tuple[Float[Tensor, "M r"], Float[Tensor, " r"], Float[Tensor, "r K"]]:
    """The leading `rank` singular triples (left, values, right) of a matrix, largest first."""
    left, values, right = svd(matrix)
    return left[:, :rank], values[:rank], right[:rank]


def matrices(layout: Layout) -> Iterator[tuple[str, slice, tuple[int, ...]]]:
    """(name, place in the flat vector, shape) of every tensor with two axes."""
    for name, shape, (start, stop) in zip(layout.names, layout.shapes, layout.bounds, strict=True):
        if len(shape) == 2:
            yield name, slice(start, stop), shape


def cutoff(sizes: Float[Tensor, " n"], keep: float) -> Float[Tensor, ""]:
    """The smallest of the largest `keep` share of numbers, at least one of them."""
    return sizes.kthvalue(len(sizes) - max(1, round(keep * len(sizes))) + 1).values


def largest(values: Float[Tensor, " n"], keep: float) -> Float[Tensor, " n"]:
    """The largest `keep` share of entries (at least one; all of equal size); the rest is zero."""
    size = values.abs()
    return torch.where(size < cutoff(size, keep), 0, values)


def elected(deltas: Float[Tensor, "T N"], keep: float) -> Float[Tensor, "T N"]:
    """What TIES leaves of every task vector: large entries of the elected sign, the rest at 0.

    Each row keeps its largest `keep` share of entries, at least one, and equals of the smallest of
    these; every column then takes the sign of its sum, and entries against it go (all if it is 0).
    """
    kept = torch.empty_like(deltas)
    for row, delta in zip(kept, deltas, strict=True):  # one magnitude copy at a time
        row.copy_(largest(delta, keep))
    sign = kept.sum(dim=0).sign()  # [N]
    return kept.masked_fill_(kept * sign <= 0, 0)


def rank_of(
    values: Float[Tensor, " r"], shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> int:
    """How many singular values of a matrix, largest first, stand above its rounding errors.

    shape: of the matrix; dtype: what its entries were rounded to, where `values` are wider.
    """
    rounding = max(shape) * torch.finfo(dtype or values.dtype).eps
    return int((values > values[:1] * rounding).sum())


def isometry(matrix: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """The part of the polar factor that the matrix determines: U V^T over nonzero singular values.

    It equals `polar` at full rank. Below, `polar` also fills in directions that the matrix says
    nothing about, and they are whatever the SVD's routine happens to return.
    """
    left, values, right = svd(matrix)
    rank = rank_of(values, tuple(matrix.shape))
    return left[:, :rank] @ right[:rank]
