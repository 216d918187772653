"""Predictions of a merged model, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from divmerge_core.merging.problem import Batch, Merged, MergeProblem

OWN = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}  # GLUE's own metrics; else accuracy

Numbers = Sequence[float | int] | np.ndarray


@dataclass(frozen=True)
class LabelledSplit:
    """A labelled split: batches, and the gold class of every row, in order."""

    batches: Sequence[Batch]
    gold: Int[Tensor, " B"]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.gold)

    def predictions(self, problem: MergeProblem, merged: Merged, task: int) -> dict[str, object]:
        """The columns `predicted` and `gold` of a Report: a class number per row."""
        classes = predict(problem, merged, task, self)
        return {"predicted": classes.tolist(), "gold": self.gold.tolist()}


def predict(
    problem: MergeProblem, merged: Merged, task: int, split: LabelledSplit
) -> Int[Tensor, " B"]:
    """The merged model's predictions on one task's split."""
    with torch.no_grad():
        return torch.cat([problem.logits_of(merged, task, b).argmax(-1) for b in split.batches])


def evaluate(
    problem: MergeProblem, merged: Merged, splits: Sequence, **labels: object
) -> pd.DataFrame:
    """Rows of a Report: the merged model's predictions on every task, with the gold classes.

    merged: merged parameters [N], or a Predictor. splits: a LabelledSplit or a WrittenSplit per
    task. labels fill the columns suite, subset, method and seed. Free text has grades between 0
    and 1 for `predicted` and their name for `gold`. Raises ValueError for a merged vector that
    holds NaN or inf.
    """
    if isinstance(merged, Tensor) and not torch.isfinite(merged).all():
        raise ValueError("the merged parameters hold NaN or inf; nothing can be scored")
    tasks = zip(problem.vectors.tasks, splits, strict=True)
    return pd.DataFrame(
        {**labels, "task": task, **split.predictions(problem, merged, number)}
        for number, (task, split) in enumerate(tasks)
    )


def graded(gold: str | Numbers) -> bool:
    """Whether a row holds grades of free text: `gold` is then the grade's name."""
    return isinstance(gold, str)


def grades(predicted: Numbers, gold: str | Numbers) -> np.ndarray:
    """The score of every row, 0 to 1: right or wrong, or the grade of a free text."""
    if graded(gold):
        return np.asarray(predicted, dtype=float)
    return (np.asarray(predicted) == np.asarray(gold)).astype(float)


def majority_class(predicted: Numbers, gold: str | Numbers) -> np.ndarray:
    """The score per row, 0 or 1, of always predicting the majority class; 0 if graded."""
    if graded(gold):
        return np.zeros(len(predicted))
    return (np.asarray(gold) == np.bincount(gold).argmax()).astype(float)


def confusion(predicted: Numbers, gold: Numbers) -> np.ndarray:
    """Counts [gold, predicted]."""
    p, g = np.asarray(predicted), np.asarray(gold)
    size = 1 + max(p.max(), g.max())
    return np.bincount(g * size + p, minlength=size * size).reshape(size, size)


def accuracy(table: np.ndarray) -> float:
    """Share of right predictions, 0 to 1."""
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
    """2 TP / (2 TP + FP + FN) of class 1 against all others, 0 to 1; 0 where class 1 is absent."""
    if len(table) < 2:
        return 0.0
    both = table[1].sum() + table[:, 1].sum()
    return float(2 * table[1, 1] / both) if both else 0.0


METRICS = {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews, "f1": f1}


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Tidy scores of every row: METRICS (F1 of two gold classes only), or the mean grade."""
    found, columns = [], ["suite", "subset", "method", "seed", "task", "metric", "value"]
    for row, key in zip(rows.itertuples(), rows[columns[:5]].itertuples(index=False), strict=True):
        if graded(row.gold):
            found.append((*key, row.gold, float(grades(row.predicted, row.gold).mean())))
            continue
        table = confusion(row.predicted, row.gold)
        names = [name for name in METRICS if name != "f1" or not table[2:].any()]
        found += [(*key, name, METRICS[name](table)) for name in names]
    return pd.DataFrame(found, columns=columns)


def main_scores(tidy: pd.DataFrame) -> pd.DataFrame:
    """One row per task: its accuracy, or its mean grade."""
    return tidy[~tidy.metric.isin(set(METRICS) - {"accuracy"})]


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
    with np.errstate(divide="ignore", invalid="ignore"):  # draws where an expert gets none right
        ratio = right / right[..., [expert]]
    return ratio.mean(0) if statistic == "anp" else ratio.min(0)
