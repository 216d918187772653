"""Answers as log-probabilities, and two ways to keep an expert's answers in less memory.

An expert never changes, so its answers need computing once. A row of V classes takes 4 V bytes in
float32. `cache_expert` keeps it in 2 V bytes, or only its k most probable classes in 12 k + 4.
"""

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from divmerge_core.kernels.delta_storage import wide


class Undefined(ValueError):
    """Logits that define no distribution."""


def log_softmax(logits: Float[Tensor, "*A V"]) -> Float[Tensor, "*A V"]:
    """Log-probabilities in float32 or wider: half precision is widened before any arithmetic.

    Raises Undefined where a row holds NaN, +inf or nothing but -inf: it has no distribution.
    """
    result = torch.log_softmax(logits.to(wide(logits.dtype)), dim=-1)
    if torch.isnan(result).any():
        raise Undefined(
            "logits hold NaN, +inf, or a row of -inf only, so they define no distribution; "
            "check the model's weights and masks"
        )
    return result


@dataclass(frozen=True)
class TopKLogProbs:
    """The k most probable classes of an expert and, as one more class, all the others together.

    Joining classes never adds information: every kind of divergence is at most as large on these
    k + 1 classes as on all. js loses at most M h(beta Q / M), hence at most M log 2, where P and Q
    are what expert and merged model give to the others, M = (1 - beta) P + beta Q, and
    h(s) = -s log s - (1 - s) log(1 - s). For js is the information that a class carries about the
    side it was drawn from: what is lost is that information within the others, and so at most the
    entropy of the side there. kl, reverse_kl and jeffreys have no such bound: they are infinite
    when one side rules out one class of the others.
    """

    classes: Int[Tensor, "*A k"]
    log_probs: Float[Tensor, "*A k+1"]  # the last column is log P

    def coarsen(self, logits: Float[Tensor, "*A V"]) -> Float[Tensor, "*A K"]:
        """The merged model's logits for these K = k + 1 classes; differentiable."""
        if logits.shape[:-1] != self.classes.shape[:-1]:
            raise ValueError(
                f"cached answers for positions {list(self.classes.shape[:-1])} do not fit logits "
                f"{list(logits.shape)}; index both alike"
            )
        return joined(logits, self.classes)


def joined(logits: Float[Tensor, "*A V"], classes: Int[Tensor, "*A k"]) -> Float[Tensor, "*A k+1"]:
    """Logits of the given classes, then one logit for all others: their log-sum-exp."""
    logits = logits.to(wide(logits.dtype))
    others = logits.scatter(-1, classes, -torch.inf)
    empty = (others == -torch.inf).all(-1, keepdim=True)  # there its gradient would be NaN
    other = others.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, classes), other.masked_fill(empty, -torch.inf)], dim=-1)


def cache_expert(
    expert: Float[Tensor, "*A V"], *, top: int | None = None
) -> BFloat16[Tensor, "*A V"] | TopKLogProbs:
    """An expert's answers in less memory, for `fused_divergence` in place of its logits.

    Without `top`: log-probabilities rounded to bfloat16, which are logits again. Each is off by at
    most 2^-8 of itself. With L the largest finite |log p| of a row, js is off by at most
    2 (1 - beta) (1/e - log(1 - beta)) L / 256, for beta = 1/2 by 1.1 L / 256 nats: its derivative
    in log p_v is (1 - beta) p_v (log p_v / m_v - mean), and sum_v p_v |log p_v / m_v| is at most
    1/e - log(1 - beta). The others have no such bound. With `top`: that many classes in float32;
    `TopKLogProbs` says what this misses.

    The expert gets no gradient. Raises ValueError for `top` not in 1..V, rows without distribution.
    """
    log_p = log_softmax(expert.detach())
    if top is None:
        return log_p.bfloat16()
    if not 1 <= top <= expert.shape[-1]:
        raise ValueError(
            f"top must be in 1..{expert.shape[-1]}, the number of classes, got {top}; "
            "leave it out to keep all in bfloat16"
        )
    classes = log_p.topk(top).indices
    return TopKLogProbs(classes, joined(log_p, classes))
