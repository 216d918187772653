"""All that can be checked before weights are loaded: folders, tokenizers, rows and labels."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pandas as pd
import transformers

from divmerge_book.user_models import language
from divmerge_book.user_models.data import load_rows, shared
from divmerge_book.user_models.description import SPLITS, Description, TaskFiles, collect_errors
from divmerge_book.user_models.folders import (
    BaseFolder,
    Source,
    open_base,
    open_expert,
    tokenizer_of,
)
from divmerge_book.user_models.hub import fetched
from divmerge_book.user_models.language_tokens import Tokens
from divmerge_book.user_models.method_needs import check_methods

COMPARED = 50  # texts of every task that both tokenizers must cut up alike
ROLES = tuple(f"{role}_token" for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos"))


@dataclass(frozen=True)
class Plan:
    """A checked description: experts that fit the base, and rows that fit the experts.

    rows: split -> per task its rows, None where it has none. notes: remarks that are no errors.
    tokens: of language models, what their tokenizers agree on.
    """

    description: Description
    base: BaseFolder
    experts: tuple[Source, ...]
    rows: Mapping[str, tuple[datasets.Dataset | None, ...]]
    notes: tuple[str, ...]
    tokens: Tokens | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(source.task.name for source in self.experts)

    def table(self) -> pd.DataFrame:
        """One row per task: its expert's kind, its labels, and how many rows every split has."""
        columns = {
            "expert": [source.kind for source in self.experts],
            "labels": [", ".join(source.labels) for source in self.experts],
            **{split: [len(rows or ()) for rows in own] for split, own in self.rows.items()},
        }
        return pd.DataFrame(columns, index=pd.Index(self.tasks, name="task"))

    def summary(self) -> str:
        """The table and the notes, as commands print them."""
        return "\n".join([self.table().to_string(), *(f"note: {note}" for note in self.notes)])


def found(task: TaskFiles, folder: Path) -> TaskFiles:
    """The task with its expert on this disk: `organisation/name@revision` is fetched from the hub.

    Raises ValueError for the first path that is not there.
    """
    inside = task.expert.is_relative_to(folder) and not task.expert.exists()
    parts = task.expert.relative_to(folder).parts if inside else ()
    if len(parts) == 2 and not (folder / parts[0]).exists():
        task = task.model_copy(update={"expert": fetched("/".join(parts))})
    for field, path in {"expert": task.expert, **task.files()}.items():
        if not path.exists():
            raise ValueError(
                f"task {task.name!r}: {field} names {path}, which does not exist; relative paths "
                "start at the description's own folder"
                + "; write / between folders"
                * ("\\" in str(path))
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
        places.setdefault(own, f"task {task.name!r}")
    return found + [
        f"task {task.name!r} has neither merge nor test rows: how near the merge is to its expert "
        "is not measured"
        for task in description.tasks
        if not {"merge", "test"} & set(task.files())
    ]


def tokenizer_gap(
    base: transformers.PreTrainedTokenizerBase,
    own: transformers.PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> str | None:
    """How an expert's tokenizer differs from the base's; None where it does not.

    Compared are vocabularies, special tokens that both have, and how these texts are cut up.
    """
    ours, theirs = base.get_vocab(), own.get_vocab()
    if moved := sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t)):
        return f"its vocabulary differs from the base's in {len(moved)} tokens, such as {moved[:3]}"
    for role in ROLES:
        wanted, found = getattr(base, role, None), getattr(own, role, None)
        if None not in (wanted, found) and wanted != found:
            return f"its {role.replace('_', ' ')} is {found!r}, the base's {wanted!r}"
    for text in texts:
        if base(text).input_ids != own(text).input_ids:
            return (
                f"its tokenizer cuts up {text[:60]!r} in another way than the base's (lower case? "
                "special tokens?)"
            )
    return None


def own_padding(source: Source, base: BaseFolder, texts: Sequence[str]) -> str | None:
    """The expert's padding token; ValueError where it reads these texts otherwise than the base."""
    own = tokenizer_of(source.task.expert)
    if own and (gap := tokenizer_gap(base.tokenizer, own, texts)):
        raise ValueError(
            f"expert {source.task.expert}: {gap}; merging needs experts that read texts as the "
            "base does"
        )
    return own and own.pad_token


def set_padding(
    base: BaseFolder, experts: Sequence[Source], pads: Sequence[str | None], given: str | None
) -> list[str]:
    """Set the base's tokenizer to the inputs that all models take and the one padding token.

    given: the description's. Returns a note where the base itself names no padding token.
    """
    tokenizer = base.tokenizer
    if given is not None and given not in tokenizer.get_vocab():
        raise ValueError(
            f"pad_token {given!r} is no token of the base {base.name!r}; give one of its own, such "
            f"as {tokenizer.eos_token or tokenizer.unk_token!r}"
        )
    models = [source.model for source in experts if source.model is not None]
    numbers = {model.config.pad_token_id for model in models} - {None}
    used = {tokenizer.pad_token, *pads, given, *map(tokenizer.convert_ids_to_tokens, numbers)}
    if len(used := used - {None}) != 1:
        raise ValueError(
            f"base and experts pad with {sorted(used) or 'nothing'}; one padding token is needed: "
            "name pad_token in the description, or set it in the base's tokenizer, and "
            "pad_token_id in every expert's config.json"
        )
    tokenizer.pad_token, tokenizer.padding_side = used.pop(), "right"
    for model in models:
        model.config.pad_token_id = tokenizer.pad_token_id
        taken = inspect.signature(model.forward).parameters
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n in taken]
    if base.config.pad_token_id is None:
        return [
            f"the base {base.name!r} names no pad_token_id in its config.json, so the merged model "
            f"will name none: set it to {tokenizer.pad_token_id} before it reads batches"
        ]
    return []


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
            found.append(f"{longer} of {len(data)} {split} inputs (up to {max(lengths)})")
    text = f"task {task.name!r}: cut at max_length {limit} tokens are {', '.join(found)}"
    return [text] if found else []


def check(description: Description, methods: Sequence[str] = ()) -> Plan:
    """Everything about a description that can be checked without loading weights.

    methods: those it is to be merged by; what they need is checked too. Raises ValueError with all
    problems of the first stage that has any: methods; paths; the base; experts' architectures,
    labels and adapters; rows; splits that share inputs; tokenizers.
    """
    names = [task.name for task in description.tasks]
    lacking = {s: [t.name for t in description.tasks if s not in t.files()] for s in SPLITS}
    if methods:
        check_methods(methods, names, lacking)
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
    loaded = collect_errors(
        partial(load_rows, source.task, split, source.labels, base.tokenizer)
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
        notes += cut_note(source.task, rows[source.task.name], base, description.max_length)
    pads = collect_errors(
        partial(
            own_padding,
            source,
            base,
            [t for own in rows[source.task.name].values() for t in own["text"]][:COMPARED],
        )
        for source in experts
    )
    notes += set_padding(base, experts, pads, description.pad_token)
    for (source, split), (data, _) in zip(jobs, loaded, strict=True):
        present = set(range(len(source.labels))) if split == "merge" else set(data["label"])
        if absent := [label for n, label in enumerate(source.labels) if n not in present]:
            absent = ", ".join(absent)
            notes.append(f"task {source.task.name!r}: no {split} row has the label {absent}")
    splits = {split: tuple(own.get(split) for own in rows.values()) for split in SPLITS}
    return Plan(description, base, experts, splits, tuple(notes))
