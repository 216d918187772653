"""Methods that need only the weights: sums of task vectors, trimmed or randomly dropped."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import largest
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import check_choice, check_keep, require_finite


def moved(problem: MergeProblem, change: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The base plus a change, in the base's precision."""
    return (problem.vectors.base + change).to(problem.vectors.base.dtype)


def task_weights(
    given: Sequence[float | int] | None, deltas: Float[Tensor, "T N"]
) -> Float[Tensor, " T"]:
    """One weight per task, beside the task vectors; None means 1 for every task.

    Raises ValueError unless there is one positive, finite number per task.
    """
    weights = [1.0] * len(deltas) if given is None else list(given)
    if len(weights) != len(deltas) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"give one positive, finite weight for each of {len(deltas)} tasks, got {weights}"
        )
    return deltas.new_tensor(weights)


# --- sums -----------------------------------------------------------------------------------------
@METHODS.register("average", source="Wortsman et al. 2022", cite="wortsman2022", elsewhere="linear")
def average(problem: MergeProblem) -> Float[Tensor, " N"]:
    r"""The mean of the experts: every task vector with the coefficient 1/T.

    $$
    \theta = \theta_0 + \frac{1}{T} \sum_{t=1}^{T} \tau_t = \frac{1}{T} \sum_{t=1}^{T} \theta_t
    $$

    Idea: Experts of one base lie close together, so their mean is a reasonable model. It is the
    simplest merge and the baseline of all others.

    All tensors alike; there are no options.

    Pitfalls: Where task vectors are nearly orthogonal, each shrinks to 1/T of its length, so with
    many tasks the merge goes back to the base. The paper averages experts of one task only.

    Source: Wortsman et al. 2022 (arXiv 2203.05482), the uniform soup.
    """
    num_tasks = len(problem.vectors.tasks)
    return problem.vectors.merge([1 / num_tasks] * num_tasks)


@METHODS.register(
    "task_arithmetic",
    source="Ilharco et al. 2023",
    cite="ilharco2023",
    needs="validation labels, for the scale",
    linear="scale",
    search=tuple({"scale": scale} for scale in (0.3, 0.2, 0.4, 0.5, 0.7, 1.0)),
)
def task_arithmetic(problem: MergeProblem, *, scale: float = 0.3) -> Float[Tensor, " N"]:
    r"""The base plus `scale` times the sum of the task vectors.

    $$
    \theta = \theta_0 + \lambda \sum_{t=1}^{T} \tau_t
    $$

    Idea: A task vector is a direction that teaches a task, and directions can be added. One
    coefficient for all tasks trades what they add against their interference.

    All tensors alike. `scale` is $\lambda$, any finite number: the paper's code takes 0.3 for eight
    vision tasks, and chooses from 0 to 1 in steps of 0.05 on validation rows; 1/T is the average.

    Pitfalls: The best scale falls with more tasks; well above it accuracy collapses. All share it.

    Peers: mergekit's `task_arithmetic` has a weight for each task; equal ones give the same.

    Raises ValueError for a scale that is not finite.

    Source: Ilharco et al. 2023 (arXiv 2212.04089).
    """
    require_finite(scale=scale)
    return problem.vectors.merge([scale] * len(problem.vectors.tasks))


@METHODS.register(
    "ties",
    source="Yadav et al. 2023",
    cite="yadav2023",
    needs="validation labels, for the scale",
    linear="scale",
    search=tuple({"scale": scale} for scale in (1.0, 0.5, 1.5, 2.0, 2.5, 3.0)),
)
def ties(
    problem: MergeProblem,
    *,
    keep: float = 0.2,
    scale: float = 1.0,
    coeffs: Sequence[float | int] | None = None,
    trim: str = "global",
    weights: str = "after",
    combine: str = "mean",
) -> Float[Tensor, " N"]:
    r"""Trim, elect sign, disjoint mean: `scale` times the mean of the entries that agree.

    $$
    \theta = \theta_0 + \lambda\, \frac{1}{|A|} \sum_{t \in A} \hat\tau_t, \qquad
    A = \Big\{\, t : \hat\tau_t \cdot \operatorname{sign} \sum_{u=1}^{T} \hat\tau_u > 0 \,\Big\}
    $$

    Idea: Small entries of a task vector are noise, and entries of opposite sign cancel in a sum. So
    both are dropped, and only tasks of the elected sign contribute.

    The formula holds entry by entry; $\hat\tau_t$ is the task vector with its largest `keep` share
    of entries and zero elsewhere. All tensors alike. A sum of exactly zero elects no sign and
    changes nothing. `keep` is the share that stays, in the paper 0.2. `scale` is $\lambda$, in the
    paper 1 before a search. `trim`: `global` ranks entries over the whole model (the paper),
    `tensor` within each tensor. `coeffs`: a positive weight per task, None for 1. `weights`:
    `before` lets weighted entries vote, and divides by the sum of the weights that agree; `after`
    lets all vote alike, and divides by their number. `combine`: `mean`, or `sum` without division.

    Pitfalls: The disjoint mean is longer than the average, as tasks without an entry do not count,
    so its scales are not those of task arithmetic. With two tasks, the larger entry always wins.

    Peers: mergekit trims within each tensor, weighs before the election (`weights="before"`), and
    elects plus where the sum is zero. PEFT trims within each tensor and weighs after. The authors'
    code, and FusionBench after it, trims globally, keeps one entry more, and elects the sign of the
    majority of coordinates where the sum is zero; FusionBench by default sums at scale 0.3. All
    round the number of entries down, here it is the nearest whole number, at least 1.

    Raises ValueError unless `keep` is in (0, 1], `scale` finite, `coeffs` T positive numbers, and
    the other options among the values named here.

    Source: Yadav et al. 2023 (arXiv 2306.01708), section 3.
    """
    check_keep(keep)
    require_finite(scale=scale)
    check_choice("trim", trim, ("global", "tensor"))
    check_choice("weights", weights, ("before", "after"))
    check_choice("combine", combine, ("mean", "sum"))
    deltas = dense(problem.vectors.deltas)
    weight = task_weights(coeffs, deltas)
    votes = weight if weights == "before" else torch.ones_like(weight)  # [T]
    whole = ((0, deltas.shape[1]),)
    trimmed = deltas.clone()
    for row in trimmed:  # one task at a time: a magnitude copy of all T would double the memory
        for start, stop in whole if trim == "global" else problem.vectors.layout.bounds:
            if start < stop:
                row[start:stop] = largest(row[start:stop], keep)
    agree = (trimmed * (votes @ trimmed).sign()) > 0  # [T, N]
    total = weight @ torch.where(agree, trimmed, 0)
    if combine == "mean":
        count = votes @ agree.to(votes.dtype)
        total = total / torch.where(count > 0, count, 1)
    return moved(problem, scale * total)


def thinned(
    row: Float[Tensor, " N"], drop: float, rescale: str, layout: Layout, generator: torch.Generator
) -> Float[Tensor, " N"]:
    """One task vector with entries dropped at random and what is left scaled up."""
    stays = torch.rand(len(row), generator=generator) >= drop  # on the CPU: alike on any device
    left = row * stays.to(row.device)
    if rescale == "expected":
        left /= 1 - drop
    elif rescale == "l1":
        for start, stop in layout.bounds:
            size = left[start:stop].abs().sum()
            left[start:stop] *= row[start:stop].abs().sum() / torch.where(size > 0, size, 1)
    return left


@METHODS.register(
    "dare",
    source="Yu et al. 2024",
    cite="yu2024",
    needs="validation labels, for the scale",
    symmetric=False,  # which entries a task loses depends on its place
    linear="scale",
    between=False,  # what survives is scaled up tenfold
    search=(
        *({"scale": scale} for scale in (0.3, 0.5, 1.0)),
        {"drop": 0.5},
        {"then": "ties", "scale": 1.0},
        {"then": "ties", "scale": 0.5, "drop": 0.5},
    ),
)
def dare(
    problem: MergeProblem,
    *,
    drop: float = 0.9,
    scale: float = 0.3,
    then: str = "task_arithmetic",
    rescale: str = "expected",
    keep: float = 0.2,
    seed: int = 0,
) -> Float[Tensor, " N"]:
    r"""Drop entries of every task vector at random, scale up the rest, then merge what is left.

    $$
    \theta = \theta_0 + \lambda \sum_{t=1}^{T} \frac{m_t \odot \tau_t}{1 - p}, \qquad
    m_{t,n} \sim \operatorname{Bernoulli}(1 - p)
    $$

    Idea: A fine-tuned model has far more changed entries than it needs, so most can go. Scaled up,
    the rest has the task vector as its expectation, and tasks rarely meet in an entry.

    Every entry of every tensor goes with probability `drop`, p in the formula, independently for
    every task. `drop` is the share that goes: in the paper 0.9, and up to 0.99 in large models.
    `then`: `task_arithmetic`, or `ties`, on what is left. `keep` is the share that `ties` leaves.
    `scale` is the factor of either. `rescale`: `expected` divides by 1 - p; `l1` makes every tensor
    as long as before in the L1 norm; `none` leaves it. `seed` decides what is dropped.

    Pitfalls: One draw is noisy, since the variance of an entry is p / (1 - p) times its square:
    nine times at 0.9. The paper finds that large models and small task vectors bear more.

    Peers: mergekit takes the share that stays (`density`) and rescales as `l1` by default; its
    DARE-TIES trims no more, which is `keep=1.0`. FusionBench drops half.

    Raises ValueError unless `drop` is in [0, 1), `keep` in (0, 1], `scale` finite, names known.

    Source: Yu et al. 2024 (arXiv 2311.03099).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop}; 0.9 keeps a tenth of the entries")
    check_keep(keep)
    require_finite(scale=scale)
    check_choice("then", then, ("task_arithmetic", "ties"))
    check_choice("rescale", rescale, ("expected", "l1", "none"))
    vectors, generator = problem.vectors, torch.Generator().manual_seed(seed)
    rows = [thinned(row, drop, rescale, vectors.layout, generator) for row in dense(vectors.deltas)]
    sparse = replace(problem, vectors=replace(vectors, deltas=torch.stack(rows)))
    if then == "ties":
        return ties(sparse, keep=keep, scale=scale)
    return task_arithmetic(sparse, scale=scale)
