r"""Divergence of two logit matrices and its gradient, with no [A, V] intermediate on a GPU.

With p = softmax(expert), q = softmax(merged), m = (1 - beta) p + beta q, per row and in nats:

    js          (1 - beta) KL(p || m) + beta KL(q || m); beta = 1/2 is the plain Jensen-Shannon
    kl          KL(p || q) = sum_v p_v (log p_v - log q_v)
    reverse_kl  KL(q || p)
    jeffreys    KL(p || q) + KL(q || p): the sum, not its half

Each is D = sum_v f(p_v, q_v). As dq_v/dx_i = q_v ([v = i] - q_i) in the merged logits x,

    dD/dx_i = slope_i - q_i sum_v slope_v,    slope_v = q_v df/dq_v.

A constant in df/dq cancels, which leaves as slope: beta q (log q - log m) for js, -p for kl,
q (log q - log p) for reverse_kl, and the sum of these two for jeffreys.

On a GPU the loss reads both matrices once if a row fits in registers, else twice, and keeps five
numbers a row. The gradient reads both and writes one, and the incoming gradient is multiplied in
before it is rounded. `fused_divergence` moves 5 A V numbers, forward and backward together; where
the weights of the rows are known before, `divergence_and_gradient` moves 3 A V. Either moves 7 A V
for rows that do not fit.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels import divergence_triton
from divmerge_core.kernels.backend import resolve_backend
from divmerge_core.kernels.delta_storage import wide
from divmerge_core.kernels.expert_cache import TopKLogProbs, log_softmax

KINDS = ("js", "kl", "reverse_kl", "jeffreys")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weighted(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """weight * log_ratio, with 0 * anything = 0 in value and in gradient."""
    return weight * log_ratio.masked_fill(weight == 0, 0.0)


def terms_and_slopes(
    log_p: Float[Tensor, "*A V"], log_q: Float[Tensor, "*A V"], kind: str, beta: float = 0.5
) -> tuple[Float[Tensor, "*A V"], Float[Tensor, "*A V"]]:
    """Class by class f(p, q), whose sum is the divergence, and slope; autograd may pass through."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "js":
        masked = torch.isneginf(log_p) & torch.isneginf(log_q)
        log_p, log_q = log_p.masked_fill(masked, -1e30), log_q.masked_fill(masked, -1e30)
        log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))  # not -inf
        slopes = beta * weighted(q, log_q - log_m)
        return (1 - beta) * weighted(p, log_p - log_m) + slopes, slopes
    if kind == "kl":
        return weighted(p, log_p - log_q), -p
    reverse = weighted(q, log_q - log_p)
    if kind == "reverse_kl":
        return reverse, reverse
    return weighted(p, log_p - log_q) + reverse, reverse - p


def definition(
    expert: Float[Tensor, "A V"],
    merged: Float[Tensor, "A V"],
    kind: str,
    beta: float = 0.5,
    *,
    differentiate: bool = True,
) -> tuple[Float[Tensor, " A"], Float[Tensor, "A V"] | None]:
    """The loss and, if wanted, its gradient in the merged logits, by the formulas above.

    In float32, or float64 if either side is. Where reverse_kl or jeffreys is +inf, the row's
    gradient is NaN. Raises ValueError for a row without a distribution.
    """
    log_p, log_q = log_softmax(expert), log_softmax(merged)
    terms, slopes = terms_and_slopes(log_p, log_q, kind, beta)
    if not differentiate:
        return terms.sum(-1), None
    total = slopes.sum(-1, keepdim=True)
    total = total.masked_fill(total.isinf(), math.nan)
    return terms.sum(-1), slopes - log_q.exp() * total


class Divergence(torch.autograd.Function):
    """The loss of `fused_divergence` with its explicit gradient, on either backend."""

    @staticmethod
    def forward(ctx, expert, merged, kind, beta, backend):
        ctx.options, ctx.backend, ctx.dtype = (kind, beta), backend, merged.dtype
        if backend == "torch":
            wanted = ctx.needs_input_grad[1]
            loss, gradient = definition(expert, merged, kind, beta, differentiate=wanted)
            ctx.save_for_backward(gradient)
        else:
            loss, state = divergence_triton.loss_and_state(expert, merged, kind, beta)
            ctx.save_for_backward(expert, merged, state)
        return loss

    @staticmethod
    def backward(ctx, incoming):
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError(
                "fused_divergence is differentiable once; leave create_graph out, or give float64 "
                "logits to the divergence of that name in divmerge_core.divergences"
            )
        if ctx.backend == "torch":
            (gradient,) = ctx.saved_tensors
            result = (gradient * incoming[:, None]).to(ctx.dtype)
        else:
            expert, merged, state = ctx.saved_tensors
            result = divergence_triton.gradient(
                expert, merged, *ctx.options, state, incoming.contiguous()
            )
        return None, result, None, None, None


def validate(expert: Tensor, merged: Tensor, kind: str, beta: float) -> None:
    """Raise ValueError unless the two are logits of one shape and the divergence exists."""
    if expert.shape != merged.shape or merged.ndim == 0 or merged.shape[-1] == 0:
        raise ValueError(
            "expert and merged must be logits of one shape [*A, V] with one class or more, "
            f"got {list(expert.shape)} and {list(merged.shape)}"
        )
    for side, logits in {"expert": expert, "merged": merged}.items():
        if logits.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"{side} must be logits in {names}, got {logits.dtype}; say .float()")
    if expert.requires_grad and torch.is_grad_enabled():
        raise ValueError("expert gets no gradient, but requires one; give expert.detach()")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 1e-3 <= beta <= 1 - 1e-3:
        raise ValueError(
            f"beta must be in [0.001, 0.999], got {beta}; near 0 js is beta times reverse_kl, "
            "near 1 it is (1 - beta) times kl: take these"
        )
    if kind != "js" and beta != 0.5:
        raise ValueError(f"beta={beta} is a skew of js, and {kind} has none; leave beta out")


def matrices(*sides: Float[Tensor, "*A V"]) -> list[Float[Tensor, "A V"]]:
    """All leading axes as one, and neighbouring classes side by side."""
    flat = [logits.reshape(-1, logits.shape[-1]) for logits in sides]
    return [rows if rows.stride(1) == 1 else rows.contiguous() for rows in flat]


def fused_divergence(
    expert: Float[Tensor, "*A V"] | TopKLogProbs,
    merged: Float[Tensor, "*A V"],
    kind: str = "js",
    *,
    beta: float = 0.5,
    backend: str = "auto",
) -> Float[Tensor, "*A"]:
    """Divergence of the merged model's answers from the expert's, in nats, one per position.

    `kind` is js (between 0 and log 2), kl, reverse_kl or jeffreys (no upper bound); `beta`, in
    [0.001, 0.999], skews js. `expert` is logits or what `cache_expert` made of them. Differentiable
    once in the merged logits; the expert gets no gradient. Sides may differ in precision and have
    any strides; a last axis that is not contiguous is copied. Float64 is computed on torch.

    Classes masked with -inf on both sides do not count. With a mask on one side js stays finite;
    kl is +inf, with a finite gradient, where the merged model rules out an answer of the expert;
    where the expert rules out an answer of the merged model reverse_kl is +inf and its gradient
    NaN; jeffreys does either. A row with NaN, +inf or only -inf has no distribution: torch raises
    ValueError, Triton, which would have to wait for the GPU, gives NaN for that row alone.

    Raises ValueError for logits, kinds, betas and backends that do not fit.
    """
    if isinstance(expert, TopKLogProbs):
        expert, merged = expert.log_probs, expert.coarsen(merged)
    validate(expert, merged, kind, beta)
    backend = resolve_backend(backend, expert, merged)
    if not torch.is_grad_enabled():
        merged = merged.detach()  # else a gradient would be computed and thrown away
    loss = Divergence.apply(*matrices(expert, merged), kind, beta, backend)
    return loss.reshape(merged.shape[:-1])


def divergence_and_gradient(
    expert: Float[Tensor, "*A V"],
    merged: Float[Tensor, "*A V"],
    kind: str = "js",
    *,
    beta: float = 0.5,
    weight: Float[Tensor, "*A"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*A"], Float[Tensor, "*A V"]]:
    """`fused_divergence` and the gradient of its sum in the merged logits, both at once.

    With `weight` the gradient is that of sum(weight * loss), rounded to the dtype of `merged` only
    after the multiplication; the loss is the same with or without. Both come without a graph: hand
    the gradient on by `merged.backward(gradient)`.

    On a GPU rows of at most 16,384 classes take one launch, which loads both sides once and stores
    the gradient: 3 A V numbers, and 2 A for losses and weights. Wider rows take the two launches of
    `fused_divergence`: two passes that load both sides for the loss, one that does for the gradient
    and stores it, 7 A V together.

    Takes what `fused_divergence` takes except top answers, and treats masks and rows without a
    distribution alike. Raises ValueError as it does, and for weights of another shape or device.
    """
    expert, merged = expert.detach(), merged.detach()
    validate(expert, merged, kind, beta)
    if weight is not None:
        if weight.shape != merged.shape[:-1]:
            raise ValueError(
                f"weight must hold one number per position, {list(merged.shape[:-1])}, "
                f"got {list(weight.shape)}; expand it"
            )
        precision = wide(torch.promote_types(expert.dtype, merged.dtype))
        weight = weight.detach().to(precision).reshape(-1).contiguous()
    given = [tensor for tensor in (expert, merged, weight) if tensor is not None]
    backend, sides = resolve_backend(backend, *given), matrices(expert, merged)
    if backend == "torch":
        loss, gradient = definition(*sides, kind, beta)
        gradient = gradient if weight is None else gradient * weight[:, None]
        gradient = gradient.to(merged.dtype)
    else:
        loss, gradient = divergence_triton.loss_and_gradient(*sides, kind, beta, weight)
    return loss.reshape(merged.shape[:-1]), gradient.reshape(merged.shape)
