"""How far the merged model's answer is from the expert's: one number per position, in nats.

Every divergence takes logits, expert first, and returns `[*A]`, unreduced. All work in log space,
so they stay finite for logits of +-1e4 and for classes masked with -inf on both sides. In float32,
values below about 1e-7 are rounding, and may be negative.

On a GPU with Triton the fused kernel of that name stands in, unless the expert needs a gradient or
logits are float64. It is differentiable once, and a row without a distribution, for which these
raise ValueError, gives NaN there.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.answers import log_softmax
from divmerge_core.kernels.backend import resolve
from divmerge_core.kernels.divergence import fused_divergence
from divmerge_core.registry import Registry

DIVERGENCES = Registry("divergence")


def fusible(expert: Tensor, merged: Tensor) -> bool:
    """Whether `fused_divergence` would run on a GPU, and would find all gradients wanted."""
    wanted = expert.requires_grad and torch.is_grad_enabled()
    return resolve("auto", expert, merged) == "triton" and not wanted


def cross(weight: Float[Tensor, "*A V"], log_ratio: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Sum over V of weight * log_ratio, with 0 * anything = 0 in value and in gradient."""
    return (weight * log_ratio.masked_fill(weight == 0, 0.0)).sum(-1)


def difference(log_a: Float[Tensor, "*A V"], log_b: Float[Tensor, "*A V"]) -> Float[Tensor, "*A V"]:
    """log a - log b, with -inf - -inf = 0: a class that both rule out tells nothing."""
    both = torch.isneginf(log_a) & torch.isneginf(log_b)
    return log_a.masked_fill(both, 0.0) - log_b.masked_fill(both, 0.0)


@DIVERGENCES.register(
    "kl", symmetric=False, bound=None, metric=None, source="Kullback and Leibler 1951"
)
def kl(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    r"""Forward Kullback-Leibler divergence, KL(p || q) = sum_v p_v (log p_v - log q_v).

    p is the expert, q the merged model. At least 0, no upper bound; +inf where the merged model
    rules out an answer that the expert gives. Source: DivMerge (arXiv 2509.02108), Eq. 4 with D =
    KL.

    >>> kl(torch.zeros(1, 2), torch.zeros(1, 2)).item()
    0.0
    """
    if fusible(expert, merged):
        return fused_divergence(expert, merged, "kl")
    log_p, log_q = log_softmax(expert), log_softmax(merged)
    return cross(log_p.exp(), difference(log_p, log_q))


@DIVERGENCES.register(
    "reverse_kl", symmetric=False, bound=None, metric=None, source="Kullback and Leibler 1951"
)
def reverse_kl(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Reverse Kullback-Leibler divergence, KL(q || p): the merged model q is the reference.

    At least 0, no upper bound; +inf, without a usable gradient, where the expert rules out an
    answer that the merged model gives. Not tested in the DivMerge paper.
    """
    if fusible(expert, merged):
        return fused_divergence(expert, merged, "reverse_kl")
    return kl(merged, expert)


@DIVERGENCES.register(
    "js", symmetric=True, bound=math.log(2), metric="square root", source="Lin 1991"
)
def js(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    r"""Jensen-Shannon divergence, (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.

    Symmetric, between 0 and log 2. Source: DivMerge (arXiv 2509.02108), Eq. 4 with D = JS, its
    default.

    >>> round(js(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])).item(), 4)
    0.6931
    """
    if fusible(expert, merged):
        return fused_divergence(expert, merged, "js")
    log_p, log_q = log_softmax(expert), log_softmax(merged)
    dead = torch.isneginf(log_p) & torch.isneginf(log_q)  # logaddexp(-inf, -inf) has a NaN gradient
    log_p, log_q = log_p.masked_fill(dead, -1e30), log_q.masked_fill(dead, -1e30)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)  # in log space: p or q may underflow
    return (cross(log_p.exp(), log_p - log_m) + cross(log_q.exp(), log_q - log_m)) / 2


def entropy(logits: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Shannon entropy of the answer, 0 to log V: AdaMerging's objective (arXiv 2310.02575).

    No divergence: it sees no expert, so it stands outside the registry.
    """
    log_q = log_softmax(logits)
    return -cross(log_q.exp(), log_q)
