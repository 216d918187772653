"""Methods that mask or weigh every entry of the task vectors on its own."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from divmerge_core.kernels.stores import dense
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import check_choice, check_keep, moved
from divmerge_core.problem import Batch, MergeProblem
from divmerge_core.vectors import Layout

# --- two-sided trimming ---------------------------------------------------------------------------


def middle(values: Float[Tensor, "R K"], keep: float, remove: float) -> Float[Tensor, "R K"]:
    """Of every row the `keep` share of entries that follows the largest `remove`, else zero."""
    width = values.shape[1]
    top = min(round(remove * width), width - 1)
    count = min(max(1, round(keep * width)), width - top)
    chosen = values.abs().topk(top + count, dim=1).indices[:, top:]
    return torch.zeros_like(values).scatter(1, chosen, values.gather(1, chosen))


@METHODS.register(
    "breadcrumbs",
    source="Davari and Belilovsky 2024",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    search=(
        *({"scale": scale} for scale in (0.4, 0.3, 0.5, 0.7)),
        *({"scale": scale, "remove": 0.01} for scale in (0.4, 0.7)),
    ),
)
def breadcrumbs(
    problem: MergeProblem,
    *,
    keep: float = 0.2,
    remove: float = 0.1,
    scale: float = 0.4,
    per: str = "tensor",
) -> Float[Tensor, " N"]:
    """Task arithmetic on the middle of every task vector: neither outliers nor small entries.

    In every tensor of every task vector the largest `remove` share is dropped, the next `keep`
    share stays, the rest is dropped (arXiv 2312.06795); at least one entry of a tensor stays. per:
    `tensor`, or `row` for a ranking within each row of a matrix, as in the authors' code; a tensor
    of one axis is one row. mergekit's `density` and `gamma` are keep and remove (0.01 there); it
    rounds both numbers of entries down, so that a tensor of a few entries may lose them all. Raises
    ValueError unless keep is in (0, 1], remove in [0, 1), their sum at most 1, and per known.
    """
    check_keep(keep)
    check_choice("per", per, ("tensor", "row"))
    if not 0 <= remove < 1 or keep + remove > 1 + 1e-9:
        raise ValueError(
            f"remove must be in [0, 1) and leave room for keep, got remove {remove} and keep "
            f"{keep}; 0.01 removes the largest hundredth"
        )
    layout, deltas = problem.vectors.layout, dense(problem.vectors.deltas)
    change = torch.zeros_like(deltas[0])
    for row in deltas:
        for (start, stop), shape in zip(layout.bounds, layout.shapes, strict=True):
            if start < stop:
                width = shape[-1] if per == "row" and len(shape) > 1 else stop - start
                change[start:stop] += middle(row[start:stop].view(-1, width), keep, remove).view(-1)
    return moved(problem, scale * change)


# --- consensus ------------------------------------------------------------------------------------


def tall_masks(deltas: Float[Tensor, "T N"], threshold: float) -> Bool[Tensor, "T N"]:
    """Which entries of the summed task vector each task can use.

    True where |tau_t| > threshold |sum of all - tau_t|: the higher the threshold, the fewer
    (arXiv 2405.07813). FusionBench's method compares the base's weights where these lines
    compare task vectors; its helper of the same name does not.
    """
    total = deltas.sum(dim=0)
    return torch.stack([row.abs() > threshold * (total - row).abs() for row in deltas])


@METHODS.register(
    "consensus",
    source="Wang et al. 2024",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    search=(
        *({"scale": scale} for scale in (0.3, 0.2, 0.5, 0.7)),
        *({"scale": scale, "threshold": 0.2} for scale in (0.3, 0.5)),
    ),
)
def consensus(
    problem: MergeProblem,
    *,
    threshold: float = 0.4,
    agree: int = 2,
    scale: float = 0.3,
) -> Float[Tensor, " N"]:
    """Task arithmetic on the entries that at least `agree` tasks can use, by their TALL masks.

    All tensors alike; an entry that fewer tasks can use stays at the base. threshold: the paper
    picks one of 0.2 to 0.6 for each task on validation rows; here it is one for all. agree: 2 drops
    what none or one task uses; 0 is task arithmetic; more than T gives the base, and so does one
    expert alone at agree=2. Source: arXiv 2405.07813. Raises ValueError unless threshold is
    positive and agree 0 or more.
    """
    if not threshold > 0 or agree < 0:
        raise ValueError(
            f"threshold must be positive and agree 0 or more, got {threshold} and {agree}; the "
            "paper takes 0.2 to 0.6 and 2"
        )
    deltas = dense(problem.vectors.deltas)
    shared = tall_masks(deltas, threshold).sum(dim=0) >= agree
    return moved(problem, scale * torch.where(shared, deltas.sum(dim=0), 0))


# --- parameter competition ------------------------------------------------------------------------


def unit_range(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Shifted and scaled to [0, 1]; values that are all equal become 0."""
    low, high = values.min(), values.max()
    return (values - low) / torch.where(high > low, high - low, 1)


def clipped(row: Float[Tensor, " N"], clip: float) -> Float[Tensor, " N"]:
    """The row with its magnitudes' lowest and highest `clip` share brought in to the next one."""
    size, cut = row.abs(), int(clip * len(row))
    low, high = size.kthvalue(cut + 1).values, size.kthvalue(len(row) - cut).values
    return row.sign() * size.clamp(low, high)


def competition(deltas: Tensor, kept: Tensor, inter: str) -> Float[Tensor, "T N"]:
    """Every entry's score: exp(T n^2), n its magnitude in [0, 1], times its accord with others."""
    size = torch.stack([unit_range(row.abs()) for row in kept])
    if inter == "pairwise":
        signed = size * deltas.sign()
        accord = torch.stack([sum(torch.tanh(row * other) for other in signed) for row in signed])
    else:
        accord = torch.tanh(deltas * deltas.sum(dim=0))
    return torch.exp(len(deltas) * size.square()) * accord


@METHODS.register(
    "pcb",
    source="Du et al. 2024",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    between=False,  # alone, what an expert keeps is scaled by 1.2
    search=(
        *({"scale": scale} for scale in (1.2, 1.0, 0.8, 1.5)),
        *({"scale": scale, "ratio": 0.05} for scale in (1.2, 0.8)),
    ),
)
def pcb(
    problem: MergeProblem,
    *,
    ratio: float = 0.1,
    scale: float = 1.2,
    clip: float = 0.01,
    inter: str = "pairwise",
) -> Float[Tensor, " N"]:
    """Parameter competition: a mean of task vectors, weighted entry by entry by what each says.

    Magnitudes of each task vector are clipped at their own `clip` quantiles on both sides and
    scaled to n in [0, 1] over the whole model. An entry scores exp(T n^2) times its accord with the
    others; of each task the best `ratio` share keep the score, scaled to [0, 1], as their weight,
    and the rest weigh 0. The result is base + scale * sum_t w_t tau_t / sum_t w_t, tau_t clipped
    (arXiv 2410.02396). inter: `pairwise`, sum_j tanh(+-n_t n_j), is the authors' vision script;
    `total`, tanh(tau_t sum_j tau_j) on raw values (tiny, so nearly linear), is their short script,
    with clip=1e-4. The paper writes softmax where both have exp and tanh. They keep one entry
    fewer, round the upper quantile down, and may search one scale per task. Raises ValueError
    unless ratio is in (0, 1], clip in [0, 0.5) and inter known.
    """
    if not 0 < ratio <= 1 or not 0 <= clip < 0.5:
        raise ValueError(
            f"ratio must be in (0, 1] and clip in [0, 0.5), got {ratio} and {clip}; the authors "
            "take 0.1 and 0.01"
        )
    check_choice("inter", inter, ("pairwise", "total"))
    deltas = dense(problem.vectors.deltas)
    kept = torch.stack([clipped(row, clip) for row in deltas])
    weight, size = competition(deltas, kept, inter), deltas.shape[1]
    count = min(max(1, round(ratio * size)), size - 1)
    for row in weight:
        row.copy_(unit_range(row.clamp(min=row.kthvalue(size - count).values)))
    below = weight.sum(dim=0)
    return moved(problem, scale * (kept * weight).sum(dim=0) / torch.where(below > 0, below, 1))


# --- a mask per task ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """One vector for all tasks; every task adds its masked and scaled part of it to the base."""

    problem: MergeProblem = field(repr=False)
    unified: Float[Tensor, " N"]
    masks: Bool[Tensor, "T N"]
    scales: Float[Tensor, " T"]

    def parameters(self, task: int) -> Float[Tensor, " N"]:
        """The model that answers for a task."""
        seen = torch.where(self.masks[task], self.unified, 0)
        return moved(self.problem, self.scales[task] * seen)

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        return self.problem.logits(self.parameters(task), task, batch)


def total_size(row: Float[Tensor, " N"], layout: Layout, norm: str) -> Float[Tensor, ""]:
    """The L1 norm of a vector, or the sum over tensors of their mean magnitudes."""
    if norm == "total":
        return row.abs().sum()
    sizes = [row[start:stop].abs().mean() for start, stop in layout.bounds if start < stop]
    return torch.stack(sizes).sum()


@METHODS.register(
    "emr",
    source="Huang et al. 2024",
    needs="nothing",
    cost="weights",
    symmetric=True,
    returns="predictor",
    search=(),
)
def emr(problem: MergeProblem, *, norm: str = "total") -> Masked:
    """Elect, mask, rescale: one vector, a bit mask per task and a number per task.

    The elected sign of an entry is that of the sum of task vectors (zero counts as minus), its size
    the largest among the entries of that sign. Task t sees the entries whose sign is its own, times
    |tau_t| / |what it sees| (arXiv 2405.17461). It must be known which task an input belongs to:
    beside the base it stores one vector, T bits per parameter and T numbers. norm: `total` takes
    L1 norms over the whole model (the paper); `tensor` sums every tensor's mean magnitude, so that
    a bias counts as much as a matrix (the authors' code and FusionBench). A task of which nothing
    is seen gets scale 1. Raises ValueError for an unknown norm.
    """
    check_choice("norm", norm, ("total", "tensor"))
    deltas, layout = dense(problem.vectors.deltas), problem.vectors.layout
    sign = torch.where(deltas.sum(dim=0) > 0, 1, -1)
    masks = deltas * sign > 0
    unified = sign * torch.where(masks, deltas.abs(), 0).amax(dim=0)
    scales = []
    for row, mask in zip(deltas, masks, strict=True):
        seen = total_size(mask * unified, layout, norm)
        own = total_size(row, layout, norm)
        scales.append(torch.where(seen > 0, own / torch.where(seen > 0, seen, 1), 1))
    return Masked(problem, unified, masks, torch.stack(scales))
