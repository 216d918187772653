"""Methods that keep some entries of the task vectors and mask the others."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import moved
from divmerge_core.methods.checks import check_choice, check_keep, require_finite, require_positive


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
    cite="davari2024",
    needs="validation labels, for the scale",
    linear="scale",
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
    r"""Task arithmetic on the middle of every task vector: neither outliers nor small entries.

    $$
    \theta = \theta_0 + \lambda \sum_{t=1}^{T} m_t \odot \tau_t, \qquad
    m_{t,n} = 1 \iff \gamma K \le \operatorname{rank} |\tau_{t,n}| \lt (\gamma + \kappa) K
    $$

    Idea: The smallest entries of a task vector are noise, and a few very large ones are outliers.
    Both interfere with other tasks more than they help their own.

    Ranks count from the largest of the K entries of a tensor, from 0. `remove` is $\gamma$, the
    share of largest entries that is dropped; `keep` is $\kappa$, the share after it that stays; at
    least one entry of a tensor stays. The authors' example has 0.1 and 0.2 at `scale` 0.4. All
    tensors are treated. `per`: `tensor`, or `row` for a ranking within each row of a matrix; a
    tensor of one axis is one row.

    Pitfalls: At `remove` 0.1 the largest tenth goes, where much of a task vector's length lies;
    0.01 is gentler. Small tensors lose their largest entry as soon as `remove` rounds to one.

    Peers: The authors' code ranks within rows. mergekit's `density` and `gamma` are `keep` and
    `remove`, 0.01 there; it rounds both numbers of entries down, so small tensors may lose all.

    Raises ValueError unless `keep` is in (0, 1], `remove` in [0, 1), their sum at most 1, `scale`
    finite, and `per` known.

    Source: Davari and Belilovsky 2024 (arXiv 2312.06795).
    """
    check_keep(keep)
    require_finite(scale=scale)
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
    cite="wang2024tall",
    needs="validation labels, for the scale",
    linear="scale",
    search=(
        *({"scale": scale} for scale in (0.3, 0.2, 0.5, 0.7)),
        *({"scale": scale, "threshold": 0.2} for scale in (0.3, 0.5)),
    ),
)
def consensus(
    problem: MergeProblem, *, threshold: float = 0.4, agree: int = 2, scale: float = 0.3
) -> Float[Tensor, " N"]:
    r"""Task arithmetic on the entries that at least `agree` tasks can use, by their TALL masks.

    $$
    \theta = \theta_0 + \lambda\, \mathbf{1}\Big[\sum_{t} m_t \ge k\Big] \odot \sum_{t} \tau_t,
    \qquad m_t = \mathbf{1}\Big[\, |\tau_t| > \rho\, \Big|\sum_{u \ne t} \tau_u\Big| \,\Big]
    $$

    Idea: An entry of the sum serves a task where the task's own part in it is large enough. Entries
    that serve no task or a single one mostly interfere with the others.

    The formula holds entry by entry, and all tensors alike; an entry that fewer tasks can use stays
    at the base. `threshold` is $\rho$, above 0: the paper picks one of 0.2 to 0.6 for each task on
    validation rows; here it is one for all. `agree` is k, in the paper 2, which drops what none or
    one task uses; 0 is task arithmetic, and more than T gives the base. `scale` is $\lambda$.

    Pitfalls: One expert alone gives the base at `agree=2`. With two tasks, few entries serve both.

    Peers: FusionBench's method compares the base's weights where these lines compare task vectors;
    its helper of the same name does not.

    Raises ValueError unless `threshold` is positive and finite, `agree` >= 0, `scale` finite.

    Source: Wang et al. 2024 (arXiv 2405.07813).
    """
    require_finite(scale=scale)
    require_positive(threshold=threshold)
    if agree < 0:
        raise ValueError(f"agree must be 0 or more, got {agree}; the paper takes 2")
    deltas = dense(problem.vectors.deltas)
    shared = tall_masks(deltas, threshold).sum(dim=0) >= agree
    return moved(problem, scale * torch.where(shared, deltas.sum(dim=0), 0))


# --- a mask per task ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Masked:
    """One vector for all tasks; every task adds its masked and scaled part of it to the base."""

    problem: MergeProblem = field(repr=False)
    unified: Float[Tensor, " N"]
    masks: Bool[Tensor, "T N"]
    scales: Float[Tensor, " T"]

    @property
    def nbytes(self) -> int:
        """Bytes to store: base, vector, masks at a bit per entry, scales; heads not counted."""
        numbers = (self.problem.vectors.base, self.unified, self.scales)
        return sum(number.nbytes for number in numbers) + -(-self.masks.numel() // 8)

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


@METHODS.register("emr", source="Huang et al. 2024", cite="huang2024", returns="predictor")
def emr(problem: MergeProblem, *, norm: str = "total") -> Masked:
    r"""Elect, mask, rescale: one vector, a bit mask per task and a number per task.

    $$
    \theta'_t = \theta_0 + \frac{\lVert\tau_t\rVert_1}{\lVert m_t \odot \tau\rVert_1}\,
    m_t \odot \tau, \qquad \tau = \gamma \max_{t} m_t |\tau_t|, \quad
    m_t = \mathbf{1}[\tau_t\, \gamma > 0], \quad \gamma = \operatorname{sign} \sum_{t} \tau_t
    $$

    Idea: Tasks disagree about signs more than about sizes. So all share one vector of elected signs
    and largest sizes, and each masks the entries of the other sign.

    All tensors alike, without data. A sum of zero counts as minus. It must be known which task an
    input belongs to; beside the base the model stores one vector, T bits per parameter and T
    numbers. `norm`: `total` takes L1 norms over the whole model, as in the formula; `tensor` sums
    every tensor's mean magnitude, so that a bias counts as much as a matrix. A task of which
    nothing is seen gets scale 1.

    Pitfalls: It returns a predictor and no merged model. Compare it at equal storage, and not with
    merges that do not need the task.

    Peers: The paper's formula is `total`. The authors' scripts differ, some take `total` and others
    `tensor`; FusionBench takes `tensor`.

    Raises ValueError for an unknown norm.

    Source: Huang et al. 2024 (arXiv 2405.17461), Algorithm 1.
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
