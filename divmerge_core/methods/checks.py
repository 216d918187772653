"""Checks that methods share: options before a merge, and the steps of a fit."""

import math
from collections.abc import Iterable

from torch import Tensor

from divmerge_core.merging.fit import LIMIT
from divmerge_core.merging.problem import Diverged


def check_choice(option: str, given: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless an option has one of its values."""
    if given not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}; got {given!r}")


def check_keep(keep: float) -> None:
    """Raise ValueError unless a share of entries to keep is in (0, 1]."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}; 0.2 keeps the largest fifth")


def require_finite(**options: float) -> None:
    """Raise ValueError for an option that is NaN or infinite."""
    for name, value in options.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}; 1.0 adds the merge as it is")


def require_positive(**options: int | float) -> None:
    """Raise ValueError for an option that is not above 0 and finite."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"{name} must be above 0 and finite, got {value}; leave it out for the default"
            )


def check_steps(method: str, steps: int, lr: float) -> None:
    """Raise ValueError unless there are 0 or more steps, of a size above 0."""
    if steps < 0 or not 0 < lr < math.inf:
        raise ValueError(
            f"{method}: steps must be 0 or more and lr above 0 and finite, got {steps} and {lr}"
        )


def check_finite(method: str, numbers: Tensor, where: int | str, lr: float) -> None:
    """Raise Diverged where a step's loss, logits or parameters contain NaN or +inf."""
    if not (numbers < math.inf).all():
        raise Diverged(
            f"{method}: NaN or inf at step {where}; lower lr (now {lr}) or check the experts and "
            "their inputs for extreme values"
        )


def check_size(method: str, what: str, size: Tensor, bound: float, where: int, lr: float) -> None:
    """Raise Diverged where a fitted quantity, or its effect, is NaN or exceeds its bound."""
    if not size <= bound:
        raise Diverged(
            f"{method}: {what} is {size.item():.3g} at step {where}, above {bound:.3g}; lower lr "
            f"(now {lr}) or check the experts and their inputs for extreme values"
        )


def check_distance(
    method: str, distance: Tensor, farthest: Tensor, where: int | str, lr: float
) -> None:
    """Raise Diverged where parameters are LIMIT times as far from the base as any expert, or NaN.

    distance: of the merged parameters from the base; farthest: of the experts. Parameter units.
    """
    if not distance <= LIMIT * farthest:
        raise Diverged(
            f"{method}: after step {where} the parameters are {distance.item():.3g} from the base, "
            f"over {LIMIT:g} times as far as any expert ({farthest.item():.3g}); lower lr (now "
            f"{lr})"
        )
