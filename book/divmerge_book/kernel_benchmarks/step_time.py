"""Time of whole steps of a fit: by this package, and with autograd through the merge."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.profiling import peak_bytes, seconds, settle
from divmerge_book.kernel_benchmarks.implementations import dictionary_merge, fusion_bench_model
from divmerge_core.divergences import js
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import Step, fit_coefficients
from divmerge_core.merging.merged_model import expert_logits, gather_in_buffer, schedule, step_loss
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.registry import Registry

STEPS = Registry("step")  # name -> function(problem, number of steps) -> seconds of each


def fitted(problem: MergeProblem, gradients: str) -> list[float]:
    """Seconds of every step of this package's fit, with one coefficient per tensor."""
    vectors, ticks = problem.vectors, []
    coefficients = Coefficients(vectors.layout, len(vectors.tasks), grouping="layer").to(
        vectors.base.device
    )

    def callback(step: Step) -> None:
        settle(vectors.base.device)
        ticks.append(time.perf_counter())

    fit_coefficients(
        problem, coefficients, js, epochs=1, gradients=gradients, callback=callback, progress=False
    )
    return np.diff(ticks).tolist()


OURS = {"ours": "divmerge_core", "ours_buffer": "divmerge_core, gradient buffer"}
for (name, label), gradients in zip(OURS.items(), ("stream", "buffer"), strict=True):
    STEPS.register(name, label=label)(partial(fitted, gradients=gradients))


def through_graph(
    problem: MergeProblem, leaf: Tensor, merge: Callable[[], Mapping[str, Tensor]], apart: bool
) -> list[float]:
    """Seconds of every step where autograd goes through the merge.

    apart: one forward and backward pass per task, as in FusionBench's loop, instead of one for all.
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


def benchmark_step(problem: MergeProblem, names: Sequence[str], *, rounds: int = 3) -> pd.DataFrame:
    """Whole steps on the same batches: a row per implementation, round and step.

    seconds of the step, and the peak bytes of the fit that it belongs to, on top of the problem.
    """
    device, (num_tasks, size) = problem.vectors.base.device, problem.vectors.deltas.shape
    rows, rng = [], np.random.default_rng(0)
    for number in tqdm(range(rounds), "rounds of steps", leave=False):
        for name in rng.permutation(list(names)):
            took: list[float] = []

            def steps(name=name, took=took) -> None:
                took += STEPS[name](problem)

            peak = peak_bytes(steps, device)
            rows += [(name, num_tasks, size, number, one, peak) for one in took]
    columns = ["contestant", "tasks", "parameters", "round", "seconds", "peak"]
    return pd.DataFrame(rows, columns=columns)


def step_parts(problem: MergeProblem) -> pd.DataFrame:
    """Seconds of the parts of a step, a row per step."""
    vectors = problem.vectors
    coefficients = Coefficients(vectors.layout, len(vectors.tasks), grouping="layer")
    coefficients.to(vectors.base.device)
    segments, experts = coefficients.segments, expert_logits(problem)
    merged = torch.empty_like(vectors.base)
    leaves = vectors.layout.unflatten(merged)
    for leaf in leaves.values():
        leaf.requires_grad_()
    collect, rows = gather_in_buffer(leaves, vectors, segments), []
    losses: list[Tensor] = []
    steps = schedule([len(b) for b in problem.batches], 1, torch.Generator().manual_seed(0))
    for chosen in steps:
        raw = coefficients().detach()
        calls = {
            "merge": partial(
                grouped_merge, vectors.base, vectors.deltas, raw, segments, out=merged
            ),
            "forward pass": lambda chosen=chosen: losses.append(
                step_loss(problem, leaves, experts, chosen, js)
            ),
            "backward pass": lambda: losses.pop().backward(),
            "gradient of the merge": collect,
        }
        rows.append({name: seconds(call, merged.device) for name, call in calls.items()})
    return pd.DataFrame(rows)
