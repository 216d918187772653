"""Rows of texts in CSV, TSV, JSONL, parquet or a `datasets` folder: read with checks, written."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets
import pandas as pd
import pyarrow
import pyarrow.parquet as parquet

from divmerge_book.data.splits import normal
from divmerge_book.data.tasks import Task, quiet
from divmerge_book.user_models.description import SPLITS, TaskFiles
from divmerge_book.user_models.labels import numbers_of

QUOTED = re.compile(r'"[^"]*(""[^"]*)+"')  # a field as CSV quotes one with quotes in it
Tokenizer = Callable[..., Mapping[str, Sequence]]


def delimited(path: Path, **form) -> pd.DataFrame:
    """A text table with a header line. Fields may hold line breaks where the form has quotes."""
    limit, rows = csv.field_size_limit(2**31 - 1), {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = next(filter(str.strip, file), "")
            file.seek(0)
            others = [mark for mark in ";\t" if mark in first]
            if not form and "," not in first and others:  # as spreadsheets export them
                form = {"delimiter": others[0]}
            reader = csv.reader(file, strict=True, **form)
            header = [name.strip() for name in next(filter(None, reader), [])]
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {line}: {len(row)} fields, the header has {len(header)}"
                    )
                if form.get("quoting") and (wrong := next(filter(QUOTED.fullmatch, row), None)):
                    raise ValueError(
                        f"{path}, line {line}: {wrong:.60} is quoted as in CSV, and in TSV quotes "
                        "are part of the text; save the rows as .csv"
                    )
                if row:
                    rows[line] = row
                line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    lines = pd.Index(list(rows), name="line")
    return pd.DataFrame(list(rows.values()), lines, header, dtype=object)


def distinct_fields(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON. Raises ValueError for a field that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a field stands twice among {', '.join(name for name, _ in pairs)}")
    return found


def json_lines(path: Path) -> pd.DataFrame:
    """One JSON object a line; blank lines do not count."""
    rows = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in ((n, line) for n, line in enumerate(file, 1) if line.strip()):
            try:
                rows[number] = json.loads(line, object_pairs_hook=distinct_fields)
            except ValueError as error:
                cause = getattr(error, "msg", error)
                hint = "; a list does: write each of its objects on a line" * line.startswith("[")
                raise ValueError(f"{path}, line {number}: {cause}{hint}") from error
            if not isinstance(rows[number], dict):
                kind = type(rows[number]).__name__
                raise ValueError(f"{path}, line {number}: every line is one object, not a {kind}")
    return pd.DataFrame(list(rows.values()), pd.Index(list(rows), name="line"), dtype=object)


def saved_folder(path: Path) -> pd.DataFrame:
    """A folder that `datasets` wrote with `save_to_disk`."""
    try:
        found = datasets.load_from_disk(str(path))
    except (KeyError, TypeError, json.JSONDecodeError) as error:  # of its state.json
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(
            f"{path} holds several splits: {', '.join(found)}; name one of them, such as "
            f"{path / next(iter(found), 'train')}"
        )
    return of_arrow(found.with_format("arrow")[:], found.features)


def of_arrow(table: pyarrow.Table, features: datasets.Features) -> pd.DataFrame:
    found = table.to_pandas(integer_object_nulls=True).astype(object)
    kinds = features.items()
    found.attrs = {n: k.names for n, k in kinds if isinstance(k, datasets.ClassLabel)}
    return found.set_axis(pd.RangeIndex(1, len(found) + 1, name="row"))


def of_parquet(path: Path) -> pd.DataFrame:
    table = parquet.read_table(path)
    return of_arrow(table, datasets.Features.from_arrow_schema(table.schema))


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": delimited,
    # In TSV quotes are ordinary characters, as the format is defined.
    ".tsv": partial(delimited, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": json_lines,
    ".parquet": of_parquet,
}


def read_table(path: Path, wanted: Sequence[str] | None) -> pd.DataFrame:
    """The wanted columns of a file or folder, or all; None where a value is missing.

    The index is each row's place in the file, and its name says so; `attrs` hold the names of
    numbered labels, by column. Raises ValueError, with the line where there is one, for an unknown
    ending, a file that cannot be read, a missing column, and a table without rows.
    """
    read = saved_folder if path.is_dir() else READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(
            f"{path}: rows come from {', '.join(READERS)}, or a folder that datasets' save_to_disk "
            "wrote"
        )
    try:
        table = read(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (OSError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    present = list(map(str, table.columns))
    wanted = present if wanted is None else wanted
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"the description names a column twice: {', '.join(wanted)}")
    if wrong := [name for name in wanted if present.count(name) != 1]:
        twice = wrong[0] in present
        what = f"column {wrong[0]} twice" if twice else f"no column {', '.join(wrong)}"
        raise ValueError(
            f"{path} has {what}; it has {', '.join(present) or 'none: it is empty'}. Name columns "
            "in the description: columns: {text: ..., pair: ..., label: ...}"
        )
    if table.empty:
        raise ValueError(f"{path} has no rows; give one row or more")
    table = table[list(wanted)].rename_axis(index=f"{path}, {table.index.name}")
    return table.where(table.notna(), None)


def require(values: pd.Series, fits: Iterable[object], what: str, cure: str) -> None:
    """Raise ValueError that names the first row whose value does not fit, if there is one.

    what: words in which `VALUE` stands for that value.
    """
    wrong = values[[not fit for fit in fits]]
    if len(wrong):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        what = what.replace("VALUE", repr(wrong.iloc[0]))
        raise ValueError(f"{values.index.name} {wrong.index[0]}{more}: {what}; {cure}")


def require_whole(values: pd.Series, words: Iterable[str], what: str) -> None:
    """Raise ValueError for the first text with half of a character, as cut JSON has; `require`."""
    whole = (text.encode("utf-8", "ignore").decode() == text for text in words)
    what = f"{what} with half of a character (a surrogate)"
    require(values, whole, what, "correct or remove the row")


def texts(values: pd.Series, tokenizer: Tokenizer) -> list[str]:
    """A column of texts of one token or more."""
    column, cure = f"column {values.name!r}", "correct or remove the row"
    words = (isinstance(text, str) and text.strip() for text in values)
    require(values, words, f"{column} holds VALUE, not a text", cure)
    require_whole(values, values, f"{column} holds VALUE")
    ids = tokenizer(list(values), add_special_tokens=False)["input_ids"]
    require(values, ids, f"the tokenizer makes no token of VALUE in {column}", cure)
    return list(values)


def load_rows(
    task: TaskFiles,
    split: str,
    labels: Sequence[str],
    tokenizer: Tokenizer,
    end: int | None = None,
) -> tuple[datasets.Dataset, list[str]]:
    """Rows of one split: `text`, for pairs `pair`, and, outside the merge split, `label`; remarks.

    Raises ValueError, naming file and row, for what cannot be read, for texts without a token, and
    for labels that the expert does not have. end: the token that an encoder-decoder's head reads
    the answer at; a row with another number of these than most is refused too.
    """
    fields = {"text", "pair", "label"}
    names, notes = task.columns.model_dump(include=fields, exclude_none=True), []
    if split == "merge":
        del names["label"]
    file = task.files()[split]
    table = read_table(file, list(names.values()))
    columns = {field: texts(table[names[field]], tokenizer) for field in names if field != "label"}
    if end is not None:
        every = tokenizer(*(columns[name] for name in ("text", "pair") if name in columns))
        counts = [ids.count(end) for ids in every["input_ids"]]
        usual = Counter(counts).most_common(1)[0][0]
        what = f"VALUE has another number of EOS tokens than most rows, which have {usual}"
        what = what if usual else "the tokenizer puts no EOS token after VALUE"
        fits = (count == usual > 0 for count in counts)
        require(table[names["text"]], fits, what, "the model's head reads its answer at that token")
    if (name := names.get("label")) is not None:
        given, named = table[name], table.attrs.get(name)
        columns["label"], notes = numbers_of(given, labels, file, named)
        what = f"label VALUE in column {name!r} is none of {', '.join(labels)}"
        cure = "correct the row, or the labels in the description"
        require(given, (number >= 0 for number in columns["label"]), what, cure)
    with quiet():
        return datasets.Dataset.from_dict(columns), notes


def keys(rows: datasets.Dataset) -> set[tuple[str, ...]]:
    """The inputs of a split, blind to case and spacing."""
    columns = [rows[name] for name in ("text", "pair") if name in rows.column_names]
    return {tuple(map(normal, row)) for row in zip(*columns, strict=True)}


def shared(name: str, splits: Mapping[str, datasets.Dataset]) -> list[str]:
    """Notes on inputs that stand in the merge split and in a labelled one.

    Raises ValueError where validation and test share inputs: what is chosen on a row must not be
    scored on it.
    """
    merge, validation, test = (keys(splits[s]) if s in splits else set() for s in SPLITS)
    if both := validation & test:
        example = " / ".join(min(both))[:80]
        raise ValueError(
            f"task {name!r}: {len(both)} inputs stand in validation and in test, such as "
            f"{example!r}; options chosen on a row cannot be scored on it: remove them from one"
        )
    return [
        f"task {name!r}: {len(merge & own)} of {len(own)} {split} inputs are merge inputs too: the "
        "merge has used them, without labels"
        for split, own in (("validation", validation), ("test", test))
        if merge & own
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
    write = {
        ".csv": partial(table.to_csv, index=False),
        ".jsonl": partial(table.to_json, orient="records", lines=True, force_ascii=False),
        ".parquet": partial(table.to_parquet, index=False),
    }
    write[path.suffix](path)
