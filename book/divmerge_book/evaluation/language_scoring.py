"""Labelled splits of language tasks: scored by likelihood, by exact words, or by ROUGE-1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import datasets
import torch
from jaxtyping import Int
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.models.language.completions import greedy, written
from divmerge_book.models.language.models import Language
from divmerge_book.models.language.prompts import Prompt, normal
from divmerge_book.models.language.reading import ask, by_length, choices
from divmerge_core.merging.problem import Merged, MergeProblem

Rows = datasets.Dataset | Sequence[Mapping[str, object]]


def prompt_batches(
    base: Language, prompt: Prompt, rows: Rows, max_length: int, batch_size: int
) -> tuple[list[list[Sequence[int]]], list]:
    """Prompts as tokens in batches of like length, and the rows' right answers in that order."""
    asked = ask(base, prompt, rows, max_length).prompts
    groups = list(by_length(list(map(len, asked)), batch_size))
    right = [row["label" if prompt.words else "answer"] for row in rows]
    return [[asked[n] for n in group] for group in groups], [right[n] for g in groups for n in g]


def likelihood_split(
    base: Language,
    prompt: Prompt,
    rows: Rows,
    *,
    max_length: int,
    batch_size: int = 16,
    before: str = " ",
) -> LabelledSplit:
    """Labelled rows; the prediction is the class whose word is most likely after the prompt.

    before: what stands between prompt and word.
    """
    batches, gold = prompt_batches(base, prompt, rows, max_length, batch_size)
    words = [choices(base, few, [before + word for word in prompt.words]) for few in batches]
    return LabelledSplit(words, torch.tensor(gold, device=base.device))


@dataclass(frozen=True)
class WrittenSplit:
    """Rows that are answered by greedy generation, up to EOS or `max_new` tokens.

    gold: class numbers where the prompt has words. The prediction is the class whose word the
    answer is exactly, and one past the last class where it is none. references: right texts of a
    free-form task, graded as `grade` says.
    """

    base: Language
    prompt: Prompt
    prompts: Sequence[Sequence[Sequence[int]]]  # in batches
    max_new: int
    precision: str
    gold: Int[Tensor, " B"] | None = None
    references: Sequence[str] | None = None
    grade: str = "rouge1"

    @property
    def rows(self) -> int:
        return sum(map(len, self.prompts))

    def answers(self, problem: MergeProblem, merged: Merged, task: int) -> list[str]:
        """The merged model's texts. Raises ValueError for a predictor, which has no weights."""
        if not isinstance(merged, Tensor):
            raise ValueError(
                "only one merged vector can write; score a predictor by the likelihood of words"
            )
        ask = partial(greedy, self.base, problem.vectors.layout.unflatten(merged))
        options = {"max_new": self.max_new, "precision": self.precision}
        return [
            written(self.base, answer) for few in self.prompts for answer in ask(few, **options)
        ]

    def predictions(self, problem: MergeProblem, merged: Merged, task: int) -> dict[str, object]:
        """The columns `predicted` and `gold` of a Report."""
        texts = self.answers(problem, merged, task)
        if self.references is None:
            classes = [self.prompt.read(text) for text in texts]
            return {"predicted": classes, "gold": self.gold.tolist()}
        return {"predicted": GRADES[self.grade](texts, self.references), "gold": self.grade}


def written_split(
    base: Language,
    prompt: Prompt,
    rows: Rows,
    *,
    max_length: int,
    max_new: int,
    precision: str = "float32",
    batch_size: int = 32,
    grade: str = "rouge1",
) -> WrittenSplit:
    """Labelled rows of a task, to be answered by generation. grade: of free text, one of GRADES."""
    batches, right = prompt_batches(base, prompt, rows, max_length, batch_size)
    gold = {"gold": torch.tensor(right)} if prompt.words else {"references": right, "grade": grade}
    return WrittenSplit(base, prompt, batches, max_new, precision, **gold)


def rouge1(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-1: F1 of the stemmed words that a text shares with its reference, 0 to 1, per row."""
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    found = zip(texts, references, strict=True)
    return [round(scorer.score(right, text)["rouge1"].fmeasure, 4) for text, right in found]


def exact(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for a text that is its reference, in any case, spacing and outer punctuation, else 0."""
    return [float(normal(a) == normal(b)) for a, b in zip(texts, references, strict=True)]


GRADES = {"rouge1": rouge1, "exact": exact}
