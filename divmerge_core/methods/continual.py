"""Methods for experts that arrive one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.activations import linear_layers
from divmerge_core.kernels.stores import dense
from divmerge_core.linalg import elected, matrices, rank_of
from divmerge_core.methods import METHODS
from divmerge_core.problem import MergeProblem

Places = Sequence[tuple[slice, tuple[int, ...]]]  # where matrices lie in the flat vector, shapes


# --- sums that grow by one expert -----------------------------------------------------------------


@METHODS.register(
    "running_average",
    source="Tang et al. 2025, as a baseline",
    needs="nothing",
    cost="weights",
    symmetric=True,
    search=(),
)
def running_average(problem: MergeProblem) -> Float[Tensor, " N"]:
    """The mean of the experts so far: theta becomes (t theta + theta_{t+1}) / (t + 1).

    Starts from the first expert and treats every tensor alike. In the end it is `average`, up to
    rounding, whatever the order, found with two models in memory. A baseline of OPCM (arXiv
    2501.09522).
    """
    merged = torch.zeros_like(problem.vectors.base)
    for count, delta in enumerate(dense(problem.vectors.deltas), start=1):
        merged += (delta - merged) / count
    return problem.vectors.base + merged


@METHODS.register(
    "sequential_task_arithmetic",
    source="Tang et al. 2025, as a baseline",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    search=tuple({"scale": scale} for scale in (0.3, 0.2, 0.4, 0.5, 0.7, 1.0)),
)
def sequential_task_arithmetic(problem: MergeProblem, *, scale: float = 0.3) -> Float[Tensor, " N"]:
    """Add `scale` times every task vector to the merged model as it comes, on all tensors.

    A sum does not know its order, so in the end it is `task_arithmetic` up to rounding; what
    differs is that the distance from the base grows with every expert at a fixed scale. A baseline
    of OPCM (arXiv 2501.09522).
    """
    merged = problem.vectors.base.clone()
    for delta in dense(problem.vectors.deltas):
        merged.add_(delta, alpha=scale)
    return merged


@METHODS.register(
    "sequential_ties",
    source="Tang et al. 2025, as a baseline",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=False,
    search=tuple({"scale": scale} for scale in (0.5, 0.3, 0.2, 0.4, 0.7, 1.0)),
)
def sequential_ties(
    problem: MergeProblem, *, keep: float = 0.2, scale: float = 0.5
) -> Float[Tensor, " N"]:
    """Add `scale` times the TIES sum of what is merged so far and the new task vector.

    The first expert joins untrimmed, at `scale`. Later, merged and new task vector each keep their
    largest `keep` share of entries over the whole model, every coordinate takes the sign of their
    sum, and entries of that sign are added up (none where they cancel); this is added to what was
    merged. Entries that stay among the largest hence grow by a factor of at least 1 + scale each
    time, and early experts weigh most. Raises ValueError unless keep is in (0, 1].

    A baseline of OPCM (arXiv 2501.09522). Its code in FusionBench keeps one entry more than the
    share asked for, and where two entries cancel the one of the sign that most coordinates have.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}; 0.2 keeps the largest fifth")
    first, *others = dense(problem.vectors.deltas)
    merged = scale * first
    for delta in others:
        merged += scale * elected(torch.stack([merged, delta]), keep).sum(dim=0)
    return problem.vectors.base + merged


# --- opcm -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merging:
    """A model that experts join one by one: all that OPCM remembers of those it has seen."""

    offset: Float[Tensor, " N"]  # of the merged model from the base
    scale: float  # lambda_t: the sum of what joined is `scale` times the offset
    lengths: tuple[float, ...]  # of the task vectors that joined, in order


def projected(
    delta: Float[Tensor, "M K"], before: Float[Tensor, "M K"], share: float, cross: bool
) -> Float[Tensor, "M K"]:
    """What an expert changes in a matrix, without what would disturb the merged change `before`.

    In the singular directions u_i, v_j of `before`, entries i = j are taken out, and those where i
    and j are both among the leading directions, or, without `cross`, where one of them is. Leading
    are the first, as long as their singular values add up to at most `share` of all. The result is
    orthogonal to `before`. Directions of singular value zero are arbitrary and take out nothing.
    """
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    rank = rank_of(values, tuple(before.shape))
    if rank == 0:
        return delta
    left, total, right = left[:, :rank], values[:rank].cumsum(0), right[:rank]
    lead = int((total / total[-1] <= share).sum())
    diagonal = ((left.T @ delta) * right).sum(dim=1)  # u_i^T delta v_i
    rest = delta - (left[:, lead:] * diagonal[lead:]) @ right[lead:]
    left, right = left[:, :lead], right[:lead]
    if cross:
        return rest - left @ (left.T @ rest @ right.T) @ right
    rest = rest - left @ (left.T @ rest)
    return rest - (rest @ right.T) @ right


def length(vector: Float[Tensor, " N"]) -> float:
    """Euclidean length, in parameter units."""
    return vector.square().sum().sqrt().item()  # torch's norm loses digits


def join(
    merging: Merging, delta: Float[Tensor, " N"], places: Places, share: float, cross: bool
) -> Merging:
    """One expert more: its projected change is added, then all is brought to the mean length."""
    total = delta.clone()
    for place, shape in places:
        matrix, before = delta[place].view(shape), merging.offset[place].view(shape)
        total[place] = projected(matrix, before, share, cross).flatten()
    total.add_(merging.offset, alpha=merging.scale)
    lengths = (*merging.lengths, length(delta))
    scale = length(total) * len(lengths) / (sum(lengths) or 1)
    return Merging(total / scale if scale else total, scale, lengths)


def untouched(problem: MergeProblem) -> Merging:
    """The base itself, which no expert has joined."""
    return Merging(torch.zeros_like(problem.vectors.base), 1.0, ())


def linear_places(problem: MergeProblem) -> Places:
    """Where the weights of linear layers lie; of all matrices where the problem has no module."""
    known = problem.module is not None
    names = linear_layers(problem) if known else problem.vectors.layout.names
    found = matrices(problem.vectors.layout)
    return [(place, shape) for name, place, shape in found if name in names]


def check_share(share: float) -> None:
    """Raise ValueError unless OPCM's share is in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}; 0.5 is the published one")


@METHODS.register(
    "opcm",
    source="Tang et al. 2025",
    needs="validation labels, for the share",
    cost="weights",
    symmetric=False,
    search=tuple({"share": share} for share in (0.5, 0.25, 0.75, 0.0, 0.9, 1.0)),
)
def opcm(
    problem: MergeProblem, *, share: float = 0.5, cross: bool = True, progress: bool = True
) -> Float[Tensor, " N"]:
    """Add every expert's change where it is orthogonal to what is merged, then rescale.

    Experts come in the order of the problem's tasks. The weight of a linear layer takes only the
    part of a task vector that `projected` leaves; all other tensors (biases, norms, embeddings)
    take all of it, and so does everything of the first expert. After each, one factor for the
    whole model brings its distance from the base to the mean length of the task vectors so far.
    Where the problem knows no module, every matrix counts as a linear weight, embeddings too.

    share: of the singular values' sum that is protected, 0 to 1. cross: keep the entries that pair
    a leading direction with another, as the authors' code does; the formula as arXiv 2505.11883
    quotes it drops them. Raises ValueError for a share out of range. Experts that cancel leave a
    small remainder, which the factor blows up to full length.

    Source: arXiv 2501.09522. The authors' code in FusionBench gives the same where merged changes
    have full rank, and differs in four ways. In the null space of a change of lower rank it takes
    out a diagonal too, in whatever basis the SVD returns. At share 1 it protects no leading
    direction unless rounding lifts a share above 1, here all. It passes over parameters that lie
    directly on a module with children (CLIP's class embedding): these keep the first expert's
    change. It shuffles the order unless told not to.
    """
    check_share(share)
    places, merging = linear_places(problem), untouched(problem)
    deltas = dense(problem.vectors.deltas)
    for delta in tqdm(deltas, "joining", disable=not progress, leave=False):
        merging = join(merging, delta, places, share, cross)
    return problem.vectors.base + merging.offset
