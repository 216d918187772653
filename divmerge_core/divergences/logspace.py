"""Differences and power sums in log space, and the range of a divergence's parameter."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TANGENT_FROM = 30.0  # above it expm1 continues as its tangent: 1e13 squared is finite in float32


@dataclass(frozen=True)
class Parameter:
    """What a divergence may be given besides logits: its name, default and range, ends included.

    limits: values at which the formula is 0 / 0, and the divergence that it tends to there.
    """

    name: str
    default: float
    low: float
    high: float
    limits: tuple[tuple[float, str], ...] = ()

    def check(self, value: float) -> None:
        """Raise ValueError unless value is in the range and no nearer than 0.01 to a limit."""
        if not self.low <= value <= self.high:
            raise ValueError(
                f"{self.name} must be in [{self.low:g}, {self.high:g}], got {value:g}; the "
                f"default is {self.default:g}"
            )
        for limit, name in self.limits:
            if 0 < abs(value - limit) < 0.01:
                raise ValueError(
                    f"{self.name}={value:g} is too near {limit:g} for float32; give "
                    f"{limit:g} itself, where it is {name}"
                )


def both_masked(log_a: Float[Tensor, "*A V"], log_b: Float[Tensor, "*A V"]) -> Tensor:
    """The classes that are -inf on both sides: they count for nothing."""
    return torch.isneginf(log_a) & torch.isneginf(log_b)


def difference(log_a: Float[Tensor, "*A V"], log_b: Float[Tensor, "*A V"]) -> Float[Tensor, "*A V"]:
    """log a - log b, with -inf - -inf = 0."""
    both = both_masked(log_a, log_b)
    return log_a.masked_fill(both, 0.0) - log_b.masked_fill(both, 0.0)


def log_power_sum(
    log_p: Float[Tensor, "*A V"], log_q: Float[Tensor, "*A V"], power: float
) -> Float[Tensor, "*A"]:
    """log sum_v p_v^power q_v^(1 - power): 0 where p = q, for every power."""
    both = both_masked(log_p, log_q)
    terms = power * log_p.masked_fill(both, 0.0) + (1 - power) * log_q.masked_fill(both, 0.0)
    return terms.masked_fill(both, -torch.inf).logsumexp(-1)


def expm1_bounded(x: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """exp(x) - 1, continued above x = 30 by its tangent: value and slope stay finite."""
    tangent = math.exp(TANGENT_FROM) * (1 + x - TANGENT_FROM) - 1
    return torch.where(x > TANGENT_FROM, tangent, torch.expm1(x.clamp(max=TANGENT_FROM)))
