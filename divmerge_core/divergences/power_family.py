"""Divergences made of powers of the two answers: alpha, Renyi, Hellinger and both chi-squared.

Where a power is negative they have no bound, and grow with the ratio of probabilities itself, not
with its logarithm. Beyond a factor of e^30 these go on as a tangent, so that value and gradient
stay finite where float32 would overflow. Where one side rules out an answer that the other gives,
they are +inf, without a usable gradient.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.divergences.kl_family import kl, reverse_kl
from divmerge_core.divergences.logspace import Parameter, expm1_bounded, log_power_sum
from divmerge_core.kernels.expert_cache import log_softmax

ALPHA = Parameter("alpha", 0.5, -3.0, 3.0, ((-1.0, "kl"), (1.0, "reverse_kl")))
ORDER = Parameter("order", 0.5, 0.01, 10.0, ((1.0, "kl"),))


def amari(alpha: float) -> dict:
    """Facts of alpha at a value."""
    bound = 4 / (1 - alpha**2) if abs(alpha) < 1 else None
    metric = "square root" if alpha == 0 else None
    return {"symmetric": alpha == 0, "bound": bound, "metric": metric, "curvature": 1.0}


@DIVERGENCES.register(
    "alpha",
    formula=r"\frac{4}{1 - \alpha^2} \bigl(1 - \sum_v q_v r^{(1 - \alpha) / 2}\bigr)",
    slope=r"-\frac{2}{1 - \alpha} r^{(1 - \alpha) / 2}",
    parameter=ALPHA,
    at=amari,
    source="Amari 1985",
    **amari(ALPHA.default),
)
def alpha(
    expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"], *, alpha: float = ALPHA.default
) -> Float[Tensor, "*A"]:
    """Amari's alpha-divergence: one family with KL at -1, Hellinger at 0 and reverse KL at 1.

    4 / (1 - alpha^2) times (1 - sum_v p_v^a q_v^b), with a = (1 - alpha) / 2 and b = 1 - a. alpha:
    in [-3, 3]. At 0 it is four times `hellinger`, at -3 half of `chi_squared`, at 3 half of
    `reverse_chi_squared`. At most 4 / (1 - alpha^2) for |alpha| < 1, else without a bound. Raises
    ValueError for other alphas, and for those nearer than 0.01 to -1 or 1.
    """
    ALPHA.check(alpha)
    if abs(alpha) == 1:
        return kl(expert, merged) if alpha == -1 else reverse_kl(expert, merged)
    log_p, log_q = log_softmax(expert), log_softmax(merged)
    a, b = (1 - alpha) / 2, (1 + alpha) / 2
    if abs(alpha) > 1:
        return expm1_bounded(log_power_sum(log_p, log_q, a)) / -(a * b)
    # a p + b q - p^a q^b: no term is negative, so little is lost where all are small
    terms = a * log_p.exp() + b * log_q.exp() - torch.exp(a * log_p + b * log_q)
    return terms.sum(-1) / (a * b)


def ordered(order: float) -> dict:
    """Facts of renyi at an order."""
    return {"symmetric": order == 0.5, "curvature": order}


@DIVERGENCES.register(
    "renyi",
    family="other",
    formula=r"\frac{1}{\alpha - 1} \log \sum_v q_v r^\alpha",
    slope=r"-r^\alpha / \sum_u q_u r_u^\alpha",
    parameter=ORDER,
    at=ordered,
    source="Renyi 1961",
    **ordered(ORDER.default),
)
def renyi(
    expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"], *, order: float = ORDER.default
) -> Float[Tensor, "*A"]:
    """Renyi divergence of an order: log(sum_v p_v^order q_v^(1 - order)) / (order - 1), in nats.

    A function of an alpha-divergence, so close to it, but with the logarithm's slow growth. order:
    in [0.01, 10]; 1 is kl, 1/2 twice the Bhattacharyya distance. No upper bound. Raises ValueError
    for other orders, and for those nearer than 0.01 to 1.
    """
    ORDER.check(order)
    if order == 1:
        return kl(expert, merged)
    return log_power_sum(log_softmax(expert), log_softmax(merged), order) / (order - 1)


@DIVERGENCES.register(
    "hellinger",
    formula=r"\frac12 \sum_v (\sqrt{p_v} - \sqrt{q_v})^2",
    slope=r"-\frac12 \sqrt{r}",
    symmetric=True,
    bound=1.0,
    metric="square root",
    curvature=0.25,
    source="Hellinger 1909",
)
def hellinger(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Squared Hellinger distance, half the squared distance of the roots: 1 - sum sqrt(p q).

    Symmetric, between 0 and 1.
    """
    roots = torch.exp(log_softmax(expert) / 2) - torch.exp(log_softmax(merged) / 2)
    return roots.square().sum(-1) / 2


@DIVERGENCES.register(
    "chi_squared",
    formula=r"\sum_v \frac{(p_v - q_v)^2}{q_v}",
    slope="-r^2",
    curvature=2.0,
    source="Pearson 1900",
)
def chi_squared(
    expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]
) -> Float[Tensor, "*A"]:
    """Pearson's chi-squared divergence, sum_v (p_v - q_v)^2 / q_v: the merged model divides.

    At least 0, no upper bound: it grows with p / q itself. Beyond e^30 it goes on as a tangent.
    """
    return expm1_bounded(log_power_sum(log_softmax(expert), log_softmax(merged), 2.0))


@DIVERGENCES.register(
    "reverse_chi_squared",
    formula=r"\sum_v \frac{(p_v - q_v)^2}{p_v}",
    slope="2 / r",
    curvature=2.0,
    source="Neyman 1949",
)
def reverse_chi_squared(
    expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]
) -> Float[Tensor, "*A"]:
    """Neyman's chi-squared divergence, sum_v (p_v - q_v)^2 / p_v: the expert divides.

    At least 0, no upper bound: it grows with q / p itself. Beyond e^30 it goes on as a tangent.
    """
    return chi_squared(merged, expert)
