"""How task vectors stand to one another: angles, opposite signs, shared places, and where they are
long."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.linalg import matrices
from divmerge_core.merging.task_vectors import Layout, TaskVectors

Groups = tuple[tuple[str, ...], tuple[int, ...]]  # names, and each tensor's group number
Pairwise = Callable[[Float[Tensor, "T n"]], Float[Tensor, "T T"]]
KINDS = ("embedding", "attention", "MLP", "norm", "other")


# --- two task vectors -----------------------------------------------------------------------------


def cosine(deltas: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Cosine of the angle between every two task vectors.

    Between -1 and 1: above 0 where they point the same way on the whole, 0 at right angles, and 0
    where a task vector is zero and has no direction. Derived in notebooks/01_task_vectors.
    """
    inner = deltas @ deltas.T  # [T, T]
    lengths = inner.diagonal().sqrt()
    return (inner / torch.outer(lengths, lengths)).nan_to_num(nan=0.0).clamp(-1, 1)


def sign_conflict(deltas: Float[Tensor, "T N"]) -> Float[Tensor, "T T"]:
    """Share of parameters that two task vectors push in opposite directions.

    Between 0 and 1; parameters that either vector leaves unchanged do not count, and where none
    counts the share is 0. Source: Yadav et al. 2023, §3. Derived in notebooks/01_task_vectors.
    """
    count = len(deltas)
    agreed = torch.zeros(count, count, dtype=torch.float64, device=deltas.device)
    counted = torch.zeros_like(agreed)
    for part in deltas.split(2**20, dim=1):  # float32 counts exactly up to 2**24
        signs = part.sign()  # the product of two tiny numbers would underflow
        agreed += (signs @ signs.T).double()  # agreeing minus opposite
        counted += (signs.abs() @ signs.abs().T).double()
    return ((counted - agreed) / 2 / counted.clamp(min=1)).to(deltas.dtype)


def magnitude_overlap(deltas: Float[Tensor, "T N"], *, share: float = 0.2) -> Float[Tensor, "T T"]:
    """Share of one task vector's largest entries that are among another's largest too.

    Of the n entries that both change, each vector's k = round(share * n) largest by magnitude (at
    least one) are compared, equals of the smallest in order of place. Between 0 and 1: 1 on the
    diagonal, k / n on average where the places are independent (the mean of a hypergeometric
    count), and 0 where nothing is changed by both. Raises ValueError unless share is in (0, 1].
    Derived in notebooks/12_interference.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}; 0.2 compares the largest fifths")
    found = deltas.new_zeros(len(deltas), len(deltas))
    for s, one in enumerate(deltas):
        for t in range(s, len(deltas)):
            both = (one != 0) & (deltas[t] != 0)
            if not both.any():
                continue
            count = max(1, round(share * int(both.sum())))
            marks = [leading(row[both], count) for row in (one, deltas[t])]
            found[s, t] = found[t, s] = int((marks[0] & marks[1]).sum()) / count
    return found


def leading(values: Float[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Where the `count` largest entries by magnitude stand; of equals, the first."""
    size = values.abs()
    cutoff = size.kthvalue(len(size) - count + 1).values
    mark = size > cutoff
    mark[(size == cutoff).nonzero()[: count - int(mark.sum()), 0]] = True
    return mark


# --- rows that no text touched --------------------------------------------------------------------


def shrunk(vectors: TaskVectors, *, tolerance: float = 0.1) -> Bool[Tensor, "T N"]:
    """Parameters of embedding rows that a task did not touch: they only shrank, or stand still.

    A word that no training text holds has no gradient, but AdamW's weight decay takes it straight
    towards zero: its row of the task vector is a multiple -epsilon of the base's row, up to the
    base's rounding. Such rows are those of matrices under the embeddings where what is left of the
    row after taking out that multiple is at most `tolerance` of the row's length: float32 rounds in
    every step, which leaves up to 0.02 where the decay is slow, and one gradient leaves nearly 1.
    Raises ValueError unless tolerance is in [0, 1). Derived in notebooks/12_interference.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}; 0.1 is a tenth")
    deltas = dense(vectors.deltas)
    mark = torch.zeros_like(deltas, dtype=torch.bool)
    for name, place, shape in matrices(vectors.layout):
        if kind_of(name) != "embedding":
            continue
        base = vectors.base[place].unflatten(0, shape)  # [words, H]
        square = base.square().sum(dim=1).clamp(min=torch.finfo(base.dtype).tiny)
        for row, delta in zip(mark, deltas, strict=True):  # one task at a time
            tau = delta[place].unflatten(0, shape)
            decay = (tau * base).sum(dim=1) / square
            rest = (tau - decay[:, None] * base).norm(dim=1)
            still = (decay <= 0) & (rest <= tolerance * tau.norm(dim=1))
            row[place] = still[:, None].expand(shape).reshape(-1)
    return mark


def touched(vectors: TaskVectors, *, tolerance: float = 0.1) -> TaskVectors:
    """The task vectors with zeros in embedding rows that a task's texts did not touch (`shrunk`).

    What leaves zeros out of the count (`sign_conflict`, `magnitude_overlap`) then counts only what
    both tasks learned. Zeros hardly change an angle or a length. Raises ValueError as `shrunk`.
    """
    mark = shrunk(vectors, tolerance=tolerance)
    return vectors.map(lambda deltas: deltas.masked_fill(mark, 0))


# --- where in the model ---------------------------------------------------------------------------


def kind_of(name: str) -> str:
    """What a BERT-like tensor belongs to, one of KINDS: `norm` wherever it stands, else its part.

    >>> kind_of("encoder.layer.0.attention.output.dense.weight")
    'attention'
    """
    if "norm" in name.lower():
        return "norm"
    parts = {"embedding": "embedding", "attention": "attention", "attn": "attention"}
    parts |= {"intermediate": "MLP", "mlp": "MLP", "output.dense": "MLP", "ffn": "MLP"}
    found = [kind for part, kind in parts.items() if part in name.lower()]
    return found[0] if found else "other"


def places(layout: Layout) -> Groups:
    """Groups of tensors by depth and kind, in the layout's order: `encoder.layer.0 attention`.

    What stands outside the blocks goes by its kind alone.
    """
    blocks = groups_of(layout, "block")
    labels = []
    for name, number in zip(layout.names, blocks[1], strict=True):
        block, kind = blocks[0][number], kind_of(name)
        labels.append(
            f"{block} {kind}" if block[-1:].isdigit() else f"{block.split('.')[0]} {kind}"
        )
    names = tuple(dict.fromkeys(labels))
    return names, tuple(names.index(label) for label in labels)


def grouped(layout: Layout, grouping: str | Groups) -> Groups:
    """Groups by the name of a grouping, as they are, or by depth and kind for `place`."""
    if not isinstance(grouping, str):
        return grouping
    return places(layout) if grouping == "place" else groups_of(layout, grouping)


def columns(layout: Layout, grouping: str | Groups) -> list[tuple[str, list[slice]]]:
    """Every group's name and where its tensors stand in the flat vector."""
    names, numbers = grouped(layout, grouping)
    found: list[tuple[str, list[slice]]] = [(name, []) for name in names]
    for (start, stop), number in zip(layout.bounds, numbers, strict=True):
        found[number][1].append(slice(start, stop))
    return found


def norms_by_group(vectors: TaskVectors, grouping: str | Groups) -> Float[Tensor, "T G"]:
    """Euclidean length of every task vector within each group of parameters, in parameter units.

    grouping: a name in GROUPINGS, `place` (depth and kind), or groups. Groups come in the order of
    `grouped`. Their squares sum to the squared length of the whole. Raises ValueError for an
    unknown grouping. Derived in notebooks/01_task_vectors.
    """
    deltas = dense(vectors.deltas)
    parts = columns(vectors.layout, grouping)
    squares = deltas.new_zeros(len(vectors.tasks), len(parts))
    for group, (_, slices) in enumerate(parts):
        for place in slices:
            # `norm` adds up millions of numbers with an error of 2e-4 in float32; `sum` does not
            squares[:, group] += deltas[:, place].square().sum(dim=1)
    return squares.sqrt()


def by_group(
    measure: Pairwise, vectors: TaskVectors, grouping: str | Groups
) -> Float[Tensor, "G T T"]:
    """A measure of pairs of task vectors, such as `cosine`, within each group of parameters.

    grouping: as for `norms_by_group`. Raises ValueError for an unknown one.
    """
    deltas = dense(vectors.deltas)
    parts = [slices for _, slices in columns(vectors.layout, grouping)]
    return torch.stack(
        [measure(torch.cat([deltas[:, place] for place in slices], dim=1)) for slices in parts]
    )


def mean_with_others(pairs: Float[Tensor, "*G T T"]) -> Float[Tensor, "*G T"]:
    """Every task's mean over the other tasks: the diagonal does not count.

    Raises ValueError for one task, which has no others.
    """
    count = pairs.shape[-1]
    if count < 2:
        raise ValueError(f"a mean over the other tasks needs two tasks or more, got {count}")
    return (pairs.sum(-1) - pairs.diagonal(dim1=-2, dim2=-1)) / (count - 1)


def upper(pairs: Float[Tensor, "T T"]) -> Sequence[float]:
    """Every pair's value once, in the order of `itertools.combinations` of the tasks."""
    count = len(pairs)
    rows, others = torch.triu_indices(count, count, offset=1)
    return pairs[rows, others].tolist()
