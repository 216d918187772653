"""Task vectors as matrices: singular values, how many of them count, and whether one task's matrix
lies in the space that another, or the merged one, spans."""

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

    r = min(M, K). From the eigenvalues of D D^T or D^T D in float64: what an SVD would take
    minutes for, with 30 thousand rows, takes a matrix product. Squares below 1e-15 of the largest
    are rounding.
    """
    wide = matrix.double()
    small = wide @ wide.T if matrix.shape[0] <= matrix.shape[1] else wide.T @ wide
    squares, directions = torch.linalg.eigh(small)
    return squares.flip(0).clamp(min=0), directions.flip(1)


def singular_values(matrix: Float[Tensor, "M K"]) -> Float[Tensor, " r"]:
    """The r = min(M, K) singular values, largest first, in float64.

    Their squares sum to the squared Frobenius norm. Values below 3e-8 of the largest are rounding.
    """
    return gram(matrix)[0].sqrt()


def stable_rank(values: Float[Tensor, " r"]) -> float:
    """Sum of squared singular values over the largest squared: 1 to r, and 0 for a zero matrix.

    Never above the rank, and hardly moved by small singular values.
    """
    top = values.max().square()
    return float(values.square().sum() / top) if top > 0 else 0.0


def effective_rank(values: Float[Tensor, " r"]) -> float:
    """exp of the entropy of the singular values' shares: 1 to r, and 0 for a zero matrix.

    r where all are equal, 1 where one stands alone. Source: Roy and Vetterli 2007.
    """
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def dominant(squares: Float[Tensor, " r"], residual: float = RESIDUAL) -> int:
    """How many leading singular directions leave at most `residual` of the norm unexplained.

    squares: squared singular values, largest first. The smallest k with
    ||D - D_k||_F <= residual * ||D||_F (Marczak et al. 2025, Eq. 6). 0 for a zero matrix. Raises
    ValueError unless residual is in [0, 1).
    """
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be in [0, 1), got {residual}; the paper takes {RESIDUAL}")
    left = squares.flip(0).cumsum(0).flip(0)  # left[k]: what k directions leave
    if not left[0] > 0:
        return 0
    return int((left > residual**2 * left[0]).sum())


def alignment(
    matrix: Float[Tensor, "M K"],
    others: Sequence[Float[Tensor, "M K"]],
    *,
    residual: float = RESIDUAL,
) -> list[float]:
    r"""Subspace alignment ratio (SAR) of every other matrix with this one.

    SAR(D; M) = ||U_k U_k^T D||_F / ||D||_F, with U_k the k dominant left singular directions of M
    (see `dominant`). Between 0 and 1: 1 where D's columns lie in the space that M spans, 0 where
    they are orthogonal to it or D is zero. M's own is sqrt(1 - residual^2) at least. It depends on
    neither matrix's length. Source: Marczak et al. 2025 (arXiv 2502.04959), Eq. 5 and 6. Derived in
    notebooks/12_interference.
    """
    squares, directions = gram(matrix)
    count = dominant(squares, residual)
    found = []
    for other in others:
        whole = other.double().square().sum()
        if count == 0 or whole == 0:
            found.append(0.0)
            continue
        if matrix.shape[0] <= matrix.shape[1]:  # the directions are the left ones
            kept = directions[:, :count].T @ other.double()
        else:  # U_k^T = S_k^-1 V_k^T M^T
            kept = (directions[:, :count].T @ (matrix.double().T @ other.double())) / squares[
                :count, None
            ].sqrt()
        found.append(float((kept.square().sum() / whole).clamp(max=1).sqrt()))
    return found


def inner_matrices(vectors: TaskVectors) -> dict[str, Float[Tensor, "T M K"]]:
    """Every task's change of every matrix outside the embeddings, by name.

    The matrices that spectral methods are about: linear layers.
    """
    deltas = dense(vectors.deltas)
    return {
        name: deltas[:, place].unflatten(1, shape)
        for name, place, shape in matrices(vectors.layout)
        if kind_of(name) != "embedding"
    }


def spectra(vectors: TaskVectors) -> dict[str, Float[Tensor, "T r"]]:
    """Singular values of every task's change of every linear layer, by the matrix's name."""
    return {
        name: torch.stack([singular_values(delta) for delta in deltas])
        for name, deltas in inner_matrices(vectors).items()
    }


def mean_alignment(
    vectors: TaskVectors, change: Float[Tensor, " N"], *, residual: float = RESIDUAL
) -> list[float]:
    """Every task's SAR with a merged model's change, mean over linear layers.

    change: merged parameters minus the base's. Raises ValueError where there is no linear layer.
    """
    merged = vectors.layout.unflatten(change)
    rows = [
        alignment(merged[name], list(deltas), residual=residual)
        for name, deltas in inner_matrices(vectors).items()
    ]
    if not rows:
        raise ValueError("no matrix outside the embeddings; alignment is one of linear layers")
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def alignment_between(vectors: TaskVectors, *, residual: float = RESIDUAL) -> Float[Tensor, "T T"]:
    """SAR of every task's change with every other task's, mean over linear layers.

    Entry [i, j]: how much of task i's change lies in the space that task j's spans; not symmetric.
    """
    rows = [
        torch.tensor(mean_alignment(vectors, change, residual=residual), dtype=torch.float64)
        for change in dense(vectors.deltas)
    ]
    return torch.stack(rows, dim=1)


def chance_alignment(matrix: Float[Tensor, "M K"], *, residual: float = RESIDUAL) -> float:
    """What the SAR with this matrix is where the other knows nothing of it: sqrt(k / M).

    k directions out of M hold the share k / M of the squared length of a matrix whose columns
    point anywhere. A SAR says something only above it.
    """
    return (dominant(gram(matrix)[0], residual) / matrix.shape[0]) ** 0.5
