"""Gauges: how long a call takes, how much memory, and which inputs a merge looked at."""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from divmerge_core.problem import Merged, MergeProblem, Pairs


def settle(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(part: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, its work on the device included."""
    settle(device)
    start = time.perf_counter()
    part()
    settle(device)
    return time.perf_counter() - start


def peak_bytes(part: Callable[[], object], device: torch.device) -> float:
    """Memory that a call takes on top of what was held before; NaN where that cannot be asked."""
    gc.collect()
    if device.type == "cuda":
        settle(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        part()
        settle(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    status = Path("/proc/self/status")
    if not status.exists():
        part()
        return math.nan

    def resident(key: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(key))
        return 1024 * int(line.split()[1])

    give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
    give_back(0)  # memory that was freed and kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    before = resident("VmRSS")
    part()
    return float(resident("VmHWM") - before)


@dataclass
class Meter:
    """Notes which unlabelled inputs of a problem are run through the model, and score calls."""

    rows: dict[int, int] = field(default_factory=dict)  # of every batch that was seen
    calls: int = 0

    def problem(self, problem: MergeProblem) -> MergeProblem:
        """The same problem, with every forward pass of its own batches noted."""
        own = {id(batch) for batches in problem.batches for batch in batches}

        def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
            for _, batch in pairs:
                if id(batch) in own:
                    self.rows[id(batch)] = len(next(iter(batch.inputs.values())))
            return problem.forward(parameters, pairs)

        return replace(problem, forward=forward)

    def score(self, score: Callable[[Merged], float]) -> Callable[[Merged], float]:
        """The same score, with its calls counted."""

        def counted(merged: Merged) -> float:
            self.calls += 1
            return score(merged)

        return counted
