"""T5's experts and their data: hub names or folders, and how a row becomes prompt and answer.

The paper names four tasks and says that its experts are public; which ones is not known. The
defaults are public experts that fit; all identifiers, and the columns of the data, are arguments.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets

from divmerge_book.data.code_digest import code_digest, key_of
from divmerge_book.data.glue import files_digest, hub_revision, quiet
from divmerge_book.data.splits import Splits, split_rows
from divmerge_book.data.tasks import Task

QUESTION = "question: {text}  context: {pair}"
MOST = 5000  # rows of a file that are looked at: more than the splits can take


@dataclass(frozen=True)
class PublishedTask:
    """A task's expert and data, by hub names or folders, and how a row becomes prompt and answer.

    text, pair and answer are formats over the data set's columns: names of classes stand for their
    numbers, lists of words are joined, and `choice` is the text of the choice that `answerKey`
    names. template: what the expert was trained to read, over {text} and {pair}. says: what it was
    trained to write in place of an answer. config: of a data set that has several.
    """

    expert: str
    data: str
    text: str
    answer: str
    pair: str | None = None
    template: str = "{text}"
    says: Mapping[str, str] = field(default_factory=dict)
    config: str | None = None

    @property
    def folder(self) -> Path | None:
        """The data's folder; None where they are on the hub."""
        folder = Path(self.data).expanduser()
        return folder if folder.is_dir() else None


HUB = "mrm8488/t5-base-finetuned-"
IMDB, QASC, SQUAD = "stanfordnlp/imdb", "allenai/qasc", "rajpurkar/squad"
MOODS = {"neg": "negative", "pos": "positive"}
FACTS = {"pair": "{fact1} {fact2}", "template": QUESTION}
CONTEXT = {"pair": "{context}", "template": QUESTION}
SOURCES = {
    "imdb": PublishedTask(f"{HUB}imdb-sentiment", IMDB, "{text}", "{label}", says=MOODS),
    "qasc": PublishedTask(f"{HUB}qasc", QASC, "{formatted_question}", "{choice}", **FACTS),
    "squad": PublishedTask(f"{HUB}squadv2", SQUAD, "{question}", "{answers[text][0]}", **CONTEXT),
    "common_gen": PublishedTask(f"{HUB}common_gen", "allenai/common_gen", "{concepts}", "{target}"),
}


def distinct_tasks(suite: str, tasks: Sequence[str], known: Collection[str]) -> list[str]:
    """The tasks. Raises ValueError for fewer than two, unknown ones, and repeated ones."""
    if len(tasks) < 2 or len(set(tasks)) < len(tasks) or not set(tasks) <= set(known):
        raise ValueError(
            f"{suite} merges two or more distinct tasks of {', '.join(known)}; got {list(tasks)}"
        )
    return list(tasks)


def tables(name: str, source: PublishedTask) -> Mapping[str, datasets.Dataset]:
    """The data set's splits, from a folder in the hub's layout or from the hub."""
    revision = None if source.folder else hub_revision(source.data)
    place = str(source.folder or source.data)
    try:
        with quiet():
            return datasets.load_dataset(place, source.config, revision=revision)
    except Exception as error:  # the libraries below raise many kinds, none of them a user's
        raise ValueError(
            f"cannot read the data of {name!r} from {source.data!r}: {error}. Give a folder with "
            "train-*.parquet and validation-*.parquet (or test-*.parquet), or run where "
            "huggingface.co can be reached"
        ) from error


def plain(row: Mapping[str, object], features: datasets.Features) -> dict[str, object]:
    """A row whose columns can stand in a text."""
    found = dict(row)
    for name, value in row.items():
        if isinstance(features[name], datasets.ClassLabel) and value is not None and value >= 0:
            found[name] = features[name].int2str(value)
        elif isinstance(value, list) and all(isinstance(word, str) for word in value):
            found[name] = " ".join(value)
    if choices := row.get("choices"):
        right = dict(zip(choices["label"], choices["text"], strict=True))
        found["choice"] = right.get(row.get("answerKey"), "")  # a test row hides its key
    return found


def rows_of(name: str, source: PublishedTask, table: datasets.Dataset) -> list[tuple]:
    """(text, second text or None, answer) of the rows that have an answer, each text once.

    Of several answers to one text (CommonGen's) the first is kept. Raises ValueError for formats
    that name columns which the data set does not have.
    """
    found: dict[tuple, tuple] = {}
    for row in table.shuffle(seed=0).select(range(min(MOST, len(table)))):
        columns = plain(row, table.features)
        try:
            text = source.text.format(**columns).strip()
            pair = None if source.pair is None else source.pair.format(**columns).strip()
            answer = answer_in(source, columns)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"the data of {name!r} has no column {error} for {source.text!r}, {source.pair!r} "
                f"and {source.answer!r}; it has {', '.join(table.column_names)}"
            ) from error
        if text and answer:
            found.setdefault((text, pair), (text, pair, answer))
    return list(found.values())


def answer_in(source: PublishedTask, columns: Mapping[str, object]) -> str:
    """A row's answer in the expert's words, empty where it has none."""
    try:
        answer = source.answer.format(**columns).strip()
    except IndexError:  # an empty list of answers
        return ""
    return source.says.get(answer, answer)


def splits_of(name: str, source: PublishedTask) -> Splits:
    """Our splits: test from the validation file (from a test file with answers where there is
    none), the others from train."""
    found = {split: rows_of(name, source, table) for split, table in tables(name, source).items()}
    return split_rows(found.get("train", []), found.get("validation") or found.get("test", []))


def task_of(name: str, source: PublishedTask) -> Task:
    """A free-form task; its splits are cached by what they are made from."""

    def origin() -> str:
        held = files_digest(source.folder) if source.folder else hub_revision(source.data)
        return key_of(code_digest(splits_of), source, held)

    read = partial(splits_of, name, source)
    return Task(name, "generation", (), source.pair is not None, source.data, read, origin)
