"""Coefficients beside conflict, cosine, norm and JS, and their rank correlations."""

from types import SimpleNamespace

import numpy as np
import pytest
from divmerge_book.interference.weights import sign_conflict
from divmerge_book.studies.coefficient_analysis import COVARIATES, cluster_correlations, tables

from divmerge_core.methods import METHODS

EFFORT = {"counts": (2, 4, 8), "groupings": ("block", "layer"), "inputs": 5, "epochs": 1}
EFFORT = SimpleNamespace(**EFFORT, draws=30)


def test_coefficients_and_covariates_are_those_of_the_method_tasks_and_group(linear):
    found, seen = tables({0: linear}, EFFORT), {}
    table, vectors = found["coefficients"], linear.problem.vectors
    METHODS["divmerge"](
        linear.problem.select(["task0", "task1"]), grouping="block", inputs=5, epochs=1, seed=0,
        progress=False, callback=lambda step: seen.update(coeffs=step.coeffs),
    )  # fmt: skip
    rows = table[(table["count"] == 2) & (table.grouping == "block")]
    wide = rows.pivot_table("coefficient", "task", "group", sort=False)
    assert np.allclose(wide.to_numpy(), seen["coeffs"].numpy(), atol=1e-5)
    assert (rows.reach == 0.01 * 1).all(), "one batch of five, once"
    assert ((rows.coefficient - 1 / 2).abs() <= 1.01 * rows.reach).all()
    assert set(table["count"]) == {2, 4}, "more tasks than there are are left out"

    rows = table[(table["count"] == 4) & (table.grouping == "layer")]
    row = rows[(rows.task == "task1") & (rows.group == vectors.layout.names[1])].iloc[0]
    start, stop = vectors.layout.bounds[1]
    pairs = sign_conflict(vectors.deltas[:, start:stop])[1]
    assert row.conflict == pytest.approx(((pairs.sum() - pairs[1]) / 3).item())
    share = vectors.deltas[1, start:stop].norm() / vectors.deltas[1].norm()
    assert row.norm == pytest.approx(share.item())

    found = found["followed"]
    assert list(found.clue) == 4 * [*COVARIATES] and set(found["count"]) == {4}
    assert list(found["view"].unique()) == ["cells", "within"]
    assert set(found.grouping) == {"block", "layer"}
    assert found.rho.dropna().between(-1, 1).all() and found.cells.min() >= 8


def test_a_map_follows_itself_and_its_negation_perfectly():
    target = np.random.default_rng(0).normal(size=(5, 3))
    clues = np.stack([target, -target, np.ones((5, 3))])
    own, turned, flat = cluster_correlations(target, clues, draws=120).to_dict("records")
    assert own["rho"] == pytest.approx(1) and turned["rho"] == pytest.approx(-1)
    assert own["low"] == pytest.approx(1) and np.isnan(flat["rho"])
    assert own["p"] <= 2 / 120 and own["p_max"] >= own["p"]


def test_tasks_are_renamed_as_wholes():
    # Every task has the same row: no renaming changes anything, so nothing is found.
    target = np.tile([1.0, 2.0, 3.0], (4, 1))
    (record,) = cluster_correlations(target, target[None], draws=24).to_dict("records")
    assert record["rho"] == pytest.approx(1) and record["p"] == 1
