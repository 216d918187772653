"""Users' texts: five formats give the same rows, and every error names its file and row."""

from pathlib import Path

import datasets
import pytest
from divmerge_book.user_models.data import load_rows, read_table, shared
from divmerge_book.user_models.description import Columns, TaskFiles
from local_files import LABELS, ROWS, tokenizer, toy_rows, write_rows

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet", "")
ANSWERS = ("negative", "positive")


def task(path: Path, **fields) -> TaskFiles:
    """A task whose merge, validation and test rows all lie at one path."""
    rows = dict.fromkeys(("merge", "validation", "test"), path)
    return TaskFiles(name="mood", expert=path.parent, **rows, columns=Columns(**fields))


def rows_of(path: Path, labels=ANSWERS, split: str = "test", **fields) -> datasets.Dataset:
    return load_rows(task(path, **fields), split, labels, tokenizer())


def written(folder: Path, text: str, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_rows(tmp_path, ending):
    given = toy_rows("mood")["test"]
    rows = rows_of(write_rows(tmp_path / f"rows{ending}", given))
    assert rows["text"][:] == [row["text"] for row in given]
    assert [LABELS["mood"][n] for n in rows["label"]] == [row["label"] for row in given]
    assert len(rows) == ROWS["test"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_columns_go_by_the_names_that_the_description_gives(tmp_path, ending):
    given = [{"id": "7", "query": "is it", "passage": "it is", "kind": "positive", "text": "no"}]
    path = write_rows(tmp_path / f"rows{ending}", given)
    rows = rows_of(path, text="query", pair="passage", label="kind")
    assert rows[:] == {"text": ["is it"], "pair": ["it is"], "label": [1]}


@pytest.mark.parametrize("ending", ENDINGS)
def test_merge_rows_need_no_label(tmp_path, ending):
    path = write_rows(tmp_path / f"rows{ending}", [{"text": "one"}, {"text": "two"}])
    assert rows_of(path, split="merge")[:] == {"text": ["one", "two"]}


def test_a_csv_field_may_hold_commas_quotes_and_line_breaks(tmp_path):
    path = written(tmp_path, 'text,label\n"a, ""b""\nc",negative\nd,positive\n')
    assert rows_of(path)["text"][:] == ['a, "b"\nc', "d"]


def test_a_csv_of_a_spreadsheet_may_open_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\r\nä,negative\r\n".encode("utf-8-sig"))
    assert rows_of(path)["text"][:] == ["ä"]


def test_quotes_in_a_tsv_are_ordinary_characters(tmp_path):
    path = written(tmp_path, 'text\tlabel\n"so\tnegative\nit "is"\tpositive\n', "rows.tsv")
    assert rows_of(path)["text"][:] == ['"so', 'it "is"']


@pytest.mark.parametrize("values", [["1", "0"], [1, 0], ["positive", "negative"]])
def test_labels_are_words_or_where_all_are_words_their_numbers(tmp_path, values):
    given = [{"text": f"t{n}", "label": value} for n, value in enumerate(values)]
    assert rows_of(write_rows(tmp_path / "rows.jsonl", given))["label"][:] == [1, 0]


def test_labels_that_are_numbers_mean_themselves(tmp_path):
    path = written(tmp_path, "text,label\na,1\nb,2\n")
    assert rows_of(path, labels=("2", "1"))["label"][:] == [1, 0]


def test_numbered_labels_of_a_datasets_folder_go_by_their_names(tmp_path):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["positive", "negative"]),
        }
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    made.save_to_disk(str(tmp_path / "rows"))
    assert rows_of(tmp_path / "rows")["label"][:] == [1, 0]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("rows.csv", "", ["empty", "columns"]),
        ("rows.csv", "text,label\n", ["no rows"]),
        ("rows.csv", "sentence,label\na,negative\n", ["no column text", "it has sentence, label"]),
        ("rows.csv", "text,text,label\na,b,negative\n", ["text twice"]),
        ("rows.csv", "text,label\na,negative\nb,c,positive\n", ["line 3", "3 fields"]),
        ("rows.csv", 'text,label\n"a,negative\n', ["line"]),
        ("rows.csv", "text,label\na,negative\n ,positive\n,a\n", ["line 3 (and 1 more)", "' '"]),
        (
            "rows.csv",
            'text,label\n"a\nb",negative\nc,bad\n',
            ["line 4", "bad", "negative, positive"],
        ),
        ("rows.tsv", "text\tlabel\n\tnegative\n", ["line 2", "not a text"]),
        ("rows.jsonl", '{"text": "a", "label": 0}\n{"text": \n', ["line 2"]),
        ("rows.jsonl", '\n{"text": "a"}\n', ["line 2", "label", "has text"]),
        ("rows.jsonl", '["a", 1]\n', ["line 1", "list"]),
        ("rows.jsonl", '{"text": 5, "label": 0}\n', ["line 1", "5"]),
        ("rows.jsonl", '{"text": "a", "label": 2}\n', ["line 1", "label 2"]),
        ("rows.jsonl", '{"text": "a", "label": null}\n', ["line 1", "None"]),
        ("rows.txt", "a\n", [".csv, .tsv, .jsonl, .parquet"]),
        ("rows.parquet", "no parquet", ["cannot be read"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, name, text, words):
    path = written(tmp_path, text, name)
    with pytest.raises(ValueError) as caught:
        rows_of(path)
    assert str(path) in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("column", ["text", "pair"])
def test_a_text_of_which_the_tokenizer_makes_nothing_is_refused_with_its_row(tmp_path, column):
    rows = [{"text": "a", "pair": "b"} for _ in range(3)]
    rows[1][column] = rows[2][column] = "\u200b\u200b"  # nothing is seen of it
    path = write_rows(tmp_path / "rows.csv", [row | {"label": "negative"} for row in rows])
    with pytest.raises(ValueError, match=f"line 3 .and 1 more.: the tokenizer makes no.*{column}"):
        rows_of(path, pair="pair")


def test_a_parquet_row_without_a_text_is_counted_from_one(tmp_path):
    given = [{"text": "a", "label": "negative"}, {"text": None, "label": "negative"}]
    with pytest.raises(ValueError, match="row 2: column 'text' holds None"):
        rows_of(write_rows(tmp_path / "rows.parquet", given))


def test_text_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nä,negative\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        rows_of(path)


def test_a_folder_of_splits_is_told_to_be_one_level_too_high(tmp_path):
    inner = datasets.Dataset.from_dict({"text": ["a"], "label": ["negative"]})
    datasets.DatasetDict({"train": inner}).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match="rows/train"):
        rows_of(tmp_path / "rows")
    assert len(rows_of(tmp_path / "rows" / "train")) == 1


def test_a_folder_that_datasets_did_not_write_is_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_table(tmp_path / "rows", ["text"])


# --- splits that share inputs ---------------------------------------------------------------------


def split_of(*texts: str, pairs: tuple[str, ...] | None = None) -> datasets.Dataset:
    columns = {"text": list(texts)} | ({"pair": list(pairs)} if pairs else {})
    return datasets.Dataset.from_dict(columns)


def test_validation_and_test_may_not_share_an_input():
    splits = {"merge": split_of("x"), "validation": split_of("A  film"), "test": split_of("a film")}
    with pytest.raises(ValueError, match="'mood': 1 inputs stand in validation and in test"):
        shared("mood", splits)


def test_inputs_that_the_merge_has_seen_are_noted():
    splits = {"merge": split_of("a", "b"), "test": split_of("B", "c", "d")}
    (note,) = shared("mood", splits)
    assert "1 of 3 test inputs are merge inputs" in note
    assert shared("mood", {"merge": split_of("a"), "test": split_of("b")}) == []


def test_pairs_are_the_same_only_with_both_texts():
    one, other = split_of("a", pairs=("x",)), split_of("a", pairs=("y",))
    assert (
        shared("mood", {"merge": split_of("q", pairs=("r",)), "validation": one, "test": other})
        == []
    )


def test_a_file_with_many_long_fields_is_read_whole(tmp_path):
    long = "word " * 40_000  # beyond csv's own limit on a field
    path = write_rows(tmp_path / "rows.csv", [{"text": long, "label": "negative"}])
    assert rows_of(path)["text"][:] == [long]


def test_tasks_know_which_splits_they_have(tmp_path):
    whole = task(tmp_path / "rows.csv")
    assert list(whole.files()) == ["merge", "validation", "test"]
    assert list(whole.model_copy(update={"validation": None}).files()) == ["merge", "test"]
