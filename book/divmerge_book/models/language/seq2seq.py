"""Encoder-decoder models such as T5: the prompt goes to the encoder, the answer to the decoder.

The decoder reads a start token, then the answer, so its position n predicts the answer's token n.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from divmerge_book.models.language.models import Language
from divmerge_core.merging.problem import Batch


def encodes(model: torch.nn.Module) -> bool:
    """Whether a model is an encoder and a decoder."""
    return bool(model.config.is_encoder_decoder)


def padded(
    base: Language, rows: Sequence[Sequence[int]], side: str = "right"
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Rows of token numbers padded to the longest, and the attention mask."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    ids = pad(tensors, padding_value=base.pad)
    mask = pad([torch.ones_like(row) for row in tensors])
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


def answer_targets(
    base: Language, answers: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, " A"], Int[Tensor, " A"]]:
    """Weight and token of every answer position: rows count alike, and tokens within a row."""
    weight = [1 / (len(answers) * len(answer)) for answer in answers for _ in answer]
    targets = [token for answer in answers for token in answer]
    return torch.tensor(weight, device=base.device), torch.tensor(targets, device=base.device)


def collate_pairs(
    base: Language, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Batch, Int[Tensor, " A"]]:
    """Prompts for the encoder, answers for the decoder, and the A tokens that it predicts."""
    ids, mask = padded(base, [prompt for prompt, _ in pairs])
    start = start_of(base)
    read, seen = padded(base, [[start, *answer[:-1]] for _, answer in pairs])
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {"decoder_input_ids": read, "decoder_attention_mask": seen}
    weight, targets = answer_targets(base, [answer for _, answer in pairs])
    return Batch(inputs, weight, seen.bool()), targets


def answer_logits(model: torch.nn.Module, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Logits at the decoder's answer positions, in the order of rows and, within, of tokens.

    Tied embeddings stand in `parameters` once; encoder, decoder and head read the same one.
    """
    given = {**batch.inputs, "use_cache": False}
    return functional_call(model, dict(parameters), kwargs=given).logits[batch.answer]
