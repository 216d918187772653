"""Methods based on lengths and angles, tensor by tensor: spherical means and Model Stock."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import moved, task_weights
from divmerge_core.methods.checks import check_choice

STRAIGHT = 0.9995  # a cosine beyond which an arc is all but a line
CANCELLED = 1e-6  # lengths of a mean of unit vectors that may be rounding alone


def directions(rows: Float[Tensor, "*R K"]) -> tuple[Float[Tensor, "*R K"], Float[Tensor, "*R 1"]]:
    """(unit vectors, lengths) of the rows; a zero row has no direction and stays zero."""
    lengths = rows.square().sum(dim=-1, keepdim=True).sqrt()
    return rows / torch.where(lengths > 0, lengths, 1), lengths


def arc(cosine: float, t: float) -> tuple[float, float]:
    """Weights of the two ends: sin((1-t)a) / sin a and sin(ta) / sin a, a the angle between."""
    if abs(cosine) > STRAIGHT:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@METHODS.register(
    "slerp",
    source="Shoemake 1985",
    cite="shoemake1985,goddard2024",
    needs="validation labels, for the share",
    symmetric=False,  # but at t = 0.5
    exactly=2,
    search=tuple({"t": t} for t in (0.5, 0.3, 0.4, 0.6, 0.7, 0.2)),
)
def slerp(problem: MergeProblem, *, t: float = 0.5) -> Float[Tensor, " N"]:
    r"""Spherical interpolation from the first expert to the second, tensor by tensor.

    $$
    \theta = \frac{\sin((1 - t)\, a)}{\sin a}\, \theta_1 + \frac{\sin(t\, a)}{\sin a}\, \theta_2,
    \qquad \cos a = \frac{\langle \theta_1, \theta_2 \rangle}
    {\lVert\theta_1\rVert\, \lVert\theta_2\rVert}
    $$

    Idea: Between two vectors of one length the straight line is shorter in the middle. The arc
    keeps the length and turns the direction at constant speed.

    Every tensor is flattened and has its own angle. The weights themselves turn, not the task
    vectors. `t` in [0, 1], 0 the first expert and 1 the second; 0.5 is usual. At cosines beyond
    0.9995 in size, and where one tensor is zero and there is no angle, the way is straight: (1 - t)
    times the first plus t times the second.

    Pitfalls: Experts of one base are often closer than that, and slerp is then the average. It
    takes two experts, and their order matters unless t is 0.5.

    Peers: mergekit and FusionBench agree but for zero tensors, whose angle they call a right one.

    Raises ValueError unless there are two experts and t is in [0, 1].

    Source: Shoemake 1985 for the arc; mergekit (arXiv 2403.13257) for its use (no paper).
    """
    vectors = problem.vectors
    if len(vectors.tasks) != 2:
        raise ValueError(
            f"slerp takes exactly 2 experts, got {len(vectors.tasks)}; select two tasks, or use "
            "multi_slerp"
        )
    if not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t}; 0 is the first expert, 1 the second")
    result, deltas = torch.empty_like(vectors.base), dense(vectors.deltas)
    for start, stop in vectors.layout.bounds:
        ends = vectors.base[start:stop] + deltas[:, start:stop]  # [2, n]
        units, lengths = directions(ends)
        cosine = float((units[0] @ units[1]).clamp(-1, 1)) if lengths.all() else 1.0
        result[start:stop] = ends.new_tensor(arc(cosine, t)) @ ends
    return result


@METHODS.register("multi_slerp", source="Goddard et al. 2024", cite="goddard2024")
def multi_slerp(
    problem: MergeProblem, *, weights: Sequence[float | int] | None = None, origin: str = "base"
) -> Float[Tensor, " N"]:
    r"""The mean direction of the experts at their mean length, tensor by tensor.

    $$
    \Delta = \Big(\sum_{t} w_t \lVert\tau_t\rVert\Big)\, \frac{\bar u}{\lVert\bar u\rVert}, \qquad
    \bar u = \sum_{t} w_t\, \frac{\tau_t}{\lVert\tau_t\rVert}, \quad \theta = \theta_0 + \Delta
    $$

    Idea: Averaging nearly orthogonal task vectors makes them short. Here only directions are
    averaged, and the length is the experts' own.

    Every tensor, flattened, by itself. `origin`: `base` does this with task vectors, as in the
    formula; `zero` with the weights. `weights`: one positive number per task, made to sum to 1;
    None for equal ones. Where the directions cancel there is no mean direction, and the plain
    weighted mean is taken.

    Pitfalls: The result is up to the root of T longer than the average, which may be too long for
    many tasks, and there is no scale. One expert's long tensor lengthens the mean for all.

    Peers: The method is mergekit's. Its code adds a step in the tangent space at the mean, which is
    always zero: what the unit vectors have off the mean direction sums to nothing. It refuses three
    or more directions that cancel.

    Raises ValueError unless `weights` are T positive numbers and `origin` is known.

    Source: mergekit's `multislerp`; its paper, Goddard et al. 2024 (arXiv 2403.13257), is older.
    """
    check_choice("origin", origin, ("base", "zero"))
    vectors, deltas = problem.vectors, dense(problem.vectors.deltas)
    weight = task_weights(weights, deltas)
    weight /= weight.sum()
    change = torch.empty_like(deltas[0])
    for start, stop in vectors.layout.bounds:
        shift = vectors.base[start:stop] * (origin == "zero")
        rows = deltas[:, start:stop] + shift
        units, lengths = directions(rows)
        mean, size = directions(weight @ units)
        turned = mean * (weight @ lengths) if size > CANCELLED else weight @ rows
        change[start:stop] = turned - shift
    return moved(problem, change)


def stock_ratio(rows: Float[Tensor, "T R K"]) -> Float[Tensor, "R 1"]:
    """How far to go from the base to the mean expert: T c / (1 + (T-1) c) of the mean cosine c.

    c is the mean over pairs of experts. One expert alone gives 1, for it has no pair; directions
    that cancel, where the denominator vanishes, give 0.
    """
    num_tasks, units = len(rows), directions(rows)[0]
    if num_tasks == 1:
        return torch.ones_like(rows[0, :, :1])
    of_sum, of_each = units.sum(dim=0).square().sum(dim=-1), units.square().sum(dim=(0, 2))
    cosine = (of_sum - of_each) / (num_tasks * (num_tasks - 1))
    below = 1 + (num_tasks - 1) * cosine
    ratio = torch.where(below > CANCELLED, num_tasks * cosine / below.clamp(min=CANCELLED), 0)
    return ratio[:, None]


@METHODS.register("model_stock", source="Jang et al. 2024", cite="jang2024")
def model_stock(problem: MergeProblem, *, filter_wise: bool = False) -> Float[Tensor, " N"]:
    r"""Between base and mean expert, as far as the angles between task vectors say.

    $$
    \theta = \theta_0 + \frac{T c}{1 + (T - 1)\, c} \cdot \frac{1}{T} \sum_{t=1}^{T} \tau_t,
    \qquad c = \operatorname*{mean}_{t \ne u} \frac{\langle\tau_t, \tau_u\rangle}
    {\lVert\tau_t\rVert\, \lVert\tau_u\rVert}
    $$

    Idea: Experts of one task lie on a sphere around a centre that generalises best. The more they
    differ in direction, the nearer to the base is the point closest to that centre.

    Every tensor, flattened, has its own ratio. `filter_wise`: a ratio for every row of a matrix;
    tensors of one axis count as one row. One expert alone stays itself.

    Pitfalls: Made for experts of one task. Task vectors of different tasks are nearly orthogonal,
    the ratio is then near 0 and the merge near the base. A negative c gives a negative ratio, which
    grows without bound as directions cancel; where they cancel the ratio is 0.

    Peers: FusionBench averages angles and not cosines, which is the same for two experts. mergekit
    floors a product of lengths at 1e-6, so that task vectors shorter than 1e-3 seem more orthogonal
    than they are. Both ask for two experts or more.

    Source: Jang et al. 2024 (arXiv 2403.19522).
    """
    vectors, deltas = problem.vectors, dense(problem.vectors.deltas)
    change = torch.empty_like(deltas[0])
    bounds, shapes = vectors.layout.bounds, vectors.layout.shapes
    for (start, stop), shape in zip(bounds, shapes, strict=True):
        if start < stop:
            width = shape[-1] if filter_wise and len(shape) > 1 else stop - start
            rows = deltas[:, start:stop].reshape(len(deltas), -1, width)
            change[start:stop] = (stock_ratio(rows) * rows.mean(dim=0)).flatten()
    return moved(problem, change)
