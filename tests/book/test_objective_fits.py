"""Objectives of a fit of coefficients: what is minimised, and one fit."""

from dataclasses import replace

import pytest
import torch
from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.hyperparameter_search import validation_anp
from divmerge_book.studies import objective_fits
from divmerge_book.studies.objective_fits import FitConfig, FitSpec, fit, fit_result, fit_spec
from helpers import MARKERS, linear_problem
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES

SHORT = FitConfig(epochs=1, rates=(1e-2, 0.3), rate=0.1)


def test_every_divergence_and_three_baselines_are_compared():
    assert objective_fits.objectives() == [*DIVERGENCES, "hidden_cosine", "entropy", "labels"]
    assert "cheats" in objective_fits.BASELINE_OBJECTIVES.facts["labels"]["label"]


def test_the_oracle_minimises_the_cross_entropy_with_every_gold_answer(experiment):
    problem, spec = experiment.problem, fit_spec(experiment, "labels")
    every = objective_fits.gold_answers(experiment)
    for number, (task, answers) in enumerate(zip(MARKERS, every, strict=True)):
        for batch, gold in zip(problem.batches[number], answers, strict=True):
            texts = experiment.base.tokenizer.batch_decode(batch.inputs["input_ids"])
            for text, answer in zip(texts, gold.tolist(), strict=True):
                (marker,) = set(text.split()) & set(MARKERS[task])
                assert TASKS[task].answers[answer] == MARKERS[task][marker]
        logits = problem.logits(problem.vectors.base, number, problem.batches[number][0])
        found = spec.loss(spec.targets[number][0], logits)
        expected = torch.nn.functional.cross_entropy(logits, answers[0], reduction="none")
        assert_close(found, expected)


def test_hidden_states_are_what_the_heads_read(experiment):
    problem, hidden = experiment.problem, fit_spec(experiment, "hidden_cosine").problem
    for number, expert in enumerate(experiment.experts):
        batch = problem.batches[number][0]
        states = hidden.logits(problem.vectors.base, number, batch)
        logits = states @ expert.head["weight"].T + expert.head["bias"]
        assert_close(logits, problem.logits(problem.vectors.base, number, batch))


def test_entropy_does_not_depend_on_the_expert(experiment):
    loss, merged = fit_spec(experiment, "entropy").loss, torch.randn(3, 2)
    assert torch.equal(loss(torch.zeros(3, 2), merged), loss(torch.randn(3, 2), merged))


def test_what_compares_no_two_answers_has_no_temperature(experiment):
    with pytest.raises(ValueError, match="'entropy' has no temperature, got 2.0; leave it out"):
        fit_spec(experiment, "entropy", 2.0)
    with pytest.raises(ValueError, match="choose one of"):
        fit_spec(experiment, "entropi")


def test_words_that_no_input_uses_are_left_out_and_do_not_change_a_fit(experiment, monkeypatch):
    problem, smaller = experiment.problem, objective_fits.with_used_words(experiment.problem)
    ids = torch.cat([b.inputs["input_ids"].flatten() for some in problem.batches for b in some])
    place = problem.vectors.layout.names.index(objective_fits.WORDS)
    assert smaller.vectors.layout.shapes[place][0] == len({0, *ids.tolist()})
    both = smaller, problem
    for task in range(len(MARKERS)):
        assert_close(*(one.logits(one.vectors.base, task, one.batches[task][0]) for one in both))
    linear = linear_problem()
    assert objective_fits.with_used_words(linear) is linear
    fast = fit(fit_spec(experiment, "js"), "layer", 0.1, SHORT)
    monkeypatch.setattr(objective_fits, "with_used_words", lambda problem: problem)
    assert_close(fit(fit_spec(experiment, "js"), "layer", 0.1, SHORT)[0], fast[0])


@pytest.mark.parametrize("name", ["js", "hidden_cosine", "entropy", "labels"])
def test_every_fit_lowers_its_own_objective(experiment, name):
    spec, losses = fit_spec(experiment, name), []
    problem = replace(spec.problem, batches=[some[:1] for some in spec.problem.batches])
    targets = spec.targets and [some[:1] for some in spec.targets]
    whole = FitSpec(problem, spec.loss, targets)
    fit(whole, "layer", 0.03, FitConfig(epochs=6), lambda step: losses.append(step.loss))
    assert losses[-2] < losses[0]


def test_a_fit_that_diverges_is_scored_where_it_started(experiment):
    found = fit_result(experiment, "logit_mse", "task", 150.0, SHORT)
    assert found["diverged"] and found["coefficients"] == [[0.5], [0.5]]
    start = fit_result(experiment, "start", "task", 0.0, SHORT)
    assert not start["diverged"] and start["coefficients"] == found["coefficients"]
    assert start["validation"] == found["validation"]


def test_coefficients_are_validated_as_merged(experiment):
    found = fit_result(experiment, "js", "layer", 0.1, SHORT)
    coefficients = torch.tensor(found["coefficients"])
    flat = objective_fits.merge(experiment.problem.vectors, coefficients, "layer")
    assert found["validation"] == validation_anp(experiment, flat)
    assert not found["diverged"]
