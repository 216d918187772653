"""A model before and after merging: its predictions, loss barriers, and hidden states."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_core.divergences import js
from divmerge_core.merging.problem import Batch, MergeProblem

Distance = Callable[[Tensor, Tensor], Tensor]  # (logits [*A, V], logits [*A, V]) -> [*A]


def disagreement(p: Float[Tensor, "*A V"], q: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """1 where the classes predicted by two sets of logits differ, else 0."""
    return (p.argmax(-1) != q.argmax(-1)).to(p.dtype)


DISTANCES: Mapping[str, Distance] = {"disagreement": disagreement, "js": js}


@torch.no_grad()
def all_logits(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int, batches: Sequence[Batch]
) -> Float[Tensor, "B V"]:
    """Logits of the model with parameters `flat` on all rows of a task's batches, in order."""
    return torch.cat([problem.logits(flat, task, batch) for batch in batches])


def expert_logits(
    problem: MergeProblem, batches: Sequence[Sequence[Batch]]
) -> list[Float[Tensor, "B V"]]:
    """Every expert's logits on all rows of its own task's batches."""
    experts = enumerate(map(problem.vectors.expert, problem.vectors.tasks))
    return [all_logits(problem, flat, task, batches[task]) for task, flat in experts]


def js_from_expert(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int, batches: Sequence[Batch]
) -> float:
    """Mean JS (nats) of the model with parameters `flat` from the task's own expert."""
    expert = problem.vectors.expert(problem.vectors.tasks[task])
    logits = [all_logits(problem, some, task, batches) for some in (expert, flat)]
    return js(*logits).double().mean().item()


def disentanglement_error(
    problem: MergeProblem,
    splits: Sequence[LabelledSplit],
    coefficients: Sequence[float | int],
    *,
    distance: str = "disagreement",
) -> float:
    r"""Weight disentanglement error of all task vectors at these coefficients.

    $$
    \xi(\lambda_1, \ldots, \lambda_T) = \sum_{t=1}^{T} \mathbb{E}_{x \sim X_t}
      \operatorname{dist}\bigl(f(x; \theta_0 + \lambda_t \tau_t),\,
                               f(x; \theta_0 + \textstyle\sum_u \lambda_u \tau_u)\bigr)
    $$

    splits: one per task; labels are not used. 0 to T with `disagreement`, to T log 2 with `js`.
    Raises ValueError for another number of coefficients or splits than tasks, and for an unknown
    distance. Source: Ortiz-Jimenez et al. 2023 (arXiv 2305.12827), §3, for T = 2.
    """
    tasks = problem.vectors.tasks
    if len(coefficients) != len(tasks) or len(splits) != len(tasks) or distance not in DISTANCES:
        raise ValueError(
            f"{len(tasks)} tasks need as many coefficients and splits and a distance out of "
            f"{', '.join(DISTANCES)}; got {len(coefficients)}, {len(splits)} and {distance!r}"
        )
    merged, total = problem.vectors.merge(list(coefficients)), 0.0
    for number, (task, split) in enumerate(zip(tasks, splits, strict=True)):
        alone = problem.vectors.select([task]).merge([coefficients[number]])
        logits = [all_logits(problem, flat, number, split.batches) for flat in (alone, merged)]
        total += DISTANCES[distance](*logits).double().mean().item()
    return total


def barrier(losses: Sequence[float | int], *, reference: str = "mean") -> float:
    """Loss barrier along the segment between two models, in the loss's unit; at least 0.

    losses: at evenly spaced points, both ends included. reference: `mean` subtracts the mean loss
    of the two ends (Frankle et al. 2020, §2), so a straight slope has half its height as barrier;
    `chord` subtracts the linear interpolation of the ends (Entezari et al. 2022), which gives 0 for
    every convex loss. Raises ValueError for fewer than two values and for an unknown reference.
    """
    if len(losses) < 2 or reference not in ("mean", "chord"):
        raise ValueError(
            f"give the loss at two points or more and mean or chord as reference, got "
            f"{len(losses)} and {reference!r}"
        )
    if reference == "mean":
        return float(max(losses) - (losses[0] + losses[-1]) / 2)
    return float(max(0, *(losses - np.linspace(losses[0], losses[-1], len(losses)))))


def confidence(logits: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Probability of the predicted class, 1 / V to 1."""
    return logits.softmax(-1).amax(-1)


def margin(logits: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Probability of the predicted class minus that of the second most probable class."""
    first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


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
