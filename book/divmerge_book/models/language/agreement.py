"""A check that our forward pass gives a causal model's own logits."""

import torch

from divmerge_book.models.language.completions import greedy
from divmerge_book.models.language.forward import language_forward
from divmerge_book.models.language.models import Language
from divmerge_book.models.language.reading import collate
from divmerge_book.models.language.seq2seq import encodes

CLOSE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}  # of the largest logit


@torch.no_grad()
def check_forward(base: Language) -> None:
    """Raise ValueError, naming the model's class, where its logits here are not its own.

    Two rows of unlike length in one padded batch are compared with the model's own forward pass on
    each row alone: our logits, and the greedy next tokens. Encoder-decoders run whole, and pass.
    """
    model = base.model
    if encodes(model):
        return
    known = model.get_input_embeddings().num_embeddings
    rows = [[n % known for n in row] for row in ((5, 6, 7, 8), (9, 4))]
    batch, _ = collate(base, [(row[:1], row[1:]) for row in rows])
    refusal = (
        f"{base.name!r} is a {type(model).__name__}, of which the logits computed here are not the "
        "model's own; take a model of another family"
    )
    try:
        whole = [model(torch.tensor([row], device=base.device)).logits[0] for row in rows]
        ours = language_forward(model)(base.state, [(0, batch)])[0]
        said = greedy(base, base.state, rows, max_new=1)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{refusal}: {error!r}") from error
    own = torch.cat([logits[:-1] for logits in whole])
    last = [logits[-1].max() - logits[-1, t] for logits, (t,) in zip(whole, said, strict=True)]
    gap = torch.stack([(ours - own).abs().max(), *last]).max() / own.abs().max()
    if not gap <= CLOSE[own.dtype]:
        raise ValueError(f"{refusal}: they differ by {gap:.2g} of the largest logit")
