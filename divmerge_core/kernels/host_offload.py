"""Task vectors that stay in the host's memory and pass through the device's in pieces.

T task vectors of a large model do not fit beside it. The merge and its gradient read every number
once and in order, so two small buffers are enough: while one is multiplied, the other is filled.
Where the device is a GPU, the host's memory is pinned and a second stream copies; elsewhere the
copy is a plain one. What runs on a GPU has not been run by us: the tests marked `gpu` are for that.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor


def kept(
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


class Copier:
    """What copies to the device: a stream beside the current one on a GPU, nothing elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def aside(self) -> AbstractContextManager:
        """What is asked for in here runs beside the current stream."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def after_use(self) -> None:
        """Copies from now on wait for what the current stream has been asked to do."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def arrival(self) -> "torch.cuda.Event | None":
        """A mark behind the copies asked for so far."""
        return self.stream.record_event() if self.stream else None

    def wait(self, arrival: "torch.cuda.Event | None") -> None:
        """The current stream goes on when these copies have arrived."""
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def holds(self, buffer: Tensor) -> None:
        """The buffer's memory is given to nobody else while copies into it are on their way."""
        if self.stream:
            buffer.record_stream(self.stream)


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
        """Keep `count` rows, one at a time, in a dtype or in their own; for the rows' device."""
        first = next(rows)
        shape, every = (count, len(first)), chain([first], rows)
        return cls(kept(every, shape, dtype or first.dtype, first.device), first.device)

    @property
    def shape(self) -> torch.Size:
        return self.host.shape

    @property
    def sample(self) -> Tensor:
        """No numbers, of the dtype of these and on the device where they are needed."""
        return torch.empty(0, dtype=self.host.dtype, device=self.device)

    def stream(
        self, pieces: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> Iterator[tuple[int, int, Float[Tensor, "T n"]]]:
        """(low, high, task vectors there in `dtype`, on the device) for every piece in turn.

        A piece is good until the one after the next is asked for.
        """
        pieces = [piece for piece in pieces if piece[0] < piece[1]]
        width = max((high - low for low, high in pieces), default=0)
        shape, copier = (len(self.host), width), Copier(self.device)
        buffers = [
            torch.empty(shape, dtype=self.host.dtype, device=self.device) for _ in pieces[:2]
        ]
        for buffer in buffers:
            copier.holds(buffer)

        def send(number: int) -> "torch.cuda.Event | None":
            low, high = pieces[number]
            copier.after_use()  # of what this buffer held before
            with copier.aside():
                # Row by row: only a copy between stretches of memory runs beside other work.
                for target, source in zip(buffers[number % 2], self.host, strict=True):
                    target[: high - low].copy_(source[low:high], non_blocking=True)
            return copier.arrival()

        arrivals = [send(number) for number in range(min(1, len(pieces)))]
        for number, (low, high) in enumerate(pieces):
            if number + 1 < len(pieces):
                arrivals.append(send(number + 1))
            copier.wait(arrivals[number])
            yield low, high, buffers[number % 2][:, : high - low].to(dtype)

    def rows(self, numbers: Sequence[int]) -> "StreamedDeltas":
        """Some of the task vectors, in the order given; a single one is not copied."""
        if len(numbers) == 1:
            return StreamedDeltas(self.host[numbers[0] : numbers[0] + 1], self.device)
        chosen, shape = (self.host[number] for number in numbers), (len(numbers), self.shape[1])
        return StreamedDeltas(kept(chosen, shape, self.host.dtype, self.device), self.device)

    def dense(self) -> Float[Tensor, "T N"]:
        """All task vectors on the device in float32 (float64 stays): what streaming avoids."""
        wide = torch.float64 if self.host.dtype == torch.float64 else torch.float32
        return self.host.to(self.device, wide)
