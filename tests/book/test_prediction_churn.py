"""Prediction churn, calibration and layers: made-up predictions by hand, and real experts."""

import numpy as np
import pandas as pd
import pytest
from divmerge_book import SIZES, TASKS, prepare
from divmerge_book.figures import behaviour as draw
from divmerge_book.studies import prediction_churn as churn
from divmerge_book.studies.evaluator import accuracies
from divmerge_book.studies.prediction_churn import MODELS, churn_intervals, layer_similarity, texts
from torch.testing import assert_close


def made_up(seed: int, task: str) -> list[dict]:
    """Ten rows of a task; the merge loses the two least sure and gains one."""
    label = {"seed": seed, "task": task, "sure": [900] * 10}
    margin = [100, 200, 300, 400, 500, 600, 700, 800, 900, 950]
    own = {"right": [1] * 9 + [0], "margin": margin, "row": list(range(10))}
    layers = {"cka": [1.0, 0.5], "shift": [0.0, 0.7], "common": [0.0, 0.2]}
    merge = {"right": [0, 0] + [1] * 8, **layers}
    return [{**label, "model": "expert", **own}, {**label, "model": "average", **merge}]


ANSWERS = pd.DataFrame(row for seed in (0, 1) for task in "ab" for row in made_up(seed, task))


def test_flips_by_hand_lie_inside_their_intervals():
    for row in churn.churn_by_task(ANSWERS).itertuples():
        assert_close((row.lost, row.gained), (0.2, 0.1))
        assert_close((row.net, row.gross), (row.gained - row.lost, row.gained + row.lost))
    found = churn_intervals(ANSWERS, draws=200).set_index("what")
    assert_close(found.value[["lost", "gained", "net"]].tolist(), [0.2, 0.1, -0.1])
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    assert found.low["lost"] < found.high["lost"]
    other = ANSWERS.copy()
    other.at[0, "row"] = list(range(1, 11))
    with pytest.raises(ValueError, match="seeds have different test rows"):
        churn_intervals(other, draws=5)


def test_the_least_sure_rows_are_the_lost_ones_and_examples_are_surest_first():
    found = churn.flips_by_margin(ANSWERS, parts=3).set_index("part")
    assert_close(list(found.lost), [2 / 3, 0.0, 0.0])
    assert_close(found.margin[1], 0.2)
    assert set(found.auc) == {1.0}
    found = churn.flip_examples(ANSWERS, "average", "a")
    assert found["row"].tolist() == [9, 1, 0]
    assert found.kind.tolist() == ["gained", "lost", "lost"]
    assert_close(list(found.margin), [0.95, 0.2, 0.1])


def test_confidence_stands_beside_accuracy_and_a_diagram_counts_every_row_once():
    table = churn.calibration_table(ANSWERS, draws=20)
    row = table.set_index(["seed", "model"]).loc[(0, "average")]
    assert_close((row.accuracy, row.confidence), (0.8, 0.9))
    assert_close((row.gap, row.uneven, row.ece), (0.1, 0.1, 0.1))
    found = churn.reliability_table(ANSWERS)
    assert found.groupby("model")["count"].sum().to_dict() == {"average": 40, "expert": 40}
    assert_close(found[found.model == "average"].accuracy.item(), 0.8)


def test_layers_have_a_row_each():
    found = layer_similarity(ANSWERS)
    assert len(found) == 8 and list(found.layer[:2]) == [0, 1]
    assert found.cka[:2].tolist() == [1.0, 0.5]


def test_predictions_are_those_that_evaluate_gives_and_no_text_is_stored(fresh):
    experiment = prepare("toy", size="toy")
    table = churn.predictions({0: experiment}, SIZES["toy"], rows=20)
    assert list(dict.fromkeys(table.model)) == list(MODELS)
    found = [np.mean(right) for right in table[table.model == "base"]["right"]]
    assert_close(found, accuracies(experiment, experiment.problem.vectors.base))
    for row in table[table.model == "expert"].itertuples():
        assert sorted(row.row) == list(range(60))
        assert max(row.sure) <= 1000 and min(row.margin) >= 0
    assert (layer_similarity(table).cka.abs() <= 1 + 1e-6).all()
    columns = {"task", "right", "sure", "margin", "row", "seed", "model"}
    assert set(table.columns) == columns | {"cka", "shift", "common"}
    task, order = experiment.problem.vectors.tasks[0], churn.row_numbers(experiment, 0)
    data = TASKS[task].load("test")
    assert [data["label"][row] for row in order] == experiment.test[0].gold.tolist()
    assert texts(task, order[:2]) == [data["text"][row] for row in order[:2]]


@pytest.mark.parametrize("bins", [4, 10])
def test_a_reliability_diagrams_bars_stand_in_the_middle_of_their_bins(ax, bins):
    table = churn.reliability_table(ANSWERS, bins=bins)
    draw.reliability(ax, table, "average", bins=bins)
    own = table[table.model == "average"]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert middles == pytest.approx(((own.bin + 0.5) / bins).tolist())
    assert all(0.8 / bins < bar.get_width() < 1 / bins for bar in ax.patches)
    assert_close(ax.collections[0].get_offsets().tolist(), [[0.9, 0.8]])


def test_a_diagram_of_more_bins_than_said_is_refused(ax):
    with pytest.raises(ValueError, match="has a bin 1[0-9], counted from 0, but bins is 10: give"):
        draw.reliability(ax, churn.reliability_table(ANSWERS, bins=20), "average")


def test_figures_of_churn_layers_and_margins_have_their_lengths_and_units(ax):
    draw.churn(ax, churn_intervals(ANSWERS, draws=50))
    assert_close(sorted(bar.get_width() for bar in ax.patches), [-20.0, 10.0])
    assert "CKA" in draw.similarity_by_layer(ax, layer_similarity(ANSWERS), "cka").get_ylabel()
    assert "%" in draw.loss_by_margin(ax, churn.flips_by_margin(ANSWERS)).get_ylabel()
