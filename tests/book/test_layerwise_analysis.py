"""Tables of where task vectors conflict, against the measures they are made of."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from divmerge_book.interference.spectra import mean_alignment
from divmerge_book.interference.weights import norms_by_group, places, sign_conflict, trained
from divmerge_book.studies.layerwise_analysis import (
    alignment_table,
    conflict_by_place,
    decay_table,
    norms_by_place,
    overlap_table,
    pair_table,
    spectrum_table,
    weight_statistics,
)
from helpers import experiment_of, linear_problem


@pytest.fixture
def decayed(problem):
    """Task vectors whose first four of six words only shrank, by the same factor in all tasks."""
    vectors = problem.vectors
    deltas = vectors.deltas.clone()
    deltas[:, :24] = -1e-3 * vectors.base[:24]
    return replace(vectors, deltas=deltas)


def test_decay_agrees_with_itself_until_it_is_left_out(decayed):
    table = pair_table(decayed)
    assert (
        list(table.counted.unique()) == ["all", "touched", "largest fifth"] and len(table) == 3 * 3
    )
    mean = table.groupby("counted").conflict.mean()
    total = decayed.layout.size
    assert mean["all"] == pytest.approx(mean["touched"] * (total - 24) / total)
    row = table[(table.counted == "all") & (table.task == "task0") & (table.partner == "task2")]
    assert row.conflict.item() == pytest.approx(sign_conflict(decayed.deltas)[0, 2].item())


def test_decay_table_are_counted_and_are_short(decayed):
    table = decay_table(decayed)
    assert (table.parameters == 24 / decayed.layout.size).all()
    norms = decayed.deltas[:, :24].square().sum(dim=1) / decayed.deltas.square().sum(dim=1)
    assert np.allclose(table.length, norms) and (table.length < 1e-3).all()


def test_places_hold_the_conflict_of_what_stands_there(decayed):
    table = conflict_by_place(decayed)
    names, _ = places(decayed.layout)
    assert list(table.place.unique()) == list(names)
    assert set(table.kind) == {"embedding", "other"}
    row = table[table.place == names[0]].iloc[0]
    start, stop = decayed.layout.bounds[0]
    learned = trained(decayed).deltas[:, start:stop]
    assert row.conflict == pytest.approx(sign_conflict(learned)[0, 1].item())


def test_shares_of_the_length_add_up_and_idle_words_thin_nothing_out(decayed):
    table = norms_by_place(decayed)
    assert np.allclose(table.groupby("task").share.sum(), 1)
    first = table[(table.place == places(decayed.layout)[0][0]) & (table.task == "task0")]
    norm = norms_by_group(decayed, "place")[0, 0].item()
    assert first.rms.item() == pytest.approx(norm / 12**0.5)


def test_overlaps_stand_beside_their_chance_level(decayed):
    table = overlap_table(decayed, shares=(0.5, 1.0))
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


def test_weight_statistics_hold_every_table_of_every_seed(tiny):
    experiment = experiment_of(linear_problem(num_tasks=3, scale=0.8), tiny)
    found = weight_statistics({0: experiment, 3: experiment}, "smoke")
    assert set(found["pairs"].seed) == set(found["alignment"].seed) == {0, 3}
    assert "energy" not in found["ranks"]
    one = found["places"][found["places"].seed == 3].drop(columns="seed").reset_index(drop=True)
    pd.testing.assert_frame_equal(one, conflict_by_place(experiment.problem.vectors))
