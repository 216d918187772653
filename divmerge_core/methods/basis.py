"""Bases: what the coefficients of a fit scale. `raw`, the paper's, takes task vectors as they are.

A basis turns T task vectors into K = T * bands components: band by band, and within a band task by
task. Only matrices are split or cleaned, and stay low-rank factors. Other tensors (biases, norms,
embedding tables) keep their task vectors, in the first band.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import Factors, LowRankDeltas, part
from divmerge_core.merging.layer_inputs import embedding_tables, layer_inputs, require_module
from divmerge_core.merging.linalg import elected, truncated
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.checks import check_keep
from divmerge_core.methods.essential import essential_factors, levelled
from divmerge_core.methods.spectral import orthogonal_factors
from divmerge_core.registry import Registry

BASES = Registry("basis")  # name -> function(problem, number) -> Basis
Basis = tuple[TaskVectors, list[float]]  # components; where coefficients start, tensor by tensor
Parts = Sequence[tuple[Tensor, Tensor]]  # of one matrix: every task's (left [M, r], right [r, K])


def basis(problem: MergeProblem, spec: str) -> Basis:
    """The components that `spec` names, and where their coefficients start.

    Cleaned matrices start at 1 (`svd` does not clean), all else at 1/T. spec: a name in BASES, with
    a number after a colon where it takes one. `tsv`, `isotropic` and `svd` take bands, 1 by
    default: with `tsv:2` the leading quarter of a task's directions has a coefficient of its own,
    with `tsv:3` the leading quarter of that too. `ties` takes the share of entries to keep, in (0,
    1]. Raises ValueError for other names and numbers, and on several devices.
    """
    name, colon, text = spec.partition(":")
    make, facts = BASES[name], BASES.facts[name]
    number = facts["number"]  # its default; None where it takes none
    try:
        number = type(number)(text) if colon else number
    except (TypeError, ValueError):
        number = 0
    if colon and not number > 0:
        takes = ", ".join(n for n in BASES if BASES.facts[n]["number"] == 1)
        raise ValueError(
            f"basis {spec!r}: {takes} take a whole number of bands, 'ties' a share in (0, 1], the "
            "others no number; as in 'tsv:2'"
        )
    if name != "raw" and problem.reducer:
        raise ValueError(f"basis {spec!r} needs whole matrices: on several devices take 'raw'")
    return make(problem, number)


def banded(parts: Parts, bands: int) -> Factors:
    """One matrix's factors of all components: every task's leading directions first."""

    def cut(rank: int) -> list[tuple[int, int]]:
        return list(pairwise([0, *(-(-rank // 4**band) for band in reversed(range(bands)))]))

    edges = [cut(left.shape[1]) for left, _ in parts]
    order = [(task, *edges[task][band]) for band in range(bands) for task in range(len(parts))]
    return Factors(
        torch.cat([parts[task][0][:, low:high] for task, low, high in order], dim=1),
        torch.cat([parts[task][1][low:high] for task, low, high in order]),
        tuple(high - low for _, low, high in order),
    )


def components(
    problem: MergeProblem,
    bands: int,
    split: Callable[[str, Float[Tensor, "T M K"]], Parts | None],
    start: float | None = None,
) -> Basis:
    """Components from what `split(name, deltas)` gives for every matrix, None to keep it.

    start: of the matrices that are split; None for 1/T, where all others start. Embedding tables
    are known by the problem's module; without one they count as matrices.
    """
    vectors, tasks, tables = problem.vectors, problem.vectors.tasks, embedding_tables(problem)
    layout, stored, starts = vectors.layout, {}, []
    ranks = (1,) * len(tasks) + (0,) * (len(tasks) * (bands - 1))  # of tensors that are kept
    for name, shape, (low, high) in zip(layout.names, layout.shapes, layout.bounds, strict=True):
        own, parts = part(vectors.deltas, low, high), None
        if len(shape) == 2 and name not in tables:
            parts = split(name, own.unflatten(1, shape))
        kept = Factors(own.new_ones(1, len(tasks)), own, ranks)
        stored[low] = kept if parts is None else banded(parts, bands)
        starts.append(1 / len(tasks) if parts is None or start is None else start)
    names = [task if b == 0 else f"{task} band {b + 1}" for b in range(bands) for task in tasks]
    store = LowRankDeltas((len(names), layout.size), stored)
    return TaskVectors(layout, tuple(names), vectors.base, store), starts


def as_they_are(vectors: TaskVectors) -> Basis:
    """One component per task, from 1/T."""
    return vectors, [1 / len(vectors.tasks)] * len(vectors.layout.names)


def orthogonal(problem: MergeProblem, bands: int, *, level: bool) -> Basis:
    """TSV-M's directions; level: with the mean of a matrix's singular values in place of each."""

    def split(name: str, deltas: Float[Tensor, "T M K"]) -> Parts | None:
        factors = orthogonal_factors(deltas)
        if factors is None:
            return None
        left, values, right = factors
        ranks, weight = [len(own) for own in values], torch.cat(values)
        scaled = left * (weight.mean() if level else weight)
        return list(zip(scaled.split(ranks, dim=1), right.split(ranks), strict=True))

    return components(problem, bands, split, start=1.0)


@BASES.register("raw", number=None)
def raw(problem: MergeProblem, number: None) -> Basis:
    """The task vectors themselves."""
    return as_they_are(problem.vectors)


@BASES.register("tsv", number=1)
def tsv(problem: MergeProblem, bands: int) -> Basis:
    """Singular directions orthogonalised over tasks: coefficients of 1 are TSV-M.

    Source: Gargiulo et al. 2025. Tables apart, which TSV-M treats as matrices.
    """
    return orthogonal(problem, bands, level=False)


@BASES.register("isotropic", number=1)
def isotropic(problem: MergeProblem, bands: int) -> Basis:
    """`tsv` with equal singular values, as in Iso-C (Marczak et al. 2025)."""
    return orthogonal(problem, bands, level=True)


@BASES.register("essential", number=None)
@torch.no_grad()
def essential(problem: MergeProblem, number: None) -> Basis:
    """ESM's subspaces of every linear layer, from unlabelled inputs (Li et al. 2026).

    Without its polarisation, which coefficients per tensor replace. Raises ValueError where a task
    has no inputs, or the problem no module.
    """
    problem.require_inputs("basis 'essential'")
    require_module(problem, "basis 'essential'")
    seen = [
        layer_inputs(problem, problem.vectors.expert(task), number)
        for number, task in enumerate(problem.vectors.tasks)
    ]

    def split(name: str, deltas: Float[Tensor, "T M K"]) -> Parts | None:
        if any(name not in own for own in seen):
            return None
        rank = max(1, deltas.shape[1] // len(deltas))
        every = zip(deltas, seen, strict=True)
        found = [essential_factors(delta, own[name].gram, rank) for delta, own in every]
        lefts, rights = zip(*found, strict=True)
        ranks = [len(right) for right in rights]
        left, right = levelled(torch.cat(lefts, dim=1)), levelled(torch.cat(rights))
        return list(zip(left.split(ranks, dim=1), right.split(ranks), strict=True))

    return components(problem, 1, split, start=1.0)


@BASES.register("svd", number=1)
def svd(problem: MergeProblem, bands: int) -> Basis:
    """All of every task's own singular directions: the control without orthogonalisation."""

    def split(name: str, deltas: Float[Tensor, "T M K"]) -> Parts:
        triples = [truncated(delta, min(delta.shape)) for delta in deltas]
        return [(left * values, right) for left, values, right in triples]

    return components(problem, bands, split)


@BASES.register("ties", number=0.2)
def ties(problem: MergeProblem, keep: float) -> Basis:
    """What TIES keeps: the largest share of every task vector's entries, of the elected sign."""
    check_keep(keep)
    return as_they_are(problem.vectors.map(lambda deltas: elected(deltas, keep)))
