"""Settings of the protocol, each changed alone, on toy experts."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from divmerge_book.figures import protocol as draw
from divmerge_book.studies.predictions import compared, split
from divmerge_book.studies.protocol import (
    COLUMNS,
    DEFAULT,
    ablation,
    layers,
    readings,
    rows_needed,
    variants,
)
from divmerge_book.studies.sizes import SETTINGS, settings


def in_columns(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Scores of a study's predictions, with the methods in the columns of a stored table."""
    return split(compared(table, draws=200), COLUMNS[name])


def test_every_setting_is_changed_alone():
    found = variants({"init": (0.0, 0.5), "lr": (0.1,)}, num_tasks=2)
    assert found == {DEFAULT: {}, "init=0.0": {"init": 0.0}, "lr=0.1": {"lr": 0.1}}


def test_the_ablation_has_each_change_beside_its_default(experiment):
    options = {"groupings": ("task", "layer"), "inputs": 8}
    table = ablation({0: experiment}, {"init": (0.0,), "epochs": (1,)}, **options)
    table = in_columns(table, "changed")
    assert len(table) == 2 * 3
    assert set(table[table.setting == "init"].value) == {"0.0"}
    assert (table[table.setting == DEFAULT].difference == 0).all()
    assert (table.low <= table.high).all() and set(table.tasks) == {2}
    ax = draw.ablation(plt.figure().gca(), table, score="kept_margin")
    assert ax.get_xlabel() == "kept margin minus the default's, points"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["start 0.0", "epochs 1"]


def test_a_layer_is_counted_in_coefficients(experiment):
    table = in_columns(layers({0: experiment}, ("task", "layer"), inputs=8), "kinds")
    tensors = len(experiment.problem.vectors.layout.names)
    assert dict(zip(table.grouping, table.coefficients, strict=True)) == {
        "task": 2,
        "layer": 2 * tensors,
    }


def test_in_total_is_less_per_task(experiment):
    table = in_columns(readings({0: experiment}, ("task", "layer"), published=4), "read")
    sizes = table.set_index(["grouping", "reading"]).inputs
    assert sizes.to_dict() == {
        **{("task", "per task"): 4, ("task", "in total"): 2},
        **{("layer", "per task"): 8, ("layer", "in total"): 4},
    }


@pytest.mark.parametrize("size", ["smoke", "default", "full"])
def test_a_size_draws_from_enough_inputs(size):
    chosen = settings("protocol", size)
    assert rows_needed(chosen) >= max(chosen.inputs, 2 * chosen.pool, *chosen.counts)
    assert rows_needed(chosen) <= 400 and max(chosen.several) <= 8


@pytest.mark.parametrize("study", SETTINGS)
def test_every_study_has_every_size_with_the_same_settings(study):
    names = [set(vars(settings(study, size))) for size in ("smoke", "default", "full")]
    assert names[0] == names[1] == names[2]
    with pytest.raises(ValueError, match="smoke, default, full, not 'huge'"):
        settings(study, "huge")
    name = sorted(names[0])[0]
    assert getattr(settings(study, "full", **{name: 7}), name) == 7
    assert settings(study, "full", **{name: 0}) == settings(study, "full")
