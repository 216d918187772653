"""Encoder-decoder models such as T5: the prompt goes to the encoder, the answer to the decoder.

The decoder reads a start token and then the answer, so its position n predicts the answer's token
n: all of its positions are answer positions, and a batch of A of them has A V logits and no more.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, EncoderDecoderCache

from divmerge_book.models.encoders import resolve
from divmerge_book.models.language.models import Language
from divmerge_core.merging.problem import Batch, Forward, Pairs


def encodes(model: torch.nn.Module) -> bool:
    """Whether a model is an encoder and a decoder."""
    return bool(model.config.is_encoder_decoder)


def padded(
    base: Language, rows: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Rows of token numbers, filled up on the right, and what of them is no filling."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    fill = torch.nn.utils.rnn.pad_sequence
    ids = fill(tensors, batch_first=True, padding_value=base.pad)
    mask = fill([torch.ones_like(row) for row in tensors], batch_first=True)
    return ids.to(base.device), mask.to(base.device)


def start_of(base: Language) -> int:
    """The token that a decoder reads first. Raises ValueError where the model names none."""
    start = base.model.config.decoder_start_token_id
    if start is None:
        raise ValueError(
            f"{base.name!r} names no decoder_start_token_id in its config.json; T5's is its "
            "padding token"
        )
    return start


def collate_pairs(
    base: Language, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Batch, Int[Tensor, " A"]]:
    """Prompts for the encoder, answers for the decoder, and the A tokens that it has to predict.

    Every row counts alike, and within a row every token of its answer. Raises ValueError for an
    empty prompt or answer: an answer that says nothing is EOS alone.
    """
    if not all(prompt and answer for prompt, answer in pairs):
        raise ValueError("every row needs a prompt and an answer of at least one token (EOS)")
    ids, mask = padded(base, [prompt for prompt, _ in pairs])
    start = start_of(base)
    read, seen = padded(base, [[start, *answer[:-1]] for _, answer in pairs])
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {"decoder_input_ids": read, "decoder_attention_mask": seen}
    weight = [1 / (len(pairs) * len(answer)) for _, answer in pairs for _ in answer]
    targets = [token for _, answer in pairs for token in answer]
    return (
        Batch(inputs, torch.tensor(weight, device=base.device), seen.bool()),
        torch.tensor(targets, device=base.device),
    )


def answer_logits(model: torch.nn.Module, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Logits at the decoder's answer positions, in the order of rows and, within, of tokens.

    Tied embeddings stand in `parameters` once; encoder, decoder and head read the same one.
    """
    given = {**batch.inputs, "use_cache": False}
    return functional_call(model, dict(parameters), kwargs=given).logits[batch.answer]


def seq2seq_forward(
    model: torch.nn.Module, *, precision: str = "float32", checkpointing: bool = False
) -> Forward:
    """A MergeProblem's `forward` for one encoder-decoder: logits [A, V] for a batch.

    precision: of the matrix products, `float32`, `bfloat16` or `auto`. checkpointing: compute a
    batch's activations again in the backward pass instead of keeping them.
    """
    device = next(model.parameters()).device
    half = resolve(precision, device) == "bfloat16"

    def logits(parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(answer_logits, model, parameters, batch, use_reentrant=False)
        return answer_logits(model, parameters, batch)

    def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found = [logits(parameters, batch) for _, batch in pairs]
        return [own.float() if half else own for own in found]

    return forward


@torch.no_grad()
def greedy_answers(
    base: Language,
    parameters: Mapping[str, Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    precision: str = "float32",
) -> list[tuple[int, ...]]:
    """The likeliest next token, again and again: up to EOS, which is part of the answer.

    An answer of `max_new` tokens that has not ended is returned as far as it goes. The encoder
    runs once.
    """
    ids, mask = padded(base, prompts)
    read = torch.full_like(ids[:, :1], start_of(base))
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=base.device)
    given: dict = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    given["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    written: list[Tensor] = []
    half = resolve(precision, base.device) == "bfloat16"
    while len(written) < max_new and not ended.all():
        with torch.autocast(base.device.type, torch.bfloat16, enabled=half):
            call = {**given, "decoder_input_ids": read}
            found = functional_call(base.model, dict(parameters), kwargs=call)
        token = found.logits[:, -1].argmax(-1)
        written.append(token.masked_fill(ended, base.stop))
        ended = ended | (token == base.stop)
        read = written[-1][:, None]
        given.pop("input_ids", None)
        given["encoder_outputs"] = (found.encoder_last_hidden_state,)
    rows = torch.stack(written, dim=1).tolist()
    stop = base.stop
    return [tuple(row[: row.index(stop) + 1] if stop in row else row) for row in rows]
