"""Time, bytes and memory of merging, beside the machine's copy bandwidth.

Milliseconds depend on the machine and its other work; ratios within one run hardly do, so every
round measures every implementation once, in a new random order. Stored tables name the
implementation in the column `contestant`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

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
from divmerge_core.kernels.table_rows import TableRows
from divmerge_core.merging.merged_model import as_read
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.basis import basis

PARTS = ("forward", "backward")


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


def side_by_side(
    calls: Mapping[tuple[str, str], Part], device: torch.device, repeats: int
) -> pd.DataFrame:
    """Every call once a round, in random order: a row per implementation, part and round.

    bytes and peak are of a call before the first round; bytes are NaN on a GPU, for what Triton's
    kernels move is not seen.
    """
    seen = bytes_moved if device.type == "cpu" else lambda call: math.nan
    costs = {key: (seen(call), peak_bytes(call, device)) for key, call in calls.items()}
    rng, rows = np.random.default_rng(0), []
    for number in tqdm(range(repeats), "rounds", leave=False):
        for index in rng.permutation(len(calls)):
            key = list(calls)[index]
            rows.append((*key, number, seconds(calls[key], device), *costs[key]))
    columns = ["contestant", "part", "round", "seconds", "bytes", "peak"]
    return pd.DataFrame(rows, columns=columns)


def parts_of(name: str, case: Case) -> list[tuple[str, Part]]:
    """The implementation's calls, forward and backward, where it has them."""
    return [(k, c) for k, c in zip(PARTS, IMPLEMENTATIONS[name](case), strict=True) if c]


def benchmark_merge(
    case: Case, names: Sequence[str], *, repeats: int = 5, more: Mapping = {}
) -> pd.DataFrame:
    """Forward and backward of every implementation and of a copy, which moves 2 N, with T, N.

    more: calls of others, as `side_by_side` takes them.
    """
    base, (num_tasks, size) = case.vectors.base, case.vectors.deltas.shape
    target = torch.empty_like(base)
    calls = {("copy", "forward"): lambda: target.copy_(base)}
    calls |= {(name, part): call for name in names for part, call in parts_of(name, case)} | more
    return side_by_side(calls, base.device, repeats).assign(tasks=num_tasks, parameters=size)


def numbers_held(vectors: TaskVectors) -> int:
    """Numbers that task vectors, or a basis's components, take beside the base."""
    if isinstance(vectors.deltas, Tensor):
        return vectors.deltas.numel()
    parts = vectors.deltas.factors.values()
    rests = [part.values if isinstance(part, TableRows) else (part.right,) for part in parts]
    held = [*(part.left for part in parts), *chain.from_iterable(rests)]
    return sum(tensor.numel() for tensor in held)


def repeated(problem: MergeProblem, count: int) -> MergeProblem:
    """The problem with `count` experts: its own, again and again where it has fewer."""
    vectors, total = problem.vectors, len(problem.batches)
    numbers = [number % total for number in range(count)]
    tasks = tuple(f"{vectors.tasks[n]} {place}" for place, n in enumerate(numbers))
    return replace(
        problem,
        vectors=replace(vectors, tasks=tasks, deltas=vectors.deltas[numbers]),
        batches=[problem.batches[n] for n in numbers],
        forward=lambda leaves, pairs: problem.forward(leaves, [(t % total, b) for t, b in pairs]),
    )


def benchmark_basis(
    problem: MergeProblem,
    counts: Sequence[int],
    spec: str = "tsv:2",
    *,
    storage: str = "float32",
    repeats: int = 5,
) -> pd.DataFrame:
    """`benchmark_merge` of a basis's components, as a fit holds them, beside task vectors, by T.

    `ours` are the task vectors, kept as `storage`, of which the components are made in float32.
    Experts are repeated where there are fewer than T.
    """
    found = []
    for count in counts:
        some = repeated(problem, count)
        some = replace(some, vectors=some.vectors.stored_as(storage))
        thin = as_read(some, basis(some, spec)[0])
        more = {(spec, part): call for part, call in parts_of("ours", Case.of(thin))}
        found.append(benchmark_merge(Case.of(some.vectors), ["ours"], repeats=repeats, more=more))
    return pd.concat(found, ignore_index=True)


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

    milliseconds, with quartiles low and high; `floor`, what (T + 2) N or (T + 1) N numbers take at
    the copy bandwidth of the same run, divided by the time; `ratio`, the time over `ours` of the
    same round; numbers moved and peak memory in units of N numbers of 4 bytes.
    """
    result, order = [], dict.fromkeys(["copy", *IMPLEMENTATIONS, *rows.contestant])
    order = list(order)
    for (tasks, size), here in rows.groupby(["tasks", "parameters"], sort=False):
        wide = here.pivot_table(index="round", columns=["contestant", "part"], values="seconds")
        costs = here.groupby(["contestant", "part"])[["bytes", "peak"]].first() / 4 / size
        a_number = wide["copy", "forward"].median() / (2 * size)  # seconds to read or write one
        for name, part in sorted(wide, key=lambda key: (order.index(key[0]), key[1] == "backward")):
            took = wide[name, part]
            low, middle, high = took.quantile([0.25, 0.5, 0.75])
            numbers = 2 if name == "copy" else tasks + (2 if part == "forward" else 1)
            row = {"tasks": tasks, "parameters": size, "contestant": name, "part": part}
            row |= {"low": 1e3 * low, "milliseconds": 1e3 * middle, "high": 1e3 * high}
            row |= {"floor": numbers * size * a_number / middle, "ratio": None}
            if ("ours", part) in wide:
                row["ratio"] = (took / wide["ours", part]).median()
            result.append(row | {"moved": costs.bytes[name, part], "peak": costs.peak[name, part]})
    return pd.DataFrame(result)


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
