"""Task vectors compared: cosine, sign conflict, magnitude overlap, and norms by group."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.linalg import matrices
from divmerge_core.merging.task_vectors import Layout, TaskVectors

TOLERANCE = 0.1  # of a row that only decayed: what may be left of its norm
Groups = tuple[tuple[str, ...], tuple[int, ...]]  # names, and each tensor's group number
Pairwise = Callable[[Float[Tensor, "T n"]], Float[Tensor, "T T"]]


def cosine(deltas: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Cosine similarity of every two task vectors; 0 beside a zero vector."""
    inner = deltas @ deltas.T  # [T, T]
    norms = inner.diagonal().sqrt()
    return (inner / torch.outer(norms, norms)).nan_to_num(nan=0.0).clamp(-1, 1)


def gram(values: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Inner products of small whole numbers: float32 counts exactly up to 2**24."""
    return sum((part @ part.T).double() for part in values.split(2**20, dim=1))


def both_nonzero(deltas: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Number of parameters that two task vectors both change, float64."""
    return gram((deltas != 0).float())


def sign_conflict(deltas: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Share of the parameters changed by both task vectors whose signs are opposite; 0 if none.

    Source: Yadav et al. 2023, §3. Derived in notebooks/01_task_vectors.
    """
    agreed = gram(deltas.sign())  # the product of two tiny numbers would underflow
    counted = both_nonzero(deltas)
    return ((counted - agreed) / 2 / counted.clamp(min=1)).to(deltas.dtype)


def magnitude_overlap(deltas: Float[Tensor, "T N"], *, share: float = 0.2) -> Float[Tensor, "T T"]:
    """Share of one task vector's largest entries that are among the other's largest too, 0 to 1.

    Of the n entries that both change, each vector's k = round(share * n) largest by magnitude (at
    least one) are compared: k / n in expectation for independent positions, 0 where both change
    nothing. Raises ValueError unless share is in (0, 1]. Derived in notebooks/12_interference.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}; 0.2 compares the largest fifths")
    overlap = deltas.new_zeros(len(deltas), len(deltas))
    for s, t in torch.triu_indices(*overlap.shape).T.tolist():
        both = (deltas[s] != 0) & (deltas[t] != 0)
        if not both.any():
            continue
        count = max(1, round(share * int(both.sum())))
        one, other = (leading(deltas[task][both], count) for task in (s, t))
        overlap[s, t] = overlap[t, s] = int((one & other).sum()) / count
    return overlap


def leading(values: Float[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Mask of the `count` largest entries by magnitude; ties go to the first."""
    size = values.abs()
    cutoff = size.kthvalue(len(size) - count + 1).values
    mask = size > cutoff
    mask[(size == cutoff).nonzero()[: count - int(mask.sum()), 0]] = True
    return mask


def decay_only(vectors: TaskVectors) -> Bool[Tensor, "T N"]:
    """Mask of embedding rows that only weight decay changed, or nothing at all.

    A word that no training text contains has no gradient, so AdamW makes its row of the task vector
    a multiple -epsilon of the base's. A row counts where the residual of that fit is at most
    `tolerance`, in [0, 1), of its norm: rounding in float32 leaves up to 0.02, one gradient nearly
    1. Derived in notebooks/12_interference.
    """
    deltas = dense(vectors.deltas)
    mask = torch.zeros_like(deltas, dtype=torch.bool)
    for name, place, shape in matrices(vectors.layout):
        if kind_of(name) != "embedding":
            continue
        base = vectors.base[place].unflatten(0, shape)  # [words, H]
        square = base.square().sum(dim=1).clamp(min=torch.finfo(base.dtype).tiny)
        for row, delta in zip(mask, deltas, strict=True):  # one task at a time
            tau = delta[place].unflatten(0, shape)
            decay = (tau * base).sum(dim=1) / square
            residual = (tau - decay[:, None] * base).norm(dim=1)
            decayed = (decay <= 0) & (residual <= TOLERANCE * tau.norm(dim=1))
            row[place] = decayed.repeat_interleave(shape[1])
    return mask


def trained(vectors: TaskVectors) -> TaskVectors:
    """The task vectors with zeros in the rows of `decay_only`, so that measures skip them."""
    mask = decay_only(vectors)
    return vectors.map(lambda deltas: deltas.masked_fill(mask, 0))


KINDS = {  # of a tensor, by the first part of its name that matches
    **{"norm": "norm", "embedding": "embedding", "attention": "attention", "attn": "attention"},
    **{"intermediate": "MLP", "mlp": "MLP", "output.dense": "MLP", "ffn": "MLP"},
}


def kind_of(name: str) -> str:
    """The kind of a BERT-like tensor: norm, embedding, attention, MLP or other."""
    return next((kind for part, kind in KINDS.items() if part in name.lower()), "other")


def grouped(layout: Layout, grouping: str) -> Groups:
    """Groups of a grouping, or of `place`: depth and kind, such as `encoder.layer.0 attention`."""
    if grouping != "place":
        return groups_of(layout, grouping)
    blocks, numbers = groups_of(layout, "block")
    blocks = [block if block[-1:].isdigit() else block.split(".")[0] for block in blocks]
    labels = [f"{blocks[n]} {kind_of(t)}" for n, t in zip(numbers, layout.names, strict=True)]
    names = tuple(dict.fromkeys(labels))
    return names, tuple(map(names.index, labels))


def columns(layout: Layout, grouping: str) -> list[tuple[str, list[slice]]]:
    """Every group's name and its tensors' slices of the flat vector."""
    names, numbers = grouped(layout, grouping)
    places = list(zip(numbers, (slice(*ends) for ends in layout.bounds), strict=True))
    return [(name, [place for g, place in places if g == n]) for n, name in enumerate(names)]


def norms_by_group(vectors: TaskVectors, grouping: str) -> Float[Tensor, "T G"]:
    """Norm of every task vector within each group: of a grouping in GROUPINGS, or of `place`.

    Raises ValueError for an unknown grouping. Derived in notebooks/01_task_vectors.
    """
    # `norm` adds up millions of numbers with an error of 2e-4 in float32; `sum` does not
    deltas = dense(vectors.deltas)
    squares = [
        sum(deltas[:, place].square().sum(dim=1) for place in slices)
        for _, slices in columns(vectors.layout, grouping)
    ]
    return torch.stack(squares, dim=1).sqrt()


def by_group(measure: Pairwise, vectors: TaskVectors, grouping: str) -> Float[Tensor, "G T T"]:
    """A measure of pairs of task vectors, such as `cosine`, within each group of parameters."""
    deltas, groups = dense(vectors.deltas), columns(vectors.layout, grouping)
    return torch.stack(
        [measure(torch.cat([deltas[:, place] for place in slices], 1)) for _, slices in groups]
    )


def mean_with_others(pairs: Float[Tensor, "*G T T"]) -> Float[Tensor, "*G T"]:
    """Every task's mean over the other tasks. Raises ValueError for one task."""
    count = pairs.shape[-1]
    if count < 2:
        raise ValueError(f"a mean over the other tasks needs two tasks or more, got {count}")
    return (pairs.sum(-1) - pairs.diagonal(dim1=-2, dim2=-1)) / (count - 1)
