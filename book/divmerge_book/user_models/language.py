"""Language models as experts: what can be checked before weights are read.

kind: language
base: models/smollm2             # folder or hub name (organisation/model@revision)
max_new: 64                      # tokens of an answer
tasks:
  - name: questions
    expert: models/questions     # whole model, PEFT LoRA folder, or our own expert
    merge: data/questions.jsonl  # `prompt`, or chat `messages`; answers are not looked at
    validation: data/qv.jsonl    # with `answer`, or the assistant's last message
    test: data/qt.jsonl
    columns: {prompt: question, answer: reply}
    labels: [yes, no]            # only where no other answers are right
    score: exact                 # likelihood (of labels), exact, or rouge1
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from divmerge_book.models.language.models import MODELS
from divmerge_book.models.language.prompts import Prompt
from divmerge_book.models.mergekit_folders import DECIDING
from divmerge_book.user_models import adapters, folders
from divmerge_book.user_models.data import shared
from divmerge_book.user_models.description import SPLITS, Description, TaskFiles, collect_errors
from divmerge_book.user_models.folders import BaseFolder, Source, bare_model, config_of, shapes_of
from divmerge_book.user_models.headers import check_config, check_headers
from divmerge_book.user_models.hub import fetched
from divmerge_book.user_models.language_rows import answer_notes, load_prompts
from divmerge_book.user_models.language_tokens import Reading, Tokens, agreed, ends_in
from divmerge_core.checkpoints.safetensors_io import StoredModel

OTHERS = {"vocab_size", "max_position_embeddings"}  # may differ: rows of tables are looked at


@dataclass(frozen=True)
class LanguageSource(Source):
    """A language model that fits its base. model: the causal one, on the meta device.

    reading: how it reads its prompts. prompt: its words where the task has labels. score: how its
    answers are scored.
    """

    reading: Reading | None = None
    prompt: Prompt | None = None
    score: str = "rouge1"

    @property
    def prefix(self) -> str:
        """All parameters are merged, under the names that they have."""
        return ""


def kind_of(config: transformers.PretrainedConfig) -> type:
    """The transformers class of a configuration's language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def open_model(who: str, config: transformers.PretrainedConfig) -> nn.Module:
    """A language model without weights. Raises ValueError where the folder holds another kind."""
    check_config(who, config)
    model = bare_model(kind_of(config), config)
    named, own = config.architectures or (), type(model).__name__
    if named and own not in named:
        raise ValueError(
            f"{who} is {', '.join(named)}, not {own}; kind: language merges language models with "
            "their output matrix (classifiers: leave `kind` out)"
        )
    return model


def tables(model: nn.Module) -> set[str]:
    """Names of the parameters with one row per token."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    mine = [tensor for part in parts if part is not None for tensor in part.parameters()]
    return {name for name, t in model.named_parameters() if any(t is one for one in mine)}


def table_rows(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[0]


def check_files(who: str, folder: Path, model: nn.Module) -> list[str]:
    """`check_headers`. Raises ValueError too for tied tensors of which each has numbers of its own.

    Where config.json says that nothing is tied, the model gets a matrix for each: T5's class ties
    them whatever it says, and transformers reads both.
    """
    notes, disk = check_headers(who, folder, model), StoredModel.at(folder)
    prefix, apart = f"{model.base_model_prefix}.", disk.config.get("tie_word_embeddings") is False
    for name, first in adapters.tied(model).items():
        pair = [disk.cores.get(one.removeprefix(prefix)) for one in (name, first)]
        if None in pair or disk.tensors[pair[0]].mapped().equal(disk.tensors[pair[1]].mapped()):
            continue
        if apart:
            owner, _, own = name.rpartition(".")
            matrix = nn.Parameter(torch.empty_like(model.get_parameter(name)))
            setattr(model.get_submodule(owner), own, matrix)
        else:
            raise ValueError(
                f"{who} holds {name} and {first}, which differ, and its config.json says that they "
                "are tied; set tie_word_embeddings to false if the model was trained so"
            )
    return notes


def open_base(description: Description) -> tuple[BaseFolder, nn.Module, list[str]]:
    """The base, its model without weights, and notes."""
    name = description.base
    local = description.path.parent / os.path.expanduser(name)
    if local.is_dir() or name not in MODELS:
        folder = local if local.is_dir() else fetched(name)
    else:
        folder = MODELS[name]()
    config, tokenizer = config_of(folder), folders.tokenizer_of(folder)
    model = open_model(f"base {folder}", config)
    notes = check_files(f"base {folder}", folder, model)
    if tokenizer is None:
        raise ValueError(f"base {folder} has no tokenizer; save the base's own beside its weights")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"base {folder}: its tokenizer has no EOS token; save it with its eos_token"
        )
    return BaseFolder(name, folder, config, tokenizer, shapes_of(model)), model, notes


def open_whole(task: TaskFiles, base: BaseFolder) -> LanguageSource:
    model = open_model(f"expert {task.expert}", config_of(task.expert))
    return LanguageSource(task, "transformers", (), model)


def open_adapter(task: TaskFiles, base: BaseFolder) -> LanguageSource:
    """A LoRA folder; tables that it saved whole may have more rows than the base's."""
    settings = adapters.read_config(task.expert)
    if settings.get("task_type") in ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"):
        raise ValueError(
            f"adapter {task.expert} has task_type {settings['task_type']}; kind: language merges "
            "CAUSAL_LM or SEQ_2_SEQ_LM"
        )
    config = copy.deepcopy(base.config)
    model = bare_model(kind_of(config), config)
    found = adapters.shapes_in(adapters.weights_of(task.expert))
    saved = {adapters.plain_name(key): shape for key, shape in found.items()}
    if rows := {saved[name][0] for name in tables(model) if name in saved}:
        config.vocab_size = rows.pop()
        model = bare_model(kind_of(config), config)
    return LanguageSource(task, "adapter", (), model, adapters.adapter_of(task.expert, model))


def open_package(task: TaskFiles, base: BaseFolder) -> LanguageSource:
    return LanguageSource(task, "package", (), bare_model(kind_of(base.config), base.config))


OPEN = {"adapter": open_adapter, "package": open_package, "transformers": open_whole}


def open_expert(task: TaskFiles, base: BaseFolder) -> tuple[LanguageSource, list[str]]:
    """A task's expert, checked against the base, and notes."""
    kind = folders.kind_in(task.expert)
    source, who = OPEN[kind](task, base), f"expert {task.expert}"
    notes = []
    if kind == "transformers":
        notes = check_files(who, task.expert, source.model)
    elif kind == "adapter":
        parts = (task.expert, source.adapter, source.model)
        notes = adapters.check_base(*parts, base.shapes, base.names)
    for field in DECIDING:
        own, wanted = (getattr(one, field, None) for one in (source.model.config, base.config))
        if field not in OTHERS and own != wanted:
            raise ValueError(
                f"{who} has {field} = {own!r}, the base {base.name!r} has {wanted!r}; merging "
                "needs experts fine-tuned from this very base"
            )
    long, found = tables(source.model), source.shapes
    names = {n for n in found.keys() | base.shapes if found.get(n) != base.shapes.get(n)}
    wrong = sorted(n for n in names if n not in long or found[n][1:] != base.shapes.get(n, ())[1:])
    if wrong:
        shown = ", ".join(f"{n} ({found.get(n)}, base {base.shapes.get(n)})" for n in wrong[:3])
        raise ValueError(
            f"{who} and the base {base.name!r} differ in {len(wrong)} tensors: {shown}; merging "
            "needs experts of one architecture, with the output matrix tied in all or in none"
        )
    return source, notes


def read_rows(
    source: LanguageSource, base: BaseFolder, description: Description
) -> tuple[LanguageSource, dict[str, datasets.Dataset]]:
    """The expert with how it reads its prompts, and the rows of every split."""
    task, who = source.task, f"task {source.task.name!r}"
    own = folders.tokenizer_of(task.expert) or base.tokenizer
    if not own.chat_template:
        own = copy.deepcopy(own)
        own.chat_template = base.tokenizer.chat_template
    if own.eos_token_id is None:
        raise ValueError(f"{who}: its tokenizer has no EOS token, so no answer would ever end")
    if len(own) > (known := table_rows(source.model)):
        raise ValueError(
            f"{who}: its tokenizer knows {len(own)} tokens, its expert has rows for {known}; save "
            "the tokenizer that it was trained with, or its resized embeddings too"
        )
    read = {split: load_prompts(task, split, own) for split in task.files()}
    rows = {split: data for split, (data, _) in read.items()}
    if len(chats := {chat for _, chat in read.values()}) > 1:
        raise ValueError(f"{who}: some of its files hold prompts and others chat messages")
    labels = task.labels or ()
    words = [a for data in rows.values() for a in data.to_dict().get("answer", ())]
    texts = [text for data in rows.values() for text in data["text"]]
    ends = ends_in(task.expert if source.kind == "transformers" else base.folder, own)
    reading = Reading(task.name, own, known, texts, any(chats), (*labels, *words), ends)
    check_prompts(source, reading, base, description)
    prompt = Prompt(task.name, "{text}", tuple(labels))
    own = {"reading": reading, "prompt": prompt, "score": score_of(task), "labels": labels}
    notes = answer_notes(reading, own["score"], labels, description.max_new)
    return replace(source, notes=tuple(notes), **own), rows


def score_of(task: TaskFiles) -> str:
    """How a task's answers are scored. Raises ValueError where that needs, or excludes, labels."""
    score = task.score or ("likelihood" if task.labels else "rouge1")
    if (score == "likelihood" and not task.labels) or (score == "rouge1" and task.labels):
        raise ValueError(
            f"task {task.name!r}: score {score!r} is for tasks "
            f"{'without' if task.labels else 'with'} labels; exact is for both"
        )
    return score


def check_prompts(
    source: LanguageSource, reading: Reading, base: BaseFolder, description: Description
) -> None:
    """Raise ValueError for prompts that are too long, and for those that end before the answer."""
    who, most = f"task {reading.task!r}", description.max_new
    longest = max(map(len, reading.asked), default=1)
    places = getattr(base.config, "max_position_embeddings", None)
    limit = min(places or 10**9, reading.tokenizer.model_max_length)
    if "max_length" in description.model_fields_set and longest > description.max_length:
        raise ValueError(
            f"{who}: its longest prompt has {longest} tokens, max_length is "
            f"{description.max_length}; raise it, or take the row out"
        )
    if longest + most > limit:
        raise ValueError(
            f"{who}: its longest prompt has {longest} tokens, with an answer of {most} (max_new) "
            f"it is more than the {limit} that the model reads; shorten the row, or max_new"
        )
    ends = [ids[-1] == reading.tokenizer.eos_token_id for ids in reading.asked]
    if any(ends) and not base.config.is_encoder_decoder:
        raise ValueError(
            f"{who}: its tokenizer puts {reading.tokenizer.eos_token!r} after prompts, so that "
            "nothing is left to answer; set add_eos_token to false, or mend its chat template"
        )


def checked(
    description: Description,
) -> tuple[BaseFolder, tuple[LanguageSource, ...], Mapping, tuple[str, ...], Tokens]:
    """All that a Plan holds but the description, checked without reading weights.

    Raises ValueError with all problems of the first stage that has any: the base; experts'
    architectures and adapters; rows; splits that share inputs; tokens.
    """
    base, model, notes = open_base(description)
    opened = collect_errors(partial(open_expert, task, base) for task in description.tasks)
    notes += [note for _, own in opened for note in own]
    read = collect_errors(partial(read_rows, source, base, description) for source, _ in opened)
    sources = tuple(source for source, _ in read)
    notes += [note for source in sources for note in source.notes]
    rows = {source.task.name: own for source, own in read}
    notes += sum(collect_errors(partial(shared, *item) for item in rows.items()), [])
    tokens = agreed(base.tokenizer, table_rows(model), [source.reading for source in sources])
    splits = {split: tuple(own.get(split) for own in rows.values()) for split in SPLITS}
    return base, sources, splits, (*notes, *tokens.notes), tokens
