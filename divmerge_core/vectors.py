"""A model as one flat vector: where each tensor lives, and task vectors as one matrix `[T, N]`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor


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

    def flatten(self, state: Mapping[str, Tensor]) -> Float[Tensor, " N"]:
        """Copy a state dict into one float32 vector (float64 stays float64).

        Raises ValueError, naming the tensors, where names or shapes differ from the layout or a
        weight is NaN or infinite.
        """
        self.check(state)
        wide = any(tensor.dtype == torch.float64 for tensor in state.values())
        dtype = torch.float64 if wide else torch.float32
        return torch.cat([state[name].detach().reshape(-1).to(dtype) for name in self.names])

    def unflatten(self, flat: Float[Tensor, " N"]) -> dict[str, Tensor]:
        """Views of the flat vector under their names: writing to one writes to the vector."""
        if flat.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} numbers, got {tuple(flat.shape)}")
        return {
            name: flat[start:stop].view(shape)
            for name, shape, (start, stop) in zip(self.names, self.shapes, self.bounds, strict=True)
        }

    def check(self, state: Mapping[str, Tensor], who: str = "the state dict") -> None:
        """Raise ValueError unless `state` has this layout's tensors, all finite."""
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
            if not torch.isfinite(state[name]).all():
                raise ValueError(f"{who}: {name} holds NaN or inf; the checkpoint is damaged")


@dataclass(frozen=True)
class TaskVectors:
    """A base model and what fine-tuning on each of T tasks added to it.

    `deltas[t] = theta_t - theta_0` (Ilharco et al. 2023; DivMerge Eq. 1).
    """

    layout: Layout
    tasks: tuple[str, ...]
    base: Float[Tensor, " N"]
    deltas: Float[Tensor, "T N"]

    def __post_init__(self):
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
        cls, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]
    ) -> "TaskVectors":
        """Subtract the base's state dict from every expert's (task name -> state dict).

        Raises ValueError where an expert's tensors differ in name or shape, or are not finite.
        """
        layout = Layout.of(base)
        layout.check(base, "the base model")
        flat = layout.flatten(base)
        deltas = flat.new_empty(len(experts), layout.size)
        for row, (task, state) in zip(deltas, experts.items(), strict=True):
            layout.check(state, f"expert {task!r}")
            torch.sub(layout.flatten(state), flat, out=row)
        return cls(layout, tuple(experts), flat, deltas)

    def select(self, tasks: Sequence[str]) -> "TaskVectors":
        """The same base with only these tasks, in this order."""
        unknown = [task for task in tasks if task not in self.tasks]
        if unknown:
            raise ValueError(f"no task vector for {unknown}; there are {', '.join(self.tasks)}")
        rows = [self.tasks.index(task) for task in tasks]
        return TaskVectors(self.layout, tuple(tasks), self.base, self.deltas[rows])

    def expert(self, task: str) -> Float[Tensor, " N"]:
        """theta_t = theta_0 + tau_t, the expert itself."""
        return self.base + self.select([task]).deltas[0]

    def norms(self) -> Float[Tensor, " T"]:
        """Euclidean length of every task vector, in parameter units."""
        squares = [row.square().sum() for row in self.deltas]  # torch's norm loses digits here
        return torch.stack(squares).sqrt()

    def map(self, function: Callable[[Tensor], Tensor]) -> "TaskVectors":
        """Task vectors with `function` applied to the matrix `[T, N]`."""
        return TaskVectors(self.layout, self.tasks, self.base, function(self.deltas))
