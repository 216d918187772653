"""Settings of the protocol, each changed alone, and the inputs of a fit, on toy experts."""

import math

import pandas as pd
import pytest
from comparisons import mean_divergence
from divmerge_book.figures import protocol as draw
from divmerge_book.studies import protocol
from divmerge_book.studies.evaluator import accuracies, expert_accuracies
from divmerge_book.studies.input_shifts import INPUT_SHIFTS
from divmerge_book.studies.predictions import compared, split
from divmerge_book.studies.protocol import COLUMNS, DEFAULT, ablation, divergence_sum, input_shifts
from divmerge_book.studies.sizes import SETTINGS, settings

from divmerge_core.methods import METHODS

BOTH = ("task", "layer")


def in_columns(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Scores of a study's predictions, with the methods in the columns of a stored table."""
    return split(compared(table, draws=200), COLUMNS[name])


def test_every_setting_is_changed_alone():
    found = protocol.variants({"init": (0.0, 0.5), "lr": (0.1,)}, num_tasks=2)
    assert found == {DEFAULT: {}, "init=0.0": {"init": 0.0}, "lr=0.1": {"lr": 0.1}}


def test_the_ablation_has_each_change_beside_its_default(ax, experiment):
    grid = {"init": (0.0,), "epochs": (1,)}
    table = in_columns(ablation({0: experiment}, grid, groupings=BOTH, inputs=8), "changed")
    assert len(table) == 2 * 3
    assert set(table[table.setting == "init"].value) == {"0.0"}
    assert (table[table.setting == DEFAULT].difference == 0).all()
    assert (table.low <= table.high).all() and set(table.tasks) == {2}
    draw.ablation(ax, table, score="kept_margin")
    assert ax.get_xlabel() == "kept margin minus the default's, points"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["start 0.0", "epochs 1"]


def test_a_layer_is_counted_in_coefficients_and_in_total_is_less_per_task(experiment):
    table = in_columns(protocol.layers({0: experiment}, BOTH, inputs=8), "kinds")
    tensors = len(experiment.problem.vectors.layout.names)
    assert table.set_index("grouping").coefficients.to_dict() == {"task": 2, "layer": 2 * tensors}
    table = in_columns(protocol.readings({0: experiment}, BOTH, published=4), "read")
    assert table.set_index(["grouping", "reading"]).inputs.to_dict() == {
        **{("task", "per task"): 4, ("task", "in total"): 2},
        **{("layer", "per task"): 8, ("layer", "in total"): 4},
    }


def test_no_inputs_leave_the_average(ax, experiment):
    table = protocol.learning_curve({0: experiment}, (0, 8), groupings=("layer",), steps=4)
    table = in_columns(table, "needed").set_index("inputs")
    average = accuracies(experiment, METHODS["average"](experiment.problem))
    pairs = zip(average, expert_accuracies(experiment).values(), strict=True)
    assert table.anp[0] == pytest.approx(sum(own / most for own, most in pairs) / 2)
    assert table.difference[8] == 0
    draw.learning_curve(ax, table.reset_index())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "8"]


def test_shifted_inputs_are_compared_with_a_tasks_own(ax, experiment):
    others = {0: experiment.problem.batches}
    options = {"inputs": 8, "shares": (0.5, 1.0), "groupings": ("task",), "steps": 2}
    table = in_columns(input_shifts({0: experiment}, others, **options), "wrong")
    assert len(table) == 2 + 2 * len(INPUT_SHIFTS)
    own = table[table.kind == DEFAULT]
    assert own.difference.item() == own.share.item() == 0 and set(table.share) == {0, 0.5, 1}
    draw.shift_costs(ax, table)
    assert len(ax.get_yticklabels()) == 1 + len(INPUT_SHIFTS)


def test_proposition_3_holds_and_half_its_bound_too(ax, experiment):
    """JS lies in [0, log 2], so that its mean changes by no more than log 2 per task."""
    problem, others = experiment.problem, {0: experiment.problem.batches}
    summed = 2 * mean_divergence(problem, problem.vectors.base)  # two tasks with as many batches
    assert divergence_sum(problem, problem.vectors.base) == pytest.approx(summed, rel=1e-5)
    table = protocol.proposition3({0: experiment}, others, inputs=8, steps=2)
    assert len(table) == 2 * len(INPUT_SHIFTS)
    assert (table.bound == 2 * math.log(2) * 2).all()
    assert (table.apart <= table.bound / 2).all()
    assert table.apart.tolist() == (table.right - table.wrong).abs().tolist()
    assert draw.proposition3(ax, table).get_xscale() == "log"


@pytest.mark.parametrize("size", ["smoke", "default", "full"])
def test_a_size_draws_from_enough_inputs(size):
    chosen = settings("protocol", size)
    most = max(chosen.inputs, 2 * chosen.pool, *chosen.counts)
    assert 400 >= protocol.rows_needed(chosen) >= most
    assert max(chosen.several) <= 8


@pytest.mark.parametrize("study", SETTINGS)
def test_every_study_has_every_size_with_the_same_settings(study):
    names = [set(vars(settings(study, size))) for size in ("smoke", "default", "full")]
    assert names[0] == names[1] == names[2]
    with pytest.raises(ValueError, match="smoke, default, full, not 'huge'"):
        settings(study, "huge")
    name = min(names[0])
    assert getattr(settings(study, "full", **{name: 7}), name) == 7
    assert settings(study, "full", **{name: 0}) == settings(study, "full")
