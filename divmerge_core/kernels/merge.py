r"""The merge itself and its gradient, over a whole model at once.

Forward,  theta = theta_0 + sum_t Lambda[t, g] tau_t        on each group g of parameters;
gradient, dL/dLambda[t, g] = < dL/dtheta_g, tau_{t,g} >.

Both are limited by memory: forward reads base and T deltas and writes theta, (T + 2) N numbers;
the gradient reads dL/dtheta and T deltas, (T + 1) N. A `Segments` table says which group each
stretch of the flat vector belongs to; neighbours of one group are one stretch, so that a merge with
one coefficient per task is a single row-times-matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Stretches (start, stop, group) that partition the N parameters, in order."""

    rows: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, bounds: Sequence[tuple[int, int]], groups: Sequence[int]) -> "Segments":
        """From every tensor's (start, stop) and group; neighbours of one group are joined.

        Raises ValueError unless the bounds tile 0..N without gap or overlap.
        """
        rows: list[tuple[int, int, int]] = []
        for (start, stop), group in zip(bounds, groups, strict=True):
            if start != (rows[-1][1] if rows else 0) or stop < start:
                raise ValueError(f"tensors must lie end to end, got bounds {list(bounds)[:5]}")
            if rows and rows[-1][2] == group:
                rows[-1] = (rows[-1][0], stop, group)
            else:
                rows.append((start, stop, group))
        return cls(tuple(rows))

    @property
    def num_groups(self) -> int:
        """G: groups are numbered 0..G-1."""
        return 1 + max(group for *_, group in self.rows)


def check(deltas: Tensor, coeffs: Tensor, segments: Segments) -> None:
    """Raise ValueError unless coeffs is [T, G] and the segments tile the N columns of deltas."""
    expected = (deltas.shape[0], segments.num_groups)
    if tuple(coeffs.shape) != expected:
        raise ValueError(
            f"coefficients must be [T, G] = {list(expected)}, one per task and group, "
            f"got {list(coeffs.shape)}"
        )
    if segments.rows[-1][1] != deltas.shape[1]:
        raise ValueError(
            f"segments end at {segments.rows[-1][1]}, deltas have {deltas.shape[1]} columns; "
            "make both from one layout"
        )


@torch.no_grad()
def grouped_merge(
    base: Float[Tensor, " N"],
    deltas: Float[Tensor, "T N"],
    coeffs: Float[Tensor, "T G"],
    segments: Segments,
    *,
    out: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """theta = theta_0 + sum_t Lambda[t, g] tau_t on each group g (DivMerge Eq. 3).

    Writes into `out` if given, else into a new vector. Differentiate with `grouped_inner`.
    Raises ValueError where the shapes do not fit together.
    """
    check(deltas, coeffs, segments)
    out = torch.empty_like(base) if out is None else out
    coeffs = coeffs.to(base.dtype)
    for start, stop, group in segments.rows:  # [1, T] x [T, n] + [1, n]: one pass, no temporary
        torch.addmm(
            base[None, start:stop],
            coeffs[None, :, group],
            deltas[:, start:stop],
            out=out[None, start:stop],
        )
    return out


@torch.no_grad()
def grouped_inner(
    grad: Float[Tensor, " N"], deltas: Float[Tensor, "T N"], segments: Segments
) -> Float[Tensor, "T G"]:
    """dL/dLambda[t, g] = <grad_g, tau_{t,g}>, the gradient of `grouped_merge` in its coefficients.

    Segments are added in order, so that the result is bitwise the same on every run.
    """
    result = grad.new_zeros(deltas.shape[0], segments.num_groups)
    check(deltas, result, segments)
    for start, stop, group in segments.rows:
        result[:, group] += deltas[:, start:stop] @ grad[start:stop]
    return result
