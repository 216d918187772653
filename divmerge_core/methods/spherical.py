"""Methods that go by lengths and angles, tensor by tensor: spherical means and Model Stock."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.stores import dense
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import check_choice, moved, task_weights
from divmerge_core.problem import MergeProblem

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
    needs="validation labels, for the share",
    cost="weights",
    symmetric=False,  # but at t = 0.5
    exactly=2,
    search=tuple({"t": t} for t in (0.5, 0.3, 0.4, 0.6, 0.7, 0.2)),
)
def slerp(problem: MergeProblem, *, t: float = 0.5) -> Float[Tensor, " N"]:
    """A point on the arc from the first expert to the second, tensor by tensor.

    Every tensor, flattened, is sin((1-t)a)/sin a times the first expert's plus sin(ta)/sin a times
    the second's, where a is the angle between the two; the weights themselves turn, not the task
    vectors. At cosines beyond 0.9995 in size, and where one tensor is zero and there is no angle,
    it is (1-t) first + t second. Experts of one base are often that close, and slerp is then the
    average. Public tools agree but for zero tensors, whose angle mergekit and FusionBench take
    for a right one. In no paper on merging: Shoemake 1985 for the arc, mergekit (arXiv 2403.13257)
    for its use. Raises ValueError unless there are two experts and t is in [0, 1].
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


@METHODS.register(
    "multi_slerp",
    source="Goddard et al. 2024",
    needs="nothing",
    cost="weights",
    symmetric=True,
    search=(),
)
def multi_slerp(
    problem: MergeProblem,
    *,
    weights: Sequence[float | int] | None = None,
    origin: str = "base",
) -> Float[Tensor, " N"]:
    """The mean direction of the experts at their mean length, tensor by tensor.

    Every tensor, flattened, is the weighted mean of unit vectors, made a unit vector again, times
    the weighted mean of lengths. origin: `base` does this with task vectors, `zero` with the
    weights. weights: one per task, made to sum to 1; None for equal ones. Where the directions
    cancel there is no mean direction, and the plain weighted mean is taken. The method is
    mergekit's (arXiv 2403.13257 is its paper, older than the method). Its code adds a step in the
    tangent space at the mean, which is always zero: sum w_t (u_t - (u_t.m) m) = 0 for m along
    sum w_t u_t. It refuses three or more directions that cancel. Raises ValueError unless weights
    are T positive numbers and origin is known.
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


@METHODS.register(
    "model_stock",
    source="Jang et al. 2024",
    needs="nothing",
    cost="weights",
    symmetric=True,
    search=(),
)
def model_stock(problem: MergeProblem, *, filter_wise: bool = False) -> Float[Tensor, " N"]:
    """Between base and mean expert, as far as the angles between task vectors say.

    Every tensor, flattened, is base + ratio times the mean task vector, with the ratio
    T c / (1 + (T-1) c) and c the mean cosine of pairs (arXiv 2403.19522). filter_wise: a ratio for
    every row of a matrix; tensors of one axis count as one row. Made for experts of one task:
    task vectors of different tasks are nearly orthogonal, the ratio is then near 0 and the merge
    near the base. A negative c gives a negative ratio, which grows without bound as directions
    cancel. Public code differs: FusionBench averages angles, not cosines, which is the same for
    two experts; mergekit floors a product of lengths at 1e-6, so that task vectors shorter than
    1e-3 seem more orthogonal than they are. Both ask for two experts; one alone stays itself here.
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
