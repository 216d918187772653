"""Methods that work in subspaces of the layers: essential, shared, interfering."""

import re

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.activations import linear_layers
from divmerge_core.kernels.stores import dense
from divmerge_core.linalg import matrices
from divmerge_core.methods import METHODS
from divmerge_core.methods.essential import (
    RoutedModel,
    check_essential,
    drawn,
    essential_matrices,
    residual_detours,
)
from divmerge_core.methods.shifts import (
    check_fit,
    cutoffs,
    descend,
    doge_gradient,
    shared_basis,
    wudi_gradient,
)
from divmerge_core.methods.spectral import orthogonalised
from divmerge_core.problem import MergeProblem

# --- essential subspaces --------------------------------------------------------------------------


@METHODS.register(
    "esm",
    source="Li et al. 2026",
    needs="unlabelled inputs",
    cost="inputs",
    symmetric=True,
    between=False,
    search=tuple(
        {"scale": scale, "scaling": scaling}
        for scaling in ("all", "layer")
        for scale in (2.0, 1.0, 4.0)
    ),
)
@torch.no_grad()
def esm(
    problem: MergeProblem,
    *,
    scale: float = 2.0,
    scaling: str = "all",
    power: float = 2.0,
    inputs: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Join the experts' essential subspaces with equal strength (arXiv 2602.20208, its code).

    A linear layer [M, K] of every expert keeps the M/T output directions along which its delta
    moves the outputs most on the task's own inputs, D_t ~ P_t A_t. All P_t side by side and all
    A_t on top of each other are made orthonormal, times their mean singular value: the product,
    times `scale`, is added to the base. Other matrices (embeddings) are merged as by TSV-M; biases
    and other tensors take the mean delta; both without `scale`.

    scaling: `all` polarises tasks, input dimensions and layers, each by (norm / mean norm) **
    power, as in the authors' vision code; `layer` polarises layers alone, as in their RoBERTa
    code. scale: in the former 2 alpha, with alpha searched in [0, 2] on validation labels, in the
    latter searched in [0, 5] and applied to every tensor. inputs: per task, in whole batches drawn
    by `seed`.

    The result has equal singular values, so one expert alone does not come back. With fewer tokens
    than M/T the authors fill the basis with unit vectors that are not orthogonal to the rest;
    here directions that no input excites are left out, of the mean too. Few layers of a kind make
    power 2 fragile: try 0 or 1. Raises ValueError for options out of range, tasks without inputs
    and problems without a module.
    """
    check_essential("esm", problem, scale, scaling, power, inputs)
    layout = problem.vectors.layout
    deltas = [layout.unflatten(row) for row in dense(problem.vectors.deltas)]
    few = drawn(problem, inputs, seed)
    merged = essential_matrices(few, deltas, scaling, power, progress)
    flat = problem.vectors.base.clone()
    for name, leaf in layout.unflatten(flat).items():
        every = torch.stack([delta[name] for delta in deltas])
        if name in merged:
            leaf += scale * merged[name]
        else:
            leaf += orthogonalised(every) if leaf.ndim == 2 else every.mean(dim=0)
    return flat


@METHODS.register(
    "esm_pp",
    source="Li et al. 2026",
    needs="unlabelled inputs",
    cost="inputs",
    symmetric=True,
    returns="predictor",
    search=({}, {"scaling": "layer"}),
)
@torch.no_grad()
def esm_pp(
    problem: MergeProblem,
    *,
    rank: int = 32,
    layers: str = "",
    scale: float = 2.0,
    scaling: str = "all",
    power: float = 2.0,
    inputs: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> RoutedModel:
    """ESM plus, layer by layer, a low-rank way back to the expert whose inputs look alike.

    The residual of expert and ESM keeps the `rank` output directions that it moves most on the
    expert's inputs. At run time each input goes, in every layer, to the task whose mean layer input
    has the largest cosine with the mean over its own tokens (padding left out); biases and
    embeddings stay ESM's. The task number is not looked at.

    layers: a regular expression for the weights that get such a way; "" for all linear layers, as
    in the authors' RoBERTa code. Their vision code takes the attention's input projections and the
    first map of each MLP. That RoBERTa code differs in more: it adds whole deltas to the base, of
    rank M/T, and lets a whole batch vote for one expert. Other options are those of `esm`
    (arXiv 2602.20208 and 2606.19164). Raises ValueError as `esm` does, for a rank below 1, and
    where `layers` matches none.
    """
    check_essential("esm_pp", problem, scale, scaling, power, inputs)
    names = [name for name in linear_layers(problem) if re.search(layers, name)]
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}; the paper uses 32")
    if not names:
        raise ValueError(
            f"layers={layers!r} matches none of {', '.join(linear_layers(problem))}; '' takes all"
        )
    same = {"scaling": scaling, "power": power, "inputs": inputs, "seed": seed}
    flat = esm(problem, scale=scale, progress=progress, **same)
    few = drawn(problem, inputs, seed)
    return RoutedModel(problem, flat, residual_detours(few, flat, names, rank))


# --- fits to the weights alone --------------------------------------------------------------------


@METHODS.register(
    "doge",
    source="Wei et al. 2025",
    needs="nothing",
    cost="gradients",
    symmetric=True,
    between=False,
    search=({}, {"eta": 0.5}),
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
    """Task vectors plus one learned shift per layer, off their shared subspace (arXiv 2501.01230).

    In every matrix each expert has the coefficient eta / its norm there. The shift, shared by all
    experts, brings the merged delta's inner product with every row of every expert's delta to that
    of the expert itself; its gradients have no part in the directions that the experts share. Of
    each task vector's entries, over all matrices, only the largest share `keep` receive delta and
    shift. Embeddings, biases and other tensors stay as in the base.

    units: `relative` counts eta in mean norms of the layer's deltas and lr in their root mean
    square, so that the merge scales with the experts; `absolute` takes both as they are: the
    authors' eta=0.07 and lr=1e-4, tuned to CLIP. Adam mixes coordinates, so the shift itself is not
    quite orthogonal to the shared directions. FusionBench's code keeps floor(keep n) + 1 of n
    entries (here the nearest whole number), treats the tensors named `encoder`, and gives NaN where
    an expert left one of them as it was. Raises ValueError for options out of range and models
    without a matrix to treat, and where the fit diverges.
    """
    check_fit(units, steps, lr)
    if not 0 < keep <= 1 or fraction < 1 or not 0 <= eta < float("inf"):
        raise ValueError(
            f"keep must be in (0, 1], fraction 1 or more and eta 0 or more, got {keep}, {fraction} "
            f"and {eta}; the authors take 0.3 and 6"
        )
    deltas, flat = dense(problem.vectors.deltas), problem.vectors.base.clone()
    treated = [part for part in matrices(problem.vectors.layout) if "embed" not in part[0]]
    if not treated:
        raise ValueError("doge merges matrices that are no embeddings; the layout has none")
    smallest = cutoffs(deltas, [place for _, place, _ in treated], keep)
    for name, place, shape in tqdm(treated, "doge", disable=not progress, leave=False):
        own = deltas[:, place].unflatten(1, shape)  # [T, M, K]
        norms = own.flatten(1).norm(dim=1)
        if not norms.any():
            continue
        relative = units == "relative"
        unit = own.square().mean().sqrt() if relative else 1.0
        coeffs = torch.where(norms > 0, eta * (norms.mean() if relative else 1.0) / norms, 0)
        slope = doge_gradient(own / unit, coeffs, shared_basis(own, fraction))
        shift = unit * descend(name, torch.zeros_like(own[0]), slope, steps, lr)
        for coeff, delta, cutoff in zip(coeffs, own, smallest, strict=True):
            flat[place] += (coeff * (delta + shift) * (delta.abs() >= cutoff)).flatten()
    return flat


@METHODS.register(
    "wudi",
    source="Cheng et al. 2025",
    needs="nothing",
    cost="gradients",
    symmetric=True,
    search=({}, {"lr": 0.025, "units": "relative"}),
)
@torch.no_grad()
def wudi(
    problem: MergeProblem,
    *,
    lr: float = 1e-5,
    units: str = "absolute",
    steps: int = 400,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Least interference with the experts' row spaces, which stand for inputs (arXiv 2503.08099).

    Every matrix, embeddings too, starts at the sum of its deltas and takes `steps` of Adam down
    sum_t |(merged - D_t) D_t^T|^2 / |D_t|^2; other tensors take the mean delta. Nothing scales the
    result. One expert alone comes back as it is.

    units: `absolute`, the authors' lr=1e-5, tuned to CLIP, where 0.025 in `relative` units (root
    mean squares of the layer's deltas) is about the same. The loss is quadratic and the step count
    a choice: in the limit it has a closed form. FusionBench's function defaults to 300 steps. The
    gradient here is the same, summed over experts once instead of at every step. A user of the
    authors' code could not reproduce its RoBERTa numbers (its issue 6). Raises ValueError for
    options out of range and where the fit diverges.
    """
    check_fit(units, steps, lr)
    deltas = dense(problem.vectors.deltas)
    flat = problem.vectors.base + deltas.mean(dim=0)
    parts = list(matrices(problem.vectors.layout))
    for name, place, shape in tqdm(parts, "wudi", disable=not progress, leave=False):
        own = deltas[:, place].unflatten(1, shape)  # [T, M, K]
        if not own.any():
            continue
        unit = own.square().mean().sqrt() if units == "relative" else 1.0
        shift = descend(name, torch.zeros_like(own[0]), wudi_gradient(own / unit), steps, lr)
        flat[place] = problem.vectors.base[place] + (own.sum(dim=0) + unit * shift).flatten()
    return flat
