"""The forward pass that merging differentiates: hidden states once, words at answer positions only.

A batch of B rows and S tokens has B S V logits, of which A V are looked at. So the head, whose
matrix is the largest of a small model, is applied to A rows, never to B S.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from divmerge_core.encoders import resolve
from divmerge_core.language.reading import Choices
from divmerge_core.problem import Batch, Forward, Pairs


@dataclass(frozen=True)
class Parts:
    """A causal model as body and head: where each one's parameters are in the whole model's.

    head: the name of the matrix that turns hidden states into logits; where it is tied, that of
    the input embeddings, so that gradients of both uses reach one leaf.
    """

    body: torch.nn.Module
    prefix: str
    head: str
    bias: str | None

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Parts":
        """The parts of a model from transformers."""
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        head, prefix = model.get_output_embeddings(), model.base_model_prefix
        bias = None if head.bias is None else names[id(head.bias)]
        return cls(getattr(model, prefix), f"{prefix}.", names[id(head.weight)], bias)

    def hidden(
        self, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor], **more: object
    ) -> object:
        """What the body returns for these inputs with these parameters."""
        own = {
            name.removeprefix(self.prefix): tensor
            for name, tensor in parameters.items()
            if name.startswith(self.prefix)
        }
        return functional_call(self.body, own, kwargs={**inputs, **more})

    def words(
        self, parameters: Mapping[str, Tensor], hidden: Float[Tensor, "A H"]
    ) -> Float[Tensor, "A V"]:
        """Logits over the vocabulary."""
        head = parameters[self.head]
        bias = None if self.bias is None else parameters[self.bias]
        return torch.nn.functional.linear(hidden.to(head), head, bias)

    def lowered(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same parameters, matrices that take no gradient rounded to bfloat16 once for all.

        Autocast would do so anew in every product; it keeps only what takes a gradient.
        """
        linear = {
            f"{self.prefix}{name}.weight"
            for name, part in self.body.named_modules()
            if isinstance(part, torch.nn.Linear)
        }
        return {
            name: tensor.bfloat16() if name in linear and not tensor.requires_grad else tensor
            for name, tensor in parameters.items()
        }


def answer_states(
    parts: Parts, parameters: Mapping[str, Tensor], batch: Batch
) -> Float[Tensor, "A H"]:
    """Hidden states at the answer positions, in the order of rows and, within, of tokens."""
    return parts.hidden(parameters, batch.inputs, use_cache=False).last_hidden_state[batch.answer]


def language_forward(
    model: torch.nn.Module, *, precision: str = "float32", checkpointing: bool = False
) -> Forward:
    """A MergeProblem's `forward` for one causal language model.

    Gives logits [A, V] for a batch, and for Choices the likelihood of every choice. precision: of
    the body's matrix products, `float32`, `bfloat16` or `auto`; the head, for which rounding would
    cost most and which sees few rows, stays in the parameters' own. checkpointing: keep no
    activations of a task's batch until its turn in the backward pass, where they are computed
    again: no more than one task's are held, at a third more work.
    """
    parts = Parts.of(model)
    device = next(model.parameters()).device
    half = resolve(precision, device) == "bfloat16"

    def states(parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(answer_states, parts, parameters, batch, use_reentrant=False)
        return answer_states(parts, parameters, batch)

    def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
        low = parts.lowered(parameters) if half else parameters
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found = [states(low, batch) for _, batch in pairs]
        logits = [parts.words(parameters, hidden) for hidden in found]
        return [
            batch.likelihood(own) if isinstance(batch, Choices) else own
            for (_, batch), own in zip(pairs, logits, strict=True)
        ]

    return forward
