"""What merging costs, side by side in one run, against the machine's own copy bandwidth.

Milliseconds depend on the machine and its other work; ratios taken in one run hardly do, so every
round measures every contestant once, in an order drawn anew.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from divmerge_core.coefficients import Coefficients
from divmerge_core.contestants import CONTESTANTS, Case, Part, dictionary_merge, fusion_bench_model
from divmerge_core.divergences import js
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.problem import (
    MergeProblem,
    Step,
    expert_logits,
    fit_coefficients,
    gather_in_buffer,
    schedule,
)
from divmerge_core.registry import Registry
from divmerge_core.report import origin, write_json

COLUMNS = ["contestant", "part", "tasks", "parameters", "round", "seconds", "bytes", "peak"]


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


def settle(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(part: Part, device: torch.device) -> float:
    settle(device)
    start = time.perf_counter()
    part()
    settle(device)
    return time.perf_counter() - start


def peak_bytes(part: Part, device: torch.device) -> float:
    """Memory that a call takes on top of what was held before; NaN where that cannot be asked."""
    gc.collect()
    if device.type == "cuda":
        settle(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        part()
        settle(device)
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    if not status.exists():
        part()
        return math.nan

    def resident(key: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(key))
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    before = resident("VmRSS")
    part()
    return resident("VmHWM") - before


def copy(case: Case) -> Part:
    """A copy of N numbers: 2 N moved, the machine's own speed."""
    source, target = case.vectors.base, torch.empty_like(case.vectors.base)
    return lambda: target.copy_(source)


def compete(case: Case, names: Sequence[str], *, repeats: int = 5, seed: int = 0) -> pd.DataFrame:
    """Every contestant's forward and backward, once a round in random order, after one to warm up.

    A row per contestant, part and round: seconds; and, of the calls before the first round, bytes
    moved by PyTorch's operations and peak bytes on top of what was held.
    """
    device, (num_tasks, size) = case.vectors.base.device, case.vectors.deltas.shape
    calls = {("copy", "forward"): copy(case)}
    for name in names:
        forward, backward = CONTESTANTS[name](case)
        calls |= {(name, "forward"): forward} | ({(name, "backward"): backward} if backward else {})
    costs = {}
    for key, call in calls.items():
        costs[key] = (bytes_moved(call), peak_bytes(call, device))
    rng, rows = np.random.default_rng(seed), []
    for number in tqdm(range(repeats), "rounds", leave=False):
        for index in rng.permutation(len(calls)):
            name, part = key = list(calls)[index]
            took = seconds(calls[key], device)
            rows.append((name, part, num_tasks, size, number, took, *costs[key]))
    return pd.DataFrame(rows, columns=COLUMNS)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over rounds: a row per model size, contestant and part.

    milliseconds, with its quartiles; `floor`, what (T + 2) N or (T + 1) N numbers take at the copy
    bandwidth measured in the same run, divided by the time; `ratio`, the time over `ours` of the
    same round; numbers moved and peak memory in units of N numbers of 4 bytes.
    """
    result = []
    for (tasks, size), here in rows.groupby(["tasks", "parameters"], sort=False):
        wide = here.pivot_table(index="round", columns=["contestant", "part"], values="seconds")
        a_number = wide["copy", "forward"].median() / (2 * size)  # seconds to read or write one
        for (name, part), some in here.groupby(["contestant", "part"], sort=False):
            numbers = {"forward": tasks + 2, "backward": tasks + 1}[part] if name != "copy" else 2
            quartiles = some.seconds.quantile([0.25, 0.5, 0.75]).tolist()
            ours = wide.get(("ours", part))
            result.append(
                {"tasks": tasks, "parameters": size, "contestant": name, "part": part}
                | dict(
                    zip(("low", "milliseconds", "high"), [1e3 * q for q in quartiles], strict=True)
                )
                | {"floor": numbers * size * a_number / quartiles[1]}
                | {"ratio": None if ours is None else (wide[name, part] / ours).median()}
                | {"moved": some.bytes.iloc[0] / 4 / size, "peak": some.peak.iloc[0] / 4 / size}
            )
    return pd.DataFrame(result)


# --- whole steps ----------------------------------------------------------------------------------

STEPS = Registry("step")  # name -> function(problem, number of steps) -> seconds of each


def fitted(problem: MergeProblem, gradients: str) -> list[float]:
    """Seconds of every step of a fit with one coefficient per tensor, all of it our own code."""
    vectors, ticks = problem.vectors, []
    coefficients = Coefficients(vectors.layout, len(vectors.tasks), grouping="layer").to(
        vectors.base.device
    )

    def watch(step: Step) -> None:
        settle(vectors.base.device)
        ticks.append(time.perf_counter())

    fit_coefficients(
        problem, coefficients, js, epochs=1, gradients=gradients, watch=watch, progress=False
    )
    return np.diff(ticks).tolist()


STEPS.register("ours", label="divmerge_core")(lambda problem: fitted(problem, "stream"))
STEPS.register("ours_buffer", label="divmerge_core, gradient buffer")(
    lambda problem: fitted(problem, "buffer")
)


def through_graph(
    problem: MergeProblem, leaf: Tensor, merge: Callable[[], Mapping[str, Tensor]], apart: bool
) -> list[float]:
    """Seconds of every step where autograd goes through the merge.

    apart: a forward and a backward pass per task, as FusionBench's loop has them, not one for all.
    """
    experts, adam = expert_logits(problem), torch.optim.Adam([leaf], lr=1e-2)
    steps = schedule([len(b) for b in problem.batches], 1, torch.Generator().manual_seed(0))
    took = []
    for chosen in steps:
        settle(leaf.device)
        start, merged = time.perf_counter(), merge()
        pairs = [(task, problem.batches[task][index]) for task, index in enumerate(chosen)]
        for group in [[pair] for pair in pairs] if apart else [pairs]:
            logits = problem.forward(merged, group)
            loss = sum(
                batch.weight @ js(experts[task][chosen[task]], answer)
                for (task, batch), answer in zip(group, logits, strict=True)
            )
            loss.backward(retain_graph=apart)
        adam.step()
        adam.zero_grad()
        settle(leaf.device)
        took.append(time.perf_counter() - start)
    return took


def start(problem: MergeProblem) -> Tensor:
    """Coefficients 1/T, one per task and tensor."""
    num_tasks = len(problem.vectors.tasks)
    shape = (num_tasks, len(problem.vectors.layout.names))
    return torch.full(shape, 1 / num_tasks, device=problem.vectors.base.device)


@STEPS.register("dictionary", label="dictionary, autograd")
def dictionary_step(problem: MergeProblem) -> list[float]:
    """The usual merge, one backward pass for all tasks."""
    layout, leaf = problem.vectors.layout, start(problem).requires_grad_()
    base = layout.unflatten(problem.vectors.base)
    experts = [*map(layout.unflatten, problem.vectors.deltas)]
    return through_graph(problem, leaf, lambda: dictionary_merge(base, experts, leaf), False)


@STEPS.register("fusion_bench", label="FusionBench", package="fusion-bench")
def fusion_bench_step(problem: MergeProblem) -> list[float]:
    """LayerWiseMergedModel's merge, and a backward pass through it per task."""
    model, names = fusion_bench_model(problem.vectors, start(problem)), problem.vectors.layout.names

    def merge() -> dict[str, Tensor]:
        return dict(zip(names, model.merge_weights().values(), strict=True))

    return through_graph(problem, model.merge_weight, merge, True)


def race(problem: MergeProblem, names: Sequence[str], *, rounds: int = 3) -> pd.DataFrame:
    """Whole steps on the same batches: a row per contestant, round and step.

    seconds of the step, and the peak bytes of the fit that it belongs to, on top of the problem.
    """
    device, (num_tasks, size) = problem.vectors.base.device, problem.vectors.deltas.shape
    rows, rng = [], np.random.default_rng(0)
    for number in tqdm(range(rounds), "rounds of steps", leave=False):
        for name in rng.permutation(list(names)):
            took: list[float] = []
            peak = peak_bytes(
                lambda name=name, took=took: took.extend(STEPS[name](problem)), device
            )
            rows += [(name, "step", num_tasks, size, number, one, math.nan, peak) for one in took]
    return pd.DataFrame(rows, columns=COLUMNS)


def split(problem: MergeProblem) -> pd.DataFrame:
    """Where the time of a step goes: seconds of its parts, a row per step."""
    vectors, objective = problem.vectors, js
    coefficients = Coefficients(vectors.layout, len(vectors.tasks), grouping="layer")
    coefficients.to(vectors.base.device)
    segments, experts = coefficients.segments, expert_logits(problem)
    live = torch.empty_like(vectors.base)
    leaves = vectors.layout.unflatten(live)
    for leaf in leaves.values():
        leaf.requires_grad_()
    collect, rows = gather_in_buffer(leaves, vectors, segments), []
    steps = schedule([len(b) for b in problem.batches], 1, torch.Generator().manual_seed(0))
    for chosen in steps:
        pairs = [(task, problem.batches[task][index]) for task, index in enumerate(chosen)]
        state = {}

        def merge() -> None:
            grouped_merge(vectors.base, vectors.deltas, coefficients().detach(), segments, out=live)

        def forward(pairs=pairs, chosen=chosen, state=state) -> None:
            logits = problem.forward(leaves, pairs)
            state["loss"] = sum(
                batch.weight @ objective(experts[task][chosen[task]], answer)
                for (task, batch), answer in zip(pairs, logits, strict=True)
            )

        calls = {
            "merge": merge,
            "forward pass": forward,
            "backward pass": lambda state=state: state["loss"].backward(),
            "gradient of the merge": collect,
        }
        rows.append({name: seconds(call, live.device) for name, call in calls.items()})
    return pd.DataFrame(rows)


def save(path: Path, rows: pd.DataFrame, **facts: object) -> None:
    """Store measurements with their origin, whole or not at all."""
    table = rows.astype(object).where(rows.notna(), None).to_dict("list")
    write_json(path, {"rows": table, "provenance": origin(**facts)})
