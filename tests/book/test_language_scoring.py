"""Scores of language models: likelihood, exact words, and ROUGE-1, in one Report."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book import TASKS, Report
from divmerge_book.evaluation import language_scoring
from divmerge_book.evaluation.hyperparameter_search import shares
from divmerge_book.evaluation.language_scoring import likelihood_split, rouge1, written_split
from divmerge_book.evaluation.metrics import grades
from divmerge_book.models.language.prompts import PROMPTS
from helpers import raising

from divmerge_core import MergeProblem, TaskVectors


def test_words_in_common_by_hand():
    found = rouge1(["the cat sat", "", "cats"], ["a cat sat down", "anything", "The cat!"])
    # 2 words shared: precision 2/3, recall 2/4; none; 1 of 1 and 1 of 2, stemmed
    assert found == pytest.approx([4 / 7, 0, 2 / 3], abs=1e-4)


def exam_of(base, kind, name="sst2", **options):
    rows = TASKS[name].load("test").select(range(8))
    return kind(base, PROMPTS[name], rows, max_length=64, batch_size=3, **options)


def one_model(base) -> tuple[MergeProblem, torch.Tensor]:
    from divmerge_book.models.language.forward import language_forward

    vectors = TaskVectors.from_states(base.state, {"sst2": base.state})
    return MergeProblem(vectors, [[]], language_forward(base.model)), vectors.base


def test_every_prompt_keeps_its_right_answer(llama):
    """Prompts of like length go together, so that rows change places."""
    rows = [{"text": "film " * n, "label": n % 2} for n in (5, 1, 4, 2, 3)]
    groups, right = language_scoring.prompt_batches(llama, PROMPTS["sst2"], rows, 200, 2)
    by_words = sorted(zip((len(one) for group in groups for one in group), right, strict=True))
    assert [label for _, label in by_words] == [1, 0, 1, 0, 1]


def test_likelihood_takes_the_likeliest_word_of_every_row(llama, glue_rows):
    problem, flat = one_model(llama)
    exam = exam_of(llama, likelihood_split)
    marks = exam.predictions(problem, flat, 0)
    assert exam.rows == 8 and len(marks["predicted"]) == 8
    rows = TASKS["sst2"].load("test").select(range(8))
    assert sorted(marks["gold"]) == sorted(rows["label"])
    assert set(marks["predicted"]) <= {0, 1}


def test_what_is_written_counts_where_it_is_exactly_a_word(llama, glue_rows, monkeypatch):
    problem, flat = one_model(llama)
    exam = exam_of(llama, written_split, max_new=4)
    texts = [" positive", "Negative.", "very positive", "", "film", "no", "yes", "negative"]
    monkeypatch.setattr(type(exam), "answers", lambda *given: texts)
    found = exam.predictions(problem, flat, 0)["predicted"]
    assert found == [1, 0, 2, 2, 2, 2, 2, 0]  # 2: none of the two


def test_a_predictor_writes_nothing(llama, glue_rows):
    problem, _ = one_model(llama)
    predictor = SimpleNamespace(nbytes=0, logits=raising(AssertionError("not asked")))
    with pytest.raises(ValueError, match="score a predictor by the likelihood"):
        exam_of(llama, written_split, max_new=4).predictions(problem, predictor, 0)


def mixed(seeds: int = 2) -> Report:
    """Two methods; task `words` has classes, task `text` grades."""
    answers = {"expert": ("1100", [0.5, 0.7, 0.6, 0.6]), "half": ("1011", [0.25, 0.35, 0.3, 0.3])}
    rows = [
        {"suite": "s", "subset": "a", "method": method, "seed": seed, **own}
        for seed in range(seeds)
        for method, (words, text) in answers.items()
        for own in (
            {"task": "words", "predicted": words, "gold": "1100"},
            {"task": "text", "predicted": text, "gold": "rouge1"},
        )
    ]
    return Report.of(pd.DataFrame(rows))


def test_the_anp_is_the_mean_of_ratios_of_accuracy_and_grade():
    tidy = mixed().metrics().set_index(["method", "task", "metric"]).value
    assert tidy[("half", "text", "rouge1")].tolist() == pytest.approx([0.3, 0.3])
    assert tidy[("half", "all", "anp")].tolist() == pytest.approx([(0.25 + 0.5) / 2] * 2)
    assert mixed().counted("s") == ["words", "text"]


def test_the_bootstrap_resamples_graded_rows_too():
    found = mixed().intervals().set_index("method")
    assert found.loc["half", "value"] == pytest.approx(0.375)
    assert found.loc["half", "low"] < 0.375 < found.loc["half", "high"]
    ends = found.loc["expert", ["low", "value", "high"]].tolist()
    assert ends == pytest.approx([1, 1, 1])  # paired
    value, low, high = mixed().difference("s", "a", "half", "expert")
    assert value == pytest.approx(-0.625) and low < value < high


def test_a_mixed_report_comes_back_as_it_was(tmp_path):
    mixed().save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    pd.testing.assert_frame_equal(again.metrics(), mixed().metrics())


def test_validation_takes_grades_as_they_are():
    assert shares(mixed(1).rows) == pytest.approx([1.0, 0.6, 0.25, 0.3])
    np.testing.assert_array_equal(grades([1, 0], [1, 1]), [1.0, 0.0])
