"""The file that describes a reader's own models and texts: read strictly, every error with a line.

Scalars are taken as they are written, so that `labels: [no, yes]` are two words and not two truth
values.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

TOP = ("base", "max_length", "tasks", "pad_token")
TASK = ("name", "expert", "merge", "validation", "test", "columns", "labels")
COLUMNS = ("text", "pair", "label")
SPLITS = ("merge", "validation", "test")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # it names files and columns of tables


@dataclass(frozen=True)
class TaskFiles:
    """One task as described: where its expert and its rows lie, and how to read them.

    text, pair and label name columns; pair None means single texts. labels are in the order of
    the model's outputs; None takes them from the expert.
    """

    name: str
    expert: Path
    merge: Path
    validation: Path | None = None
    test: Path | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None

    def files(self) -> dict[str, Path]:
        """Split -> path, for the splits that are described."""
        every = {split: getattr(self, split) for split in SPLITS}
        return {split: path for split, path in every.items() if path is not None}


@dataclass(frozen=True)
class Description:
    """Base, tasks, and the number of tokens at which inputs are cut.

    pad_token: what batches are padded with where neither base nor experts name it, as with GPT-2.
    """

    path: Path
    base: str
    tasks: tuple[TaskFiles, ...]
    max_length: int = 128
    pad_token: str | None = None


def locate(path: str | os.PathLike) -> Path:
    """The description file: from here, from where the command was typed, or from one folder up.

    A notebook runs in its own folder, so a relative path may mean any of these. Raises ValueError
    that lists the places looked at.
    """
    places = [Path.cwd(), Path(os.environ.get("PWD", ".")).resolve(), Path.cwd().parent]
    found = [(place / Path(path).expanduser()).resolve() for place in dict.fromkeys(places)]
    for candidate in found:
        if candidate.is_file():
            return candidate
    looked = ", ".join(dict.fromkeys(map(str, found)))
    raise ValueError(f"there is no description {str(path)!r}; looked at {looked}")


class Reader:
    """The nodes of one description, with errors that say file and line."""

    def __init__(self, path: Path, *, top: Iterable[str] = TOP):
        self.path, self.top = path, top

    def error(self, node: yaml.Node, text: str) -> ValueError:
        return ValueError(f"{self.path}, line {node.start_mark.line + 1}: {text}")

    def tree(self) -> yaml.Node:
        """The whole file as a tree of nodes; JSON where the name ends so, else YAML."""
        kinds = (".yaml", ".yml", ".json")
        if self.path.suffix not in kinds:
            raise ValueError(f"{self.path}: a description ends in {', '.join(kinds)}")
        try:
            text = self.path.read_text("utf-8")
            if self.path.suffix == ".json":
                json.loads(text)
                text = text.replace("\t", " ")  # JSON may indent with tabs, YAML may not
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {error.lineno}: {error.msg}") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ValueError(f"{self.path}, line {line}: {error.problem}") from error
        if node is None:
            raise ValueError(f"{self.path} is empty; it needs the fields {', '.join(self.top)}")
        return node

    def fields(self, node: yaml.Node, allowed: Iterable[str], what: str) -> dict[str, yaml.Node]:
        """A mapping's entries; null ones are left out. Unknown and repeated fields are refused."""
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what} must be fields with values: {', '.join(allowed)}")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if key.value not in allowed:
                near = difflib.get_close_matches(str(key.value), allowed, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise self.error(
                    key,
                    f"unknown field {key.value!r} in {what}; allowed: {', '.join(allowed)}{hint}",
                )
            if key.value in found:
                raise self.error(key, f"field {key.value!r} stands twice in {what}")
            found[key.value] = value
        return {key: n for key, n in found.items() if n.tag != "tag:yaml.org,2002:null"}

    def need(self, node: yaml.Node, fields: Iterable[str], found: dict, what: str) -> None:
        missing = [field for field in fields if field not in found]
        if missing:
            raise self.error(node, f"{what} lacks {', '.join(missing)}")

    def word(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            raise self.error(node, f"{what} must be one non-empty text")
        return node.value.strip()

    def words(self, node: yaml.Node, what: str) -> tuple[str, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(node, f"{what} must be a list")
        found = tuple(self.word(item, f"an entry of {what}") for item in node.value)
        if len(found) < 2 or len(set(found)) < len(found):
            raise self.error(node, f"{what} must be two or more distinct texts, got {list(found)}")
        return found

    def count(self, node: yaml.Node, what: str) -> int:
        text = self.word(node, what)
        if not text.isdecimal() or int(text) < 2:
            raise self.error(node, f"{what} must be a whole number of 2 or more, got {text!r}")
        return int(text)


def task_files(reader: Reader, node: yaml.Node, number: int) -> TaskFiles:
    """One entry of `tasks`."""
    what = f"task {number}"
    found = reader.fields(node, TASK, what)
    reader.need(node, ("name", "expert", "merge"), found, what)
    name = reader.word(found["name"], f"name of {what}")
    if not NAME.fullmatch(name):
        raise reader.error(
            found["name"],
            f"name {name!r} names a file: use letters, digits, '_', '-' and '.', no spaces",
        )
    what = f"task {name!r}"
    columns = (
        reader.fields(found["columns"], COLUMNS, f"columns of {what}")
        if ("columns" in found)
        else {}
    )
    folder = reader.path.parent
    paths = {
        field: folder / Path(reader.word(found[field], f"{field} of {what}")).expanduser()
        for field in ("expert", *SPLITS)
        if field in found
    }
    named = {key: reader.word(value, f"column {key} of {what}") for key, value in columns.items()}
    labels = reader.words(found["labels"], f"labels of {what}") if "labels" in found else None
    return TaskFiles(name, labels=labels, **paths, **named)


def read(path: str | os.PathLike) -> Description:
    """The description in a YAML or JSON file.

    Raises ValueError, with file and line, for unknown, missing or repeated fields, values of the
    wrong kind, fewer than two tasks, and two tasks of one name. No other file is looked at.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no description {path}; it is a YAML or JSON file")
    reader = Reader(path)
    root = reader.tree()
    found = reader.fields(root, TOP, "the description")
    reader.need(root, ("base", "tasks"), found, "the description")
    entries = found["tasks"]
    if not isinstance(entries, yaml.SequenceNode) or len(entries.value) < 2:
        raise reader.error(entries, "tasks must be a list of two tasks or more")
    tasks = tuple(task_files(reader, node, 1 + n) for n, node in enumerate(entries.value))
    seen: dict[str, str] = {}
    for node, task in zip(entries.value, tasks, strict=True):
        if task.name.lower() in seen:
            raise reader.error(
                node, f"two tasks have the name {task.name!r}; each needs its own, in any case"
            )
        seen[task.name.lower()] = task.name
    given: dict = {}
    if "max_length" in found:
        given["max_length"] = reader.count(found["max_length"], "max_length")
    if "pad_token" in found:
        given["pad_token"] = reader.word(found["pad_token"], "pad_token")
    return Description(path, reader.word(found["base"], "base"), tasks, **given)


def together(checks: Iterable[Callable[[], object]]) -> list:
    """Every check's result; where some raise ValueError, one error with all that they say."""
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except ValueError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{len(problems)} problems:\n" + "\n".join(f"- {p}" for p in problems))
    return results
