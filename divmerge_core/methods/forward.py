"""Forward passes that methods share: hooks, a module's output, means over tokens, single inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divmerge_core.merging.problem import Batch, MergeProblem


@contextmanager
def hooked(hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Forward hooks `(module, args, kwargs, output)` of several modules; removed afterwards."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def module_output(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int, batch: Batch
) -> object:
    """What the problem's module returns (its last hidden state where it names one) with `flat`.

    None where the module does not run.
    """
    outputs: list[object] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        outputs.append(getattr(output, "last_hidden_state", output))

    with hooked({problem.module: keep}):
        problem.logits(flat, task, batch)
    return outputs[-1] if outputs else None


def over_tokens(hidden: Tensor, batch: Batch) -> Float[Tensor, "B d"]:
    """Mean over the tokens that are not padding: [B, S, d] -> [B, d]; [B, d] stays as it is."""
    if hidden.ndim == 2:
        return hidden
    mask = batch.inputs.get("attention_mask", hidden.new_ones(hidden.shape[:2]))
    mask = mask.to(hidden)[..., None]  # [B, S, 1]
    return (hidden * mask).sum(1) / mask.sum(1)


def rows(batch: Batch) -> Iterator[Batch]:
    """A batch's inputs one by one, with their own weights and answer positions, without experts."""
    size = len(next(iter(batch.inputs.values())))
    answers = [1] * size if batch.answer is None else batch.answer.sum(dim=1).tolist()
    for n, weight in enumerate(batch.weight.split(answers)):
        inputs = {key: value[n : n + 1] for key, value in batch.inputs.items()}
        yield Batch(inputs, weight, None if batch.answer is None else batch.answer[n : n + 1])
