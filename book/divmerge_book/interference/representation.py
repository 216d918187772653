"""How merging changes what a model's layers hold of an input."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_core.merging.problem import MergeProblem


@torch.no_grad()
def hidden_states(
    problem: MergeProblem, flat: Float[Tensor, " N"], exam: LabelledSplit
) -> Float[Tensor, "L B H"]:
    """What the embeddings and every layer give, mean over tokens that are not padding.

    L is 1 plus the number of layers, B the exam's rows in its order. In float32, whatever the
    precision that the problem's answers are computed in. Raises ValueError where the problem has no
    module, or one that does not give its layers' states.
    """
    parameters, parts = problem.vectors.layout.unflatten(flat), []
    if problem.module is None or not hasattr(problem.module, "config"):
        raise ValueError(
            "hidden states come from a transformers encoder: give MergeProblem its `module`"
        )
    for batch in exam.batches:
        asked = {**batch.inputs, "output_hidden_states": True}
        states = functional_call(problem.module, parameters, kwargs=asked).hidden_states
        mask = batch.inputs["attention_mask"][..., None].to(flat.dtype)  # [B, S, 1]
        parts.append(torch.stack([(state * mask).sum(1) / mask.sum(1) for state in states]))
    return torch.cat(parts, dim=1)


def dependence(x: Float[Tensor, "n n"], y: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Unbiased Hilbert-Schmidt independence criterion of two kernel matrices.

    Their diagonals, which no pair of distinct rows enters, do not count. Source: Song et al. 2012,
    Eq. 5.
    """
    n = len(x)
    x, y = (kernel - torch.diag(kernel.diagonal()) for kernel in (x, y))
    both = x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 * (x.sum(0) @ y.sum(0)) / (n - 2)
    return ((x * y).sum() + both) / (n * (n - 3))


def cka(x: Float[Tensor, "n H"], y: Float[Tensor, "m K"]) -> float:
    """Linear centred kernel alignment of two representations of the same n inputs, debiased.

    1 where one is the other turned, mirrored, moved or scaled as a whole; about 0 where they have
    nothing in common, also for few rows and many dimensions, which is why the unbiased estimate of
    the criterion stands in each place; it may be slightly negative. 0 where a representation is
    the same for all inputs. Raises ValueError for fewer than 4 rows, or unequally many.

    Source: Kornblith et al. 2019 (arXiv 1905.00414); debiased after Nguyen et al. 2021.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(
            f"give two representations of the same 4 or more inputs, got {len(x)} and {len(y)}"
        )
    x, y = (some.double() - some.double().mean(0) for some in (x, y))
    x, y = (some @ some.T for some in (x, y))  # [n, n]
    scale = (dependence(x, x) * dependence(y, y)).clamp(min=0).sqrt()
    return (dependence(x, y) / scale).item() if scale > 0 else 0.0


def shift(expert: Float[Tensor, "n H"], merged: Float[Tensor, "n H"]) -> float:
    """How far merging moves the representation of an input, in units of the expert's own spread.

    Root mean square over inputs of the distance between the two, divided by that of the distance
    between the expert's representation and its mean. 0 where nothing moves; at 1 an input moves as
    far as inputs lie from their middle. Unlike `cka`, it sees moves and turns of the whole. Raises
    ValueError where the expert's is the same for all inputs.

    After the representation bias of Yang et al. 2024 (arXiv 2402.02705), made free of scale.
    """
    spread = (expert - expert.mean(0)).double().square().sum(1).mean()
    if not spread > 0:
        raise ValueError("the expert's representation does not vary over the inputs; give others")
    return ((merged - expert).double().square().sum(1).mean() / spread).sqrt().item()


def common_share(expert: Float[Tensor, "n H"], merged: Float[Tensor, "n H"]) -> float:
    """The share of the squared shift that is one and the same move for all inputs, 0 to 1.

    A constant added behind the encoder could undo it. 0 where nothing moves.
    """
    moved = (merged - expert).double()
    total = moved.square().sum(1).mean()
    return (moved.mean(0).square().sum() / total).item() if total > 0 else 0.0
