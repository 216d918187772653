"""Similarity of a model's hidden states before and after merging."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_core.merging.problem import MergeProblem


@torch.no_grad()
def hidden_states(
    problem: MergeProblem, flat: Float[Tensor, " N"], split: LabelledSplit
) -> Float[Tensor, "L B H"]:
    """Outputs of the embeddings and of every layer, mean over tokens that are not padding; float32.

    The B rows of the split are in its order. Raises ValueError where the problem has no module that
    returns hidden states.
    """
    if not hasattr(problem.module, "config"):
        raise ValueError(
            "hidden states come from a transformers encoder: give MergeProblem its `module`"
        )
    parameters, parts = problem.vectors.layout.unflatten(flat), []
    for batch in split.batches:
        inputs = {**batch.inputs, "output_hidden_states": True}
        states = functional_call(problem.module, parameters, kwargs=inputs).hidden_states
        mask = batch.inputs["attention_mask"][..., None].to(flat.dtype)  # [B, S, 1]
        parts.append(torch.stack([(state * mask).sum(1) / mask.sum(1) for state in states]))
    return torch.cat(parts, dim=1)


def hsic(x: Float[Tensor, "n n"], y: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Unbiased Hilbert-Schmidt independence criterion of two kernel matrices (Song 2012, Eq. 5)."""
    n = len(x)
    x, y = (kernel - torch.diag(kernel.diagonal()) for kernel in (x, y))
    both = x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 * (x.sum(0) @ y.sum(0)) / (n - 2)
    return ((x * y).sum() + both) / (n * (n - 3))


def cka(x: Float[Tensor, "n H"], y: Float[Tensor, "m K"]) -> float:
    """Debiased linear centred kernel alignment of two representations of the same n inputs.

    1 where they are equal up to rotation, reflection, translation and scale; about 0 where they are
    independent, also for few inputs and many dimensions; 0 where one is constant. Raises ValueError
    for fewer than 4 inputs, or unequal numbers. Source: Kornblith et al. 2019 (arXiv 1905.00414);
    debiased after Nguyen et al. 2021.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(
            f"give two representations of the same 4 or more inputs, got {len(x)} and {len(y)}"
        )
    x, y = (some.double() - some.double().mean(0) for some in (x, y))
    x, y = x @ x.T, y @ y.T
    scale = (hsic(x, x) * hsic(y, y)).clamp(min=0).sqrt()
    return (hsic(x, y) / scale).item() if scale > 0 else 0.0


def shift(expert: Float[Tensor, "n H"], merged: Float[Tensor, "n H"]) -> float:
    """Root mean square distance between both representations, in units of the expert's own spread.

    The spread is their root mean square distance from their mean. Raises ValueError where it is 0.
    After the representation bias of Yang et al. 2024 (arXiv 2402.02705), normalised.
    """
    spread = (expert - expert.mean(0)).double().square().sum(1).mean()
    if not spread > 0:
        raise ValueError("the expert's representation does not vary over the inputs; give others")
    return ((merged - expert).double().square().sum(1).mean() / spread).sqrt().item()


def common_share(expert: Float[Tensor, "n H"], merged: Float[Tensor, "n H"]) -> float:
    """Share of the squared shift that is the same translation for all inputs, 0 to 1; 0 if none."""
    moved = (merged - expert).double()
    total = moved.square().sum(1).mean()
    return (moved.mean(0).square().sum() / total).item() if total > 0 else 0.0
