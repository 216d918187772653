"""Gauges: how long a call takes, how much memory, and which inputs a merge looked at."""

import atexit
import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from divmerge_core.merging.problem import Batch, Merged, MergeProblem, Pairs

PROCESS = Path("/proc/self")


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


@cache
def set_modules_apart() -> None:
    """Leave what stands in memory now out of later collections, once a process.

    The modules of PyTorch and its like are half a million objects: to look through them takes a
    third of a second, longer than many a merge.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def peak_bytes(part: Callable[[], object], device: torch.device) -> float:
    """Memory that a call takes on top of what was held before; NaN where that cannot be asked."""
    set_modules_apart()
    gc.collect()
    if device.type == "cuda":
        settle(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        part()
        settle(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    known = mark_reset()
    before = resident("VmRSS") if known else math.nan
    part()
    return resident("VmHWM") - before if known else math.nan


def mark_reset() -> bool:
    """Let the high-water mark of memory start again here; False where the system has none.

    Linux has one, and some sandboxes do not let a process write to it.
    """
    try:
        PROCESS.joinpath("status").read_text("utf-8")
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
        give_back(0)  # memory that was freed and kept would hide what the call takes
        PROCESS.joinpath("clear_refs").write_text("5", "utf-8")
    except OSError:
        return False
    return True


def resident(key: str) -> float:
    """Bytes that a line of the process's status tells; NaN where it has no such line."""
    lines = PROCESS.joinpath("status").read_text("utf-8").splitlines()
    found = [line for line in lines if line.startswith(f"{key}:")]
    return 1024.0 * int(found[0].split()[1]) if found else math.nan


def places(batch: Batch) -> set[int]:
    """Where a batch's rows lie in memory: batches cut out of it have some of the same."""
    rows = next(iter(batch.inputs.values()))
    return {rows.data_ptr() + n * rows.stride(0) * rows.element_size() for n in range(len(rows))}


@dataclass
class Meter:
    """Notes which unlabelled inputs of a problem are run through the model, and score calls."""

    seen: set[int] = field(default_factory=set)  # the places of inputs
    calls: int = 0

    def problem(self, problem: MergeProblem) -> MergeProblem:
        """The same problem, with every forward pass of its own inputs noted."""
        own = {place for batches in problem.batches for b in batches for place in places(b)}

        def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
            for _, batch in pairs:
                self.seen |= places(batch) & own
            return problem.forward(parameters, pairs)

        return replace(problem, forward=forward)

    def score(self, score: Callable[[Merged], float]) -> Callable[[Merged], float]:
        """The same score, with its calls counted."""

        def counted(merged: Merged) -> float:
            self.calls += 1
            return score(merged)

        return counted
