"""From rows to tokens: prompts that always fit, answers that end in EOS, and batches of both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import datasets
import torch
from jaxtyping import Float, Int
from torch import Tensor

from divmerge_book.models.language.models import Language
from divmerge_book.models.language.prompts import Prompt
from divmerge_book.models.language.seq2seq import answer_targets, collate_pairs, encodes, padded
from divmerge_core.kernels.expert_cache import log_softmax
from divmerge_core.merging.problem import Batch


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as token numbers; shortened: how many had to lose part of their text to fit."""

    prompts: tuple[tuple[int, ...], ...]
    shortened: int


def ask(
    base: Language,
    prompt: Prompt,
    rows: datasets.Dataset | Sequence[Mapping[str, object]],
    max_length: int,
) -> EncodedPrompts:
    """Every row's prompt in at most `max_length` tokens.

    Of a prompt that is too long, the longer of its texts loses its end, never the question itself.
    Raises ValueError where not even the question without a text fits.
    """
    found, shortened = [], 0
    for row in rows:
        tokens = base.tokenizer(prompt.ask(row))["input_ids"]
        shortened += len(tokens) > max_length
        while len(tokens) > max_length:
            row = truncate(base, prompt, row, len(tokens) - max_length)
            tokens = base.tokenizer(prompt.ask(row))["input_ids"]
        found.append(tuple(tokens))
    return EncodedPrompts(tuple(found), shortened)


def truncate(base: Language, prompt: Prompt, row: Mapping[str, object], excess: int) -> dict:
    """The row with `excess` tokens cut off the longer of its texts."""
    ids = {
        key: base.tokenizer(str(row[key]), add_special_tokens=False)["input_ids"]
        for key in ("text", "pair")
        if row.get(key)
    }
    longest = max(ids, key=lambda key: len(ids[key]), default=None)
    if longest is None:
        raise ValueError(
            f"the prompt of {prompt.task!r} alone is {excess} tokens too long; raise max_length"
        )
    kept = ids[longest][: max(0, len(ids[longest]) - excess)]
    return {**row, longest: base.tokenizer.decode(kept, skip_special_tokens=True).strip()}


def answer_tokens(base: Language, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
    """An answer as tokens, with the EOS that ends it; a longer one is cut and does not end."""
    tokens = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tuple([*tokens, base.stop][:max_tokens])


Pair = tuple[Sequence[int], Sequence[int]]  # a prompt's tokens, an answer's tokens


def collate(base: Language, pairs: Sequence[Pair]) -> tuple[Batch, Int[Tensor, " A"]]:
    """Prompts and their answers in one batch, and the A tokens that its answer positions predict.

    A position predicts the token after it: the last one of the prompt predicts the answer's first
    token, and none predicts what follows the answer. Every row counts alike, and within a row every
    token of its answer. An encoder-decoder reads them apart (see seq2seq). Raises ValueError for an
    empty prompt or answer.
    """
    if not all(prompt and answer for prompt, answer in pairs):
        raise ValueError("every row needs a prompt and an answer of at least one token (EOS)")
    if encodes(base.model):
        return collate_pairs(base, pairs)
    rows = [[*asked, *answered][:-1] for asked, answered in pairs]  # the last token is not read
    ids, mask = padded(base, rows)
    answer = mask.bool()
    for number, (asked, _) in enumerate(pairs):
        answer[number, : len(asked) - 1] = False
    weight, targets = answer_targets(base, [answered for _, answered in pairs])
    return Batch({"input_ids": ids, "attention_mask": mask}, weight, answer), targets


@dataclass(frozen=True)
class MultipleChoiceBatch(Batch):
    """Prompts that are answered by how likely each of C words is after them: logits [B, C].

    A row of the inputs is a prompt with the beginning that some words share, so that words of one
    token need one row together. position, token and slot say, for every token of every word of
    every prompt, at which of the A positions it is predicted, and whose it is: prompt * C + word.
    """

    position: Int[Tensor, " K"] | None = None
    token: Int[Tensor, " K"] | None = None
    slot: Int[Tensor, " K"] | None = None

    def likelihood(self, logits: Float[Tensor, "A V"]) -> Float[Tensor, "B C"]:
        """Log-probability of every word: the sum of its tokens'."""
        given = log_softmax(logits)[self.position, self.token]
        total = given.new_zeros(int(self.slot.max()) + 1).index_add(0, self.slot, given)
        return total.view(len(self.weight), -1)


def choices(
    base: Language, prompts: Sequence[Sequence[int]], words: Sequence[str]
) -> MultipleChoiceBatch:
    """A batch that asks how likely each word, with the space before it, is after each prompt.

    EOS is not part of a word.
    """
    answers = [answer_tokens(base, word)[:-1] for word in words]
    begun = list(dict.fromkeys(answer[:-1] for answer in answers))
    batch, _ = collate(base, [(prompt, (*start, 0)) for prompt in prompts for start in begun])
    places = []
    first = [sum(len(start) + 1 for start in begun[:n]) for n in range(len(begun) + 1)]
    for number in range(len(prompts)):
        for word, answer in enumerate(answers):
            start = number * first[-1] + first[begun.index(answer[:-1])]
            slot = number * len(words) + word
            places += [(start + n, token, slot) for n, token in enumerate(answer)]
    columns = torch.tensor(places, device=base.device).T
    weight = torch.full((len(prompts),), 1 / len(prompts), device=base.device)
    return MultipleChoiceBatch(batch.inputs, weight, batch.answer, None, *columns)


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in groups of like length, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for start in range(0, len(order), size):
        yield order[start : start + size]
