"""Rows of texts in CSV, TSV, JSONL, parquet or a `datasets` folder: read with checks, written."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet as parquet

from divmerge_book.data.splits import normal
from divmerge_book.data.tasks import Task, quiet
from divmerge_book.user_models.description import TaskFiles


@dataclass(frozen=True)
class Table:
    """Named columns of a file, and the place of each row in it (`line 7`, `row 3`).

    classes: the names of numbered labels, where the file has them.
    """

    path: Path
    columns: Mapping[str, Sequence]
    unit: str
    numbers: Sequence[int]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of_lines(cls, path: Path, wanted: Sequence[str], rows: Mapping[int, Mapping]) -> "Table":
        columns = {name: [row[name] for row in rows.values()] for name in wanted}
        return cls(path, columns, "line", list(rows))

    def refuse(self, wrong: Sequence[int], what: str, cure: str) -> None:
        """Raise ValueError that names the first wrong row, if there is one."""
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            place = f"{self.unit} {self.numbers[wrong[0]]}"
            raise ValueError(f"{self.path}, {place}{more}: {what}; {cure}")


def has_columns(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    """Raise ValueError for columns that the file lacks or has twice."""
    lacking = [name for name in wanted if name not in present]
    double = [name for name in wanted if list(present).count(name) > 1]
    if lacking or double:
        what = f"no column {', '.join(lacking)}" if lacking else f"column {double[0]} twice"
        raise ValueError(
            f"{path} has {what}; it has {', '.join(map(str, present))}. Name columns in the "
            "description: columns: {text: ..., pair: ..., label: ...}"
        )


def separated(path: Path, wanted: Sequence[str], **form) -> Table:
    """A text table with a header line. Fields may hold line breaks where the form has quotes."""
    limit, rows = csv.field_size_limit(2**31 - 1), {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, **form)
            header = next(reader, None)
            if header is None:
                raise ValueError(f"{path} is empty; its first line must name the columns")
            has_columns(path, wanted, header)
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {line}: {len(row)} fields, the header has {len(header)}"
                    )
                if row:
                    rows[line] = dict(zip(header, row, strict=True))
                line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return Table.of_lines(path, wanted, rows)


def json_rows(path: Path, wanted: Sequence[str]) -> Table:
    """One JSON object a line; blank lines do not count."""
    rows = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error.msg}") from error
            if not isinstance(row, dict) or not set(wanted) <= set(row):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(
                    f"{path}, line {number}: needs {', '.join(wanted)}, has {has}; every line is "
                    "one object with these keys"
                )
            rows[number] = row
    return Table.of_lines(path, wanted, rows)


def parquet_rows(path: Path, wanted: Sequence[str]) -> Table:
    try:
        with parquet.ParquetFile(path) as file:
            has_columns(path, wanted, file.schema_arrow.names)
            columns = file.read(columns=list(wanted)).to_pydict()
            return Table(path, columns, "row", range(1, file.metadata.num_rows + 1))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def folder_rows(path: Path, wanted: Sequence[str]) -> Table:
    """A folder that `datasets` wrote with `save_to_disk`."""
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(
            f"{path} holds several splits: {', '.join(found)}; name one of them, such as "
            f"{path / next(iter(found), 'train')}"
        )
    has_columns(path, wanted, found.column_names)
    kinds = {name: found.features[name] for name in wanted}
    classes = {n: k.names for n, k in kinds.items() if isinstance(k, datasets.ClassLabel)}
    columns = {name: list(found[name]) for name in wanted}
    return Table(path, columns, "row", range(1, len(found) + 1), classes)


READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    ".csv": separated,
    # In TSV quotes are ordinary characters, as the format is defined.
    ".tsv": partial(separated, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": json_rows,
    ".parquet": parquet_rows,
}


def read_table(path: Path, wanted: Sequence[str]) -> Table:
    """The wanted columns of a file or folder.

    Raises ValueError, with the line where there is one, for an unknown ending, a file that cannot
    be read, a missing column, and a table without rows.
    """
    read = folder_rows if path.is_dir() else READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(
            f"{path}: rows come from {', '.join(READERS)}, or a folder that datasets' save_to_disk "
            "wrote"
        )
    try:
        table = read(path, wanted)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not table.numbers:
        raise ValueError(f"{path} has no rows; give one row or more")
    return table


Tokenizer = Callable[..., Mapping[str, Sequence]]


def texts(table: Table, column: str, tokenizer: Tokenizer) -> list[str]:
    """A column of texts of one token or more. Raises ValueError for the first row that is none."""
    values = list(table.columns[column])
    wrong = [n for n, text in enumerate(values) if not isinstance(text, str) or not text.strip()]
    shown = repr(values[wrong[0]]) if wrong else ""
    cure = "correct or remove the row"
    table.refuse(wrong, f"column {column!r} holds {shown}, not a text", cure)
    ids = tokenizer(values, add_special_tokens=False)["input_ids"]
    wrong = [n for n, tokens in enumerate(ids) if not tokens]
    shown = repr(values[wrong[0]]) if wrong else ""
    table.refuse(wrong, f"the tokenizer makes no token of {shown} in column {column!r}", cure)
    return values


def class_numbers(table: Table, column: str, labels: Sequence[str]) -> list[int]:
    """A column of labels as numbers of the model's outputs.

    A value is one of the labels, or, where all labels are words, their number from 0 on.
    """
    known = {label: number for number, label in enumerate(labels)}
    values, names = table.columns[column], table.classes.get(column)
    if not any(label.isdecimal() for label in labels):
        known |= {str(number): number for number in range(len(labels))}
    if names is not None and not all(label.isdecimal() for label in labels):
        values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]
    wrong = [n for n, value in enumerate(values) if str(value).strip() not in known]
    shown = repr(values[wrong[0]]) if wrong else ""
    what = f"label {shown} in column {column!r} is none of {', '.join(labels)}"
    table.refuse(wrong, what, "correct the row, or the labels in the description")
    return [known[str(value).strip()] for value in values]


def load_rows(
    task: TaskFiles, split: str, labels: Sequence[str], tokenizer: Tokenizer
) -> datasets.Dataset:
    """Rows of one split: `text`, for pairs `pair`, and, outside the merge split, `label`.

    Raises ValueError, naming file and row, for what cannot be read, a text that is empty or of
    which the tokenizer makes nothing, and a label that the expert does not have.
    """
    labelled = split != "merge"
    names = task.columns
    wanted = [names.text] + ([names.pair] if names.pair else []) + ([names.label] * labelled)
    table = read_table(task.files()[split], wanted)
    columns: dict[str, list] = {"text": texts(table, names.text, tokenizer)}
    if names.pair:
        columns["pair"] = texts(table, names.pair, tokenizer)
    if labelled:
        columns["label"] = class_numbers(table, names.label, labels)
    with quiet():
        return datasets.Dataset.from_dict(columns)


def keys(rows: datasets.Dataset) -> set[tuple[str, ...]]:
    """The inputs of a split, blind to case and spacing."""
    columns = [rows["text"]] + ([rows["pair"]] if "pair" in rows.column_names else [])
    return {tuple(map(normal, row)) for row in zip(*columns, strict=True)}


def shared(name: str, splits: Mapping[str, datasets.Dataset]) -> list[str]:
    """Notes on inputs that stand in the merge split and in a labelled one.

    Raises ValueError where validation and test share inputs: what is chosen on a row must not be
    scored on it.
    """
    found = {split: keys(rows) for split, rows in splits.items()}
    both = found.get("validation", set()) & found.get("test", set())
    if both:
        example = " / ".join(min(both))[:80]
        raise ValueError(
            f"task {name!r}: {len(both)} inputs stand in validation and in test, such as "
            f"{example!r}; options chosen on a row cannot be scored on it: remove them from one"
        )
    return [
        f"task {name!r}: {len(found['merge'] & found[split])} of {len(found[split])} {split} "
        "inputs are merge inputs too: the merge has used them, without labels"
        for split in ("validation", "test")
        if found["merge"] & found.get(split, set())
    ]


def write_rows(
    path: Path, task: Task, split: str, labels: Sequence[str], count: int | None = None
) -> None:
    """The first rows of a task's split, in the format of the path's ending.

    labels: the words that stand for the task's answers in the file.
    """
    table = task.load(split).to_pandas().iloc[:count]
    if "label" in table:
        table["label"] = [labels[number] for number in table.label]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        table.to_parquet(path, index=False)
