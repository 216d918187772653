"""The file that describes a user's own models and texts, as a pydantic schema."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PrivateAttr, StringConstraints, model_validator

from divmerge_book.data.schema import Fields, FilePath, at_home, read_file
from divmerge_core.merging.task_vectors import STORAGES

SPLITS = ("merge", "validation", "test")
# Fields that one kind of description has and the other has not.
ONLY = {
    "classifier": {"pad_token", "text", "pair", "label"},
    "language": {"max_new", "score", "prompt", "messages", "answer"},
}


def file_name(name: str) -> str:
    """A task's name, which stands in names of files and of columns."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"use letters, digits, '_', '-' and '.', no spaces; got {str(name)!r}")
    if name.lower() in ("all", "base"):
        raise ValueError(
            "tables call the mean over tasks 'all', and cards the base 'base'; give the task "
            "another name"
        )
    return name


def distinct(labels: list[str]) -> tuple[str, ...]:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"must be two or more distinct texts, got {labels}")
    return tuple(labels)


Word = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class Columns(Fields):
    """Names of columns; pair is None for single texts, messages for prompts that are plain text."""

    text: Word = "text"
    pair: Word | None = None
    label: Word = "label"
    prompt: Word = "prompt"
    messages: Word | None = None
    answer: Word = "answer"


class TaskFiles(Fields):
    """One task: where its expert and its rows are, and how to read them.

    merge: None for methods that read no inputs. labels: in the order of the model's outputs; None
    takes them from the expert. Of a language model: the answers that are allowed; None where any
    text is. score: how answers are scored; None is the likelihood of labels, and ROUGE-1 of free
    text.
    """

    name: Annotated[str, AfterValidator(file_name)]
    expert: FilePath
    merge: FilePath | None = None
    validation: FilePath | None = None
    test: FilePath | None = None
    columns: Columns = Columns()
    labels: Annotated[list[Word], AfterValidator(distinct)] | None = None
    score: Literal["likelihood", "exact", "rouge1"] | None = None

    def files(self) -> dict[str, Path]:
        """Split -> path, for the splits that are described."""
        return {split: path for split in SPLITS if (path := getattr(self, split)) is not None}


def distinct_names(tasks: list[TaskFiles]) -> tuple[TaskFiles, ...]:
    if len(tasks) < 2:
        raise ValueError(f"must be a list of two tasks or more, got {len(tasks)}")
    ((name, count),) = Counter(task.name.lower() for task in tasks).most_common(1)
    if count > 1:
        raise ValueError(f"two tasks have the name {name!r}; names differ in more than case")
    return tuple(tasks)


class Description(Fields):
    """What the models are, base, tasks, and the number of tokens at which inputs are cut.

    pad_token: pads batches where neither base nor experts name one, as with GPT-2. max_new: tokens
    of a language model's answers. storage: how task vectors are kept in memory; low_rank keeps the
    factors of LoRA adapters. Raises ValueError for fields of the other kind.
    """

    kind: Literal["classifier", "language"] = "classifier"
    base: Annotated[Word, AfterValidator(lambda name: at_home(Path(name)) and name)]
    tasks: Annotated[list[TaskFiles], AfterValidator(distinct_names)]
    max_length: Annotated[int, Field(ge=2)] = 128
    max_new: Annotated[int, Field(ge=1)] = 64
    pad_token: Word | None = None
    storage: Literal[(*STORAGES, "low_rank")] = "float32"
    _path: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def one_kind(self) -> "Description":
        """The description itself, where every field that it has is one of its kind's."""
        parts = (self, *self.tasks, *(task.columns for task in self.tasks))
        given = set().union(*(part.model_fields_set for part in parts))
        for kind, own in ONLY.items():
            if kind != self.kind and (strange := sorted(given & own)):
                raise ValueError(
                    f"{', '.join(strange)}: only for kind: {kind}, and this is kind: {self.kind}"
                )
        return self

    @property
    def path(self) -> Path:
        """The file itself."""
        return self._path


def locate(path: str | os.PathLike) -> Path:
    """A reader's file: from here, from where the command was typed, or from one folder up.

    A notebook runs in its own folder, so a relative path may mean any of these. Raises ValueError
    that lists the places looked at.
    """
    places = [Path.cwd(), Path(os.environ.get("PWD", ".")), Path.cwd().parent]
    looked = list(dict.fromkeys((place / Path(path).expanduser()).resolve() for place in places))
    for candidate in looked:
        if candidate.is_file():
            return candidate
    raise ValueError(f"there is no file {str(path)!r}; looked at {', '.join(map(str, looked))}")


def read(path: str | os.PathLike) -> Description:
    """The description in a YAML or JSON file; no other file is read.

    Raises ValueError, with file and line, for unknown, missing or repeated fields, values of the
    wrong type, fewer than two tasks, and two tasks of one name.
    """
    found = read_file(path, Description, "description")
    found._path = Path(path)
    return found


def collect_errors(checks: Iterable[Callable[[], object]]) -> list:
    """Every check's result; where some raise ValueError, one error with all messages."""
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except ValueError as error:
            problems.append(str(error))
    if problems:
        head = [f"{len(problems)} problems:"] if len(problems) > 1 else []
        raise ValueError("\n".join([*head, *(f"{'- ' * len(head)}{p}" for p in problems)]))
    return results
