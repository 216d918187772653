"""Essential subspaces: the directions in which a task vector moves a layer's outputs.

The pieces of `esm` and `esm_pp` in methods/subspace.py.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from divmerge_core.merging.layer_inputs import layer_inputs, linear_layers, require_module
from divmerge_core.merging.linalg import rank_of, truncated
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.methods.checks import check_choice
from divmerge_core.methods.forward import hooked

ENERGY_POWER = 0.15  # of a direction's weight within its task; a constant in the authors' code


def subsampled(problem: MergeProblem, inputs: int, seed: int) -> MergeProblem:
    """The problem with whole batches of every task, drawn until they hold `inputs` inputs."""

    def some(batches: Sequence[Batch]) -> list[Batch]:
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
        kept, count = [], 0
        while count < inputs and len(kept) < len(batches):
            kept.append(batches[int(order[len(kept)])])
            count += len(next(iter(kept[-1].inputs.values())))
        return kept

    return replace(problem, batches=[some(batches) for batches in problem.batches])


def essential(
    delta: Float[Tensor, "M K"], gram: Float[Tensor, "K K"]
) -> tuple[Float[Tensor, "M M"], Float[Tensor, " M"]]:
    """Orthonormal directions of a layer's outputs, and the energy of delta @ inputs along each.

    Largest energy first, summed over inputs and not mean-centred; exactly 0 where it is rounding.
    """
    delta = delta.double()
    energy, basis = torch.linalg.eigh(delta @ gram @ delta.T)
    energy, basis = energy.flip(0), basis.flip(1)
    energy[rank_of(energy, tuple(delta.shape)) :] = 0
    return basis, energy


def essential_factors(
    delta: Float[Tensor, "M K"], gram: Float[Tensor, "K K"], rank: int
) -> tuple[Float[Tensor, "M r"], Float[Tensor, "r K"]]:
    """The leading `rank` directions and delta's rows along them, both weighted by their energy."""
    basis, energy = essential(delta, gram)
    energy = energy[:rank]
    if not energy.any():
        return delta.new_zeros(len(delta), rank), delta.new_zeros(rank, delta.shape[1])
    excited = energy > 0  # means are over these: `levelled` counts no others either
    weight = torch.where(excited, (energy / energy[excited].mean()) ** ENERGY_POWER, 0)
    weight = (weight / weight[excited].mean()).to(delta.dtype)
    left = basis[:, :rank].to(delta.dtype)
    return left * weight, weight[:, None] * (left.T @ delta)


def levelled(matrix: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """The matrix with each of its non-zero singular values replaced by their mean."""
    left, values, right = truncated(matrix, min(matrix.shape))
    rank = rank_of(values, tuple(matrix.shape))
    return values[:rank].sum() / max(rank, 1) * (left[:, :rank] @ right[:rank])


def fused(
    factors: Sequence[tuple[Tensor, Tensor]], norms: Float[Tensor, " T"], power: float
) -> Float[Tensor, "M K"]:
    """One layer's factors of all tasks, polarised by task and input dimension, then levelled."""
    if not norms.any():
        return torch.zeros_like(factors[0][0] @ factors[0][1])
    by_task = (norms / norms.mean()) ** power
    rows = torch.cat([s * right for s, (_, right) in zip(by_task, factors, strict=True)])
    sizes = rows.norm(dim=0)
    if sizes.any():  # else no input reaches what the experts changed
        rows = rows * (sizes / sizes.mean()) ** power
    return levelled(torch.cat([left for left, _ in factors], dim=1)) @ levelled(rows)


def polarised_layers(merged: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """Every layer times (its norm / the mean norm of its kind) ** power.

    Layers are of one kind where their names differ in numbers alone.
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, matrix in merged.items():
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(matrix.norm())
    means = {kind: torch.stack(norms).mean() for kind, norms in kinds.items()}

    def scaled(name: str, matrix: Tensor) -> Tensor:
        mean = means[re.sub(r"\d+", "#", name)]
        return matrix * (matrix.norm() / mean) ** power if mean > 0 else matrix

    return {name: scaled(name, matrix) for name, matrix in merged.items()}


def essential_matrices(
    problem: MergeProblem,
    deltas: Sequence[Mapping[str, Tensor]],
    scaling: str,
    power: float,
    progress: bool,
) -> dict[str, Tensor]:
    """What ESM adds to every linear layer, before its scale."""
    tasks = problem.vectors.tasks
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    bar = tqdm(tasks, "essential subspaces", disable=not progress, leave=False)
    for number, task in enumerate(bar):
        expert = problem.vectors.expert(task)
        for name, seen in layer_inputs(problem, expert, number).items():
            delta = deltas[number][name]
            found = essential_factors(delta, seen.gram, max(1, len(delta) // len(tasks)))
            factors.setdefault(name, []).append(found)
    merged = {}
    for name, parts in factors.items():
        norms = torch.stack([delta[name].norm() for delta in deltas])
        merged[name] = fused(parts, norms, power if scaling == "all" else 0.0)
    return polarised_layers(merged, power)


def check_essential(
    method: str, problem: MergeProblem, scale: float, scaling: str, power: float, inputs: int
) -> None:
    """Raise ValueError for options out of range and a problem that lacks inputs or module."""
    check_choice("scaling", scaling, ("all", "layer"))
    if not math.isfinite(scale) or not 0 <= power < float("inf"):
        raise ValueError(
            f"scale must be finite and power 0 or more, got {scale} and {power}; the authors take "
            "power 2, and 0 polarises nothing"
        )
    if inputs < 1:
        raise ValueError(f"inputs must be 1 or more per task, got {inputs}; the paper uses 32")
    problem.require_inputs(method)
    require_module(problem, method)


@dataclass(frozen=True)
class Detour:
    """A layer's low-rank way to every expert, and the mean input by which one is chosen."""

    prototypes: Float[Tensor, "T K"]
    left: Float[Tensor, "T M r"]
    right: Float[Tensor, "T r K"]

    def __call__(self, x: Tensor, mask: Tensor | None) -> Float[Tensor, "B S M"]:
        """What the nearest expert of each input adds to the layer's outputs."""
        x = x.reshape(len(x), -1, x.shape[-1]).to(self.right.dtype)  # [B, S, K]; S = 1 for vectors
        weight = x.new_ones(x.shape[:2]) if mask is None or x.shape[1] == 1 else mask.to(x)
        mean = torch.einsum("bs,bsk->bk", weight / weight.sum(dim=1, keepdim=True), x)
        chosen = cosine_similarity(mean[:, None], self.prototypes, dim=-1).argmax(dim=1)  # [B]
        return x @ self.right[chosen].mT @ self.left[chosen].mT


@dataclass(frozen=True)
class RoutedModel:
    """A merged model whose layers add, input by input, what the nearest expert has more."""

    problem: MergeProblem
    flat: Float[Tensor, " N"]
    detours: Mapping[str, Detour]

    @property
    def nbytes(self) -> int:
        """Bytes to store: merged parameters, factors and prototypes; heads not counted."""
        parts = [(d.prototypes, d.left, d.right) for d in self.detours.values()]
        return self.flat.nbytes + sum(tensor.nbytes for every in parts for tensor in every)

    @torch.no_grad()
    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """Answers on inputs of any task; `task` chooses the head alone, not the experts."""
        mask = batch.inputs.get("attention_mask")

        def hook(detour: Detour) -> Callable:
            def add(layer: nn.Module, given: tuple, kwargs: dict, output: Tensor) -> Tensor:
                return output + detour(given[0], mask).reshape(output.shape).to(output.dtype)

            return add

        layers = linear_layers(self.problem)
        with hooked({layers[name]: hook(detour) for name, detour in self.detours.items()}):
            return self.problem.logits(self.flat, task, batch)


def residual_detours(
    problem: MergeProblem, flat: Float[Tensor, " N"], names: Sequence[str], rank: int
) -> dict[str, Detour]:
    """The named layers' ways from the parameters `flat` to every expert; idle layers have none."""
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    for number, task in enumerate(problem.vectors.tasks):
        expert = problem.vectors.expert(task)
        gaps = problem.vectors.layout.unflatten(expert - flat)
        for name, seen in layer_inputs(problem, expert, number, names).items():
            basis, energy = essential(gaps[name], seen.gram)
            left = (basis * (energy > 0))[:, :rank].to(flat.dtype)
            mean = (seen.total / seen.count).to(flat.dtype)
            parts[name].append((mean, left, left.T @ gaps[name]))
    return {
        name: Detour(*map(torch.stack, zip(*every, strict=True)))
        for name, every in parts.items()
        if every
    }
