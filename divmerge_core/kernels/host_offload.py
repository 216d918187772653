"""Task vectors in the host's memory, copied to the device in pieces.

The merge and its gradient read every number once and in order, so two small buffers are enough:
one is filled while the other is read. On a GPU the host's memory is pinned and a second stream
copies. Not run on a GPU by us: the tests marked `gpu` are for that.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor


def host_matrix(
    rows: Iterable[Float[Tensor, " N"]],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "T N"]:
    """A matrix of these rows in the host's memory, pinned if they are for a GPU."""
    host = torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")
    for target, row in zip(host, rows, strict=True):
        target.copy_(row)
    return host


@dataclass(frozen=True)
class StreamedDeltas:
    """T task vectors in the host's memory, for sums on a device: a store like any other.

    On the device they take two buffers of T columns each, whatever N is.
    """

    host: Float[Tensor, "T N"]
    device: torch.device

    @classmethod
    def of(
        cls, rows: Iterator[Float[Tensor, " N"]], count: int, dtype: torch.dtype | None = None
    ) -> "StreamedDeltas":
        """Copy `count` rows of a device to the host, one at a time, in `dtype` or their own."""
        first = next(rows)
        shape, every = (count, len(first)), chain([first], rows)
        return cls(host_matrix(every, shape, dtype or first.dtype, first.device), first.device)

    @property
    def shape(self) -> torch.Size:
        return self.host.shape

    @property
    def sample(self) -> Tensor:
        """An empty tensor with their dtype, on the device that they are for."""
        return torch.empty(0, dtype=self.host.dtype, device=self.device)

    def stream(
        self, pieces: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> Iterator[tuple[int, int, Float[Tensor, "T n"]]]:
        """(low, high, task vectors there in `dtype`, on the device) for every piece in turn.

        A piece is good until the one after the next is asked for.
        """
        pieces = [piece for piece in pieces if piece[0] < piece[1]]
        width = max((high - low for low, high in pieces), default=0)
        gpu = self.device.type == "cuda"
        copies = torch.cuda.Stream(self.device) if gpu else None  # beside the current stream
        like = {"dtype": self.host.dtype, "device": self.device}
        buffers = [torch.empty(len(self.host), width, **like) for _ in pieces[:2]]
        for buffer in buffers if gpu else []:
            buffer.record_stream(copies)  # not reused while copies into it are on their way

        def send(number: int) -> "torch.cuda.Event | None":
            """Start to copy a piece; on a GPU, an event that marks its end."""
            low, high = pieces[number]
            if gpu:  # only after the use of what this buffer held before
                copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(copies) if gpu else nullcontext():
                # Row by row: only copies of contiguous memory run beside other work.
                for target, source in zip(buffers[number % 2], self.host, strict=True):
                    target[: high - low].copy_(source[low:high], non_blocking=True)
            return copies.record_event() if gpu else None

        events = [send(0)] if pieces else []
        for number, (low, high) in enumerate(pieces):
            if number + 1 < len(pieces):
                events.append(send(number + 1))
            if gpu:
                torch.cuda.current_stream(self.device).wait_event(events[number])
            yield low, high, buffers[number % 2][:, : high - low].to(dtype)

    def rows(self, numbers: Sequence[int]) -> "StreamedDeltas":
        """Some of the task vectors, in the order given; a single one is not copied."""
        if len(numbers) == 1:
            return StreamedDeltas(self.host[numbers[0] : numbers[0] + 1], self.device)
        chosen, shape = (self.host[number] for number in numbers), (len(numbers), self.shape[1])
        return StreamedDeltas(host_matrix(chosen, shape, self.host.dtype, self.device), self.device)
