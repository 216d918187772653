"""Random merges: coefficients, and what is measured of every model."""

from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies import random_merges as module
from helpers import linear_experiment, refuse

from divmerge_core.divergences import DIVERGENCES


@pytest.fixture
def experiment(tiny, cache) -> Experiment:
    return linear_experiment(tiny, 3, rows=8)


def test_draws_are_what_they_say_and_the_same_again():
    for kind in module.SAMPLERS:
        coeffs = [module.random_coefficients(kind, 3, 5, n, 0) for n in range(200)]
        assert torch.equal(coeffs[7], module.random_coefficients(kind, 3, 5, 7, 0))
        assert not torch.equal(coeffs[7], module.random_coefficients(kind, 3, 5, 7, 1))
        low, high = {"near": (0.5, 1.5), "pair": (0, 2), "layer": (0, 2)}.get(kind, (0, 1))
        every = torch.stack(coeffs)
        assert every.shape[1:] == (3, 5 if kind == "layer" else 1)
        assert low <= every.min() and low + 0.9 * (high - low) < every.max() * 1.3 <= 1.3 * high


def test_a_random_merge_is_a_sum_with_its_coefficients(experiment):
    vectors = experiment.problem.vectors
    layout, close = vectors.layout, partial(torch.testing.assert_close, rtol=0, atol=1e-6)
    coeffs = module.random_coefficients("task", 3, len(layout.names), 4, 1)
    close(module.random_merge(experiment, "task", 4, 1), vectors.merge(coeffs[:, 0].tolist()))
    factors = module.random_coefficients("near", 3, 5, 2, 1)
    found = module.random_merge(experiment, "near", 2, 1, centre=4)
    close(found, vectors.merge((factors * coeffs)[:, 0].tolist()))
    coeffs = module.random_coefficients("layer", 3, len(layout.names), 0, 0).to(vectors.base)
    found = layout.unflatten(module.random_merge(experiment, "layer", 0) - vectors.base)
    parts = [layout.unflatten(row) for row in vectors.deltas]
    for n, name in enumerate(layout.names):  # every tensor has its own coefficient
        close(found[name], sum(coeffs[t, n] * part[name] for t, part in enumerate(parts)))


def test_every_expert_is_nearest_to_itself_and_is_asked_through_the_tasks_head(experiment):
    table = pd.DataFrame(module.experts_on_tasks(experiment, seed=0)).set_index(["task", "model"])
    problem = experiment.problem
    for task in problem.vectors.tasks:
        own = table.loc[task, task]
        assert own.js == 0 and own.accuracy == 1 and table.loc[task].js.idxmin() == task
    p, q = (
        torch.cat([problem.logits(problem.vectors.expert(t), 0, b) for b in problem.batches[0]])
        for t in problem.vectors.tasks[:2]
    )
    found = table.loc[problem.vectors.tasks[:2]]
    for name in module.MEASURES[:-1]:
        assert found[name] == pytest.approx(DIVERGENCES[name](p, q).mean().item(), abs=1e-5)
    right = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.accuracy == pytest.approx(right, abs=1e-5)


def test_models_are_drawn_once_in_pieces_and_come_back_from_the_cache(experiment, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 3)
    table = module.sampled_models(experiment, "task", 5)
    assert len(table) == 15 and sorted(table.model.unique()) == [0, 1, 2, 3, 4]
    monkeypatch.setattr(module, "measured", refuse)
    pd.testing.assert_frame_equal(module.sampled_models(experiment, "task", 5), table)
    with pytest.raises(ValueError, match="cannot write"):
        module.sampled_models(experiment, "task", 6)


def test_bad_draws_are_told_what_is_allowed(experiment):
    with pytest.raises(ValueError, match="choose one of: task, layer, near, pair"):
        module.sampled_models(experiment, "some", 3)
    for sampler, count, centre in (("task", 0, None), ("task", 3, 1), ("near", 3, None)):
        with pytest.raises(ValueError, match="centre to 'near' alone"):
            module.sampled_models(experiment, sampler, count, centre=centre)


def test_neighbours_form_a_ring():
    assert module.neighbours(["a", "b", "c"]) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert module.neighbours(["a", "b"]) == [("a", "b")]


def test_tables_have_every_draw_of_every_seed(experiment):
    counts = SimpleNamespace(task=4, layer=2, near=2, pair=2)
    found = module.random_merges({0: experiment, 1: experiment}, counts)
    models = found["models"]
    sizes = models[models.seed == 1].groupby("sampler", sort=False).size().to_dict()
    assert sizes == {"task": 12, "layer": 6, "near": 6, "pair": 12}
    pairs = {"task0+task1", "task1+task2", "task2+task0"}
    assert set(models[models.sampler == "pair"].experts) == pairs
    assert len(found["cross"]) == 2 * 9
    assert not models.drop(columns="seed").duplicated().all()
