"""All that can be checked before weights are loaded: folders, tokenizers, rows and labels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import pandas as pd

from divmerge_book.models.mergekit_folders import copies
from divmerge_book.planning.memory import Plan as MemoryPlan
from divmerge_book.user_models import language
from divmerge_book.user_models.data import load_rows, shared
from divmerge_book.user_models.description import SPLITS, Description, TaskFiles, collect_errors
from divmerge_book.user_models.folders import BaseFolder, Source, open_base, open_expert
from divmerge_book.user_models.hub import HUB_NAME, fetched
from divmerge_book.user_models.labels import unnamed
from divmerge_book.user_models.language_tokens import Tokens
from divmerge_book.user_models.method_needs import check_methods
from divmerge_book.user_models.vocabulary import Vocabulary, agreed_words, set_padding


@dataclass(frozen=True)
class Plan:
    """A checked description: experts that fit the base, and rows that fit the experts.

    rows: split -> per task its rows, None where it has none. notes: remarks that are no errors.
    tokens, vocabulary: what tokenizers of language models, or of classifiers, agree on. place, once
    methods are known: where they are merged; memory: what that needs, for one moment or two.
    """

    description: Description
    base: BaseFolder
    experts: tuple[Source, ...]
    rows: Mapping[str, tuple[datasets.Dataset | None, ...]]
    notes: tuple[str, ...]
    tokens: Tokens | None = None
    vocabulary: Vocabulary | None = None
    place: str = ""
    memory: tuple[MemoryPlan, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(source.task.name for source in self.experts)

    @property
    def portable(self) -> dict[str, object]:
        """What a card says of the base, and notes: without the places of folders on this disk."""
        base, tasks = self.base.folder, [source.task for source in self.experts]
        paths = [base, *(path for t in tasks for path in (t.expert, *t.files().values()))]
        names = {path: public_name(path) for path in paths}
        if not (self.description.path.parent / Path(self.base.name).expanduser()).is_dir():
            names[base] = self.base.name
        notes = self.notes
        known = {str(p): name for path, name in names.items() for p in (path, path.resolve())}
        for path in sorted(known, key=len, reverse=True):  # a file before its folder
            notes = tuple(note.replace(path, known[path]) for note in notes)
        return {"base_name": names[base], "notes": notes}

    def table(self) -> pd.DataFrame:
        """One row per task: its expert's kind, its labels, and how many rows every split has."""
        columns = {
            "expert": [source.kind for source in self.experts],
            "labels": [", ".join(source.labels) for source in self.experts],
            **{split: [len(rows or ()) for rows in own] for split, own in self.rows.items()},
        }
        return pd.DataFrame(columns, index=pd.Index(self.tasks, name="task"))

    def summary(self) -> str:
        """The table, the notes and the memory, as commands print them."""
        said = [self.table().to_string(), *(f"note: {note}" for note in self.notes)]
        return "\n".join([*said, *([self.place] if self.place else []), *map(str, self.memory)])


def public_name(path: Path) -> str:
    """A file's or folder's own name; of a model in the hub's cache, the hub's."""
    cached = re.fullmatch(r"models--(.+)", path.parent.parent.name)
    if cached and path.parent.name == "snapshots":
        return cached[1].replace("--", "/")
    return path.name


HINTS = {  # on a path that does not exist, by what it contains
    "\\": "; write / between folders",
    "$": "; variables of the shell are not replaced: write the folder out",
    ":/": "; it is an address: give a folder, or a model of the hub as organisation/name",
}


def found(task: TaskFiles, folder: Path) -> TaskFiles:
    """The task with its expert on this disk: `organisation/name@revision` is fetched from the hub.

    Raises ValueError for the first path that is not there.
    """
    inside = task.expert.is_relative_to(folder) and not task.expert.exists()
    name = task.expert.relative_to(folder).as_posix() if inside else ""
    if HUB_NAME.fullmatch(name) and not (folder / name).parent.exists():
        task = task.model_copy(update={"expert": fetched(name)})
    for field, path in {"expert": task.expert, **task.files()}.items():
        if not path.exists():
            hint = next((words for mark, words in HINTS.items() if mark in str(path)), "")
            raise ValueError(
                f"task {task.name!r}: {field} names {path}, which does not exist; relative paths "
                f"start at the description's own folder{hint}"
            )
    return task


def remarks(description: Description) -> list[str]:
    """Notes on tasks that share one expert, or have the base for one, and on tasks without rows."""
    base = (description.path.parent / Path(description.base).expanduser()).resolve()
    places, found = {base: "the base"}, []
    for task in description.tasks:
        own = task.expert.resolve()
        if own in places:
            found.append(f"task {task.name!r} and {places[own]} have the same folder, {own}")
        elif twin := next((place for place in places if copies(own, place)), None):
            found.append(f"task {task.name!r} and {places[twin]} have equal weights, {own}, {twin}")
        places.setdefault(own, f"task {task.name!r}")
    return found + [
        f"task {task.name!r} has neither merge nor test rows: how near the merge is to its expert "
        "is not measured"
        for task in description.tasks
        if not {"merge", "test"} & set(task.files())
    ]


def order_remark(source: Source) -> list[str]:
    """A note where nothing can tell whether a description's labels are in the outputs' order."""
    named = source.model is not None and source.kind == "transformers"
    if source.task.labels is None or "test" in source.task.files() or source.kind == "package":
        return []
    if named and not unnamed(list(map(str, source.model.config.id2label.values()))):
        return []
    return [
        f"task {source.task.name!r}: its outputs have no names, and without test rows nothing "
        f"shows that they are {', '.join(source.labels)} in this order"
    ]


def check_length(description: Description, base: BaseFolder) -> None:
    """Raise ValueError where inputs have more tokens than the model has positions, or no room."""
    own, given = base.tokenizer.model_max_length, description.max_length
    limit, pair = min(base.positions or own, own), any(t.columns.pair for t in description.tasks)
    least = base.tokenizer.num_special_tokens_to_add(pair=pair) + 1 + pair
    if not least <= given <= limit:
        raise ValueError(
            f"{description.path}: max_length is {given}, and inputs of the base {base.name!r} have "
            f"{least} (with its special tokens) to {limit} tokens; set max_length to one of these"
        )


def cut_note(
    task: TaskFiles, rows: Mapping[str, datasets.Dataset], base: BaseFolder, limit: int
) -> list[str]:
    """A note where inputs of a task have more tokens than are read."""
    found = []
    for split, data in rows.items():
        columns = [list(data[name]) for name in ("text", "pair") if name in data.column_names]
        lengths = list(map(len, base.tokenizer(*columns, verbose=False)["input_ids"]))
        if longer := sum(length > limit for length in lengths):
            found.append(f"{longer} of {len(data)} {split} inputs (up to {max(lengths)} tokens)")
    text = f"task {task.name!r}: max_length {limit} shortens {', '.join(found)}"
    return [text] if found else []


def inspected(
    description: Description, methods: Sequence[str], options: Mapping[str, object]
) -> Plan:
    """The plan without its memory; see `check`, which says what is refused."""
    names = [task.name for task in description.tasks]
    lacking = {s: [t.name for t in description.tasks if s not in t.files()] for s in SPLITS}
    if methods:
        check_methods(methods, names, lacking, options)
    folder = description.path.parent
    tasks = collect_errors(partial(found, task, folder) for task in description.tasks)
    description = description.model_copy(update={"tasks": tuple(tasks)})
    if description.kind == "language":
        *parts, notes, tokens = language.checked(description)
        return Plan(description, *parts, (*remarks(description), *notes), tokens)
    base = open_base(description.base, folder)
    check_length(description, base)
    experts = tuple(collect_errors(partial(open_expert, task, base) for task in description.tasks))
    jobs = [(source, split) for source in experts for split in source.task.files()]
    end = base.config.eos_token_id if base.config.is_encoder_decoder else None
    loaded = collect_errors(
        partial(load_rows, source.task, split, source.labels, base.tokenizer, end)
        for source, split in jobs
    )
    rows: dict[str, dict[str, datasets.Dataset]] = {source.task.name: {} for source in experts}
    notes = remarks(description)
    notes += [*base.notes, *(note for source in experts for note in source.notes)]
    for (source, split), (data, said) in zip(jobs, loaded, strict=True):
        rows[source.task.name][split] = data
        notes += said
    notes += sum(collect_errors(partial(shared, *item) for item in rows.items()), [])
    for source in experts:
        notes += order_remark(source)
        notes += cut_note(source.task, rows[source.task.name], base, description.max_length)
    every = [[t for own in rows[one.task.name].values() for t in own["text"]] for one in experts]
    vocabulary = agreed_words(base, experts, every)
    base = replace(base, tokenizer=vocabulary.tokenizer)
    notes += [*vocabulary.notes]
    notes += set_padding(base, experts, vocabulary.pads, description.pad_token)
    for (source, split), (data, _) in zip(jobs, loaded, strict=True):
        present = set(range(len(source.labels))) if split == "merge" else set(data["label"])
        if absent := [label for n, label in enumerate(source.labels) if n not in present]:
            absent = ", ".join(absent)
            notes.append(f"task {source.task.name!r}: no {split} row has the label {absent}")
    splits = {split: tuple(own.get(split) for own in rows.values()) for split in SPLITS}
    return Plan(description, base, experts, splits, tuple(notes), vocabulary=vocabulary)
