"""Task vectors in less memory than one float32 per parameter: int8 blocks, factors, table rows.

Half precision needs nothing here: a `[T, N]` tensor of bfloat16 or float16 is a store as it is.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from divmerge_core.kernels.host_offload import StreamedDeltas
from divmerge_core.kernels.segments import Segments
from divmerge_core.kernels.table_rows import TableRows

SCALE_BLOCK = 128  # neighbouring parameters that share one int8 scale
CHUNK = 1 << 18  # columns read at a time: T MB of temporaries where they are widened or copied


def quantise(row: Float[Tensor, " N"]) -> tuple[Int8[Tensor, " N"], Float[Tensor, " K"]]:
    """int8 values and one float32 scale per SCALE_BLOCK: row is about value * scale.

    The scale is the block's largest magnitude / 127, so the error is at most half a scale.
    """
    padded = torch.nn.functional.pad(row.float(), (0, -len(row) % SCALE_BLOCK))
    blocks = padded.view(-1, SCALE_BLOCK)
    scales = blocks.abs().amax(dim=1) / 127
    steps = blocks / torch.where(scales == 0, 1, scales)[:, None]
    return steps.round().to(torch.int8).view(-1)[: len(row)], scales


@dataclass(frozen=True)
class Int8Deltas:
    """T task vectors in int8 with a float32 scale per SCALE_BLOCK parameters: 1.03 bytes each."""

    values: Int8[Tensor, "T N"]
    scales: Float[Tensor, "T K"]

    @classmethod
    def of(cls, rows: Iterable[Float[Tensor, " N"]]) -> "Int8Deltas":
        """Quantise task vectors a piece at a time, so that nothing else of their size is needed."""
        pairs = []
        for row in rows:
            pieces = map(quantise, row.split(SCALE_BLOCK << 11))
            pairs.append([torch.cat(parts) for parts in zip(*pieces, strict=True)])
        return cls(*(torch.stack(parts) for parts in zip(*pairs, strict=True)))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def columns(self, start: int, stop: int) -> Float[Tensor, "T n"]:
        """Task vectors at positions start..stop, in float32."""
        blocks = torch.arange(start, stop, device=self.scales.device) // SCALE_BLOCK
        return self.values[:, start:stop] * self.scales[:, blocks]

    def rows(self, numbers: Sequence[int]) -> "Int8Deltas":
        """Some of the task vectors, in the order given."""
        return Int8Deltas(self.values[list(numbers)], self.scales[list(numbers)])


@dataclass(frozen=True)
class Factors:
    """One tensor's low-rank factors of all tasks, side by side: tau_t = left_t @ right_t.

    ranks says how many of the R columns belong to each task; 0 where a task leaves the tensor be.
    """

    left: Float[Tensor, "M R"]
    right: Float[Tensor, "R K"]
    ranks: tuple[int, ...]

    @property
    def shape(self) -> torch.Size:
        """Of the tensor itself."""
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    def within(self, low: int, high: int) -> Iterator[tuple[int, "Factors"]]:
        """The numbers low..high of the tensor laid in a row, as matrices in the order of places.

        Where each begins, and its factors. A stretch that begins and ends inside a row is up to
        three: the rest of that row, whole rows, the start of the last one.
        """
        if low >= high:
            return
        width = self.right.shape[1]
        first, last = -(-low // width) * width, high // width * width  # the whole rows' ends
        cuts = [low, first, last, high] if first <= last else [low, high]
        for start, stop in pairwise(cuts):
            if start < stop:
                row, column = divmod(start, width)
                rows = slice(row, row + max(1, (stop - start) // width))
                columns = slice(column, column + min(stop - start, width))
                yield start, Factors(self.left[rows], self.right[:, columns], self.ranks)

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """Every task's own (left, right)."""
        ranks = list(self.ranks)
        return list(zip(self.left.split(ranks, dim=1), self.right.split(ranks), strict=True))

    def merge(self, base: Float[Tensor, "M K"], coeffs: Float[Tensor, " T"], out: Tensor) -> None:
        """out = base + sum_t coeffs[t] left_t @ right_t: one product, with no cross terms."""
        repeats = torch.tensor(self.ranks, device=coeffs.device)
        scale = coeffs.repeat_interleave(repeats, output_size=sum(self.ranks))
        left, right = self.left.to(scale) * scale, self.right.to(scale)
        if out.dtype == scale.dtype:
            torch.addmm(base, left, right, out=out)
        else:
            out.copy_(torch.addmm(base.to(scale.dtype), left, right))

    def inner(self, grad: Float[Tensor, "M K"]) -> Float[Tensor, " T"]:
        """<grad, left_t @ right_t> of every task, as <left_t^T grad, right_t>."""
        products = (self.left.to(grad).T @ grad * self.right.to(grad)).sum(dim=1)
        return torch.stack([part.sum() for part in products.split(list(self.ranks))])

    def rows(self, numbers: Sequence[int]) -> "Factors":
        """Some of the tasks, in the order given."""
        lefts, rights = zip(*(self.split()[n] for n in numbers), strict=True)
        ranks = tuple(self.ranks[n] for n in numbers)
        return Factors(torch.cat(lefts, dim=1), torch.cat(rights), ranks)

    def dense(self) -> Iterator[Float[Tensor, "M K"]]:
        """Every task's matrix, multiplied out."""
        for left, right in self.split():
            dtype = wide(left.dtype)
            yield left.to(dtype) @ right.to(dtype)


@dataclass(frozen=True)
class LowRankDeltas:
    """T task vectors, never multiplied out: factors, by where a tensor starts.

    Holds r (M + K) numbers per task and M x K tensor with factors. Tensors without have no delta.
    While a fit runs, embedding tables are TableRows.
    """

    shape: tuple[int, int]  # T, N
    factors: Mapping[int, Factors | TableRows]

    @cached_property
    def places(self) -> list[int]:
        """Where tensors with factors start, in order."""
        return sorted(self.factors)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[slice, Factors | TableRows]]:
        """(which numbers, their factors) of every tensor that has numbers in start..stop."""
        first = max(bisect_right(self.places, start) - 1, 0)
        for place in self.places[first : bisect_right(self.places, stop - 1)]:
            factors = self.factors[place]
            low, high = max(start, place), min(stop, place + factors.shape.numel())
            for begin, part in factors.within(low - place, high - place):
                yield slice(place + begin, place + begin + part.shape.numel()), part

    def merge(self, base: Tensor, coeffs: Tensor, segments: Segments, out: Tensor) -> None:
        """out = base + sum_t Lambda[t, g] tau_t, a matrix product per adapted tensor and group."""
        out.copy_(base)
        for start, stop, group in segments.rows:
            for here, part in self.pieces(start, stop):
                own, target = base[here].view(part.shape), out[here].view(part.shape)
                part.merge(own, coeffs[:, group], target)

    def inner(self, grad: Tensor, start: int, stop: int) -> Float[Tensor, " T"]:
        """<grad, tau_t> of every task, for the gradient of the parameters at start..stop."""
        result = grad.new_zeros(self.shape[0])
        for here, part in self.pieces(start, stop):
            result += part.inner(grad[here.start - start : here.stop - start].view(part.shape))
        return result

    def rows(self, numbers: Sequence[int]) -> "LowRankDeltas":
        """Some of the task vectors, in the order given."""
        factors = {start: factor.rows(numbers) for start, factor in self.factors.items()}
        return LowRankDeltas((len(numbers), self.shape[1]), factors)

    def columns(self, start: int, stop: int) -> Float[Tensor, "T n"]:
        """Task vectors at positions start..stop, multiplied out."""
        first = sample(self)
        result = first.new_zeros(self.shape[0], stop - start, dtype=wide(first.dtype))
        for here, part in self.pieces(start, stop):
            for row, matrix in zip(result, part.dense(), strict=True):
                row[here.start - start : here.stop - start] = matrix.flatten()
        return result


Deltas = Float[Tensor, "T N"] | Int8Deltas | LowRankDeltas | StreamedDeltas


def sample(deltas: Deltas) -> Tensor:
    """One tensor of a store, to ask for its device."""
    if isinstance(deltas, StreamedDeltas):
        return deltas.sample
    if isinstance(deltas, LowRankDeltas):
        return next(iter(deltas.factors.values())).left
    return deltas.values if isinstance(deltas, Int8Deltas) else deltas


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def columns(
    deltas: Deltas, start: int, stop: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """(low, high, deltas there in `dtype`), a chunk at a time: views where they serve."""
    pieces = [(low, min(low + CHUNK, stop)) for low in range(start, stop, CHUNK)]
    if isinstance(deltas, StreamedDeltas):
        yield from deltas.stream(pieces, dtype)
        return
    dense = isinstance(deltas, Tensor)
    for low, high in pieces:
        yield low, high, deltas[:, low:high].to(dtype) if dense else deltas.columns(low, high)


def part(deltas: Deltas, start: int, stop: int) -> Float[Tensor, "T n"]:
    """Task vectors at start..stop as float32 (float64 stays): a view where that serves."""
    if isinstance(deltas, Tensor):
        return deltas[:, start:stop].to(wide(deltas.dtype))
    first = sample(deltas)
    result = first.new_empty(deltas.shape[0], stop - start, dtype=wide(first.dtype))
    for low, high, some in columns(deltas, start, stop, result.dtype):
        result[:, low - start : high - start] = some
    return result


def dense(deltas: Deltas) -> Float[Tensor, "T N"]:
    """Any store's task vectors as one matrix, for methods that need every number."""
    return part(deltas, 0, deltas.shape[1])


def check(base: Tensor, deltas: Deltas, segments: Segments, coeffs: Tensor | None = None) -> None:
    """Raise ValueError unless vector, task vectors, coefficients and segments fit together."""
    num_tasks, size = deltas.shape
    if num_tasks < 1:
        raise ValueError("deltas hold no task (T = 0); merging needs at least one")
    if base.shape != (size,) or segments.size != size:
        raise ValueError(
            f"segments end at {segments.size}, deltas have {size} columns, the vector has shape "
            f"{list(base.shape)}; make all of them from one layout"
        )
    if not base.is_contiguous() or (sample(deltas) is deltas and deltas.stride(1) != 1 < size):
        raise ValueError(
            "the numbers of the vector and of every row of deltas must be neighbours in memory; "
            "call .contiguous() first"
        )
    stored = torch.float32 if isinstance(deltas, Int8Deltas) else sample(deltas).dtype
    kinds = {base.dtype, stored}
    half = {torch.bfloat16, torch.float16, torch.float32}
    if not (kinds <= half or kinds == {torch.float64}):
        raise ValueError(
            f"cannot mix {sorted(map(str, kinds))}: vector and deltas may be float32, bfloat16 or "
            "float16 in any combination, or both float64"
        )
    if coeffs is not None and tuple(coeffs.shape) != (num_tasks, segments.num_groups):
        raise ValueError(
            f"coefficients must be [T, G] = {[num_tasks, segments.num_groups]}, one per task and "
            f"group, got {list(coeffs.shape)}"
        )
