"""Parameter competition: a weight for every entry of every task vector."""

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import moved
from divmerge_core.methods.checks import check_choice, require_finite


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
    cite="du2024",
    needs="validation labels, for the scale",
    linear="scale",
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
    r"""A mean of task vectors, each entry weighted by its size and by its accord with other tasks.

    $$
    \theta = \theta_0 + \lambda\, \frac{\sum_t w_t \odot \tau_t}{\sum_t w_t}, \qquad
    s_t = \exp(T n_t^2) \sum_{u=1}^{T} \tanh(\pm n_t\, n_u), \quad w_t = [\,s_t\,]_{\text{top } r}
    $$

    Idea: An entry scores high where it is large for its own task and has the sign of other tasks'
    entries. The best entries are averaged with their scores as weights; the others are dropped.

    The formula holds entry by entry. Magnitudes of each task vector are clipped at their own `clip`
    quantiles on both sides, and scaled to n in [0, 1] over the whole model; the sign in the sum is
    that of the two entries' product. The best `ratio` share r of each task's scores, scaled to [0,
    1], are weights; the others weigh 0. Task vectors enter the mean clipped. All tensors alike.
    `ratio`: the authors' is 0.1. `clip`: the authors' is 0.01. `scale` is a factor, theirs is 1.2.
    `inter`: `pairwise` is the sum above, the authors' vision script; `total` is tanh of the product
    with the summed task vectors, raw: their language scripts, whose `clip` is 0.01 or 1e-4.

    Pitfalls: At `total` the products are tiny, so tanh is nearly linear and the score hardly
    depends on accord. One outlier fixes the unit of a whole model: that is what `clip` is for.

    Peers: The authors' scripts differ from each other, as `inter` says; the paper writes softmax
    where both have exp and tanh. They keep one entry fewer, round the upper quantile down, and may
    search one scale per task.

    Raises ValueError unless `ratio` in (0, 1], `clip` in [0, 0.5), `scale` finite, `inter` known.

    Source: Du et al. 2024 (arXiv 2410.02396).
    """
    require_finite(scale=scale)
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
