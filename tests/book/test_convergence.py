"""Optimizers of Lambda: what is counted, and where each meets the target."""

import pytest
from divmerge_book.evaluation.stored_tables import ResultTable, load, save
from divmerge_book.figures import protocol as draw
from divmerge_book.studies.convergence import convergence, with_scores

from divmerge_core.merging.fit import OPTIMIZERS


@pytest.fixture
def found(experiment, toys, once):
    if "found" not in once:
        budget = {"pool": 8, "adam": 8, "passes": 4}
        once["found"] = convergence(experiment, [toys], groupings=("task",), **budget)
    return once["found"]


def test_all_optimizers_start_at_the_same_loss(found):
    courses, ends = found["courses"], found["ends"]
    assert set(courses.optimizer) == set(OPTIMIZERS) == set(ends.optimizer)
    first = courses.groupby("optimizer").loss.first()
    assert first.max() - first.min() < 1e-5


def test_passes_and_inputs_are_counted(found):
    """Two batches of four inputs a task: a step of Adam reads 4 of each, a pass all 8."""
    courses = found["courses"]
    adam = courses[courses.optimizer == "adam"]
    assert adam.passes.tolist()[:3] == [0, 1, 2] and adam.read.tolist()[:3] == [0, 4, 8]
    whole = courses[courses.optimizer == "lbfgs"]
    assert whole.passes.iloc[0] == 1 and whole.read.iloc[0] == 8
    assert courses[courses.optimizer != "adam"].passes.max() <= 4
    assert (courses.groupby("optimizer").seconds.diff().dropna() >= 0).all()


def test_the_target_is_adams_last_loss(ax, found, tmp_path):
    measured = with_scores(ResultTable(found, {"seeds": [0]}, "this run"))
    courses, ends = measured["courses"], measured["ends"]
    adam = ends.set_index("optimizer").loc["adam"]
    assert adam.target == courses[courses.optimizer == "adam"].loss.iloc[-1]
    assert adam.passes <= 8 and adam.difference == adam.kept_difference == 0
    met = ends[ends.reached <= ends.target]
    assert met.passes.notna().all() and ends[ends.reached > ends.target].passes.isna().all()
    save(tmp_path / "ends.json", {"ends": ends}, seeds=[0])  # missing numbers survive it
    assert load(tmp_path / "ends.json")[0]["ends"].passes.isna().sum() == ends.passes.isna().sum()
    draw.convergence(ax, courses, adam.target)
    assert len(ax.get_lines()) == len(OPTIMIZERS) + 1
