"""Singular values of task matrices, their ranks, and subspace alignment between tasks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.interference.weights import kind_of
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import matrices
from divmerge_core.merging.task_vectors import TaskVectors

RESIDUAL = 0.05  # of Marczak et al. 2025


def gram(matrix: Float[Tensor, "M K"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "r r"]]:
    """Squared singular values, largest first, and singular vectors of the matrix's shorter side.

    From the eigenvalues of D D^T or D^T D in float64, much faster than an SVD of 30 thousand rows;
    squares below 1e-15 of the largest are rounding errors.
    """
    wide = matrix.double()
    small = wide @ wide.T if matrix.shape[0] <= matrix.shape[1] else wide.T @ wide
    squares, directions = torch.linalg.eigh(small)
    return squares.flip(0).clamp(min=0), directions.flip(1)


def singular_values(matrix: Float[Tensor, "M K"]) -> Float[Tensor, " r"]:
    """The r = min(M, K) singular values, largest first, in float64; see `gram`."""
    return gram(matrix)[0].sqrt()


def stable_rank(values: Float[Tensor, " r"]) -> float:
    """Sum of squared singular values over the largest squared: 1 to r, and 0 for a zero matrix."""
    top = values.max().square()
    return float(values.square().sum() / top) if top > 0 else 0.0


def effective_rank(values: Float[Tensor, " r"]) -> float:
    """exp of the entropy of normalised singular values: 1 to r, 0 for a zero matrix (Roy 2007)."""
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp()) if values.any() else 0.0


def dominant(squares: Float[Tensor, " r"], residual: float = RESIDUAL) -> int:
    """The smallest k with ||D - D_k||_F <= residual * ||D||_F; 0 for a zero matrix.

    squares: squared singular values, largest first. Raises ValueError unless residual is in [0, 1).
    Source: Marczak et al. 2025, Eq. 6.
    """
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be in [0, 1), got {residual}; the paper takes {RESIDUAL}")
    left = squares.flip(0).cumsum(0).flip(0)  # left[k]: what k directions leave
    return int((left > residual**2 * left[0]).sum())


def alignment(
    matrix: Float[Tensor, "M K"],
    others: Sequence[Float[Tensor, "M K"]],
    *,
    residual: float = RESIDUAL,
) -> list[float]:
    """Subspace alignment ratio (SAR) of every other matrix with this one, 0 to 1.

    SAR(D; M) = ||U_k U_k^T D||_F / ||D||_F, with U_k the k dominant left singular vectors of M (see
    `dominant`); 0 where D is zero. Source: Marczak et al. 2025 (arXiv 2502.04959), Eq. 5 and 6.
    Derived in notebooks/12_interference.
    """
    squares, directions = gram(matrix)
    count = dominant(squares, residual)
    basis = directions[:, :count]
    if matrix.shape[0] > matrix.shape[1]:  # right singular vectors: U_k = M V_k S_k^-1
        basis = matrix.double() @ basis / squares[:count].sqrt()
    ratios = [(basis.T @ other.double()).norm() / other.double().norm() for other in others]
    return [float(ratio.nan_to_num(nan=0.0).clamp(max=1)) for ratio in ratios]


def inner_matrices(vectors: TaskVectors) -> dict[str, Float[Tensor, "T M K"]]:
    """Every task's change of every linear layer (matrices outside the embeddings), by name."""
    deltas = dense(vectors.deltas)
    return {
        name: deltas[:, place].unflatten(1, shape)
        for name, place, shape in matrices(vectors.layout)
        if kind_of(name) != "embedding"
    }


def mean_alignment(
    vectors: TaskVectors, change: Float[Tensor, " N"], *, residual: float = RESIDUAL
) -> list[float]:
    """Every task's SAR with a change of the base's parameters, mean over linear layers.

    Raises ValueError where there is no linear layer.
    """
    merged = vectors.layout.unflatten(change)
    rows = [
        alignment(merged[name], list(deltas), residual=residual)
        for name, deltas in inner_matrices(vectors).items()
    ]
    if not rows:
        raise ValueError("no matrix outside the embeddings; alignment needs linear layers")
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def alignment_between(vectors: TaskVectors, *, residual: float = RESIDUAL) -> Float[Tensor, "T T"]:
    """[i, j]: SAR of task i's matrices with task j's, mean over linear layers; not symmetric."""
    rows = [mean_alignment(vectors, one, residual=residual) for one in dense(vectors.deltas)]
    return torch.tensor(rows, dtype=torch.float64).T


def chance_alignment(matrix: Float[Tensor, "M K"], *, residual: float = RESIDUAL) -> float:
    """Expected SAR with this matrix of one with random columns: sqrt(k / M), see `dominant`."""
    return (dominant(gram(matrix)[0], residual) / matrix.shape[0]) ** 0.5
