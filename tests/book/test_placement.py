"""Tables of where tasks conflict and of what coefficients do about it, against the measures."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.interference.spectra import mean_alignment
from divmerge_book.interference.weights import norms_by_group, places, sign_conflict, touched
from divmerge_book.models.finetuning import Expert
from divmerge_book.studies import coefficient_analysis as module
from divmerge_book.studies.coefficient_analysis import (
    CLUES,
    Effort,
    average_js,
    cluster_correlations,
    coefficient_table,
    followed,
)
from divmerge_book.studies.layerwise_analysis import (
    COUNTED,
    alignment_table,
    conflict_places,
    idle_rows,
    length_places,
    overlap_counts,
    pair_counts,
    spectrum_table,
    survey,
)
from helpers import linear_problem
from test_arrivals import bench_of, forbid

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.methods import METHODS

EFFORT = Effort((2, 4), ("block", "layer"), inputs=5, epochs=1, seeds=(0,), draws=30)


@pytest.fixture
def bench(tiny, cache) -> Experiment:
    made = bench_of(linear_problem(num_tasks=4, scale=0.8), tiny)
    return replace(made, experts=[Expert(task, {}, {}, {}) for task in made.problem.vectors.tasks])


@pytest.fixture
def decayed(problem):
    """Task vectors whose first four of six words only shrank, by the same factor in all tasks."""
    vectors = problem.vectors
    deltas = vectors.deltas.clone()
    deltas[:, :24] = -1e-3 * vectors.base[:24]
    return replace(vectors, deltas=deltas)


# --- where ----------------------------------------------------------------------------------------


def test_decay_agrees_with_itself_until_it_is_left_out(decayed):
    table = pair_counts(decayed)
    assert list(table.counted.unique()) == list(COUNTED) and len(table) == 3 * 3
    mean = table.groupby("counted").conflict.mean()
    total = decayed.layout.size
    assert mean["all"] == pytest.approx(mean["touched"] * (total - 24) / total)
    row = table[(table.counted == "all") & (table.task == "task0") & (table.partner == "task2")]
    assert row.conflict.item() == pytest.approx(sign_conflict(decayed.deltas)[0, 2].item())


def test_idle_rows_are_counted_and_are_short(decayed):
    table = idle_rows(decayed)
    assert (table.parameters == 24 / decayed.layout.size).all()
    norms = decayed.deltas[:, :24].square().sum(dim=1) / decayed.deltas.square().sum(dim=1)
    assert np.allclose(table.length, norms) and (table.length < 1e-3).all()


def test_places_hold_the_conflict_of_what_stands_there(decayed):
    table = conflict_places(decayed)
    names, _ = places(decayed.layout)
    assert list(table.place.unique()) == list(names)
    assert set(table.kind) == {"embedding", "other"}
    row = table[table.place == names[0]].iloc[0]
    start, stop = decayed.layout.bounds[0]
    learned = touched(decayed).deltas[:, start:stop]
    assert row.conflict == pytest.approx(sign_conflict(learned)[0, 1].item())


def test_shares_of_the_length_add_up_and_idle_words_thin_nothing_out(decayed):
    table = length_places(decayed)
    assert np.allclose(table.groupby("task").share.sum(), 1)
    first = table[(table.place == places(decayed.layout)[0][0]) & (table.task == "task0")]
    norm = norms_by_group(decayed, "place")[0, 0].item()
    assert first.rms.item() == pytest.approx(norm / 12**0.5)


def test_overlaps_stand_beside_their_chance_level(decayed):
    table = overlap_counts(decayed, shares=(0.5, 1.0))
    assert list(table.columns) == ["share", "within", "task", "partner", "overlap"]
    assert (table[table.share == 1.0].overlap == 1).all()
    assert set(table.within) == {"model", "tensor"} and len(table) == 2 * 2 * 3


def test_energies_of_a_spectrum_add_up_to_one(problem):
    table = spectrum_table(problem.vectors)
    assert len(table) == 2 * 3
    assert np.allclose(table.energy.map(sum), 1)
    assert (table.stable >= 1).all() and (table.stable <= table.full).all()
    top = table.energy.map(lambda shares: 1 / shares[0])
    assert np.allclose(table.stable, top), "one over the first share"


def test_the_alignment_table_is_that_of_the_sum(problem):
    table = alignment_table(problem.vectors, residuals=(0.1, 0.6)).set_index("residual")
    total = problem.vectors.deltas.sum(dim=0)
    for residual in (0.1, 0.6):
        found = mean_alignment(problem.vectors, total, residual=residual)
        assert table.merged[residual] == pytest.approx(sum(found) / 3)
    assert (table.chance <= 1).all() and table.chance[0.1] >= table.chance[0.6]


def test_the_survey_holds_every_table_of_every_seed(bench):
    found = survey({0: bench, 3: bench}, "smoke")
    assert set(found["pairs"].seed) == set(found["alignment"].seed) == {0, 3}
    assert "energy" not in found["ranks"]
    one = found["places"][found["places"].seed == 3].drop(columns="seed").reset_index(drop=True)
    pd.testing.assert_frame_equal(one, conflict_places(bench.problem.vectors))


# --- coefficients ---------------------------------------------------------------------------------


def test_the_coefficients_are_those_of_the_method(bench):
    table = coefficient_table({0: bench}, EFFORT)
    seen = {}
    some = bench.problem.select(["task0", "task1"])
    METHODS["divmerge"](
        some, grouping="block", inputs=5, epochs=1, seed=0, progress=False,
        callback=lambda step: seen.update(coeffs=step.coeffs),
    )  # fmt: skip
    rows = table[(table["count"] == 2) & (table.grouping == "block")]
    wide = rows.pivot_table("coefficient", "task", "group", sort=False)
    assert np.allclose(wide.to_numpy(), seen["coeffs"].numpy(), atol=1e-5)
    assert (rows.reach == 0.01 * 1).all(), "one batch of five, once"
    assert ((rows.coefficient - 1 / 2).abs() <= 1.01 * rows.reach).all()


def test_what_stands_beside_a_coefficient_is_of_the_same_tasks_and_group(bench):
    table = coefficient_table({0: bench}, EFFORT)
    rows = table[(table["count"] == 4) & (table.grouping == "layer")]
    names = bench.problem.vectors.layout.names
    row = rows[(rows.task == "task1") & (rows.group == names[1])].iloc[0]
    start, stop = bench.problem.vectors.layout.bounds[1]
    deltas = bench.problem.vectors.deltas
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


def test_finished_fits_are_not_repeated(bench, monkeypatch):
    first = coefficient_table({0: bench}, EFFORT)
    monkeypatch.setattr(module, "run_method", forbid)
    pd.testing.assert_frame_equal(coefficient_table({0: bench}, EFFORT), first)


def test_more_tasks_than_there_are_are_left_out(bench):
    effort = replace(EFFORT, counts=(2, 8), groupings=("block",))
    assert set(coefficient_table({0: bench}, effort)["count"]) == {2}


def test_a_map_follows_itself_and_its_negation_perfectly():
    target = np.random.default_rng(0).normal(size=(5, 3))
    clues = np.stack([target, -target, np.ones((5, 3))])
    own, turned, flat = cluster_correlations(target, clues, draws=120, seed=0)
    assert own["rho"] == pytest.approx(1) and turned["rho"] == pytest.approx(-1)
    assert own["low"] == pytest.approx(1) and np.isnan(flat["rho"])
    assert own["p"] <= 2 / 120 and own["p_max"] >= own["p"]


def test_tasks_are_renamed_as_wholes():
    # Every task has the same row: no renaming changes anything, so nothing is found.
    target = np.tile([1.0, 2.0, 3.0], (4, 1))
    (record,) = cluster_correlations(target, target[None], draws=24, seed=0)
    assert record["rho"] == pytest.approx(1) and record["p"] == 1


def test_every_clue_of_every_fit_is_asked(bench):
    found = followed(coefficient_table({0: bench}, EFFORT), draws=30)
    assert list(found.clue) == 4 * [*CLUES] and set(found["count"]) == {4}
    assert list(found["view"].unique()) == ["cells", "within"]
    assert set(found.grouping) == {"block", "layer"}
    assert found.rho.dropna().between(-1, 1).all() and torch.tensor(found.cells.tolist()).min() >= 8
