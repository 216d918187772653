"""Tokens of a base and of experts that added or renamed some: one table of rows for them all.

A row that all of them know by one name is merged. A row that one expert added, or took for a token
of its own, stays that expert's. A number that two tasks use for different tokens is refused.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from divmerge_book.user_models.headers import GENERATION
from divmerge_core.checkpoints.safetensors_io import read_config

COMPARED = 50  # texts of every task that the written tokenizer must cut up as the expert's does
SAMPLE = ["Which of these 12 words, if any, ends here?\n"]  # stands for texts where there are none


@dataclass(frozen=True)
class Reading:
    """How one expert reads and ends texts.

    rows: of its token tables. prompts: its prompts as texts, chat: whether a chat template wrote
    them, special tokens included. said: answers that are scored. ends: tokens beside EOS that end
    its answers.
    """

    task: str
    tokenizer: PreTrainedTokenizerBase
    rows: int
    prompts: Sequence[str]
    chat: bool = False
    said: Sequence[str] = ()
    ends: tuple[int, ...] = ()

    @property
    def stops(self) -> tuple[int, ...]:
        """All tokens that end its answers, EOS first."""
        return (self.tokenizer.eos_token_id, *self.ends)

    def cut(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
        """Prompts as token numbers, by any tokenizer."""
        if not texts:
            return []
        return tokenizer(list(texts), add_special_tokens=not self.chat)["input_ids"]

    @cached_property
    def asked(self) -> list[list[int]]:
        """Its prompts as the token numbers that it reads."""
        return self.cut(self.tokenizer, self.prompts)

    @cached_property
    def names(self) -> dict[int, str]:
        """Number -> token."""
        return {number: token for token, number in self.tokenizer.get_vocab().items()}

    def used(self, base: Mapping[int, str]) -> set[int]:
        """Numbers of the tokens in its texts; without texts, of all that the base has not."""
        known = {*self.stops} - {None}
        if not self.prompts:
            return known | {n for n, token in self.names.items() if base.get(n) != token}
        answers = self.tokenizer(list(self.said) or [""], add_special_tokens=False)["input_ids"]
        return known.union(*self.asked, *answers)


def ends_in(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens beside EOS that end answers, by a folder's settings of generation or of its model."""
    names = (name for name in (GENERATION, "config.json") if (folder / name).is_file())
    read = (read_config(folder, name) for name in names)
    said = next((one for own in read if (one := own.get("eos_token_id")) is not None), [])
    known = {*tokenizer.get_vocab().values()} - {tokenizer.eos_token_id}
    every = said if isinstance(said, list) else [said]
    return tuple(dict.fromkeys(number for number in every if number in known))


@dataclass(frozen=True)
class Tokens:
    """What base and experts agree on.

    rows: of the merged tables. owners: number of a row -> the experts (by place) whose it is.
    tokenizer: reads every task's texts as its expert does. stops: tokens that end answers.
    """

    rows: int
    owners: Mapping[int, tuple[int, ...]]
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    templates: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def added(self, place: int) -> list[str]:
        """Tokens whose rows are this expert's own, alone or with others."""
        mine = sorted(number for number, places in self.owners.items() if place in places)
        return self.tokenizer.convert_ids_to_tokens(mine)


def agreed(base: PreTrainedTokenizerBase, rows: int, experts: Sequence[Reading]) -> Tokens:
    """One table of tokens and one tokenizer for the base (with so many rows) and its experts.

    Raises ValueError, naming the token, where one number means different tokens in texts of two
    tasks, where an expert has moved a token of the base that its texts use, and where no one
    tokenizer reads all tasks' texts as their experts do.
    """
    ours = {number: token for token, number in base.get_vocab().items()}
    claims = claimed(base, ours, experts)
    owners, notes = owned(ours, claims, experts)
    mine = {number: experts[places[0]].names[number] for number, places in owners.items()}
    written = holding(base, experts, claims | mine)
    for one in experts:
        few = list(one.prompts[:COMPARED]) or SAMPLE
        for text in few:
            if one.cut(one.tokenizer, [text]) != one.cut(written, [text]):
                raise ValueError(
                    f"task {one.task!r}: its expert's tokenizer cuts up {text[:60]!r} in another "
                    "way than the one that holds all tokens, so the merged model would not read it "
                    "as the expert does; save the expert with the base's tokenizer and its own "
                    "added tokens"
                )
    stops = tuple(dict.fromkeys(stop for one in experts for stop in one.stops))
    if len(stops) > 1:
        words = [(e.task, " or ".join(repr(e.names[stop]) for stop in e.stops)) for e in experts]
        ends = ", ".join(map(" with ".join, words))
        notes.append(f"answers end at several tokens: {ends}; the merged model stops at any")
    templates = {one.task: main_template(one.tokenizer) for one in experts}
    templates = {task: text for task, text in templates.items() if text}
    if len(set(templates.values())) > 1:
        notes.append(
            f"chat templates differ: the default is that of {next(iter(templates))!r}, and each "
            "task's is written under its name"
        )
    rows, written = max(rows, *(one.rows for one in experts)), finished(written, experts, templates)
    return Tokens(rows, owners, written, stops, templates, tuple(notes))


def claimed(
    base: PreTrainedTokenizerBase, ours: Mapping[int, str], experts: Sequence[Reading]
) -> dict[int, str]:
    """Number -> token, of all that the tasks' texts use."""
    places, claims = base.get_vocab(), {}
    for one in experts:
        for number in sorted(one.used(ours)):
            token = one.names.get(number)
            if ours.get(number) != token and token in places:
                raise ValueError(
                    f"task {one.task!r}: {token!r} is token {number} of its expert and token "
                    f"{places[token]} of the base, and its texts use it; merging needs experts "
                    "fine-tuned from this very base"
                )
            before, task = claims.setdefault(number, (token, one.task))
            if before != token:
                raise ValueError(
                    f"token {number} is {before!r} for task {task!r} and {token!r} for task "
                    f"{one.task!r}, and texts of both use it; one row cannot be both: train one of "
                    "the two with another token"
                )
    return {number: token for number, (token, _) in claims.items()}


def owned(
    ours: Mapping[int, str], claims: Mapping[int, str], experts: Sequence[Reading]
) -> tuple[dict[int, tuple[int, ...]], list[str]]:
    """Row -> the experts that it stays with, and notes on them."""
    others: dict[int, dict[str, list[int]]] = {}
    for place, one in enumerate(experts):
        for number, token in one.names.items():
            if token != ours.get(number) and claims.get(number, token) == token:
                others.setdefault(number, {}).setdefault(token, []).append(place)
    lone = {n: tokens for n, tokens in sorted(others.items()) if len(tokens) == 1}
    owners = {n: tuple(*tokens.values()) for n, tokens in lone.items()}
    notes = []
    for place, one in enumerate(experts):
        mine = [one.names[number] for number, places in owners.items() if place in places]
        if mine:
            shown = ", ".join(mine[:5]) + (", ..." if len(mine) > 5 else "")
            notes.append(
                f"task {one.task!r}: its expert added or renamed {len(mine)} tokens ({shown}); "
                "their rows are its own in the merged model"
            )
    if unnamed := sorted(number for number, tokens in others.items() if len(tokens) > 1):
        notes.append(
            f"tokens {', '.join(map(str, unnamed[:5]))} have other names in one expert than in "
            "another; no text of the tasks uses them, and they keep the base's"
        )
    return owners, notes


def holding(
    base: PreTrainedTokenizerBase, experts: Sequence[Reading], wanted: Mapping[int, str]
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that knows most tokens and reads as most experts, with the others."""

    def lacking(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        own = tokenizer.get_vocab()
        return {n: token for n, token in sorted(wanted.items()) if own.get(token) != n}

    def misread(tokenizer: PreTrainedTokenizerBase) -> int:
        every = ((one, list(one.prompts[:1]) or SAMPLE) for one in experts)
        return sum(one.cut(tokenizer, few) != one.cut(one.tokenizer, few) for one, few in every)

    every = [base, *(one.tokenizer for one in experts)]
    found = copy.deepcopy(min(every, key=lambda own: (len(lacking(own)), misread(own))))
    for number, token in lacking(found).items():
        special = any(token in one.tokenizer.all_special_tokens for one in experts)
        found.add_tokens([AddedToken(token, special=special, normalized=False)])
        if found.convert_tokens_to_ids(token) != number:
            raise ValueError(
                f"no one tokenizer can hold {token!r} as token {number} beside the tokens of the "
                "other experts; train the experts with the same added tokens"
            )
    return found


def finished(
    written: PreTrainedTokenizerBase, experts: Sequence[Reading], templates: Mapping[str, str]
) -> PreTrainedTokenizerBase:
    """The tokenizer with the experts' end of an answer, and their chat templates."""
    written.eos_token = experts[0].tokenizer.eos_token
    every = [one.tokenizer.chat_template for one in experts]
    named = {name: text for own in every if isinstance(own, dict) for name, text in own.items()}
    named |= templates if len(set(templates.values())) > 1 else {}
    first = next(iter(templates.values()), None)
    written.chat_template = {**named, **({"default": first} if first else {})} if named else first
    return written


def main_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a tokenizer uses where none of several is asked for by name."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found
