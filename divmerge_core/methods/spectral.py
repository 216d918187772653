"""Methods that work on the singular value decomposition of task vectors."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import isometry, matrices, polar, rank_of, svd, truncated
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import moved, ties
from divmerge_core.methods.checks import check_choice, check_keep, require_finite

SCALES = tuple({"scale": scale} for scale in (1.0, 0.4, 0.7, 1.3, 1.6, 2.0))


def merge_matrices(
    problem: MergeProblem,
    scale: float,
    merge: Callable[[Float[Tensor, "T M K"]], Float[Tensor, "M K"]],
) -> Float[Tensor, " N"]:
    """Base plus `scale` times: `merge` of every tensor with two axes, the mean of all others."""
    require_finite(scale=scale)
    deltas = dense(problem.vectors.deltas)
    merged = deltas.mean(dim=0)
    for _, place, shape in matrices(problem.vectors.layout):
        merged[place] = merge(deltas[:, place].unflatten(1, shape)).flatten()
    return moved(problem, scale * merged)


# --- TSV-M ----------------------------------------------------------------------------------------
@METHODS.register(
    "tsv_m",
    source="Gargiulo et al. 2025",
    cite="gargiulo2025",
    needs="validation labels, for the scale",
    linear="scale",
    search=SCALES,
)
def tsv_m(problem: MergeProblem, *, scale: float = 1.0) -> Float[Tensor, " N"]:
    r"""Cut each task's matrices to a share of the rank; make all tasks' directions orthogonal.

    $$
    \Delta = \operatorname{polar}(U)\, \operatorname{diag}(s)\, \operatorname{polar}(V)^\top, \qquad
    U = [U_1 \cdots U_T], \quad V = [V_1 \cdots V_T], \quad
    D_t \approx U_t \operatorname{diag}(s_t)\, V_t^\top
    $$

    Idea: A task's matrix is nearly of low rank, so its leading directions are enough. Tasks disturb
    each other where these overlap; the nearest orthogonal directions do not.

    For the change $D_t$ of a matrix [M, K] with r = min(M, K), each task keeps its floor(r / T)
    leading singular triples; s holds all tasks' singular values, and polar(U) is the nearest matrix
    with orthonormal columns. Every tensor with two axes counts, embeddings too; all others, and
    matrices with r below T that have no room for every task, take the mean. `scale` is a factor
    of all: 1 in the paper, whose code searches 0 to 3.

    Pitfalls: The rank per task falls with 1/T. Directions that several tasks share are turned
    apart, and what the tasks have in common loses its strength.

    Peers: Singular triples of value zero, and directions that U or V does not span (two equal
    experts), are left out here. The authors' code and FusionBench keep them, so there what they
    return depends on the SVD's routine; at full rank all agree. A matrix with r below T, averaged
    here, their code leaves as in the base.

    Raises ValueError for a scale that is not finite.

    Source: Gargiulo et al. 2025 (arXiv 2412.00081), its TSV-Merge.
    """
    return merge_matrices(problem, scale, orthogonalised)


def orthogonal_factors(
    deltas: Float[Tensor, "T M K"],
) -> tuple[Float[Tensor, "M R"], list[Float[Tensor, " _"]], Float[Tensor, "R K"]] | None:
    """TSV-M's directions and every task's singular values; None where r is below T."""
    shape = tuple(deltas.shape[1:])
    share = min(shape) // len(deltas)
    if share == 0:
        return None
    kept = []
    for delta in deltas:
        left, values, right = truncated(delta, share)
        rank = rank_of(values, shape)
        kept.append((left[:, :rank], values[:rank], right[:rank]))
    lefts, values, rights = zip(*kept, strict=True)
    return isometry(torch.cat(lefts, dim=1)), list(values), isometry(torch.cat(rights))


def orthogonalised(deltas: Float[Tensor, "T M K"]) -> Float[Tensor, "M K"]:
    """TSV-M of one matrix: the mean where r is below T."""
    factors = orthogonal_factors(deltas)
    if factors is None:
        return deltas.mean(dim=0)
    left, values, right = factors
    return left * torch.cat(values) @ right


# --- isotropic merging ----------------------------------------------------------------------------
@METHODS.register(
    "iso_c",
    source="Marczak et al. 2025",
    cite="marczak2025",
    needs="validation labels, for the scale",
    linear="scale",
    between=False,
    search=SCALES,
)
def iso_c(problem: MergeProblem, *, scale: float = 1.0) -> Float[Tensor, " N"]:
    r"""The sum of task vectors, every matrix with all its singular values set to their mean.

    $$
    \Delta = \bar s\, U V^\top, \qquad \sum_{t} D_t = U \operatorname{diag}(s)\, V^\top, \quad
    \bar s = \frac{1}{r} \sum_{i=1}^{r} s_i
    $$

    Idea: A few directions that tasks share dominate the sum and hide those of single tasks. With
    equal singular values every direction of the sum has the same weight.

    Every tensor with two axes counts, embeddings too; all others take the mean, not the sum.
    `scale` is a factor of both: the authors search 0.1 to 3.0 on validation rows; FusionBench: 1.5.

    Pitfalls: Where the sum has low rank (LoRA experts) its null directions get the same weight as
    any other, in directions that are rounding noise: expect less there. One expert alone keeps its
    nuclear norm and does not come back.

    Peers: The authors' code leaves CLIP's text projection out, FusionBench takes names to exclude;
    on the same tensors all agree.

    Raises ValueError for a scale that is not finite.

    Source: Marczak et al. 2025 (arXiv 2502.04959), its Iso-C.
    """
    return merge_matrices(problem, scale, lambda deltas: flattened(deltas.sum(dim=0)))


def flattened(matrix: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """The matrix of the same singular vectors and nuclear norm whose singular values are equal."""
    left, values, right = svd(matrix)
    return values.mean() * (left @ right)


@METHODS.register(
    "iso_cts",
    source="Marczak et al. 2025",
    cite="marczak2025",
    needs="validation labels, for the scale",
    linear="scale",
    between=False,
    search=SCALES,
)
def iso_cts(
    problem: MergeProblem, *, common: float = 0.8, scale: float = 1.0
) -> Float[Tensor, " N"]:
    r"""Iso-C with part of the directions taken from single tasks instead of their sum.

    $$
    \Delta = \bar s \operatorname{polar}\big([U_1 \cdots U_T\; U_c]\big)
    \operatorname{polar}\big([V_1 \cdots V_T\; V_c]\big)^\top, \qquad
    D_t - U_c U_c^\top D_t \approx U_t \operatorname{diag}(s_t)\, V_t^\top
    $$

    Idea: The weakest directions of the sum help no task. Each task replaces some of them by
    directions of its own, orthogonal to the common ones.

    For a matrix with r = min(M, K), about the share `common` of the r directions, the columns of
    $U_c$ and $V_c$, are leading ones of the tasks' sum. The rest is split evenly: each task gives
    leading directions of its matrix without the part along $U_c$. All r are made orthogonal and
    weighted by the mean of their singular values. Other tensors take the mean. `scale` is a
    factor of all. `common`: in the paper 0.8; at 1, with one task, or where the rest is under half
    a direction per task, this is Iso-C.

    Pitfalls: It inherits Iso-C's noise at low rank. With many tasks or small matrices the rest
    rounds to no direction, and the method silently becomes Iso-C.

    Peers: The authors' code and FusionBench ask for more directions than there are at small common
    shares; here each task takes what fits.

    Raises ValueError for a common share out of range and a scale that is not finite.

    Source: Marczak et al. 2025 (arXiv 2502.04959), its Iso-CTS.
    """
    if not 0 <= common <= 1:
        raise ValueError(f"common must be in [0, 1], got {common}; 0.8 is the published share")
    return merge_matrices(problem, scale, lambda deltas: common_and_own(deltas, common))


def split_of(rank: int, num_tasks: int, common: float) -> tuple[int, int]:
    """How many of a matrix's directions are common, and how many every task has of its own.

    Rounded as in the authors' code; where that asks for more directions than there are (small
    common shares), each task takes what fits.
    """
    own = min(round((rank - int(rank * common)) / num_tasks), rank // num_tasks)
    return rank - own * num_tasks, own


def common_and_own(deltas: Float[Tensor, "T M K"], common: float) -> Float[Tensor, "M K"]:
    """Iso-CTS of one matrix."""
    shared, own = split_of(min(deltas.shape[1:]), len(deltas), common)
    left, values, right = truncated(deltas.sum(dim=0), shared)
    triples = [truncated(delta - left @ (left.T @ delta), own) for delta in deltas]
    triples.append((left, values, right))
    lefts, values, rights = zip(*triples, strict=True)
    directions = polar(torch.cat(lefts, dim=1)) @ polar(torch.cat(rights))
    return torch.cat(values).mean() * directions


# --- KnOTS ----------------------------------------------------------------------------------------
@METHODS.register(
    "knots",
    source="Stoica et al. 2025",
    cite="stoica2025",
    needs="validation labels, for the scale",
    linear="scale",
    between=False,
    search=tuple({"scale": scale} for scale in (0.6, 0.3, 1.0, 1.5, 2.0, 2.5)),
)
def knots(
    problem: MergeProblem, *, keep: float = 0.2, scale: float = 0.6, shared: str = "output"
) -> Float[Tensor, " N"]:
    r"""TIES in coordinates that the tasks share: a basis from the SVD of all task vectors at once.

    $$
    \Delta = U \operatorname{TIES}\big(\operatorname{diag}(s)\, V_1^\top, \ldots,
    \operatorname{diag}(s)\, V_T^\top\big), \qquad
    [D_1 \cdots D_T] = U \operatorname{diag}(s)\, [V_1^\top \cdots V_T^\top]
    $$

    Idea: Signs and sizes of entries are not comparable where every expert has its own axes. In a
    common basis of all experts' outputs they are.

    The pieces $\operatorname{diag}(s) V_t^\top = U^\top D_t$ are merged over all tensors at once,
    and U maps the outcome back. Every tensor with two axes counts, embeddings too; all others join
    TIES as they are. `keep` as in `ties`. `scale` as in `ties`, here the authors' 0.6 for ViT-B.
    `shared`: the side of the matrices that has the common basis, `output` (theirs) or `input`.

    Pitfalls: Made for LoRA experts. At full rank the SVD, in float64, is slow on embeddings.

    Peers: The authors' code drops directions with s below 1e-5, FusionBench below 1e-4; here s is
    held against the largest one, so that the unit of the weights does not matter. The authors' code
    also appends a layer's bias to its weight as one more column, and its `input` side works for
    square matrices only.

    Raises ValueError for a side that does not exist, an infinite scale, a share outside (0, 1].

    Source: Stoica et al. 2025 (arXiv 2410.19735).
    """
    require_finite(scale=scale)
    check_choice("shared", shared, ("output", "input"))
    check_keep(keep)
    bases, layout, pieces = aligned(problem.vectors, shared)
    zero = pieces.new_zeros(layout.size)
    inner = TaskVectors(layout, problem.vectors.tasks, zero, pieces)
    unused = [[] for _ in inner.tasks]
    found = ties(MergeProblem(inner, unused, problem.forward), keep=keep, scale=scale)
    parts = layout.unflatten(found)
    for name, basis in bases.items():
        part = basis @ parts[name]
        parts[name] = part if shared == "output" else part.T
    return moved(problem, torch.cat([part.reshape(-1) for part in parts.values()]))


def aligned(
    vectors: TaskVectors, shared: str
) -> tuple[dict[str, Tensor], Layout, Float[Tensor, "T L"]]:
    """Every matrix's common basis, and the tasks' coordinates in these with their layout."""
    deltas, bases, pieces = dense(vectors.deltas), {}, {}
    for name, shape, (start, stop) in zip(
        vectors.layout.names, vectors.layout.shapes, vectors.layout.bounds, strict=True
    ):
        parts = deltas[:, start:stop].reshape(len(deltas), *shape)  # [T, *shape]
        if len(shape) == 2:
            parts = parts if shared == "output" else parts.mT
            bases[name] = common_basis(parts)
            parts = bases[name].T @ parts  # [T, R, K]
        pieces[name] = parts
    layout = Layout(tuple(pieces), tuple(tuple(part.shape[1:]) for part in pieces.values()))
    rows = [part.reshape(len(part), -1) for part in pieces.values()]
    return bases, layout, torch.cat(rows, dim=1)


def common_basis(parts: Float[Tensor, "T M K"]) -> Float[Tensor, "M R"]:
    """Orthonormal columns that span every task's columns; one of them where all are zero."""
    beside = torch.cat(list(parts), dim=1)  # [M, T K]
    left, values, _ = torch.linalg.svd(beside.double(), full_matrices=False)
    rank = max(1, rank_of(values, tuple(beside.shape), parts.dtype))
    return left[:, :rank].to(parts.dtype)
