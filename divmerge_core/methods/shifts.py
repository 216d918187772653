"""DOGE and WUDI: shifts of a layer's merged delta, fitted to the weights alone, without inputs."""

import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.layer_inputs import linear_layers, require_module
from divmerge_core.merging.linalg import cutoff, matrices, rank_of, truncated
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import check_choice, check_distance, check_steps

UNITS = ("relative", "absolute")
WORDS = re.compile(r"embed|\b(wte|wpe)\b")  # tables of words and places; GPT-2's are the latter


def descend(
    method: str,
    name: str,
    gradient: Callable[[Tensor], Tensor],
    like: Tensor,
    *,
    farthest: Tensor,
    unit: Tensor | float,
    steps: int,
    lr: float,
) -> Tensor:
    """The shift that Adam reaches from zero, in steps of `lr`.

    unit: how far the parameters move per unit of the shift; farthest: the largest norm of a task
    vector. Raises Diverged where the parameters move too far.
    """
    shift = torch.zeros_like(like)
    adam = torch.optim.Adam([shift], lr=lr, fused=True)  # one pass over memory, not ten
    for step in range(steps):
        shift.grad = gradient(shift)
        adam.step()
        check_distance(method, unit * shift.norm(), farthest, f"{step} in {name}", lr)
    return shift


# --- DOGE -----------------------------------------------------------------------------------------
def cutoffs(
    deltas: Float[Tensor, "T N"], places: Sequence[slice], keep: float
) -> Float[Tensor, " T"]:
    """The size of every task's smallest entry among its largest share `keep` at these places."""
    return torch.stack(
        [cutoff(torch.cat([row[place] for place in places]).abs(), keep) for row in deltas]
    )


def shared_basis(deltas: Float[Tensor, "T M K"], fraction: int) -> Float[Tensor, "M q"]:
    """Orthonormal output directions that the experts share, at most min(M, K) // fraction.

    The leading left singular vectors of every expert's leading min(M, K) // T.
    """
    size = min(deltas.shape[1:])

    def leading(matrix: Tensor, count: int) -> Tensor:
        left, values, _ = truncated(matrix, count)
        return left[:, : rank_of(values, tuple(matrix.shape))]

    own = torch.cat([leading(delta, size // len(deltas)) for delta in deltas], dim=1)
    return leading(own, size // fraction) if own.shape[1] else own


def doge_gradient(
    deltas: Float[Tensor, "T M K"], coeffs: Float[Tensor, " T"], shared: Float[Tensor, "M q"]
) -> Callable[[Tensor], Tensor]:
    """The gradient, off the shared directions, of DOGE's loss at a shift [M, K].

    The loss is sum_t sum_m <D_t, D_t - sum_u coeffs_u (D_u + shift)>^2, with the inner product of
    rows m. A shift enters through its products with the deltas alone.
    """
    total = coeffs.sum()
    start = (deltas * (deltas - torch.einsum("t,tmk->mk", coeffs, deltas))).sum(dim=2)  # [T, M]

    def gradient(shift: Tensor) -> Tensor:
        gaps = start - total * torch.einsum("tmk,mk->tm", deltas, shift)
        along = -2 * total * torch.einsum("tm,tmk->mk", gaps, deltas)
        return along - shared @ (shared.T @ along)

    return gradient


@METHODS.register(
    "doge",
    source="Wei et al. 2025",
    cite="wei2025",
    cost="gradients",
    between=False,
    search=(
        *({"eta": eta} for eta in (0.3, 0.5, 0.2, 0.8)),
        *({"eta": eta, "lr": 0.05} for eta in (0.3, 0.5)),
    ),
)
@torch.no_grad()
def doge(
    problem: MergeProblem,
    *,
    eta: float = 0.3,
    lr: float = 0.3,
    units: str = "relative",
    steps: int = 400,
    fraction: int = 6,
    keep: float = 0.3,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Task vectors plus one learned shift per layer, off the subspace that the tasks share.

    $$
    W = W_0 + \sum_t \lambda_t M_t \odot (D_t + \Delta), \qquad
    \lambda_t = \frac{\eta}{\lVert D_t\rVert}, \qquad
    \min_\Delta \sum_{t,m}
    \Big\langle d_{tm},\, d_{tm} - \sum_u \lambda_u (d_{um} + \delta_m) \Big\rangle^2
    $$

    Idea: Along each expert's directions, the merged change should match the expert's own change. A
    shift common to all experts is fitted to this, off the directions that the tasks share.

    Every matrix is treated but embeddings, known by their names ("embed", GPT-2's `wte` and `wpe`);
    these, biases and other tensors stay as in the base. In the loss $d_{tm}$ and $\delta_m$ are
    rows of $D_t$ and $\Delta$. Adam takes `steps` down it, with gradients that have no part in the
    directions that the experts share, at most min(M, K) / `fraction` of them. $M_t$ keeps, over all
    matrices, the largest share `keep` of the task vector's entries. `eta` is $\eta$. `units`:
    `relative` counts `eta` in mean norms of the layer's deltas and `lr` in their root mean square,
    so that the merge scales with the experts; `absolute` takes both as they are: the authors'
    `eta=0.07` and `lr=1e-4`, tuned to CLIP, with 400 steps, fraction 6 and keep 0.3.

    Pitfalls: Constants tuned to CLIP do not transfer to other models, hence relative units. Adam
    mixes coordinates, so the shift itself is not quite orthogonal to the shared directions.

    Peers: FusionBench keeps floor(keep n) + 1 of n entries (here the nearest whole number), treats
    the tensors named `encoder`, and gives NaN where an expert left one of them as it was. Its page
    prints another sign of the loss.

    Raises ValueError for options out of range and models without a matrix to treat, and Diverged
    where the fit runs away.

    Source: Wei et al. 2025 (arXiv 2501.01230), its variant without data; code of FusionBench.
    """
    check_steps("doge", steps, lr)
    check_choice("units", units, UNITS)
    if not 0 < keep <= 1 or fraction < 1 or not 0 <= eta < float("inf"):
        raise ValueError(
            f"keep must be in (0, 1], fraction 1 or more and eta 0 or more, got {keep}, {fraction} "
            f"and {eta}; the authors take 0.3 and 6"
        )
    deltas, flat = dense(problem.vectors.deltas), problem.vectors.base.clone()
    treated = [part for part in matrices(problem.vectors.layout) if not WORDS.search(part[0])]
    if not treated:
        raise ValueError("doge merges matrices that are no embeddings; the layout has none")
    smallest = cutoffs(deltas, [place for _, place, _ in treated], keep)
    farthest = problem.vectors.norms().max()
    for name, place, shape in tqdm(treated, "doge", disable=not progress, leave=False):
        own = deltas[:, place].unflatten(1, shape)  # [T, M, K]
        norms = own.flatten(1).norm(dim=1)
        if not norms.any():
            continue
        relative = units == "relative"
        unit = own.square().mean().sqrt() if relative else 1.0
        coeffs = torch.where(norms > 0, eta * (norms.mean() if relative else 1.0) / norms, 0)
        slope = doge_gradient(own / unit, coeffs, shared_basis(own, fraction))
        options = {"farthest": farthest, "unit": unit * coeffs.sum(), "steps": steps, "lr": lr}
        shift = unit * descend("doge", name, slope, own[0], **options)
        for coeff, delta, least in zip(coeffs, own, smallest, strict=True):
            flat[place] += (coeff * (delta + shift) * (delta.abs() >= least)).flatten()
    return flat


# --- WUDI -----------------------------------------------------------------------------------------
def wudi_gradient(deltas: Float[Tensor, "T M K"]) -> Callable[[Tensor], Tensor]:
    """The gradient of sum_t |(sum_u D_u + shift - D_t) D_t^T|^2 / |D_t|^2 at a shift [M, K].

    It is linear in the shift, so two matrices stand for all experts.
    """
    total, width = deltas.sum(dim=0), deltas.shape[2]
    start, spread = torch.zeros_like(total), deltas.new_zeros(width, width)
    for delta in deltas:
        if delta.any():
            gram = delta.T @ delta / delta.square().sum()
            start += (total - delta) @ gram
            spread += gram
    return lambda shift: 2 * (start + shift @ spread)


def linear_parts(problem: MergeProblem) -> list[tuple[str, slice, tuple[int, ...]]]:
    """Weights of linear layers, as `matrices` has them. Raises ValueError where there are none."""
    require_module(problem, "wudi")
    if not (names := linear_layers(problem)):
        raise ValueError(
            "wudi with scope='linear' merges the weights of nn.Linear layers, and the problem's "
            "module has none whose weight is merged; take scope='matrices'"
        )
    return [part for part in matrices(problem.vectors.layout) if part[0] in names]


@METHODS.register(
    "wudi",
    source="Cheng et al. 2025",
    cite="cheng2025",
    cost="gradients",
    search=({}, *({"lr": lr, "units": "relative"} for lr in (0.025, 0.1, 0.01, 0.05, 0.005))),
)
@torch.no_grad()
def wudi(
    problem: MergeProblem,
    *,
    lr: float = 1e-5,
    units: str = "absolute",
    steps: int = 400,
    scope: str = "matrices",
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Least interference with the experts' row spaces, which stand for their inputs.

    $$
    \min_\Delta \sum_{t=1}^{T}
    \frac{\lVert (\Delta - D_t)\, D_t^\top \rVert_F^2}{\lVert D_t \rVert_F^2}
    $$

    Idea: Gradients of a linear layer are combinations of its inputs, so a change's rows span them.
    On these rows, in place of data, the merged change should act as each expert's does.

    A matrix starts at the sum of its deltas and takes `steps` of Adam; nothing scales the result.
    `scope`: `matrices` treats every matrix, embeddings too, and gives other tensors the mean delta,
    so that one expert alone comes back as it is; `linear` treats the weights of linear layers and
    leaves all else as in the base. `units`: `absolute`, the authors' `lr=1e-5`, tuned to CLIP;
    0.025 in `relative` units (root mean squares of the layer's deltas) is about the same there.

    The defaults, 400 steps on all matrices, are those of FusionBench's example: text experts change
    embeddings too, and the base's would not fit their layers. The authors' own code takes 300 steps
    on the weights of linear layers alone: `steps=300, scope="linear"`.

    Pitfalls: The loss is quadratic and the step count a choice: no step leaves the sum of task
    vectors, and the limit is a least-squares solution in closed form; `lr`, `steps` say how near.

    Peers: FusionBench's function, called without its example's options, takes 300 steps too. The
    gradient here is the same, summed over experts once and not at every step. A user of the
    authors' code could not reproduce its RoBERTa numbers (its issue 6).

    Raises ValueError for options out of range, and for `linear` where the problem knows no module
    or no linear layer; Diverged where the fit runs away.

    Source: Cheng et al. 2025 (arXiv 2503.08099).
    """
    check_steps("wudi", steps, lr)
    check_choice("units", units, UNITS)
    check_choice("scope", scope, ("matrices", "linear"))
    deltas, flat = dense(problem.vectors.deltas), problem.vectors.base.clone()
    if scope == "linear":
        parts = linear_parts(problem)
    else:
        parts, flat = list(matrices(problem.vectors.layout)), flat + deltas.mean(dim=0)
    farthest = problem.vectors.norms().max()
    for name, place, shape in tqdm(parts, "wudi", disable=not progress, leave=False):
        own = deltas[:, place].unflatten(1, shape)  # [T, M, K]
        if not own.any():
            continue
        unit = own.square().mean().sqrt() if units == "relative" else 1.0
        options = {"farthest": farthest, "unit": unit, "steps": steps, "lr": lr}
        shift = descend("wudi", name, wudi_gradient(own / unit), own[0], **options)
        flat[place] = problem.vectors.base[place] + (own.sum(dim=0) + unit * shift).flatten()
    return flat
