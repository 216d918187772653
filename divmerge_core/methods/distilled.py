"""Distillation of all weights, and the checks and hooks of methods that learn from experts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.kernels.stores import dense
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import limit
from divmerge_core.problem import MergeProblem, expert_logits, schedule


def require_positive(**options: int | float) -> None:
    """Raise ValueError for an option that is not above 0 and finite."""
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise ValueError(
                f"{name} must be above 0 and finite, got {value}; leave it out for the default"
            )


def require_finite(loss: Tensor, where: str, lr: float) -> None:
    """Raise ValueError where a loss is NaN or infinite."""
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss is {loss.item()} at {where}; lower lr (now {lr}) or check the experts for "
            "extreme values"
        )


def require_module(problem: MergeProblem, method: str) -> nn.Module:
    """The problem's module. Raises ValueError where it knows none."""
    if problem.module is None:
        raise ValueError(
            f"{method} looks inside the model: give MergeProblem its `module`, the network that "
            "forward calls"
        )
    return problem.module


@contextmanager
def hooked(module: nn.Module, see: Callable) -> Iterator[None]:
    """Call see(module, args, kwargs, output) whenever the module has run; gone afterwards."""
    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@METHODS.register(
    "distillation",
    source="Hinton et al. 2015",
    needs="unlabelled inputs",
    cost="training",
    symmetric=True,
    search=({}, {"lr": 1e-3}),
)
def distillation(
    problem: MergeProblem,
    *,
    divergence: str = "js",
    init: float | None = None,
    inputs: int | None = None,
    epochs: int = 4,
    lr: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Minimise DivMerge's own objective over the weights themselves, sum_t E_x D(expert_t, model).

    An upper reference and no merge: DivMerge freed of its T G coefficients. Every parameter that
    some expert changed learns, be it matrix, bias or embedding; the others stay the base's. Adam
    starts from base plus `init` times the sum of task vectors, None for 1/T, and takes a batch of
    every task per step.

    divergence: a name in DIVERGENCES; `kl` is the classic one at temperature 1 (arXiv 1503.02531).
    inputs: per task, None for DivMerge's 200. lr has no published value: this one is that of
    fine-tuning. With few inputs it fits these alone, so it may lose to a merge on other rows.
    Raises ValueError for unknown names, values out of range, a task without inputs, and a loss
    that stops being finite.
    """
    objective = DIVERGENCES[divergence]
    require_positive(epochs=epochs, lr=lr)
    problem.require_inputs("distillation")
    problem = limit(problem, inputs, "task")
    vectors, experts = problem.vectors, expert_logits(problem)
    num_tasks = len(vectors.tasks)
    live = vectors.merge([1 / num_tasks if init is None else init] * num_tasks)
    leaves = vectors.layout.unflatten(live)
    free = dense(vectors.deltas).any(dim=0)  # [N]
    adam = torch.optim.Adam([leaf.requires_grad_() for leaf in leaves.values()], lr=lr)
    steps = schedule([len(b) for b in problem.batches], epochs, torch.Generator().manual_seed(seed))
    for number, chosen in enumerate(tqdm(steps, "distilling", disable=not progress, leave=False)):
        pairs = [(task, problem.batches[task][index]) for task, index in enumerate(chosen)]
        taught = zip(experts, chosen, pairs, problem.forward(leaves, pairs), strict=True)
        try:
            loss = sum(b.weight @ objective(e[n], logits) for e, n, (_, b), logits in taught)
        except ValueError as error:  # a divergence's own, of logits that are NaN
            raise ValueError(f"step {number}, lr {lr} (lower it if too high): {error}") from error
        require_finite(loss, f"step {number}", lr)
        adam.zero_grad()
        loss.backward()
        for leaf, (start, stop) in zip(leaves.values(), vectors.layout.bounds, strict=True):
            if leaf.grad is not None:  # a tensor that forward does not use has none
                leaf.grad *= free[start:stop].view_as(leaf)
        adam.step()
    return live
