"""Users' texts: five formats give the same rows, and every error names its file and row."""

import re
from pathlib import Path

import datasets
import pytest
from divmerge_book.user_models.data import load_rows, read_table, shared
from divmerge_book.user_models.description import Columns, TaskFiles
from local_files import tokenizer, write_rows

ANSWERS = ("negative", "positive")
LONG = "word " * 40_000  # beyond csv's own limit on a field


def rows_of(path: Path, labels=ANSWERS, split: str = "test", **fields) -> datasets.Dataset:
    """Rows of a task whose merge, validation and test rows all lie at one path."""
    rows = dict.fromkeys(("merge", "validation", "test"), path)
    task = TaskFiles(name="mood", expert=path.parent, **rows, columns=Columns(**fields))
    return load_rows(task, split, labels, tokenizer())[0]


# --- what is read ---------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ""])
def test_every_format_gives_the_same_rows_by_the_descriptions_columns(tmp_path, ending):
    given = [
        {"id": "7", "query": "is it", "passage": "it is", "kind": "positive", "text": "no"},
        {"id": "8", "query": "was it", "passage": "it was", "kind": "negative", "text": "yes"},
    ]
    path = write_rows(tmp_path / f"rows{ending}", given)
    rows = rows_of(path, text="query", pair="passage", label="kind")
    wanted = {"text": ["is it", "was it"], "pair": ["it is", "it was"], "label": [1, 0]}
    assert rows[:] == wanted
    path = write_rows(tmp_path / f"merge{ending}", [{"text": "one"}, {"text": "two"}])
    assert rows_of(path, split="merge")[:] == {"text": ["one", "two"]}, "it needs no label"


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("quoted.csv", b'text,label\n"a, ""b""\nc",negative\nd,positive\n', ['a, "b"\nc', "d"]),
        ("byte-order-mark.csv", "text,label\r\nä,negative\r\n".encode("utf-8-sig"), ["ä"]),
        ("long.csv", f"text,label\n{LONG},negative\n".encode(), [LONG]),
        ("semicolons.csv", b'text;label\n"a;b";negative\n', ["a;b"]),
        ("late.csv", b'\n\ntext;label\n"a, b";negative\n', ["a, b"]),
        ("tabs.csv", b"text\tlabel\na, b\tnegative\n", ["a, b"]),
        ("old-mac.csv", b"text,label\ra,negative\rb,positive\r", ["a", "b"]),
        ("no-end.csv", b"text, label\n\nNA,negative\nnull,positive", ["NA", "null"]),
        ("blank.jsonl", b'\xef\xbb\xbf\n{"text": "a", "label": 1}\n\n', ["a"]),
        ("quotes.tsv", b'text\tlabel\n"so\tnegative\nit "is"\tpositive\n', ['"so', 'it "is"']),
    ],
)
def test_fields_are_read_as_their_format_defines_them(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name)["text"][:] == texts


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["positive", "negative"], ANSWERS),
        (["1", "0"], ANSWERS),  # where all labels are words
        ([1, 0], ANSWERS),
        (["1.0", "0.0"], ANSWERS),  # as a column with gaps was saved
        ([True, False], ANSWERS),
        ([True, False], ("False", "True")),
        ([1, 2], ("2", "1")),  # labels that are numbers mean themselves
    ],
)
def test_labels_are_words_or_numbers(tmp_path, values, labels):
    given = [{"text": f"t{n}", "label": value} for n, value in enumerate(values)]
    path = write_rows(tmp_path / "rows.jsonl", given)
    assert rows_of(path, labels=labels)["label"][:] == [1, 0]


def test_a_missing_label_is_not_the_label_none(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", [{"text": "a", "label": None}])
    with pytest.raises(ValueError, match="row 1: label None .* is none of None, some"):
        rows_of(path, labels=("None", "some"))


def test_numbers_for_named_outputs_are_noted(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    task = TaskFiles(name="mood", expert=tmp_path, test=path)
    note = "read as numbers of the expert's outputs .0 = negative, 1 = positive"
    assert re.search(note, load_rows(task, "test", ANSWERS, tokenizer())[1][0])
    assert load_rows(task, "test", ("0", "1"), tokenizer())[1] == [], "nothing else can be meant"
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    made.save_to_disk(str(tmp_path / "rows"))
    task = TaskFiles(name="mood", expert=tmp_path, test=tmp_path / "rows")
    assert "(0 = no, 1 = yes)" in load_rows(task, "test", ("0", "1"), tokenizer())[1][0]


def test_numbered_labels_of_a_datasets_folder_go_by_their_names(tmp_path):
    label = datasets.ClassLabel(names=["positive", "negative"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    made.save_to_disk(str(tmp_path / "rows"))
    made.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows", "rows.parquet"):
        assert rows_of(tmp_path / name)["label"][:] == [1, 0]
    for broken in ("{}", "{"):
        (tmp_path / "rows" / "state.json").write_text(broken)
        with pytest.raises(ValueError, match="rows cannot be read"):
            rows_of(tmp_path / "rows")


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
        ("rows.csv", 'text,label\n"a\nb",negative\nc,bad\n', ["line 4", "negative, positive"]),
        ("rows.tsv", "text\tlabel\n\tnegative\n", ["line 2", "not a text"]),
        ("rows.tsv", 'text\tlabel\n"a ""b"""\t0\n', ['"a ""b""" is quoted as in CSV', "line 2"]),
        ("rows.jsonl", '{"text": "a", "label": 0}\n{"text": \n', ["line 2"]),
        ("rows.jsonl", '\n{"text": "a"}\n', ["no column label", "it has text"]),
        ("rows.jsonl", '{"text": "a", "label": 0}\n{"text": "b"}\n', ["line 2", "label None"]),
        ("rows.jsonl", '["a", 1]\n', ["line 1", "list"]),
        ("rows.jsonl", '[{"text": "a"},\n', ["line 1", "each of its objects on a line"]),
        ("rows.jsonl", '{"text": "a", "text": "b"}\n', ["line 1: a field stands twice"]),
        ("rows.jsonl", '{"text": "a \\ud83d", "label": 0}\n', ["line 1", "surrogate"]),
        ("rows.jsonl", '{"text": 5, "label": 0}\n', ["line 1", "5"]),
        ("rows.jsonl", '{"text": "a", "label": 2}\n', ["line 1", "label 2"]),
        ("rows.txt", "a\n", [".csv, .tsv, .jsonl, .parquet"]),
        ("rows.parquet", "no parquet", ["cannot be read"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        rows_of(tmp_path / name)
    assert [word for word in (name, *words) if word not in str(caught.value)] == []


@pytest.mark.parametrize("column", ["text", "pair"])
def test_a_text_of_which_the_tokenizer_makes_nothing_is_refused_with_its_row(tmp_path, column):
    rows = [{"text": "a", "pair": "b"} for _ in range(3)]
    rows[1][column] = rows[2][column] = "\u200b\u200b"  # nothing is seen of it
    path = write_rows(tmp_path / "rows.csv", [row | {"label": "negative"} for row in rows])
    with pytest.raises(ValueError, match=f"line 3 .and 1 more.: the tokenizer makes no.*{column}"):
        rows_of(path, pair="pair")


def test_a_row_with_another_number_of_end_tokens_is_refused(tmp_path):
    """An encoder-decoder's head reads the answer at its last EOS token."""
    path = write_rows(tmp_path / "rows.csv", [{"text": t} for t in ("a", "b", "a [SEP]")])
    task = TaskFiles(name="mood", expert=tmp_path, merge=path)
    (end,) = tokenizer()(["[SEP]"], add_special_tokens=False)["input_ids"][0]
    for token, words in ((end, "line 4: .* than most rows, which have 1"), (10**6, "no EOS token")):
        with pytest.raises(ValueError, match=words):
            load_rows(task, "merge", ANSWERS, tokenizer(), token)


def test_a_parquet_row_without_a_text_is_counted_from_one(tmp_path):
    given = [{"text": "a", "label": "negative"}, {"text": None, "label": "negative"}]
    with pytest.raises(ValueError, match="row 2: column 'text' holds None"):
        rows_of(write_rows(tmp_path / "rows.parquet", given))


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes("text,label\nä,negative\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        rows_of(tmp_path / "rows.csv")


def test_a_folder_of_splits_or_of_something_else_is_refused(tmp_path):
    inner = datasets.Dataset.from_dict({"text": ["a"], "label": ["negative"]})
    datasets.DatasetDict({"train": inner}).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match="name one of them, such as .*rows/train"):
        rows_of(tmp_path / "rows")
    assert len(rows_of(tmp_path / "rows" / "train")) == 1
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_table(tmp_path / "other", ["text"])


# --- splits that share inputs ---------------------------------------------------------------------
def split_of(*texts: str, **more: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts), **more})


def test_validation_and_test_may_not_share_an_input():
    splits = {"merge": split_of("x"), "validation": split_of("A  film"), "test": split_of("a film")}
    with pytest.raises(ValueError, match="'mood': 1 inputs stand in validation and in test"):
        shared("mood", splits)
    pairs = {split: split_of("a", pair=[split]) for split in splits}  # other second texts
    assert shared("mood", pairs) == []


def test_inputs_that_the_merge_has_seen_are_noted():
    (note,) = shared("mood", {"merge": split_of("a", "b"), "test": split_of("B", "c", "d")})
    assert "1 of 3 test inputs are merge inputs" in note
    assert shared("mood", {"merge": split_of("a"), "test": split_of("b")}) == []
