"""The forward pass that merging differentiates: logits at the A answer positions only.

A batch of B rows and S tokens has B S V logits, of which A V are used: the head is applied to A
hidden states.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from divmerge_book.models.encoders import resolve
from divmerge_book.models.language.reading import MultipleChoiceBatch
from divmerge_book.models.language.seq2seq import answer_logits, encodes
from divmerge_core.merging.problem import Batch, Forward, Pairs


@dataclass(frozen=True)
class Parts:
    """A causal model as body and head: where each one's parameters are in the whole model's.

    head: the model itself with a body that returns the hidden states it is given, so that what the
    model's own code does with its logits (scales them, caps them) is done here too. names: the
    head's parameters -> the whole model's; where the head is tied, that of the input embeddings, so
    that gradients of both uses reach one leaf.
    """

    body: torch.nn.Module
    prefix: str
    head: torch.nn.Module
    names: Mapping[str, str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Parts":
        """The parts of a model from transformers. Raises ValueError where it has no such parts."""
        places = {part: name for name, part in model.named_modules()}
        body = model.get_decoder()
        prefix = places.get(body) or model.base_model_prefix
        if model.get_output_embeddings() is None or not prefix:
            raise ValueError(
                f"{type(model).__name__} has no body and output matrix of its own; take a causal "
                "language model of another family"
            )
        body = model.get_submodule(prefix)
        head = replaced(model, prefix, returning(body))
        names = {tensor: name for name, tensor in model.named_parameters()}
        own = {name: names[tensor] for name, tensor in head.named_parameters()}
        return cls(body, f"{prefix}.", head, own)

    def hidden(
        self, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor], **more: object
    ) -> object:
        """What the body returns for these inputs with these parameters."""
        own = {
            name.removeprefix(self.prefix): tensor
            for name, tensor in parameters.items()
            if name.startswith(self.prefix)
        }
        given = {**inputs, **more}
        if "position_ids" not in inspect.signature(self.body.forward).parameters:
            given.pop("position_ids", None)  # such models count them from the mask
        return functional_call(self.body, own, kwargs=given)

    def words(
        self, parameters: Mapping[str, Tensor], hidden: Float[Tensor, "A H"]
    ) -> Float[Tensor, "A V"]:
        """Logits over the vocabulary."""
        own = {name: parameters[whole] for name, whole in self.names.items()}
        dtype = next(iter(own.values())).dtype
        call = {"inputs_embeds": hidden[None].to(dtype), "use_cache": False}
        return functional_call(self.head, own, kwargs=call).logits[0]

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


class Given(BaseModelOutput):
    """Hidden states as a body returns them, with nothing in all its other fields."""

    def __getattr__(self, name: str) -> None:
        return None


def returning(body: torch.nn.Module) -> torch.nn.Module:
    """The body without its parts and parameters: it returns the embeddings that it is given."""
    empty = copy.copy(body)
    empty._modules, empty._parameters, empty._buffers = {}, {}, {}
    empty.forward = lambda *_, inputs_embeds, **__: Given(last_hidden_state=inputs_embeds)
    return empty


def replaced(module: torch.nn.Module, path: str, part: torch.nn.Module) -> torch.nn.Module:
    """A shallow copy of a module with another part at this dotted path; the rest is shared."""
    first, _, rest = path.partition(".")
    shell = copy.copy(module)
    part = replaced(module._modules[first], rest, part) if rest else part
    shell._modules = {**module._modules, first: part}
    return shell


def answer_states(
    parts: Parts, parameters: Mapping[str, Tensor], batch: Batch
) -> Float[Tensor, "A H"]:
    """Hidden states at the answer positions, in the order of rows and, within, of tokens."""
    return parts.hidden(parameters, batch.inputs, use_cache=False).last_hidden_state[batch.answer]


def language_forward(
    model: torch.nn.Module, *, precision: str = "float32", checkpointing: bool = False
) -> Forward:
    """A MergeProblem's `forward` for one causal language model, or one encoder-decoder.

    Gives logits [A, V] for a batch, and the likelihood of every choice for MultipleChoiceBatch.
    precision: of the body's matrix products, `float32`, `bfloat16` or `auto`; a causal head stays
    in the parameters' own. checkpointing: recompute a batch's activations in the backward pass, at
    a third more work.
    """
    two, device = encodes(model), next(model.parameters()).device
    parts = None if two else Parts.of(model)
    run = partial(answer_logits, model) if two else partial(answer_states, parts)
    half = resolve(precision, device) == "bfloat16"

    def states(parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(run, parameters, batch, use_reentrant=False)
        return run(parameters, batch)

    def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
        low = parts.lowered(parameters) if half and parts else parameters
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found = [states(low, batch) for _, batch in pairs]
        if parts:
            found = [parts.words(parameters, hidden) for hidden in found]
        elif half:
            found = [logits.float() for logits in found]
        return [
            batch.likelihood(logits) if isinstance(batch, MultipleChoiceBatch) else logits
            for (_, batch), logits in zip(pairs, found, strict=True)
        ]

    return forward
