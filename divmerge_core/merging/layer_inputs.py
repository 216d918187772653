"""What goes into a model's linear layers, for methods that match layers and not answers."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from divmerge_core.merging.problem import MergeProblem


def require_module(problem: MergeProblem, method: str) -> nn.Module:
    """The problem's module. Raises ValueError, with the method's name, where it knows none."""
    if problem.module is None:
        raise ValueError(
            f"{method} looks inside the model: give MergeProblem its `module`, the network that "
            "forward calls"
        )
    return problem.module


def linear_layers(problem: MergeProblem) -> dict[str, nn.Linear]:
    """The linear layers of a problem's module whose weights are merged, by the weight's name."""
    names = set(problem.vectors.layout.names)
    return {
        f"{name}.weight": layer
        for name, layer in require_module(problem, "this method").named_modules()
        if isinstance(layer, nn.Linear) and f"{name}.weight" in names
    }


def embedding_tables(problem: MergeProblem) -> dict[str, nn.Embedding]:
    """The embedding tables that are merged, by the weight's name; none without a module."""
    named = problem.module.named_modules() if problem.module else ()
    tables = {f"{name}.weight": part for name, part in named if isinstance(part, nn.Embedding)}
    return {name: tables[name] for name in problem.vectors.layout.names if name in tables}


def rows_read(
    problem: MergeProblem, tables: Mapping[str, nn.Embedding]
) -> dict[str, Bool[Tensor, " V"]]:
    """Which rows of these embedding tables the problem's inputs read, by the weight's name.

    All rows of a table where gradients reach others too, as where the model's output is tied to it.
    """
    parameters = problem.vectors.layout.unflatten(problem.vectors.base)
    leaves = {name: parameters[name].detach().requires_grad_() for name in tables}
    read = {name: leaf.new_zeros(len(leaf), dtype=torch.bool) for name, leaf in leaves.items()}

    def record(name: str, layer: nn.Module, given: tuple[Tensor, ...], named: dict) -> None:
        read[name][next(iter((*given, *named.values())))] = True

    hooks = {table: partial(record, name) for name, table in tables.items()}
    handles = [t.register_forward_pre_hook(hook, with_kwargs=True) for t, hook in hooks.items()]
    try:
        for task, batches in enumerate(problem.batches):
            for number, batch in enumerate(batches):
                with torch.set_grad_enabled(number == 0):
                    logits = problem.forward(parameters | leaves, [(task, batch)])[0]
                if logits.requires_grad:
                    every, total = list(leaves.values()), logits.square().sum()
                    slopes = torch.autograd.grad(total, every, materialize_grads=True)
                    for seen, slope in zip(read.values(), slopes, strict=True):
                        seen |= slope[~seen].any()
    finally:
        for handle in handles:
            handle.remove()
    return read


@torch.no_grad()
def visit_layer_inputs(
    problem: MergeProblem,
    flat: Float[Tensor, " N"],
    task: int,
    see: Callable[[str, Float[Tensor, "n K"]], None],
) -> None:
    """Run a model on a task's unlabelled inputs; `see(weight name, inputs [n, K])` at every layer.

    n counts inputs times tokens, of one batch at a time; padding is left out.
    """
    masks: list[Tensor] = []

    def hook(name: str) -> Callable:
        def record(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0]
            # a decoder's layers read its own tokens, or, where they look across, the encoder's
            if own := [mask for mask in masks if x.ndim == 3 and mask.shape == x.shape[:2]]:
                x = x[own[-1 if "decoder" in name else 0].bool()]
            see(name, x.reshape(-1, x.shape[-1]))

        return record

    handles = [
        layer.register_forward_pre_hook(hook(name))
        for name, layer in linear_layers(problem).items()
    ]
    try:
        for batch in problem.batches[task]:
            both = ("attention_mask", "decoder_attention_mask")
            masks[:] = [batch.inputs[key] for key in both if key in batch.inputs]
            problem.logits(flat, task, batch)
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Seen:
    """What a layer reads: sums over inputs and tokens of x, of x x^T, and their number."""

    total: Float[Tensor, " K"]
    gram: Float[Tensor, "K K"]  # float64: a spectrum of it is cut at rounding, and it is solved for
    count: int


def layer_inputs(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int, names: Container[str] | None = None
) -> dict[str, Seen]:
    """What a model's linear layers read on a task's inputs, by the weight's name.

    names: the weights asked for; None for all.
    """
    seen: dict[str, Seen] = {}

    def see(name: str, x: Float[Tensor, "n K"]) -> None:
        if names is not None and name not in names:
            return
        x = x.double()
        if name not in seen:
            seen[name] = Seen(torch.zeros_like(x[0]), x.new_zeros(x.shape[1], x.shape[1]), 0)
        here = seen[name]
        here.total += x.sum(dim=0)
        here.gram += x.T @ x
        here.count += len(x)

    visit_layer_inputs(problem, flat, task, see)
    return seen
