"""Task vectors of an embedding table: a factor of weight decay, and the rows that were trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TableRows:
    """An embedding table's deltas: tau_t = decay[t] * table, plus values[t] at the rows places[t].

    Weight decay alone moves the rows that a task's texts never use, by one factor for all of them.
    """

    table: Float[Tensor, "V K"]  # the base's: a view
    decay: Float[Tensor, " T"]
    places: tuple[Int[Tensor, " _"], ...]
    values: tuple[Float[Tensor, "_ K"], ...]

    @classmethod
    def of(cls, table: Float[Tensor, "V K"], deltas: Float[Tensor, "T V K"]) -> "TableRows":
        """The rows that differ from decay by more than the rounding errors of training."""
        rounding = 64 * torch.finfo(table.dtype).eps * table.abs().amax(dim=1, keepdim=True)
        decay, places, values = [], [], []
        for delta in deltas:
            ratio = (delta * table).sum(dim=1) / table.square().sum(dim=1).clamp_min(1e-30)
            decay.append(ratio.median())
            rest = delta - decay[-1] * table
            places.append((rest.abs() > rounding).any(dim=1).nonzero()[:, 0])
            values.append(rest[places[-1]])
        return cls(table, torch.stack(decay), tuple(places), tuple(values))

    @property
    def shape(self) -> torch.Size:
        """Of the table."""
        return self.table.shape

    @property
    def left(self) -> Tensor:
        """Any of its tensors, to ask for a dtype and device."""
        return self.decay

    def extended(self, more: int) -> "TableRows":
        """With `more` further tasks that leave the table be."""
        decay = torch.cat([self.decay, self.decay.new_zeros(more)])
        places = (*self.places, *[self.places[0][:0]] * more)
        values = (*self.values, *[self.values[0][:0]] * more)
        return replace(self, decay=decay, places=places, values=values)

    def within(self, low: int, high: int) -> Iterator[tuple[int, "TableRows"]]:
        """The whole table, where low..high is all of it. Raises ValueError for a part."""
        if low < high:
            if (low, high) != (0, self.table.numel()):
                raise ValueError(f"numbers {low}..{high} cut a table of {list(self.shape)} in two")
            yield 0, self

    def merge(self, base: Float[Tensor, "V K"], coeffs: Float[Tensor, " T"], out: Tensor) -> None:
        """out = base + sum_t coeffs[t] tau_t."""
        torch.mul(base, 1 + coeffs @ self.decay.to(coeffs), out=out)
        for weight, places, values in zip(coeffs, self.places, self.values, strict=True):
            out.index_add_(0, places, (weight * values).to(out.dtype))

    def inner(self, grad: Float[Tensor, "V K"]) -> Float[Tensor, " T"]:
        """<grad, tau_t> of every task."""
        own = [
            (grad[places] * values.to(grad.dtype)).sum()
            for places, values in zip(self.places, self.values, strict=True)
        ]
        return torch.stack(own) + self.decay.to(grad) * (grad * self.table).sum()

    def rows(self, numbers: Sequence[int]) -> "TableRows":
        """Some of the tasks, in the order given."""
        places, values = ([every[n] for n in numbers] for every in (self.places, self.values))
        decay = self.decay[list(numbers)]
        return replace(self, decay=decay, places=tuple(places), values=tuple(values))

    def dense(self) -> Iterator[Float[Tensor, "V K"]]:
        """Every task's table of changes."""
        for decay, places, values in zip(self.decay, self.places, self.values, strict=True):
            yield (decay * self.table).index_add(0, places, values)
