"""Tasks: what they declare, how rows become splits on disk, and GLUE read from a folder."""

import shutil

import datasets
import pytest
from divmerge_book.data.downloads import ASSETS
from divmerge_book.data.splits import SPLITS, normal
from divmerge_book.data.tasks import SUITES, TASKS, swap_half
from helpers import raising, task_of, toy_splits, toy_task


def test_every_task_is_in_a_suite_and_declares_its_question_and_source():
    assert {task for suite in SUITES.values() for task in suite.tasks} == set(TASKS)
    for name, task in TASKS.items():
        assert task.name == name and task.kind and task.source
        assert len(set(task.answers)) == len(task.answers) != 1  # none where any text may be one


def test_the_embedded_suite_is_as_varied_as_the_book_says():
    chosen = [TASKS[name] for name in SUITES["embedded"].tasks]
    assert len(chosen) == 8 and sum(task.pair for task in chosen) >= 2
    assert len({task.kind for task in chosen}) >= 6
    sources = {f"{asset.package} {asset.version}" for asset in ASSETS.values()}
    assert {task.source for task in chosen} <= sources


def test_the_second_suite_is_glue():
    chosen = [TASKS[name] for name in SUITES["glue_encoder"].tasks]
    assert {task.source for task in chosen} == {"GLUE"}
    assert [task.name for task in chosen if not task.pair] == ["cola", "sst2"]
    assert [task.name for task in chosen if task.pair] == ["qqp", "qnli", "mnli", "rte", "mrpc"]


def test_rows_come_back_as_they_were_read(cache):
    task = toy_task("place")
    rows = toy_splits("place")["test"]
    found = task.load("test")
    assert isinstance(found, datasets.Dataset)
    assert found.column_names == ["text", "label"]
    given = [(text, answer) for text, _, answer in rows]
    assert [(row["text"], task.answers[row["label"]]) for row in found] == given


def test_a_pair_task_has_both_texts_and_the_merge_split_no_labels(cache):
    rows = [("question", "passage", "yes"), ("question", "other", "no")]
    task = task_of(dict.fromkeys(SPLITS, rows), pair=True)
    assert task.load("train").column_names == ["text", "pair", "label"]
    assert task.load("merge").column_names == ["text", "pair"]
    assert list(task.load("merge")["pair"]) == ["passage", "other"]


def test_rows_are_read_once_and_other_data_anew(cache):
    first, again = toy_task("mood").load("train"), toy_task("mood")
    object.__setattr__(again, "read", lambda: pytest.fail("read again"))
    assert list(again.load("train")) == list(first)
    assert toy_task("mood", seed=0).folder() != toy_task("mood", seed=1).folder()


def test_half_of_the_questions_get_a_passage_of_another():
    rows = [(f"question {n}", f"passage {n} of {n % 7}", "yes") for n in range(200)]
    own = {question: passage for question, passage, _ in rows}
    found = swap_half(rows)
    assert found == swap_half(rows)
    assert [question for question, *_ in found] == [question for question, *_ in rows]
    assert all((passage == own[asked]) == (answer == "yes") for asked, passage, answer in found)
    assert 70 < sum(answer == "no" for *_, answer in found) < 130
    assert {passage for _, passage, _ in found} <= set(own.values())  # splits stay disjoint


def made(count: int, **texts: str) -> list[dict]:
    """GLUE's rows with these texts, numbered."""
    return [
        {name: text.format(n) for name, text in texts.items()} | {"label": n % 2, "idx": n}
        for n in range(count)
    ]


@pytest.fixture
def glue(tmp_path, cache, monkeypatch):
    """A folder in the layout of nyu-mll/glue, with a few rows."""
    folder = tmp_path / "glue"
    monkeypatch.setenv("DIVMERGE_GLUE_DIR", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def write(name: str, split: str, rows: list[dict]) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        path = folder / name / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)

    for split, count in (("train", 900), ("validation", 40)):
        write("cola", split, made(count, sentence=f"{split} sentence {{}}"))
        texts = {"sentence1": f"{split} premise {{}}", "sentence2": f"{split} hypothesis {{}}"}
        rows = made(count, **texts)
        rows[1::2] = [
            row | {"sentence1": other["sentence1"]}
            for row, other in zip(rows[1::2], rows[::2], strict=True)
        ]
        write("rte", split, rows)  # every premise has two hypotheses: rows share texts
    write("cola", "test", [row | {"label": -1} for row in made(5, sentence="test sentence {}")])
    return write


def test_glue_is_read_from_a_folder_in_the_hubs_layout(glue):
    task = TASKS["cola"]
    assert {split: len(task.load(split)) for split in SPLITS} == {
        **{"train": 200, "validation": 300, "merge": 400, "test": 40}
    }
    test = task.load("test")
    assert all(text.startswith("validation sentence") for text in test["text"])
    labels = {text: label for text, label in zip(test["text"], test["label"], strict=True)}
    assert labels["validation sentence 3"] == 1
    assert task.answers[1] == "acceptable"
    texts = {text for split in SPLITS for text in task.load(split)["text"]}
    assert not any(text.startswith("test") for text in texts)  # GLUE hides these labels


def test_glues_pairs_share_no_text_across_splits(glue):
    places: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in TASKS["rte"].load(split):
            places.setdefault(normal(row["text"]), set()).add(split)
            places.setdefault(normal(row["pair"]), set()).add(split)
    assert all(len(found) == 1 for found in places.values())
    assert all(text.startswith("validation") for text in TASKS["rte"].load("test")["text"])


def test_a_labelled_test_split_stands_in_for_a_validation_split_that_is_missing(glue):
    for split, count in (("train", 900), ("test", 30)):
        glue("sst2", split, made(count, sentence=f"{split} review {{}}"))
    assert all(text.startswith("test review") for text in TASKS["sst2"].load("test")["text"])


def test_one_split_alone_is_split_in_four(glue):
    glue("qnli", "validation", made(1300, question="question {}", sentence="sentence {}"))
    counts = {split: len(TASKS["qnli"].load(split)) for split in SPLITS}
    assert counts == {"train": 100, "validation": 300, "merge": 400, "test": 500}


def test_another_glue_folder_is_other_data(glue, tmp_path, monkeypatch):
    first = TASKS["cola"].folder()
    glue("cola", "validation", made(50, sentence="another {}"))
    other = shutil.copytree(tmp_path / "glue", tmp_path / "other")
    monkeypatch.setenv("DIVMERGE_GLUE_DIR", str(other))
    assert TASKS["cola"].folder() != first


def test_without_hub_and_folder_the_error_says_how_to_get_either(cache, monkeypatch):
    monkeypatch.delenv("DIVMERGE_GLUE_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", raising(ConnectionError("Couldn't reach")))
    message = (
        r"(?s)cannot read GLUE task 'rte' from the hub's nyu-mll/glue: Couldn't reach.*"
        r"Set DIVMERGE_GLUE_DIR to a folder with rte/train-\*\.parquet.*huggingface\.co"
    )
    with pytest.raises(ValueError, match=message):
        TASKS["rte"].load("train")
    assert not any(cache.rglob("*.arrow"))


def test_a_glue_folder_without_the_task_is_named_in_the_error(glue):
    with pytest.raises(ValueError, match=r"GLUE task 'mrpc' from .*glue/mrpc: .*DIVMERGE_GLUE_DIR"):
        TASKS["mrpc"].load("train")


TWO = [("a", None, "yes"), ("b", None, "no")]
FEW = "its {} split of {} rows is empty or holds one class .*more rows"


@pytest.mark.parametrize(
    ("rows", "split", "message"),
    [
        ({}, "dev", "unknown split 'dev'; choose one of: train, validation"),
        (dict.fromkeys(SPLITS, [*TWO, ("b", None, "maybe")]), "train", r"given: answers \['maybe'"),
        *(({split: []}, "train", FEW.format(split, 0)) for split in SPLITS),
        *(
            ({split: TWO[:1]}, "train", FEW.format(split, 1))
            for split in SPLITS
            if split != "merge"
        ),
    ],
)
def test_what_cannot_be_a_task_is_refused(cache, rows, split, message):
    with pytest.raises(ValueError, match=message):
        task_of(dict.fromkeys(SPLITS, TWO) | rows).load(split)


def test_unlabelled_rows_may_be_of_one_class(cache):
    assert len(task_of(dict.fromkeys(SPLITS, TWO) | {"merge": TWO[:1]}).load("merge")) == 1
