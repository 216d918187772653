"""Time of whole steps of a fit: by this package, and with autograd through the merge."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.profiling import peak_bytes, seconds, settle
from divmerge_book.kernel_benchmarks.implementations import Built, layer_wise_model, usual
from divmerge_book.studies.objective_fits import coefficients_of
from divmerge_core.divergences import js
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.fit import Step, fit_coefficients
from divmerge_core.merging.merged_model import expert_logits, gather_in_buffer, schedule, step_loss
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.registry import Registry

STEPS = Registry("step")  # name -> function(problem, number of steps) -> seconds of each


def steps_of(problem: MergeProblem) -> list:
    """One epoch's batches, a number per task in each step."""
    return schedule([len(b) for b in problem.batches], 1, torch.Generator().manual_seed(0))


def fitted(problem: MergeProblem, gradients: str) -> list[float]:
    """Seconds of every step of this package's fit, with one coefficient per tensor."""
    ticks = []

    def callback(step: Step) -> None:
        settle(problem.vectors.base.device)
        ticks.append(time.perf_counter())

    how = {"epochs": 1, "gradients": gradients, "callback": callback, "progress": False}
    fit_coefficients(problem, coefficients_of(problem.vectors, "layer"), js, **how)
    return np.diff(ticks).tolist()


def through_graph(
    problem: MergeProblem, build: Callable[[TaskVectors, Tensor], Built], apart: bool
) -> list[float]:
    """Seconds of every step where autograd goes through the merge.

    apart: one forward and backward pass per task, as in FusionBench's loop, instead of one for all.
    """
    leaf, merge = build(problem.vectors, coefficients_of(problem.vectors, "layer")().detach())
    experts, adam = expert_logits(problem), torch.optim.Adam([leaf], lr=1e-2)

    def step(chosen: Sequence[int]) -> None:
        merged = merge()
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

    return [seconds(partial(step, chosen), leaf.device) for chosen in steps_of(problem)]


stream, buffer = (partial(fitted, gradients=how) for how in ("stream", "buffer"))
STEPS.register("ours", label="divmerge_core")(stream)
STEPS.register("ours_buffer", label="divmerge_core, gradient buffer")(buffer)
STEPS.register("dictionary", label="dictionary, autograd")(
    partial(through_graph, build=usual, apart=False)
)
STEPS.register("fusion_bench", label="FusionBench", package="fusion-bench")(
    partial(through_graph, build=layer_wise_model, apart=True)
)


def benchmark_step(problem: MergeProblem, names: Sequence[str], *, rounds: int = 3) -> pd.DataFrame:
    """Whole steps on the same batches: a row per implementation, round and step.

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
            rows += [(name, num_tasks, size, number, one, peak) for one in took]
    columns = ["contestant", "tasks", "parameters", "round", "seconds", "peak"]
    return pd.DataFrame(rows, columns=columns)


def step_parts(problem: MergeProblem) -> pd.DataFrame:
    """Seconds of the parts of a step, a row per step."""
    vectors, coefficients = problem.vectors, coefficients_of(problem.vectors, "layer")
    segments, experts = coefficients.segments, expert_logits(problem)
    merged, raw = torch.empty_like(vectors.base), coefficients().detach()
    leaves = vectors.layout.unflatten(merged)
    for leaf in leaves.values():
        leaf.requires_grad_()
    merge = partial(grouped_merge, vectors.base, vectors.deltas, raw, segments, out=merged)
    collect, losses = gather_in_buffer(leaves, vectors, segments), []

    def forward(chosen: Sequence[int]) -> None:
        losses.append(step_loss(problem, leaves, experts, chosen, js))

    rows = []
    for chosen in steps_of(problem):
        calls = {
            "merge": merge,
            "forward pass": partial(forward, chosen),
            "backward pass": lambda: losses.pop().backward(),
            "gradient of the merge": collect,
        }
        rows.append({name: seconds(call, merged.device) for name, call in calls.items()})
    return pd.DataFrame(rows)
