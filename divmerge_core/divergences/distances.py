"""Distances between answers that are no average of logarithms, and one between hidden states."""

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.divergences.logspace import both_masked, difference
from divmerge_core.kernels.delta_storage import wide
from divmerge_core.kernels.expert_cache import log_softmax


@DIVERGENCES.register(
    "total_variation",
    formula=r"\frac12 \sum_v \lvert p_v - q_v \rvert",
    slope=r"-\frac12 \mathrm{sign}(r - 1)",
    symmetric=True,
    bound=1.0,
    metric="itself",
    source="Tsybakov 2009, section 2.4",
)
def total_variation(
    expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]
) -> Float[Tensor, "*A"]:
    """Total variation distance, sum_v |p_v - q_v| / 2: the largest difference over any event.

    Symmetric, between 0 and 1. Its f has a kink at 1, so near equality it is no Fisher metric.
    """
    return (log_softmax(expert).exp() - log_softmax(merged).exp()).abs().sum(-1) / 2


@DIVERGENCES.register(
    "triangular",
    formula=r"\sum_v \frac{(p_v - q_v)^2}{p_v + q_v}",
    slope=r"-4 r^2 / (1 + r)^2",
    symmetric=True,
    bound=2.0,
    metric="square root",
    curvature=1.0,
    source="Vincze 1981; Le Cam 1986",
)
def triangular(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Triangular discrimination (Vincze-Le Cam), sum_v (p_v - q_v)^2 / (p_v + q_v).

    Symmetric, between 0 and 2.
    """
    log_p, log_q = log_softmax(expert), log_softmax(merged)
    share = torch.tanh(difference(log_p, log_q) / 2)  # (p - q) / (p + q), where both may underflow
    return ((log_p.exp() + log_q.exp()) * share.square()).sum(-1)


@DIVERGENCES.register(
    "squared_l2",
    family="other",
    formula=r"\sum_v (p_v - q_v)^2",
    slope="2 (q_v - p_v)",
    symmetric=True,
    bound=2.0,
    metric="square root",
    source="Brier 1950",
)
def squared_l2(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Squared Euclidean distance of the probabilities: Brier's score, with p for the outcome.

    Symmetric, between 0 and 2. Near equality it is curved, but not as the Fisher metric is.
    """
    return (log_softmax(expert).exp() - log_softmax(merged).exp()).square().sum(-1)


@DIVERGENCES.register(
    "logit_mse",
    family="other",
    formula=r"\frac1V \sum_v (\log r - \overline{\log r})^2",
    symmetric=True,
    metric="square root",
    source="Ba and Caruana 2014",
)
def logit_mse(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Mean squared difference of the logits, each side centred: the variance of log p_v - log q_v.

    Logits are defined up to a constant, so a row's mean over V is taken off both sides; the mean
    square is over the classes that are not masked on both sides. In squared nats, at least 0, no
    upper bound; +inf, with gradient 0, where one side alone masks a class.
    """
    log_p, log_q = log_softmax(expert), log_softmax(merged)
    ratio, both = difference(log_p, log_q), both_masked(log_p, log_q)
    never = ratio.isinf()
    ratio = ratio.masked_fill(never, 0.0)
    count = (~both).sum(-1, keepdim=True)
    centred = (ratio - ratio.sum(-1, keepdim=True) / count).masked_fill(both, 0.0)
    mean = (centred.square() / count).sum(-1)
    return mean.masked_fill(never.any(-1), torch.inf)


def cosine(expert: Float[Tensor, "*A H"], merged: Float[Tensor, "*A H"]) -> Float[Tensor, "*A"]:
    """1 minus the cosine of two hidden states, 0 to 2: for a problem whose `forward` returns these.

    No divergence of answers: it stands outside the registry. A state of length 0 counts as
    orthogonal to every other.
    """
    precision = wide(torch.promote_types(expert.dtype, merged.dtype))
    return 1 - torch.cosine_similarity(expert.to(precision), merged.to(precision), dim=-1)
