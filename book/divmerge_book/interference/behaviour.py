"""What merging does to answers: which change, which stay sure of themselves, and how far apart
tasks keep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_core.divergences import js
from divmerge_core.merging.problem import MergeProblem

Distance = Callable[[Tensor, Tensor], Tensor]  # (logits [*A, V], logits [*A, V]) -> [*A]


def disagreement(p: Float[Tensor, "*A V"], q: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """1 where two models give different answers, 0 where they give the same one.

    The distance of Ortiz-Jimenez et al. 2023, §3, for classification. Takes logits.
    """
    return (p.argmax(-1) != q.argmax(-1)).to(p.dtype)


DISTANCES: Mapping[str, Distance] = {"disagreement": disagreement, "js": js}


@torch.no_grad()
def answers(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int, exam: LabelledSplit
) -> Float[Tensor, "B V"]:
    """Logits of the model with parameters `flat` on every row of a task's exam, in its order."""
    return torch.cat([problem.logits(flat, task, batch) for batch in exam.batches])


# --- weight disentanglement -----------------------------------------------------------------------


def disentanglement_error(
    problem: MergeProblem,
    exams: Sequence[LabelledSplit],
    coefficients: Sequence[float | int],
    *,
    distance: str = "disagreement",
) -> float:
    r"""How far the tasks are from not noticing each other at these coefficients.

    $$
    \xi(\lambda_1, \ldots, \lambda_T) = \sum_{t=1}^{T} \mathbb{E}_{x \sim X_t}
      \operatorname{dist}\bigl(f(x; \theta_0 + \lambda_t \tau_t),\,
                               f(x; \theta_0 + \textstyle\sum_u \lambda_u \tau_u)\bigr)
    $$

    exams: one per task, of which only inputs count. At least 0; with `disagreement` at most T, with
    `js` at most T log 2. It is 0 where all coefficients are 0. Where all but task u's are, it is
    what u's vector changes in the other tasks' answers. Raises ValueError for another number of
    coefficients or exams than tasks, and for an unknown distance.

    Source: Ortiz-Jimenez et al. 2023 (arXiv 2305.12827), §3; there T = 2.
    """
    tasks = problem.vectors.tasks
    if len(coefficients) != len(tasks) or len(exams) != len(tasks) or distance not in DISTANCES:
        raise ValueError(
            f"{len(tasks)} tasks need as many coefficients and exams and a distance out of "
            f"{', '.join(DISTANCES)}; got {len(coefficients)}, {len(exams)} and {distance!r}"
        )
    merged, total = problem.vectors.merge(list(coefficients)), 0.0
    for number, (task, exam) in enumerate(zip(tasks, exams, strict=True)):
        alone = problem.vectors.select([task]).merge([coefficients[number]])
        apart = DISTANCES[distance](
            answers(problem, alone, number, exam), answers(problem, merged, number, exam)
        )
        total += apart.double().mean().item()
    return total


def barrier(losses: Sequence[float | int], *, reference: str = "mean") -> float:
    """How much higher a loss rises on the way from one model to another than at its ends.

    losses: along the segment, both ends included. reference: `mean` subtracts the mean of the two
    ends (Frankle et al. 2020, §2); where the ends differ this is half their difference even on a
    slope without a hump. `chord` subtracts the straight line between the ends at every point
    (Entezari et al. 2022), and is 0 on every convex loss. At least 0, in the loss's unit. Raises
    ValueError for fewer than two values and for an unknown reference.
    """
    values = torch.tensor(list(losses), dtype=torch.float64)
    if len(values) < 2 or reference not in ("mean", "chord"):
        raise ValueError(
            f"give the loss at two points or more and mean or chord as reference, got "
            f"{len(values)} and {reference!r}"
        )
    if reference == "mean":
        return (values.max() - (values[0] + values[-1]) / 2).item()
    along = torch.linspace(0, 1, len(values), dtype=torch.float64)
    return (values - torch.lerp(values[0], values[-1], along)).max().clamp(min=0).item()


# --- answers that change --------------------------------------------------------------------------


@dataclass(frozen=True)
class Flips:
    """Which rows the expert gets right and the merged model wrong, and the reverse."""

    lost: Bool[Tensor, " B"]
    gained: Bool[Tensor, " B"]

    @property
    def net(self) -> float:
        """Accuracy of the merged model minus the expert's."""
        return (self.gained.double() - self.lost.double()).mean().item()

    @property
    def gross(self) -> float:
        """Share of rows whose answer turned from right to wrong or from wrong to right."""
        return (self.gained | self.lost).double().mean().item()


def flips(expert: Bool[Tensor, " B"], merged: Bool[Tensor, " B"]) -> Flips:
    """Rows lost and gained, from what each of two models gets right."""
    return Flips(expert & ~merged, merged & ~expert)


def confidence(logits: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Probability of the likeliest answer, 1 / V to 1."""
    return logits.softmax(-1).amax(-1)


def margin(logits: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    """Probability of the likeliest answer minus that of the next: 0 is a tie, 1 is certainty."""
    first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second
