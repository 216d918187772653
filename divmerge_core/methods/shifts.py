"""Shifts of a layer's merged delta that are fitted to the weights alone, without any input.

The pieces of `doge` and `wudi` in methods/subspace.py.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.linalg import rank_of, truncated


def check_fit(units: str, steps: int, lr: float) -> None:
    """Raise ValueError for options of a fit that are out of range."""
    if units not in ("relative", "absolute"):
        raise ValueError(f"units must be 'relative' or 'absolute', got {units!r}")
    if steps < 0 or not 0 < lr < float("inf"):
        raise ValueError(
            f"steps must be 0 or more and lr above 0 and finite, got {steps} and {lr}; the authors "
            "take 400 steps"
        )


def descend(
    name: str, start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, lr: float
) -> Tensor:
    """Where Adam arrives from `start`. Raises ValueError where a gradient is not finite."""
    place = start.clone()
    adam = torch.optim.Adam([place], lr=lr)
    for step in range(steps):
        place.grad = gradient(place)
        if not torch.isfinite(place.grad).all():
            raise ValueError(
                f"{name}: the gradient is not finite at step {step}; lower lr (now {lr}) or check "
                "the experts for extreme weights"
            )
        adam.step()
    return place


def cutoffs(
    deltas: Float[Tensor, "T N"], places: Sequence[slice], keep: float
) -> Float[Tensor, " T"]:
    """The size of every task's smallest entry among its largest share `keep` at these places."""

    def cutoff(row: Tensor) -> Tensor:
        sizes = torch.cat([row[place] for place in places]).abs()
        return sizes.kthvalue(len(sizes) - max(1, round(keep * len(sizes))) + 1).values

    return torch.stack([cutoff(row) for row in deltas])


def shared_basis(deltas: Float[Tensor, "T M K"], fraction: int) -> Float[Tensor, "M q"]:
    """Orthonormal output directions that the experts share, at most min(M, K) // fraction.

    The leading left singular vectors of every expert's leading min(M, K) // T.
    """
    size = min(deltas.shape[1:])

    def leading(matrix: Tensor, count: int) -> Tensor:
        left, values, _ = truncated(matrix, count)
        return left[:, : rank_of(values, tuple(matrix.shape))]

    own = torch.cat([leading(delta, size // len(deltas)) for delta in deltas], dim=1)
    return leading(own, size // fraction) if own.shape[1] else own


def doge_gradient(
    deltas: Float[Tensor, "T M K"], coeffs: Float[Tensor, " T"], shared: Float[Tensor, "M q"]
) -> Callable[[Tensor], Tensor]:
    """The gradient, off the shared directions, of DOGE's loss at a shift [M, K].

    The loss is sum_t sum_m <D_t, D_t - sum_u coeffs_u (D_u + shift)>^2, with the inner product of
    rows m. A shift enters through its products with the deltas alone.
    """
    total = coeffs.sum()
    start = (deltas * (deltas - torch.einsum("t,tmk->mk", coeffs, deltas))).sum(dim=2)  # [T, M]

    def gradient(shift: Tensor) -> Tensor:
        gaps = start - total * torch.einsum("tmk,mk->tm", deltas, shift)
        along = -2 * total * torch.einsum("tm,tmk->mk", gaps, deltas)
        return along - shared @ (shared.T @ along)

    return gradient


def wudi_gradient(deltas: Float[Tensor, "T M K"]) -> Callable[[Tensor], Tensor]:
    """The gradient of sum_t |(sum_u D_u + shift - D_t) D_t^T|^2 / |D_t|^2 at a shift [M, K].

    It is linear in the shift, so two matrices stand for all experts.
    """
    total, width = deltas.sum(dim=0), deltas.shape[2]
    start, spread = torch.zeros_like(total), deltas.new_zeros(width, width)
    for delta in deltas:
        if delta.any():
            gram = delta.T @ delta / delta.square().sum()
            start += (total - delta) @ gram
            spread += gram
    return lambda shift: 2 * (start + shift @ spread)
