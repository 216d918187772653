"""Evaluation: a merged model's answers, and metrics worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation import metrics
from divmerge_book.evaluation.metrics import accuracy, confusion, f1, macro_f1, matthews, scores


def exams_of(problem) -> list[metrics.LabelledSplit]:
    generator = torch.Generator().manual_seed(0)
    counts = [sum(len(batch.weight) for batch in own) for own in problem.batches]
    gold = [torch.randint(4, (count,), generator=generator) for count in counts]
    return list(map(metrics.LabelledSplit, problem.batches, gold))


BINARY = np.array([[5, 1], [2, 4]])  # [gold, predicted]
THREE = np.array([[3, 1, 0], [0, 4, 2], [1, 0, 9]])


def test_a_confusion_matrix_counts_gold_by_predicted():
    found = confusion([0, 0, 1, 1, 2, 0], [0, 1, 1, 2, 2, 0])
    assert found.tolist() == [[2, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert (accuracy(found), accuracy(BINARY)) == (4 / 6, 9 / 12)


def test_macro_f1_is_the_mean_of_the_classes_own():
    first = 2 * 5 / (2 * 5 + 2 + 1)  # 2 TP / (2 TP + FP + FN)
    second = 2 * 4 / (2 * 4 + 1 + 2)
    assert macro_f1(BINARY) == pytest.approx((first + second) / 2)
    precision, recall = (3 / 4, 4 / 5, 9 / 11), (3 / 4, 4 / 6, 9 / 10)
    each = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    assert macro_f1(THREE) == pytest.approx(sum(each) / 3)


def test_a_class_that_never_occurs_does_not_count_in_macro_f1():
    assert macro_f1(np.array([[4, 0, 0], [0, 0, 0], [0, 0, 2]])) == 1
    # A class that is predicted and never right counts, with 0.
    assert macro_f1(np.array([[4, 1], [0, 0]])) == pytest.approx((8 / 9) / 2)


def test_matthews_is_the_correlation_of_two_binary_variables():
    tn, fp, fn, tp = 5, 1, 2, 4
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(BINARY) == pytest.approx(expected)
    gold = np.repeat([0, 0, 1, 1], [5, 1, 2, 4])
    predicted = np.repeat([0, 1, 0, 1], [5, 1, 2, 4])
    assert matthews(BINARY) == pytest.approx(np.corrcoef(gold, predicted)[0, 1])


def test_matthews_of_three_classes_is_gorodkins():
    """R_K from covariances of one-hot rows, summed over classes."""
    gold, predicted = (np.repeat(side, THREE.ravel()) for side in np.indices((3, 3)).reshape(2, 9))
    x, y = np.eye(3)[gold], np.eye(3)[predicted]
    cov = lambda a, b: ((a - a.mean(0)) * (b - b.mean(0))).sum()  # noqa: E731
    assert matthews(THREE) == pytest.approx(cov(x, y) / math.sqrt(cov(x, x) * cov(y, y)))


def test_perfect_inverted_and_constant_answers_have_the_known_scores():
    known = {(0, 1, 0, 1): (1, 1, 1), (1, 0, 1, 0): (0, 0, -1), (0, 0, 0, 0): (1 / 2, 1 / 3, 0)}
    for predicted, expected in known.items():
        found = confusion(predicted, [0, 1, 0, 1])
        assert [f(found) for f in (accuracy, macro_f1, matthews)] == pytest.approx(expected)


def test_f1_is_of_answer_1_against_all_others():
    tp, fp, fn = 4, 1, 2
    assert f1(BINARY) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert f1(confusion([0] * 4, [0] * 4)) == 0  # nobody gives a 1
    assert f1(confusion([0, 1, 1, 0], [0, 1, 1, 0])) == 1
    third = np.array([[5, 1, 0], [1, 4, 1], [0, 0, 0]])  # one answer is neither
    assert f1(third) == pytest.approx(2 * tp / (2 * tp + fp + fn))


def table(task: str, predicted: list[int], gold: list[int]) -> pd.DataFrame:
    labels = {"suite": "s", "subset": task, "method": "m", "seed": 0, "task": task}
    return pd.DataFrame([{**labels, "predicted": predicted, "gold": gold}])


def test_only_two_gold_answers_have_an_f1():
    every = {"accuracy", "macro_f1", "matthews", "f1"}
    assert set(scores(table("t", [0, 1, 2], [0, 1, 1])).metric) == every
    assert "f1" not in set(scores(table("t", [0, 1, 1], [0, 1, 2])).metric)


@pytest.mark.parametrize(
    ("task", "metric"),
    [("cola", "matthews"), ("mrpc", "f1"), ("qqp", "f1"), ("rte", "accuracy"), ("x", "accuracy")],
)
def test_every_glue_task_has_its_own_metric(task, metric):
    own = metrics.own_scores(scores(table(task, [0, 1, 1, 1], [0, 1, 0, 1])))
    assert own.metric.tolist() == [metric]
    by_hand = {"matthews": 1 / math.sqrt(3), "f1": 4 / 5, "accuracy": 3 / 4}
    assert own.value.item() == pytest.approx(by_hand[metric])


def test_more_than_36_answers_are_scored():
    """Banking has 77."""
    answers = list(range(77))
    tidy = scores(table("banking", answers, [*answers[:-1], 3])).set_index("metric").value
    assert tidy["accuracy"] == pytest.approx(76 / 77)


def test_answers_are_the_largest_logits_in_order(problem):
    exams, flat = exams_of(problem), problem.vectors.base
    for task, exam in enumerate(exams):
        logits = torch.cat([problem.logits(flat, task, batch) for batch in exam.batches])
        assert torch.equal(metrics.predict(problem, flat, task, exam), logits.argmax(-1))


def test_one_row_per_task_holds_answers_gold_and_labels(problem):
    exams = exams_of(problem)
    rows = metrics.evaluate(problem, problem.vectors.base, exams, method="base", seed=3)
    assert rows.task.tolist() == list(problem.vectors.tasks)
    assert rows.method.tolist() == ["base"] * 3 and rows.seed.tolist() == [3] * 3
    for row, exam in zip(rows.itertuples(), exams, strict=True):
        assert row.gold == exam.gold.tolist()
        assert len(row.predicted) == len(row.gold) == 15


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merged_model_that_is_no_number_is_refused(problem, value):
    flat = problem.vectors.base.clone()
    flat[3] = value
    with pytest.raises(ValueError, match="merged parameters hold NaN or inf; nothing can be sc"):
        metrics.evaluate(problem, flat, exams_of(problem))
