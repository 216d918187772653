"""Ask a merged model, and score its answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from divmerge_core.merging.problem import Batch, Merged, MergeProblem

METRICS = ("accuracy", "macro_f1", "matthews", "f1")
OWN = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}  # GLUE's own metrics; else accuracy


@runtime_checkable
class AnySplit(Protocol):
    """A labelled split that can be scored: how many rows it has, and a model's marks on it."""

    @property
    def rows(self) -> int: ...

    def marks(self, problem: MergeProblem, merged: Merged, task: int) -> dict[str, object]: ...


@dataclass(frozen=True)
class LabelledSplit:
    """A labelled split, ready to be scored: batches, and the gold answer of every row in order."""

    batches: Sequence[Batch]
    gold: Int[Tensor, " B"]

    @property
    def rows(self) -> int:
        """How many rows are answered."""
        return len(self.gold)

    def marks(self, problem: MergeProblem, merged: Merged, task: int) -> dict[str, object]:
        """The columns `predicted` and `gold` of a Report: an answer's number per row."""
        answers = predict(problem, merged, task, self)
        return {"predicted": answers.tolist(), "gold": self.gold.tolist()}


def predict(
    problem: MergeProblem, merged: Merged, task: int, exam: LabelledSplit
) -> Int[Tensor, " B"]:
    """The merged model's answers on one task's exam."""
    with torch.no_grad():
        return torch.cat([problem.logits_of(merged, task, b).argmax(-1) for b in exam.batches])


def evaluate(
    problem: MergeProblem,
    merged: Merged,
    exams: Sequence[AnySplit],
    **labels: object,
) -> pd.DataFrame:
    """Rows of a Report: the merged model's answers on every task, beside the right ones.

    merged: merged parameters [N], or a Predictor. labels fill the columns suite, subset, method
    and seed. Answers are numbers, one per test row. An exam that grades free text gives grades
    between 0 and 1 instead, and the grade's name in the place of right answers.
    Raises ValueError for a merged vector that holds NaN or inf.
    """
    if isinstance(merged, Tensor) and not torch.isfinite(merged).all():
        raise ValueError("the merged parameters hold NaN or inf; nothing can be scored")
    rows = []
    for number, (task, exam) in enumerate(zip(problem.vectors.tasks, exams, strict=True)):
        rows.append({**labels, "task": task, **exam.marks(problem, merged, number)})
    return pd.DataFrame(rows)


def numbers(answers: str | Sequence[int]) -> np.ndarray:
    """Answers as numbers, also from older text: one character each (0-9, then a, b, ...)."""
    if isinstance(answers, str):
        answers = [int(character, 36) for character in answers]
    return np.asarray(answers, dtype=int)


def graded(gold: str | Sequence[int], predicted: str | Sequence[float | int]) -> bool:
    """Whether a row holds grades of free text: a grade's name stands in the place of answers."""
    return isinstance(gold, str) and not isinstance(predicted, str)


def grades(predicted: str | Sequence[float | int], gold: str | Sequence[int]) -> np.ndarray:
    """What every row counts, 0 to 1: right or wrong, or the grade of a free text."""
    if graded(gold, predicted):
        return np.asarray(predicted, dtype=float)
    return (numbers(predicted) == numbers(gold)).astype(float)


def listed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose answers, older text or numbers, are lists of numbers; grades stay."""
    given = list(zip(rows.predicted, rows.gold, strict=True))
    both = [
        (predicted, gold)
        if graded(gold, predicted)
        else (numbers(predicted).tolist(), numbers(gold).tolist())
        for predicted, gold in given
    ]
    predicted, gold = (
        pd.Series(part, rows.index, dtype=object) for part in zip(*both, strict=True)
    )
    return rows.assign(predicted=predicted, gold=gold)


def commonest(predicted: Sequence[float | int], gold: str | Sequence[int]) -> np.ndarray:
    """What always giving the commonest gold answer gets on every row: 0 or 1; 0 if graded."""
    if graded(gold, predicted):
        return np.zeros(len(predicted))
    answers = numbers(gold)
    return (answers == np.bincount(answers).argmax()).astype(float)


def confusion(predicted: str | Sequence[int], gold: str | Sequence[int]) -> np.ndarray:
    """Counts [gold, predicted]."""
    p, g = numbers(predicted), numbers(gold)
    size = 1 + max(p.max(), g.max())
    return np.bincount(g * size + p, minlength=size * size).reshape(size, size)


def accuracy(table: np.ndarray) -> float:
    """Share of right answers, 0 to 1."""
    return float(np.trace(table) / table.sum())


def macro_f1(table: np.ndarray) -> float:
    """Mean over classes (gold or predicted) of 2 TP / (2 TP + FP + FN), 0 to 1."""
    both = table.sum(0) + table.sum(1)
    return float((2 * np.diag(table)[both > 0] / both[both > 0]).mean())


def matthews(table: np.ndarray) -> float:
    """Matthews correlation (Gorodkin's R_K for more classes), -1 to 1; 0 where it is undefined."""
    n, true, guessed = table.sum(), table.sum(1), table.sum(0)
    scale = np.sqrt(float(n**2 - guessed @ guessed) * float(n**2 - true @ true))
    return float((np.trace(table) * n - true @ guessed) / scale) if scale else 0.0


def f1(table: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of answer 1 against all others, 0 to 1; 0 where nobody gives a 1."""
    if len(table) < 2:
        return 0.0
    both = table[1].sum() + table[:, 1].sum()
    return float(2 * table[1, 1] / both) if both else 0.0


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Every row's accuracy, macro F1, Matthews correlation and, of two gold answers, F1, tidy.

    Of a graded row, the mean grade under the grade's own name.
    """
    functions: dict[str, Callable] = dict(
        zip(METRICS, (accuracy, macro_f1, matthews, f1), strict=True)
    )
    found = []
    for row in rows.itertuples():
        key = (row.suite, row.subset, row.method, row.seed, row.task)
        if graded(row.gold, row.predicted):
            found.append((*key, row.gold, float(grades(row.predicted, row.gold).mean())))
            continue
        table = confusion(row.predicted, row.gold)
        some = METRICS[:3] if table[2:].any() else METRICS
        found += [(*key, metric, functions[metric](table)) for metric in some]
    columns = ["suite", "subset", "method", "seed", "task", "metric", "value"]
    return pd.DataFrame(found, columns=columns)


def main_scores(tidy: pd.DataFrame) -> pd.DataFrame:
    """One row per task: its accuracy, or its mean grade."""
    return tidy[~tidy.metric.isin(METRICS[1:])]


def own_scores(tidy: pd.DataFrame) -> pd.DataFrame:
    """One row per task: the metric that the task's authors report (OWN), else accuracy or grade."""
    usual = [OWN.get(task, "accuracy") for task in tidy.task]
    return tidy[(tidy.metric == usual) | ~tidy.metric.isin(METRICS)]


def combine(
    right: np.ndarray, floor: np.ndarray, expert: int, statistic: str
) -> Float[np.ndarray, "D S M"]:
    """Accuracies [tasks, D, S, M] and majorities [tasks, D] to a statistic [D, S, M].

    The kept margin divides by the experts' mean margin over seeds. What a draw or a seed adds to
    it is taken to first order about the rows as they are (D = 0), since a denominator near 0
    would have no variance.
    """
    if statistic == "accuracy":
        return right.mean(0)
    if statistic == "kept_margin":
        above = right - floor[:, :, None, None]
        mean = above[:, :1].mean(2, keepdims=True)  # [tasks, 1, 1, M]: on the rows as they are
        margin = mean[..., [expert]]
        kept = mean / margin
        return (kept + (above - kept * above[..., [expert]]) / margin).mean(0)
    ratio = right / right[..., [expert]]
    return ratio.mean(0) if statistic == "anp" else ratio.min(0)
