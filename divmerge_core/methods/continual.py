"""Methods for experts that arrive one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.layer_inputs import linear_layers
from divmerge_core.merging.linalg import elected, matrices, rank_of, svd
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import check_keep, require_finite

Places = Sequence[tuple[slice, tuple[int, ...]]]  # where matrices lie in the flat vector, shapes


# --- sums that grow by one expert -----------------------------------------------------------------
@METHODS.register("running_average", source="Tang et al. 2025, as a baseline", cite="tang2025")
def running_average(problem: MergeProblem) -> Float[Tensor, " N"]:
    r"""Keep the mean of the experts that have come so far.

    $$
    \theta^{(t)} = \frac{(t - 1)\, \theta^{(t-1)} + \theta_t}{t}, \qquad t = 1, \dots, T
    $$

    Idea: A mean can be updated without keeping what went into it: two models in memory are enough.
    Every expert counts alike, whenever it came.

    All tensors are treated alike. In the end it is `average` up to rounding, in any order of tasks.

    Pitfalls: Every new expert dilutes the earlier ones: each one's coefficient is 1/T.

    Peers: FusionBench's continual average gives the same.

    Source: a baseline of OPCM, Tang et al. 2025, arXiv 2501.09522.
    """
    merged = torch.zeros_like(problem.vectors.base)
    for count, delta in enumerate(dense(problem.vectors.deltas), start=1):
        merged += (delta - merged) / count
    return problem.vectors.base + merged


@METHODS.register(
    "sequential_task_arithmetic",
    source="Tang et al. 2025, as a baseline",
    needs="validation labels, for the scale",
    linear="scale",
    cite="tang2025",
    search=tuple({"scale": scale} for scale in (0.3, 0.2, 0.4, 0.5, 0.7, 1.0)),
)
def sequential_task_arithmetic(problem: MergeProblem, *, scale: float = 0.3) -> Float[Tensor, " N"]:
    r"""Add every task vector to the merged model as it comes.

    $$
    \theta^{(t)} = \theta^{(t-1)} + \lambda\, \tau_t, \qquad \theta^{(0)} = \theta_0
    $$

    Idea: A sum does not depend on order, so experts can be added one by one. This is
    `task_arithmetic` for experts that arrive one at a time.

    All tensors are treated alike. In the end it is `task_arithmetic` at that scale up to rounding.

    scale: $\lambda$, published as 0.3; any finite number.

    Pitfalls: The distance from the base grows with every expert, so a scale tuned for few tasks is
    too large for many, and their final number is unknown.

    Peers: FusionBench's continual task arithmetic gives the same.

    Raises ValueError for a scale that is not finite.

    Source: a baseline of OPCM, Tang et al. 2025, arXiv 2501.09522.
    """
    require_finite(scale=scale)
    merged = problem.vectors.base.clone()
    for delta in dense(problem.vectors.deltas):
        merged.add_(delta, alpha=scale)
    return merged


@METHODS.register(
    "sequential_ties",
    source="Tang et al. 2025, as a baseline",
    needs="validation labels, for the scale",
    symmetric=False,
    cite="tang2025",
    search=tuple({"scale": scale} for scale in (0.5, 0.3, 0.2, 0.4, 0.7, 1.0)),
)
def sequential_ties(
    problem: MergeProblem, *, keep: float = 0.2, scale: float = 0.5
) -> Float[Tensor, " N"]:
    r"""Add the TIES sum of what is merged so far and of each new task vector.

    $$
    m^{(1)} = \lambda\, \tau_1, \qquad
    m^{(t)} = m^{(t-1)} + \lambda\, \mathrm{TIES}\big(m^{(t-1)}, \tau_t\big), \qquad
    \theta = \theta_0 + m^{(T)}
    $$

    Idea: Signs are elected between two vectors only, the merged one and the newcomer. So TIES needs
    no more than two of them in memory.

    The first expert joins untrimmed, at `scale`. Later, merged and new task vector each keep their
    largest `keep` share of entries over the whole model, every coordinate takes the sign of their
    sum, and entries of that sign are added up (none where they cancel).

    keep: the share of entries that stays, published as 0.2. scale: $\lambda$, published as 0.5.

    Pitfalls: Entries that stay among the largest grow by a factor of 1 + `scale` or more with every
    expert, so early experts weigh most, and order matters much.

    Peers: FusionBench, as the authors of TIES, keeps one entry more than the share asked for, and
    where two entries cancel elects the sign that most coordinates have.

    Raises ValueError unless keep is in (0, 1] and scale is finite.

    Source: a baseline of OPCM, Tang et al. 2025, arXiv 2501.09522.
    """
    check_keep(keep)
    require_finite(scale=scale)
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
    left, values, right = svd(before)
    rank = rank_of(values, tuple(before.shape))
    if rank == 0:
        return delta
    left, total, right = left[:, :rank], values[:rank].cumsum(0), right[:rank]
    lead = int((total / total[-1] <= share).sum())
    diagonal = ((left.T @ delta) * right).sum(dim=1)  # u_i^T delta v_i
    rest = delta - (left * diagonal) @ right
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
    symmetric=False,
    cite="tang2025",
    search=tuple({"share": share} for share in (0.5, 0.25, 0.75, 0.0, 0.9, 1.0)),
)
def opcm(
    problem: MergeProblem, *, share: float = 0.5, cross: bool = True, progress: bool = True
) -> Float[Tensor, " N"]:
    r"""Add of every expert what is orthogonal to the merged change, then rescale the whole.

    $$
    \theta^{(t)} = \theta_0 + \frac{1}{\lambda_t} \Big[ \lambda_{t-1}
      \big(\theta^{(t-1)} - \theta_0\big) + P^{(t-1)}\big(\tau_t\big) \Big], \qquad
    \big\lVert \theta^{(t)} - \theta_0 \big\rVert = \frac{1}{t} \sum_{i=1}^{t} \lVert \tau_i \rVert
    $$

    Idea: A change orthogonal to the merged change interferes least. Rescaling to the mean length
    keeps the model near the base for any number of experts.

    Experts come in the order of the problem's tasks. The weight of a linear layer takes only the
    part of a task vector that `projected` leaves: in the singular directions of the merged change,
    entries on the diagonal go, and those between two leading directions. All other tensors (biases,
    norms, embeddings) take all of it, and so does everything of the first expert. $\lambda_t$ is
    one factor for the whole model. Where the problem knows no module, every matrix counts as a
    linear weight, embeddings too.

    share: of the singular values' sum that is protected, 0 to 1, published as 0.5. cross: keep the
    entries that pair a leading direction with another, as public code does; the formula as arXiv
    2505.11883 quotes it drops them.

    Pitfalls: Earlier experts are protected from later ones, so order matters. Experts that cancel
    leave a small remainder, which the factor scales up to full length. Each step takes a full SVD
    of every linear weight.

    Peers: The authors' own repository calls `diag().fill_(0)`, which fills a copy: there the
    diagonal stays, and published numbers may be of that variant. FusionBench's version takes the
    diagonal out and gives the same as here where merged changes have full rank; it differs in four
    ways. In the null space of a change of lower rank it takes out a diagonal too, in whatever basis
    the SVD returns. At `share=1` it protects no leading direction unless rounding lifts a share
    above 1, here all. It passes over parameters that lie directly on a module with children (CLIP's
    class embedding), which keep the first expert's change. It shuffles the order by default.

    Raises ValueError for a share out of range.

    Source: Tang et al. 2025, arXiv 2501.09522.
    """
    check_share(share)
    places, merging = linear_places(problem), untouched(problem)
    deltas = dense(problem.vectors.deltas)
    for delta in tqdm(deltas, "joining", disable=not progress, leave=False):
        merging = join(merging, delta, places, share, cross)
    return problem.vectors.base + merging.offset
