"""Three ways to score a language model: by likelihood, by what it writes, and by words in common.

Each is an exam: `evaluate` asks it for marks, whatever kind it is, and a Report may hold them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import torch
from jaxtyping import Int
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.models.language.completions import greedy, written
from divmerge_book.models.language.models import Language
from divmerge_book.models.language.prompts import Prompt
from divmerge_book.models.language.reading import ask, by_length, choices
from divmerge_core.merging.problem import Merged, MergeProblem


def likelihood_exam(
    base: Language,
    prompt: Prompt,
    rows: datasets.Dataset | Sequence[Mapping[str, object]],
    *,
    max_length: int,
    batch_size: int = 16,
) -> LabelledSplit:
    """Labelled rows, answered by the class whose word is most likely after the prompt."""
    asked = ask(base, prompt, rows, max_length).prompts
    groups = list(by_length(list(map(len, asked)), batch_size))
    batches = [choices(base, [asked[n] for n in group], prompt.words) for group in groups]
    order = [number for group in groups for number in group]
    gold = torch.tensor([rows[number]["label"] for number in order], device=base.device)
    return LabelledSplit(batches, gold)


@dataclass(frozen=True)
class WrittenExam:
    """Rows that are answered by writing: greedily, up to EOS or `max_new` tokens.

    gold: class numbers where the prompt has words: an answer counts where it is exactly one of
    them, and is of one class more where it is none. references: right texts for a free-form task,
    whose mark is ROUGE-1 between the two.
    """

    base: Language
    prompt: Prompt
    prompts: Sequence[Sequence[Sequence[int]]]  # in batches
    max_new: int
    precision: str
    gold: Int[Tensor, " B"] | None = None
    references: Sequence[str] | None = None

    @property
    def rows(self) -> int:
        """How many rows are answered."""
        return sum(map(len, self.prompts))

    def answers(self, problem: MergeProblem, merged: Merged, task: int) -> list[str]:
        """What the merged model writes. Raises ValueError for a predictor, which has no weights."""
        if not isinstance(merged, Tensor):
            raise ValueError(
                "only one merged vector can write; score a predictor by the likelihood of words"
            )
        parameters = problem.vectors.layout.unflatten(merged)
        return [
            written(self.base, answer)
            for few in self.prompts
            for answer in greedy(
                self.base, parameters, few, max_new=self.max_new, precision=self.precision
            )
        ]

    def marks(self, problem: MergeProblem, merged: Merged, task: int) -> dict[str, object]:
        """The columns `predicted` and `gold` of a Report."""
        texts = self.answers(problem, merged, task)
        if self.references is None:
            said = [self.prompt.read(text) for text in texts]
            return {"predicted": said, "gold": self.gold.tolist()}
        return {"predicted": rouge1(texts, self.references), "gold": "rouge1"}


@dataclass(frozen=True)
class KnownExam:
    """Marks that are known already: free text scored before is not written again."""

    known: Mapping[str, object]

    @property
    def rows(self) -> int:
        """How many rows were answered."""
        return len(self.known["predicted"])

    def marks(self, problem: MergeProblem, merged: Merged, task: int) -> dict[str, object]:
        """These marks."""
        return {key: self.known[key] for key in ("predicted", "gold")}


def written_exam(
    base: Language,
    prompt: Prompt,
    rows: datasets.Dataset | Sequence[Mapping[str, object]],
    *,
    max_length: int,
    max_new: int,
    precision: str = "float32",
    batch_size: int = 32,
) -> WrittenExam:
    """Labelled rows of a task, to be answered by writing."""
    asked = ask(base, prompt, rows, max_length).prompts
    groups = list(by_length(list(map(len, asked)), batch_size))
    order = [number for group in groups for number in group]
    batches = [[asked[number] for number in group] for group in groups]
    if prompt.words:
        right = {"gold": torch.tensor([rows[number]["label"] for number in order])}
    else:
        right = {"references": [rows[number]["answer"] for number in order]}
    return WrittenExam(base, prompt, batches, max_new, precision, **right)


def rouge1(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 of the words that a text has in common with its reference, stemmed: 0 to 1, per row."""
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    found = zip(texts, references, strict=True)
    return [round(scorer.score(right, text)["rouge1"].fmeasure, 4) for text, right in found]
