"""Task vectors of an embedding table in a fit: most rows are read by no input."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TableRows:
    """A table's deltas at the R rows that a fit reads: tau_t = decay[t] * table, plus trained rows.

    Merging leaves all other rows as they are: no gradient comes to a row that no input reads.
    Weight decay moves the rows that a task's own texts never used by one factor for all of them.
    """

    table: Float[Tensor, "V K"]  # the base's: a view
    read: Int[Tensor, " R"]
    left: Float[Tensor, " T"]  # decay, of the tasks that change the table
    places: tuple[Int[Tensor, " _"], ...]  # of each task's trained rows among those read
    values: tuple[Float[Tensor, "_ K"], ...]
    ranks: tuple[int, ...]  # 1 for each of these tasks, 0 for all other components

    @classmethod
    def of(
        cls, table: Tensor, read: Tensor, deltas: Float[Tensor, "T V K"], ranks: tuple[int, ...]
    ) -> "TableRows":
        """Trained rows: those that differ from decay by more than training's rounding errors."""
        rounding = 64 * torch.finfo(table.dtype).eps * table[read].abs().amax(dim=1, keepdim=True)
        decay, places, values = [], [], []
        for delta in deltas:
            ratio = (delta * table).sum(dim=1) / table.square().sum(dim=1).clamp_min(1e-30)
            decay.append(ratio.median())
            rest = delta[read] - decay[-1] * table[read]
            places.append((rest.abs() > rounding).any(dim=1).nonzero()[:, 0])
            values.append(rest[places[-1]])
        return cls(table, read, torch.stack(decay), tuple(places), tuple(values), ranks)

    @property
    def shape(self) -> torch.Size:
        """Of the table."""
        return self.table.shape

    @property
    def used(self) -> list[int]:
        """The components that change the table."""
        return [number for number, rank in enumerate(self.ranks) if rank]

    def within(self, low: int, high: int) -> Iterator[tuple[int, "TableRows"]]:
        """The whole table. Raises ValueError where low..high is a part of it."""
        if (low, high) != (0, self.shape.numel()):
            raise ValueError(f"numbers {low}..{high} cut a table of {list(self.shape)} in two")
        yield 0, self

    def merge(self, base: Float[Tensor, "V K"], coeffs: Float[Tensor, " C"], out: Tensor) -> None:
        """out = base + sum_t coeffs[t] tau_t at the rows that are read."""
        own, rows = coeffs[self.used], base[self.read].to(coeffs)
        rows *= 1 + own @ self.left.to(coeffs)
        for weight, places, values in zip(own, self.places, self.values, strict=True):
            rows.index_add_(0, places, weight * values.to(coeffs))
        out[self.read] = rows.to(out.dtype)

    def inner(self, grad: Float[Tensor, "V K"]) -> Float[Tensor, " C"]:
        """<grad, tau_t> of every component, for a gradient that is 0 at all other rows."""
        rows, result = grad[self.read], grad.new_zeros(len(self.ranks))
        pairs = zip(self.places, self.values, strict=True)
        own = torch.stack([(rows[places] * values.to(grad)).sum() for places, values in pairs])
        result[self.used] = own + self.left.to(grad) * (rows * self.table[self.read]).sum()
        return result
