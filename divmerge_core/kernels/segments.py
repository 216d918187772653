"""Which coefficient applies where: stretches of the flat vector, and the blocks a GPU cuts them
into."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise, takewhile

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Stretches (start, stop, group) that partition the N parameters, in order.

    Raises ValueError where they do not tile 0..N, or groups are not numbered 0..G-1.
    """

    rows: tuple[tuple[int, int, int], ...]

    def __post_init__(self):
        end = 0
        for start, stop, _ in self.rows:
            if start != end or stop < start:
                raise ValueError(
                    f"tensors must lie end to end from 0, got one at {start}..{stop} after {end}; "
                    "take the bounds of one Layout"
                )
            end = stop
        groups = {group for *_, group in self.rows}
        if not groups or groups != set(range(len(groups))):
            raise ValueError(
                f"every tensor needs a group, numbered 0..G-1 without a gap; got {sorted(groups)}"
            )

    @classmethod
    def of(cls, bounds: Sequence[tuple[int, int]], groups: Sequence[int]) -> "Segments":
        """From every tensor's (start, stop) and group; neighbours of one group are joined.

        Raises ValueError unless there is one group per tensor and the bounds tile 0..N.
        """
        if len(bounds) != len(groups):
            raise ValueError(f"{len(bounds)} tensors but {len(groups)} groups; give one per tensor")
        rows: list[tuple[int, int, int]] = []
        for (start, stop), group in zip(bounds, groups, strict=True):
            if rows and rows[-1][1:] == (start, group) and stop >= start:
                rows[-1] = (rows[-1][0], stop, group)
            else:
                rows.append((start, stop, group))
        return cls(tuple(rows))

    @property
    def num_groups(self) -> int:
        """G: groups are numbered 0..G-1."""
        return 1 + max(group for *_, group in self.rows)

    @property
    def size(self) -> int:
        """N, the number of parameters."""
        return self.rows[-1][1]

    def within(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """The rows between two positions, those at the two ends cut there; none is empty."""
        first = bisect_right(self.rows, low, key=lambda row: row[1])
        inside = takewhile(lambda row: row[0] < high, islice(self.rows, first, None))
        cut = [(max(start, low), min(stop, high), group) for start, stop, group in inside]
        return [row for row in cut if row[0] < row[1]]

    def shares(self, count: int) -> list[list[tuple[int, int, int]]]:
        """The rows cut into `count` runs of equally many parameters."""
        edges = [self.size * n // count for n in range(count + 1)]
        return [self.within(low, high) for low, high in pairwise(edges)]


@lru_cache(maxsize=32)
def block_table(
    segments: Segments, block: int, device: torch.device
) -> tuple[Int[Tensor, "blocks 3"], Int[Tensor, " G_plus_1"]]:
    """Blocks (low, high, group) for one launch, grouped; and where each group's blocks begin.

    A block never holds parameters of two groups. Blocks are cut at multiples of `block`, not at
    the start of a tensor: all of them but those at a segment's two ends are full and aligned, so
    that they are read 128 bits at a time whatever the sizes of the tensors. Built once per layout.
    """
    cut = []
    for start, stop, group in segments.rows:
        if start == stop:
            continue
        inner = torch.arange(start // block + 1, -(-stop // block)) * block
        edges = torch.cat([torch.tensor([start]), inner, torch.tensor([stop])])
        cut.append(torch.stack([edges[:-1], edges[1:], torch.full_like(edges[1:], group)], dim=1))
    table = torch.cat(cut) if cut else torch.empty(0, 3, dtype=torch.long)
    table = table[torch.argsort(table[:, 2], stable=True)]
    counts = torch.bincount(table[:, 2], minlength=segments.num_groups)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return table.to(device), starts.to(device)
