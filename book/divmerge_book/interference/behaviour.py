"""Predictions before and after merging: disentanglement, loss barriers, confidence and margin."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

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
