"""Coefficients beside conflict, cosine, norm and JS, and their rank correlations."""

import numpy as np
import pytest
import torch
from divmerge_book.interference.weights import sign_conflict
from divmerge_book.studies.coefficient_analysis import (
    COVARIATES,
    average_js,
    cluster_correlations,
    coefficient_table,
    covariate_correlations,
)
from helpers import experiment_of, linear_problem

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.methods import METHODS

EFFORT = {"counts": (2, 4), "groupings": ("block", "layer"), "inputs": 5, "epochs": 1}


@pytest.fixture
def experiment(tiny, cache):
    return experiment_of(linear_problem(num_tasks=4, scale=0.8), tiny)


def test_the_coefficients_are_those_of_the_method(experiment):
    table = coefficient_table({0: experiment}, **EFFORT)
    seen = {}
    some = experiment.problem.select(["task0", "task1"])
    METHODS["divmerge"](
        some, grouping="block", inputs=5, epochs=1, seed=0, progress=False,
        callback=lambda step: seen.update(coeffs=step.coeffs),
    )  # fmt: skip
    rows = table[(table["count"] == 2) & (table.grouping == "block")]
    wide = rows.pivot_table("coefficient", "task", "group", sort=False)
    assert np.allclose(wide.to_numpy(), seen["coeffs"].numpy(), atol=1e-5)
    assert (rows.reach == 0.01 * 1).all(), "one batch of five, once"
    assert ((rows.coefficient - 1 / 2).abs() <= 1.01 * rows.reach).all()


def test_what_stands_beside_a_coefficient_is_of_the_same_tasks_and_group(experiment):
    table = coefficient_table({0: experiment}, **EFFORT)
    rows = table[(table["count"] == 4) & (table.grouping == "layer")]
    names = experiment.problem.vectors.layout.names
    row = rows[(rows.task == "task1") & (rows.group == names[1])].iloc[0]
    start, stop = experiment.problem.vectors.layout.bounds[1]
    deltas = experiment.problem.vectors.deltas
    pairs = sign_conflict(deltas[:, start:stop])[1]
    assert row.conflict == pytest.approx(((pairs.sum() - pairs[1]) / 3).item())
    share = deltas[1, start:stop].norm() / deltas[1].norm()
    assert row.norm == pytest.approx(share.item())


def test_the_js_of_the_average_is_that_of_its_answers(problem):
    found, flat = average_js(problem), METHODS["average"](problem)
    for task, name in enumerate(problem.vectors.tasks):
        batches = problem.batches[task]
        own, merged = (
            torch.cat([problem.logits(some, task, batch) for batch in batches])
            for some in (problem.vectors.expert(name), flat)
        )
        assert found[task] == pytest.approx(DIVERGENCES["js"](own, merged).mean().item())
    assert average_js(problem.select(["task1"])) == pytest.approx([0], abs=1e-12)


def test_more_tasks_than_there_are_are_left_out(experiment):
    wanted = {**EFFORT, "counts": (2, 8), "groupings": ("block",)}
    assert set(coefficient_table({0: experiment}, **wanted)["count"]) == {2}


def test_a_map_follows_itself_and_its_negation_perfectly():
    target = np.random.default_rng(0).normal(size=(5, 3))
    clues = np.stack([target, -target, np.ones((5, 3))])
    table = cluster_correlations(target, clues, draws=120, seed=0)
    own, turned, flat = table.to_dict("records")
    assert own["rho"] == pytest.approx(1) and turned["rho"] == pytest.approx(-1)
    assert own["low"] == pytest.approx(1) and np.isnan(flat["rho"])
    assert own["p"] <= 2 / 120 and own["p_max"] >= own["p"]


def test_tasks_are_renamed_as_wholes():
    # Every task has the same row: no renaming changes anything, so nothing is found.
    target = np.tile([1.0, 2.0, 3.0], (4, 1))
    (record,) = cluster_correlations(target, target[None], draws=24, seed=0).to_dict("records")
    assert record["rho"] == pytest.approx(1) and record["p"] == 1


def test_every_clue_of_every_fit_is_asked(experiment):
    found = covariate_correlations(coefficient_table({0: experiment}, **EFFORT), draws=30)
    assert list(found.clue) == 4 * [*COVARIATES] and set(found["count"]) == {4}
    assert list(found["view"].unique()) == ["cells", "within"]
    assert set(found.grouping) == {"block", "layer"}
    assert found.rho.dropna().between(-1, 1).all() and found.cells.min() >= 8
