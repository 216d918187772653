"""Time, bytes and memory of merging, beside the machine's copy bandwidth.

Milliseconds depend on the machine and its other work; ratios within one run hardly do, so every
round measures every implementation once, in a new random order. Stored tables name the
implementation in the column `contestant`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from divmerge_book.evaluation.profiling import peak_bytes, seconds
from divmerge_book.kernel_benchmarks.implementations import (
    DIVERGENCE_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    Case,
    Part,
)

COLUMNS = ["contestant", "part", "round", "seconds", "bytes", "peak"]


class Traffic(TorchDispatchMode):
    """Counts the bytes that PyTorch's operations read and write; views move nothing."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, given = str(function), [*args, *(kwargs or {}).values()]
        if not function.is_view and "empty" not in name and "detach" not in name:
            made = [] if "out" in (kwargs or {}) or "_." in name else [result]
            tensors = made if "new_" in name else [*given, *made]
            self.bytes += sum(x.nbytes for x in tensors if isinstance(x, Tensor))
        return result


def bytes_moved(part: Part) -> int:
    """Bytes that a call's operations read and write, on one thread: a mode sees no other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Traffic() as traffic:
            part()
    finally:
        torch.set_num_threads(threads)
    return traffic.bytes


def copy(case: Case) -> Part:
    """A copy of N numbers, which moves 2 N: the machine's bandwidth."""
    source, target = case.vectors.base, torch.empty_like(case.vectors.base)
    return lambda: target.copy_(source)


def side_by_side(
    calls: Mapping[tuple[str, str], Part], device: torch.device, repeats: int
) -> pd.DataFrame:
    """Every call once a round, in random order: a row per implementation, part and round.

    seconds; and, of the calls before the first round, bytes moved by PyTorch's operations and peak
    bytes on top of what was held.
    """
    costs = {key: (bytes_moved(call), peak_bytes(call, device)) for key, call in calls.items()}
    rng, rows = np.random.default_rng(0), []
    for number in tqdm(range(repeats), "rounds", leave=False):
        for index in rng.permutation(len(calls)):
            key = list(calls)[index]
            rows.append((*key, number, seconds(calls[key], device), *costs[key]))
    return pd.DataFrame(rows, columns=COLUMNS)


def benchmark_merge(case: Case, names: Sequence[str], *, repeats: int = 5) -> pd.DataFrame:
    """Forward and backward of every implementation and of a copy, with the model's T and N."""
    calls = {("copy", "forward"): copy(case)}
    for name in names:
        forward, backward = IMPLEMENTATIONS[name](case)
        calls |= {(name, "forward"): forward} | ({(name, "backward"): backward} if backward else {})
    num_tasks, size = case.vectors.deltas.shape
    rows = side_by_side(calls, case.vectors.base.device, repeats)
    return rows.assign(tasks=num_tasks, parameters=size)


def benchmark_divergence(
    names: Sequence[str], shape: tuple[int, int], device: torch.device, *, repeats: int = 5
) -> pd.DataFrame:
    """Loss and gradient of JS between random logits of this shape [A, V]."""
    generator = torch.Generator(device).manual_seed(0)
    expert, merged = (3 * torch.randn(shape, generator=generator, device=device) for _ in range(2))
    calls = {(name, "both"): DIVERGENCE_IMPLEMENTATIONS[name](expert, merged) for name in names}
    return side_by_side(calls, device, repeats)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over rounds: a row per model size, implementation and part.

    milliseconds, with its quartiles; `floor`, what (T + 2) N or (T + 1) N numbers take at the copy
    bandwidth measured in the same run, divided by the time; `ratio`, the time over `ours` of the
    same round; numbers moved and peak memory in units of N numbers of 4 bytes.
    """
    result = []
    for (tasks, size), here in rows.groupby(["tasks", "parameters"], sort=False):
        wide = here.pivot_table(index="round", columns=["contestant", "part"], values="seconds")
        a_number = wide["copy", "forward"].median() / (2 * size)  # seconds to read or write one
        order = ["copy", *IMPLEMENTATIONS]
        for name, part in sorted(wide, key=lambda key: (order.index(key[0]), key[1] == "backward")):
            some = here[(here.contestant == name) & (here.part == part)]
            numbers = {"forward": tasks + 2, "backward": tasks + 1}[part] if name != "copy" else 2
            quartiles = some.seconds.quantile([0.25, 0.5, 0.75]).tolist()
            ours = wide.get(("ours", part))
            ratio = None if ours is None else (wide[name, part] / ours).median()
            row = tasks, size, name, part, *(1e3 * q for q in quartiles)
            row += (numbers * size * a_number / quartiles[1], ratio)
            result.append((*row, some.bytes.iloc[0] / 4 / size, some.peak.iloc[0] / 4 / size))
    columns = ["tasks", "parameters", "contestant", "part", "low", "milliseconds", "high"]
    return pd.DataFrame(result, columns=[*columns, "floor", "ratio", "moved", "peak"])


def matrix_rate(device: torch.device, width: int = 2048) -> float:
    """Operations per second / 1e9 of a large float32 matrix product: the roof of arithmetic."""
    square = torch.ones(width, width, device=device)
    best = min(seconds(lambda: square @ square, device) for _ in range(5))
    return 2 * width**3 / best / 1e9


def caption(facts: Mapping) -> str:
    """One line of provenance."""
    return (
        f"{facts['model']}, task vectors in {facts['dtype']}, {facts['repeats']} rounds, "
        f"{facts['device']}, {facts['machine']}, {facts['threads']} threads, torch "
        f"{facts['torch']}, measured {facts['date']}"
    )
