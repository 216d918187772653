"""What goes into a model's linear layers, for methods that match layers and not answers."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divmerge_core.problem import MergeProblem


def linear_layers(problem: MergeProblem) -> dict[str, nn.Linear]:
    """The linear layers of a problem's module whose weights are merged, by the weight's name.

    Raises ValueError where the problem knows no module.
    """
    if problem.module is None:
        raise ValueError(
            "this method looks inside the model: give MergeProblem its `module`, the network that "
            "forward calls"
        )
    names = set(problem.vectors.layout.names)
    return {
        f"{name}.weight": layer
        for name, layer in problem.module.named_modules()
        if isinstance(layer, nn.Linear) and f"{name}.weight" in names
    }


@torch.no_grad()
def watch_inputs(
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
            own = [mask for mask in masks if x.ndim == 3 and mask.shape == x.shape[:2]]
            if own:
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
