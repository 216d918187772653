"""Time and memory of a call, and the unlabelled inputs that a merge reads."""

import atexit
import ctypes
import gc
import math
import re
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
    """Wait until the device has done its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(part: Callable[[], object], device: torch.device) -> float:
    """Duration of a call, with its work on the device."""
    settle(device)
    start = time.perf_counter()
    part()
    settle(device)
    return time.perf_counter() - start


@cache
def freeze_objects() -> None:
    """Exclude the objects of imported modules, half a million, from later garbage collections."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def peak_bytes(part: Callable[[], object], device: torch.device) -> float:
    """Peak memory of a call above what was held before; NaN where the system does not report it."""
    freeze_objects()
    gc.collect()
    if device.type == "cuda":
        settle(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        part()
        settle(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    before = resident_before()
    part()
    return math.nan if math.isnan(before) else resident("VmHWM") - before


def resident_before() -> float:
    """The process's memory, its peak set to it; NaN where the system (or a sandbox) refuses."""
    try:
        PROCESS.joinpath("status").read_text("utf-8")
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
        trim(0)  # freed memory that is still held would hide what the call takes
        PROCESS.joinpath("clear_refs").write_text("5", "utf-8")
    except OSError:
        return math.nan
    return resident("VmRSS")


def resident(key: str) -> float:
    """Bytes of an entry of the process's status; NaN where it is missing."""
    found = re.search(rf"^{key}:\s+(\d+)", PROCESS.joinpath("status").read_text("utf-8"), re.M)
    return 1024.0 * int(found[1]) if found else math.nan


def addresses(batch: Batch) -> set[int]:
    """Memory addresses of a batch's rows; a slice of the batch shares some of them."""
    rows = next(iter(batch.inputs.values()))
    return {rows.data_ptr() + n * rows.stride(0) * rows.element_size() for n in range(len(rows))}


@dataclass
class Meter:
    """Counts the unlabelled inputs that run through the model, and calls of the score."""

    seen: set[int] = field(default_factory=set)  # addresses of inputs
    calls: int = 0

    def problem(self, problem: MergeProblem) -> MergeProblem:
        """The same problem; every forward pass of its own inputs is counted."""
        own = {row for batches in problem.batches for b in batches for row in addresses(b)}

        def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
            for _, batch in pairs:
                self.seen |= addresses(batch) & own
            return problem.forward(parameters, pairs)

        return replace(problem, forward=forward)

    def score(self, score: Callable[[Merged], float]) -> Callable[[Merged], float]:
        """The same score; its calls are counted."""

        def counted(merged: Merged) -> float:
            self.calls += 1
            return score(merged)

        return counted
