"""Tables of where task vectors conflict, against the measures they are made of."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from divmerge_book.interference.spectra import mean_alignment
from divmerge_book.interference.weights import grouped, norms_by_group, sign_conflict, trained
from divmerge_book.studies import layerwise_analysis as tables


@pytest.fixture
def decayed(problem):
    """Task vectors whose first four of six words only shrank, by the same factor in all tasks."""
    vectors = problem.vectors
    deltas = vectors.deltas.clone()
    deltas[:, :24] = -1e-3 * vectors.base[:24]
    return replace(vectors, deltas=deltas)


def test_decay_agrees_with_itself_until_it_is_left_out(decayed):
    table = tables.pair_table(decayed)
    counted = ["all", "touched", "largest fifth"]
    assert list(table.counted.unique()) == counted and len(table) == 3 * 3
    mean, total = table.groupby("counted").conflict.mean(), decayed.layout.size
    assert mean["all"] == pytest.approx(mean["touched"] * (total - 24) / total)
    row = table[(table.counted == "all") & (table.task == "task0") & (table.partner == "task2")]
    assert row.conflict.item() == pytest.approx(sign_conflict(decayed.deltas)[0, 2].item())
    table = tables.decay_table(decayed)
    assert (table.parameters == 24 / total).all()
    norms = decayed.deltas[:, :24].square().sum(dim=1) / decayed.deltas.square().sum(dim=1)
    assert np.allclose(table.length, norms) and (table.length < 1e-3).all()


def test_places_hold_the_conflict_and_the_length_of_what_stands_there(decayed):
    table, (names, _) = tables.conflict_by_place(decayed), grouped(decayed.layout, "place")
    assert list(table.place.unique()) == list(names)
    assert set(table.kind) == {"embedding", "other"}
    start, stop = decayed.layout.bounds[0]
    learned = trained(decayed).deltas[:, start:stop]
    assert table.conflict[0] == pytest.approx(sign_conflict(learned)[0, 1].item())
    table = tables.norms_by_place(decayed)
    assert np.allclose(table.groupby("task").share.sum(), 1)
    first = table[(table.place == names[0]) & (table.task == "task0")]
    norm = norms_by_group(decayed, "place")[0, 0].item()
    assert first.rms.item() == pytest.approx(norm / 12**0.5), "decayed words thin nothing out"


def test_overlaps_stand_beside_their_chance_level(decayed):
    table = tables.overlap_table(decayed, shares=(0.5, 1.0))
    assert list(table.columns) == ["share", "within", "task", "partner", "overlap"]
    assert (table[table.share == 1.0].overlap == 1).all()
    assert set(table.within) == {"model", "tensor"} and len(table) == 2 * 2 * 3


def test_energies_of_a_spectrum_add_up_to_one(problem):
    table = tables.spectrum_table(problem.vectors)
    assert len(table) == 2 * 3
    assert np.allclose(table.energy.map(sum), 1)
    assert (table.stable >= 1).all() and (table.stable <= table.full).all()
    assert np.allclose(table.stable, table.energy.map(lambda shares: 1 / shares[0]))


def test_the_alignment_table_is_that_of_the_sum(problem):
    table = tables.alignment_table(problem.vectors, residuals=(0.1, 0.6)).set_index("residual")
    total = problem.vectors.deltas.sum(dim=0)
    for residual in (0.1, 0.6):
        found = mean_alignment(problem.vectors, total, residual=residual)
        assert table.merged[residual] == pytest.approx(sum(found) / 3)
    assert (table.chance <= 1).all() and table.chance[0.1] >= table.chance[0.6]


def test_weight_statistics_hold_every_table_of_every_seed(linear):
    found = tables.weight_statistics({0: linear, 3: linear}, "smoke")
    assert set(found["pairs"].seed) == set(found["alignment"].seed) == {0, 3}
    assert "energy" not in found["ranks"]
    one = found["places"][found["places"].seed == 3].drop(columns="seed").reset_index(drop=True)
    pd.testing.assert_frame_equal(one, tables.conflict_by_place(linear.problem.vectors))
