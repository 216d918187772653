"""Whether our forward pass gives a causal model's own logits: compared once for every base."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from divmerge_book.models.language.forward import Parts, language_forward
from divmerge_book.models.language.models import Language
from divmerge_book.models.language.reading import collate
from divmerge_book.models.language.seq2seq import encodes

CLOSE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}  # of the largest logit


@torch.no_grad()
def check_forward(base: Language) -> None:
    """Raise ValueError, naming the model's class, where its logits here are not its own.

    Two rows of unlike length are compared with the model's own forward pass on each row alone:
    in one batch, filled up on the right, as merging reads them; and filled up on the left with the
    last token after the others, as answers are written. Encoder-decoders run whole, and pass.
    """
    model = base.model
    if encodes(model):
        return
    known = model.get_input_embeddings().num_embeddings
    rows = [[n % known for n in row] for row in ((5, 6, 7, 8), (9, 4))]
    batch, _ = collate(base, [(row[:1], row[1:]) for row in rows])
    try:
        whole = [model(torch.tensor([row], device=base.device)).logits[0] for row in rows]
        ours = language_forward(model)(base.state, [(0, batch)])[0]
        last = written_last(base, rows)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{refusal(base)}: {error!r}") from error
    own = torch.cat([*(logits[:-1] for logits in whole), *(logits[-1:] for logits in whole)])
    gap = (torch.cat([ours, last]) - own).abs().max() / own.abs().max()
    if not gap <= CLOSE[own.dtype]:
        raise ValueError(f"{refusal(base)}: they differ by {gap:.2g} of the largest logit")


def refusal(base: Language) -> str:
    return (
        f"{base.name!r} is a {type(base.model).__name__}, of which the logits computed here are "
        "not the model's own; take a model of another family"
    )


def written_last(base: Language, rows: list[list[int]]) -> Float[Tensor, "B V"]:
    """Logits after the last token of every row, read with a cache and filled up on the left."""
    parts, parameters, memory = Parts.of(base.model), base.state, DynamicCache()
    width = max(map(len, rows))
    ids = torch.tensor([[base.pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    ids, mask = ids.to(base.device), mask.to(base.device)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    for stop, start in ((width - 1, 0), (width, width - 1)):
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        inputs["position_ids"] = place[:, start:stop]
        found = parts.hidden(parameters, inputs, past_key_values=memory, use_cache=True)
    return parts.words(parameters, found.last_hidden_state[:, -1])
