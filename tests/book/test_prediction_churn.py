"""Prediction churn, calibration and layers: made-up predictions by hand, and real experts."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.experiment import SIZES, prepare
from divmerge_book.figures import behaviour as draw
from divmerge_book.studies.evaluator import accuracies
from divmerge_book.studies.prediction_churn import (
    MODELS,
    calibration_table,
    churn_by_task,
    churn_intervals,
    flip_examples,
    flips_by_margin,
    layer_similarity,
    predictions,
    reliability_table,
    row_numbers,
    texts,
)
from torch.testing import assert_close


def made_up_answers() -> pd.DataFrame:
    """Two tasks of ten rows at two seeds; the merge loses the two least sure and gains one."""
    right, margin = [1] * 9 + [0], [100, 200, 300, 400, 500, 600, 700, 800, 900, 950]
    rows = []
    for seed in (0, 1):
        for task in "ab":
            label = {"seed": seed, "task": task}
            sure = {"sure": [900] * 10}
            own = {"right": right, "margin": margin, "row": list(range(10))}
            rows.append({**label, "model": "expert", **sure, **own})
            layers = {"cka": [1.0, 0.5], "shift": [0.0, 0.7], "common": [0.0, 0.2]}
            after = {"right": [0, 0] + [1] * 8}
            rows.append({**label, "model": "average", **sure, **after, **layers})
    return pd.DataFrame(rows)


def test_net_is_gained_minus_lost_and_by_hand():
    for row in churn_by_task(made_up_answers()).itertuples():
        assert_close((row.lost, row.gained), (0.2, 0.1))
        assert_close(row.net, row.gained - row.lost)


def test_resampling_keeps_the_value_inside_its_interval():
    found = churn_intervals(made_up_answers(), draws=200).set_index("what")
    assert_close(found.value["net"], -0.1)
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    assert found.low["lost"] < found.high["lost"]


def test_the_least_sure_rows_are_the_lost_ones():
    found = flips_by_margin(made_up_answers(), parts=3).set_index("part")
    assert_close(list(found.lost), [2 / 3, 0.0, 0.0])
    assert_close(found.margin[1], 0.2)
    assert set(found.auc) == {1.0}


def test_examples_are_the_rows_that_turned_surest_first():
    found = flip_examples(made_up_answers(), "average", "a")
    assert found["row"].tolist() == [9, 1, 0]
    assert found.kind.tolist() == ["gained", "lost", "lost"]
    assert_close(list(found.margin), [0.95, 0.2, 0.1])


def test_confidence_stands_beside_accuracy():
    found = calibration_table(made_up_answers(), draws=20).set_index(["seed", "model"])
    row = found.loc[0, "average"]
    assert_close((row.accuracy, row.confidence), (0.8, 0.9))
    assert_close((row.gap, row.uneven, row.ece), (0.1, 0.1, 0.1))


def test_a_diagram_counts_every_row_once():
    found = reliability_table(made_up_answers())
    assert found.groupby("model")["count"].sum().to_dict() == {"average": 40, "expert": 40}
    assert_close(found[found.model == "average"].accuracy.item(), 0.8)


def test_depths_have_a_row_per_layer():
    found = layer_similarity(made_up_answers())
    assert len(found) == 8 and list(found.layer[:2]) == [0, 1]
    assert found.cka[:2].tolist() == [1.0, 0.5]


# --- real experts ---------------------------------------------------------------------------------


def test_predictions_are_those_that_evaluate_gives_and_no_text_is_stored(fresh):
    experiment = prepare("toy", size="toy")
    table = predictions({0: experiment}, SIZES["toy"], rows=20)
    assert list(dict.fromkeys(table.model)) == list(MODELS)
    found = [np.mean(right) for right in table[table.model == "base"]["right"]]
    assert_close(found, accuracies(experiment, experiment.problem.vectors.base))
    for row in table[table.model == "expert"].itertuples():
        assert sorted(row.row) == list(range(60))
        assert max(row.sure) <= 1000 and min(row.margin) >= 0
    assert (layer_similarity(table).cka.abs() <= 1 + 1e-6).all()
    columns = {"task", "right", "sure", "margin", "row", "seed", "model"}
    assert set(table.columns) == columns | {"cka", "shift", "common"}
    task, order = experiment.problem.vectors.tasks[0], row_numbers(experiment, 0)
    data = TASKS[task].load("test")
    assert [data["label"][row] for row in order] == experiment.test[0].gold.tolist()
    assert texts(task, order[:2]) == [data["text"][row] for row in order[:2]]


# --- figures -------------------------------------------------------------------------------------


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_bars_of_flips_are_as_long_as_what_is_lost_and_gained(ax):
    draw.churn(ax, churn_intervals(made_up_answers(), draws=50))
    assert_close(sorted(bar.get_width() for bar in ax.patches), [-20.0, 10.0])


@pytest.mark.parametrize("bins", [4, 10])
def test_a_reliability_diagrams_bars_stand_in_the_middle_of_their_bins(ax, bins):
    table = reliability_table(made_up_answers(), bins=bins)
    draw.reliability(ax, table, "average", bins=bins)
    own = table[table.model == "average"]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert middles == pytest.approx(((own.bin + 0.5) / bins).tolist())
    assert all(0.8 / bins < bar.get_width() < 1 / bins for bar in ax.patches)


def test_a_diagram_of_more_bins_than_said_is_refused(ax):
    table = reliability_table(made_up_answers(), bins=20)
    with pytest.raises(ValueError, match="has a bin 1[0-9], counted from 0, but bins is 10: give"):
        draw.reliability(ax, table, "average")


def test_a_reliability_diagram_shows_accuracy_at_its_confidence(ax):
    draw.reliability(ax, reliability_table(made_up_answers()), "average")
    assert_close(ax.collections[0].get_offsets().tolist(), [[0.9, 0.8]])


def test_layers_margins_and_calibration_say_their_units(ax):
    assert (
        "CKA"
        in draw.similarity_by_layer(ax, layer_similarity(made_up_answers()), "cka").get_ylabel()
    )
    assert "%" in draw.loss_by_margin(ax, flips_by_margin(made_up_answers())).get_ylabel()
    states = calibration_table(made_up_answers(), draws=5)
    assert "points" in draw.calibration(ax, states).get_xlabel()
