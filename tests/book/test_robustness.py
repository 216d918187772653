"""Corrupted experts and temperatures: what is changed, and what it costs the other tasks."""

import pytest
import torch
from divmerge_book.data.tasks import TASKS
from divmerge_book.studies.choice import ablation, summary
from divmerge_book.studies.evaluator import accuracies
from divmerge_book.studies.objective_fits import FitConfig, fit_result
from divmerge_book.studies.predictions import compared, split
from divmerge_book.studies.robustness import (
    CORRUPTIONS,
    corrupted_fit,
    corruption_costs,
    corruption_study,
    permuted,
    temperatures,
)
from torch.testing import assert_close

from divmerge_core.merging.fit import expert_logits

SHORT = FitConfig(epochs=1, rates=(0.1,), rate=0.1)


def test_noise_has_the_norm_of_what_it_replaces_tensor_by_tensor(experiment):
    before = experiment.problem.vectors.deltas.clone()
    changed = CORRUPTIONS["noise"](experiment, 1, 0).experiment.problem.vectors
    assert torch.equal(experiment.problem.vectors.deltas, before)
    assert torch.equal(changed.deltas[0], before[0])
    for start, stop in changed.layout.bounds:
        assert_close(changed.deltas[1, start:stop].norm(), before[1, start:stop].norm())
    assert torch.cosine_similarity(changed.deltas[1], before[1], dim=0).abs() < 0.2


def test_permuted_labels_are_the_same_labels_on_other_rows_and_teach_little(experiment):
    splits = TASKS["place"].read()
    shuffled = permuted(splits, 0)
    texts, answers = zip(*((row[0], row[-1]) for row in splits["train"]), strict=True)
    same, others = zip(*((row[0], row[-1]) for row in shuffled["train"]), strict=True)
    assert same == texts and others != answers and sorted(others) == sorted(answers)
    assert all(shuffled[key] == splits[key] for key in splits if key != "train")
    changed = CORRUPTIONS["permuted"](experiment, 1, 0).experiment
    deltas, before = changed.problem.vectors.deltas, experiment.problem.vectors.deltas
    assert torch.equal(deltas[0], before[0])
    own = changed.problem.vectors.expert("place")
    assert_close(own, changed.problem.vectors.layout.flatten(changed.experts[1].state))
    good, bad = (
        accuracies(one, one.problem.vectors.expert("place"), ["place"])[0]
        for one in (experiment, changed)
    )
    assert bad < good - 0.2


def test_answers_are_changed_for_one_expert_alone(experiment):
    own = expert_logits(experiment.problem)
    wrong, sure, none = (
        corrupted_fit(experiment, kind, "js", seed=1)[1].targets
        for kind in ("wrong", "overconfident", "none")
    )
    for given in (wrong, sure):
        assert_close(list(given[0]), list(own[0]))
    assert_close(wrong[1][0], own[1][0][:, [2, 0, 1]])
    assert_close(sure[1][0], 5 * own[1][0])
    assert none is None


def test_costs_are_what_the_others_lose_against_leaving_the_expert_out(experiment):
    options = {"kinds": ["none", "wrong"], "groupings": ["task"], "config": SHORT}
    found = corruption_costs(corruption_study({0: experiment}, specs=["js", "kl"], **options))
    assert list(found.kind) == ["none", "none", "wrong", "wrong"]
    assert set(found.task) == {"mood"}
    # left out of two, the other expert stays alone: it is itself, and its ratio is 1
    assert found.cost.tolist() == pytest.approx((1 - found.honest).tolist())
    plain = fit_result(experiment, "js", "task", SHORT.rate, SHORT)["coefficients"]
    own = found[(found.kind == "none") & (found.objective == "js")]
    assert own.coefficient.item() == pytest.approx(plain[0][0])


def test_temperature_one_is_the_plain_fit(experiment):
    options = {"grouping": "task", "config": SHORT}
    hot = temperatures({0: experiment}, specs=["js"], values=[1.0, 4.0], **options)
    found = split(compared(hot["rows"], draws=50), ("objective", "temperature"))
    options = {"groupings": ["task"], "counts": [2], "config": SHORT}
    plain = summary(ablation({0: experiment}, specs=["js"], **options)["scores"], draws=50)
    same = plain[(plain.search == "same") & (plain.objective == "js")].anp.item()
    assert found.anp[0] == pytest.approx(same)
    assert list(found.temperature) == list(hot["fits"].temperature) == [1.0, 4.0]
