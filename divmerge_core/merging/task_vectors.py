"""A model as one flat vector: where each tensor lives, and task vectors as one matrix `[T, N]`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from math import prod

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import Deltas, Factors, Int8Deltas, LowRankDeltas, dense
from divmerge_core.kernels.host_offload import StreamedDeltas
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.require import require, require_mapping
from divmerge_core.registry import Registry

STORAGES = Registry("storage")


def stacked(dtype: torch.dtype | None) -> Callable[[Iterator[Tensor], int], Tensor]:
    """A storage that is a matrix of this dtype, filled one row at a time."""

    def store(rows: Iterator[Tensor], count: int) -> Float[Tensor, "T N"]:
        first = next(rows)
        result = first.new_empty(count, len(first), dtype=dtype)
        for number, row in enumerate(chain([first], rows)):
            result[number] = row
        return result

    return store


STORAGES.register("float32")(stacked(None))  # what a layout flattens to: float64 stays float64
STORAGES.register("bfloat16")(stacked(torch.bfloat16))
STORAGES.register("float16")(stacked(torch.float16))
STORAGES.register("int8")(lambda rows, count: Int8Deltas.of(rows))
STORAGES.register("streamed")(StreamedDeltas.of)
STORAGES.register("streamed_bfloat16")(partial(StreamedDeltas.of, dtype=torch.bfloat16))


def unmergeable(tensor: Tensor) -> str | None:
    """Why a tensor cannot be added to others and what to do; None where it can."""
    if tensor.is_meta:
        return "is on the device meta and holds no numbers; load the weights before merging"
    if tensor.layout != torch.strided:
        return f"is stored as {tensor.layout}; give tensor.to_dense()"
    if tensor.is_complex():
        return f"is {tensor.dtype}; give torch.view_as_real(tensor), whose numbers are real"
    if tensor.is_floating_point() and tensor.itemsize > 1:
        return None
    if tensor.is_floating_point() or tensor.is_quantized:
        return f"is {tensor.dtype}, in which nothing is added up; dequantise the model to bfloat16"
    return f"is {tensor.dtype}: whole numbers are no weights; leave it out of what is merged"


def is_count(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers or truth values: counters, positions, masks."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)


def without_counts(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor], who: str
) -> dict[str, Tensor]:
    """The state dict without what holds whole numbers or truth values in the base.

    Raises ValueError, naming them, where these are not the base's own.
    """
    require_mapping(state, who)
    counts = {name: tensor for name, tensor in base.items() if is_count(tensor)}
    own = {name: state[name] for name in counts if name in state}
    for name, tensor in own.items():
        if tensor.is_meta:
            raise ValueError(f"{who}: {name} {unmergeable(tensor)}")
    if other := [n for n, t in own.items() if t.dtype != counts[n].dtype or not t.equal(counts[n])]:
        raise ValueError(
            f"{who}: {other[:5]} of {counts[other[0]].dtype} differ from the base's, and the mean "
            "of counters, masks or packed weights means nothing; give the expert the base's, or "
            "load packed weights dequantised to bfloat16"
        )
    if counts and len(counts) == len(base):
        raise ValueError(
            f"{who} holds whole numbers alone, {list(counts)[:5]}: load packed weights dequantised"
        )
    return {name: tensor for name, tensor in state.items() if name not in counts}


@dataclass(frozen=True)
class Layout:
    """Names and shapes of P tensors, laid end to end in a vector of N numbers."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        if not self.names:
            raise ValueError("a layout needs at least one tensor; the state dict given is empty")

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Layout":
        """The layout of a state dict, in its own order."""
        require_mapping(state, "the state dict")
        return cls(tuple(state), tuple(tuple(tensor.shape) for tensor in state.values()))

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of every tensor in the flat vector."""
        stops = tuple(accumulate(prod(shape) for shape in self.shapes))
        return tuple(zip((0, *stops), stops, strict=False))

    @property
    def size(self) -> int:
        """N, the number of merged parameters."""
        return self.bounds[-1][1]

    def flatten(
        self, state: Mapping[str, Tensor], who: str = "the state dict"
    ) -> Float[Tensor, " N"]:
        """Copy a state dict into one float32 vector (float64 stays float64).

        Raises ValueError, naming the tensors, where names or shapes differ from the layout or a
        weight is NaN or infinite.
        """
        self.check(state, who)
        wide = any(tensor.dtype == torch.float64 for tensor in state.values())
        dtype = torch.float64 if wide else torch.float32
        return torch.cat([state[name].detach().reshape(-1).to(dtype) for name in self.names])

    def unflatten(self, flat: Float[Tensor, " N"]) -> dict[str, Tensor]:
        """Views of the flat vector under their names: writing to one writes to the vector."""
        require(flat, Tensor, "the vector", f"one tensor of {self.size} numbers, such as a merge")
        if flat.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} numbers, got {tuple(flat.shape)}")
        return {
            name: flat[start:stop].view(shape)
            for name, shape, (start, stop) in zip(self.names, self.shapes, self.bounds, strict=True)
        }

    def check(self, state: Mapping[str, Tensor], who: str = "the state dict") -> None:
        """Raise ValueError unless `state` has this layout's tensors, all floating and finite."""
        require_mapping(state, who)
        missing, extra = set(self.names) - set(state), set(state) - set(self.names)
        if missing or extra:
            raise ValueError(
                f"{who} does not match the base model: missing {sorted(missing)[:5]}, "
                f"extra {sorted(extra)[:5]}; load base and expert with the same model class"
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(state[name].shape) != shape:
                raise ValueError(
                    f"{who}: {name} has shape {tuple(state[name].shape)}, the base has {shape}; "
                    "merging needs experts of one architecture and vocabulary"
                )
            if refusal := unmergeable(state[name]):
                raise ValueError(f"{who}: {name} {refusal}")
            if not torch.isfinite(state[name]).all():
                raise ValueError(f"{who}: {name} holds NaN or inf; the checkpoint is damaged")


@dataclass(frozen=True)
class TaskVectors:
    """A base model and what fine-tuning on each of T tasks added to it.

    `deltas[t] = theta_t - theta_0` (Ilharco et al. 2023; DivMerge Eq. 1): a matrix in any floating
    dtype, or a store that takes less memory (see STORAGES and `from_adapters`).
    """

    layout: Layout
    tasks: tuple[str, ...]
    base: Float[Tensor, " N"]
    deltas: Deltas

    def __post_init__(self):
        stores = Tensor | Int8Deltas | LowRankDeltas | StreamedDeltas
        kinds = {"layout": Layout, "tasks": tuple | list, "base": Tensor, "deltas": stores}
        for name, kind in kinds.items():
            require(getattr(self, name), kind, name, "TaskVectors(layout, tasks, base, deltas)")
        shape, size = tuple(self.deltas.shape), self.layout.size
        if shape != (len(self.tasks), size) or self.base.shape != (size,):
            raise ValueError(
                f"{len(self.tasks)} tasks of {size} parameters need base [{size}] and deltas "
                f"[{len(self.tasks)}, {size}], got {list(self.base.shape)} and {list(shape)}"
            )
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be one or more distinct names, got {list(self.tasks)}")

    @classmethod
    def from_states(
        cls,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        storage: str = "float32",
    ) -> "TaskVectors":
        """Subtract the base's state dict from every expert's (task name -> state dict).

        Whole numbers and truth values (counters, positions, masks) are not in the layout: they stay
        the base's, which has to be what every expert has too. storage: how task vectors are kept, a
        name in STORAGES; `streamed` leaves them in the host's memory. Raises ValueError for tensors
        of other names or shapes than the base's, not finite, complex, float8, quantised or sparse.
        """
        store, weights = STORAGES[storage], without_counts(base, base, "the base model")
        layout = Layout.of(weights)
        require_mapping(experts, "experts", "tasks to state dicts", Mapping)
        if not experts:
            raise ValueError("no experts given; merging needs one or more")
        flat = layout.flatten(weights, "the base model")

        def rows() -> Iterator[Tensor]:
            for task, state in experts.items():
                who = f"expert {task!r}"
                yield layout.flatten(without_counts(state, base, who), who).sub_(flat)

        return cls(layout, tuple(experts), flat, store(rows(), len(experts)))

    @classmethod
    def from_adapters(
        cls,
        base: Mapping[str, Tensor],
        adapters: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
        *,
        scale: float = 1.0,
    ) -> "TaskVectors":
        """Task vectors of LoRA experts: task -> name of a matrix -> its factors (B, A).

        The task vector of a matrix is scale * B @ A (scale is LoRA's alpha / r), and is never
        multiplied out. Ranks may differ; a task may leave matrices alone. Whole numbers of the base
        are not in the layout. Raises ValueError for a name that is no matrix of the base, for
        factors whose product does not have its shape, and for tensors that cannot be added up.
        """
        base = without_counts(base, base, "the base model")
        layout = Layout.of(base)
        layout.check(base, "the base model")
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        require_mapping(adapters, "adapters", "tasks to factors by name", Mapping)
        for task, factors in adapters.items():
            require_mapping(factors, f"adapter {task!r}", "names to factors (B, A)", Sequence)
            for name, (left, right) in factors.items():
                shape = (left.shape[0], right.shape[1])
                if shapes.get(name) != shape or left.shape[1] != right.shape[0]:
                    raise ValueError(
                        f"adapter {task!r}: {name} of shape {shapes.get(name, 'unknown')} cannot "
                        f"take factors {list(left.shape)} and {list(right.shape)}; give B [M, r] "
                        "and A [r, K] for a matrix [M, K] of the base"
                    )
        stored = {}
        for name, (start, _) in zip(layout.names, layout.bounds, strict=True):
            if pairs := [factors[name] for factors in adapters.values() if name in factors]:
                stored[start] = Factors(
                    torch.cat([left * scale for left, _ in pairs], dim=1),
                    torch.cat([right for _, right in pairs]),
                    tuple(len(f[name][1]) if name in f else 0 for f in adapters.values()),
                )
        if not stored:
            raise ValueError("the adapters hold no factors; give at least one matrix's (B, A)")
        deltas = LowRankDeltas((len(adapters), layout.size), stored)
        return cls(layout, tuple(adapters), layout.flatten(base), deltas)

    def stored_as(self, storage: str) -> "TaskVectors":
        """The same task vectors kept as one of STORAGES."""
        deltas = STORAGES[storage](iter(dense(self.deltas)), len(self.tasks))
        return TaskVectors(self.layout, self.tasks, self.base, deltas)

    def select(self, tasks: Sequence[str]) -> "TaskVectors":
        """The same base with only these tasks, in this order."""
        if unknown := [task for task in tasks if task not in self.tasks]:
            raise ValueError(f"no task vector for {unknown}; there are {', '.join(self.tasks)}")
        rows = [self.tasks.index(task) for task in tasks]
        places = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows  # one is a view
        deltas = self.deltas[places] if isinstance(self.deltas, Tensor) else self.deltas.rows(rows)
        return TaskVectors(self.layout, tuple(tasks), self.base, deltas)

    def merge(self, weights: Sequence[float | int]) -> Float[Tensor, " N"]:
        """theta_0 + sum_t weights[t] tau_t: one coefficient per task for the whole model."""
        cure = f"a list with a number for each of {', '.join(self.tasks)}, in this order"
        require(weights, list | tuple | np.ndarray | Tensor, "weights", cure)
        coeffs = torch.tensor(list(weights), dtype=torch.float64, device=self.base.device)
        segments = Segments(((0, self.layout.size, 0),))
        return grouped_merge(self.base, self.deltas, coeffs[:, None], segments)

    def expert(self, task: str) -> Float[Tensor, " N"]:
        """theta_t = theta_0 + tau_t, the expert itself (as near as its storage allows)."""
        return self.select([task]).merge([1.0])

    def norms(self) -> Float[Tensor, " T"]:
        """Euclidean length of every task vector, in parameter units."""
        squares = [row.square().sum() for row in dense(self.deltas)]  # torch's norm loses digits
        return torch.stack(squares).sqrt()

    def map(self, function: Callable[[Tensor], Tensor]) -> "TaskVectors":
        """Task vectors with `function` applied to the matrix `[T, N]`."""
        return TaskVectors(self.layout, self.tasks, self.base, function(dense(self.deltas)))
