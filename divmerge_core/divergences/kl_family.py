"""The Kullback-Leibler family: both directions, their sum, their mixtures; and plain entropy.

The formulas are those of `kernels/divergence.py`. On a GPU with Triton its fused kernel computes
them, unless the expert needs a gradient or logits are float64. The kernel is differentiable once,
and gives NaN for a row without a distribution, for which PyTorch raises ValueError.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.divergences.logspace import Parameter
from divmerge_core.kernels.backend import resolve_backend
from divmerge_core.kernels.divergence import fused_divergence, terms_and_slopes, weighted
from divmerge_core.kernels.expert_cache import log_softmax

BETA = Parameter("beta", 0.1, 1e-3, 1 - 1e-3)  # the kernel's range


def fusible(expert: Tensor, merged: Tensor) -> bool:
    """Whether `fused_divergence` would run on a GPU and give every gradient that is wanted."""
    wanted = expert.requires_grad and torch.is_grad_enabled()
    return resolve_backend("auto", expert, merged) == "triton" and not wanted


def divergence(expert: Tensor, merged: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """One of KINDS by the fused kernel where it serves, else by its definition and autograd."""
    if fusible(expert, merged):
        return fused_divergence(expert, merged, kind, beta=beta)
    return terms_and_slopes(log_softmax(expert), log_softmax(merged), kind, beta)[0].sum(-1)


@DIVERGENCES.register(
    "kl",
    formula=r"\sum_v p_v \log r",
    slope="-r",
    curvature=1.0,
    fused="kl",
    source="Kullback and Leibler 1951",
)
def kl(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    r"""Forward Kullback-Leibler divergence, KL(p || q) = sum_v p_v (log p_v - log q_v), in nats.

    p is the expert, q the merged model. At least 0, no upper bound; +inf where the merged model
    rules out an answer that the expert gives. Source: DivMerge (arXiv 2509.02108), Eq. 4 with D =
    KL.

    >>> kl(torch.zeros(1, 2), torch.zeros(1, 2)).item()
    0.0
    """
    return divergence(expert, merged, "kl")


@DIVERGENCES.register(
    "reverse_kl",
    formula=r"-\sum_v q_v \log r",
    slope=r"-\log r",
    curvature=1.0,
    fused="reverse_kl",
    source="Kullback and Leibler 1951",
)
def reverse_kl(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Reverse Kullback-Leibler divergence, KL(q || p), in nats: q is averaged over.

    At least 0, no upper bound; +inf, without a usable gradient, where the expert rules out an
    answer that the merged model gives. Not tested in the DivMerge paper.
    """
    return divergence(expert, merged, "reverse_kl")


@DIVERGENCES.register(
    "jeffreys",
    formula=r"\sum_v (p_v - q_v) \log r",
    slope=r"-r - \log r",
    symmetric=True,
    curvature=2.0,
    fused="jeffreys",
    source="Jeffreys 1946",
)
def jeffreys(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Jeffreys divergence, KL(p || q) + KL(q || p), in nats: the sum, not its half.

    At least 0, no upper bound; +inf, possibly without a usable gradient, where one side rules out
    an answer that the other gives.
    """
    return divergence(expert, merged, "jeffreys")


def skewed(beta: float) -> dict:
    """Facts of skew_js at beta; the bound is the entropy of a coin that shows q with beta."""
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    return {"symmetric": beta == 0.5, "bound": bound, "curvature": beta * (1 - beta)}


@DIVERGENCES.register(
    "js",
    formula=r"\frac12 \mathrm{KL}(p \Vert m) + \frac12 \mathrm{KL}(q \Vert m), m = \frac{p + q}{2}",
    slope=r"-\frac12 \log \frac{1 + r}{2}",
    metric="square root",
    fused="js",
    source="Lin 1991",
    **skewed(0.5),
)
def js(expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    r"""Jensen-Shannon divergence, (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats.

    Symmetric, between 0 and log 2. Source: DivMerge (arXiv 2509.02108), Eq. 4, D = JS (default).

    >>> round(js(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])).item(), 4)
    0.6931
    """
    return divergence(expert, merged, "js")


@DIVERGENCES.register(
    "skew_js",
    formula=r"(1 - \beta) \mathrm{KL}(p \Vert m) + \beta \mathrm{KL}(q \Vert m), "
    r"m = (1 - \beta) p + \beta q",
    slope=r"-\beta \log ((1 - \beta) r + \beta)",
    parameter=BETA,
    at=skewed,
    fused="js",
    source="Lin 1991; Nielsen 2020",
    **skewed(BETA.default),
)
def skew_js(
    expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"], *, beta: float = BETA.default
) -> Float[Tensor, "*A"]:
    """Skewed Jensen-Shannon divergence: JS with the share beta for the merged model, in nats.

    beta: in [0.001, 0.999], the weight of q in the mixture and of its own term; 1/2 is js. As beta
    goes to 0, skew_js / beta goes to reverse_kl; as it goes to 1, skew_js / (1 - beta) goes to kl.
    At most the entropy of a coin of chance beta. Raises ValueError for others.
    """
    BETA.check(beta)
    return divergence(expert, merged, "js", beta)


def entropy(logits: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Shannon entropy of the answer, 0 to log V: AdaMerging's objective (arXiv 2310.02575).

    No divergence: it sees no expert, so it stands outside the registry.
    """
    log_q = log_softmax(logits)
    return -weighted(log_q.exp(), log_q).sum(-1)
