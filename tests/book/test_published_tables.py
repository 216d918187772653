"""FusionBench's printed numbers agree with each other, and their standing with a case by hand."""

import pandas as pd
import pytest
from divmerge_book.evaluation.report import Report
from divmerge_book.published import paper
from divmerge_book.published.leaderboard_summary import (
    METHODS_HERE,
    SCALED,
    margins,
    measured,
    published,
    scored_rows,
    summary,
    sweep,
)
from pandas.testing import assert_series_equal

from divmerge_core.methods import METHODS

TASKS = ["CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2"]


def test_every_part_is_a_table_of_its_rows_and_columns_and_says_its_source():
    for name in paper.parts("fusionbench"):
        found, kept = paper.frame(name, "fusionbench"), paper.part(name, "fusionbench")
        assert found.shape == (len(kept["rows"]), len(kept["columns"])), name
        assert list(found.columns) == TASKS and found.notna().all(axis=None), name
        assert "FusionBench" in found.attrs["source"], name


@pytest.mark.parametrize("name", [part for part, _ in SCALED.values()])
def test_shares_are_whole_numbers_of_the_validation_rows(name):
    """So the counts of GLUE's validation splits are those that were scored."""
    right = paper.frame(name, "fusionbench") * scored_rows()
    last = 0.5e-6 * scored_rows() + 1e-9  # half of the last printed digit
    assert ((right - right.round()).abs() <= last).all(axis=None)


@pytest.mark.parametrize("method", SCALED)
def test_a_printed_method_is_the_best_row_of_its_sweep(method):
    part, scale = SCALED[method]
    swept = paper.frame(part, "fusionbench")
    assert swept.mean(axis=1).idxmax() == scale
    gap = (100 * swept.loc[scale] - paper.frame("methods", "fusionbench").loc[method]).abs()
    assert gap.max() < 0.0501


def test_both_sweeps_start_at_the_same_base():
    first = [paper.frame(part, "fusionbench").loc[0.0] for part, _ in SCALED.values()]
    assert (first[0] == first[1]).all()


def test_experts_stand_on_the_diagonal_of_the_cross_table():
    cross, table = (paper.frame(name, "fusionbench") for name in ("experts", "methods"))
    own = pd.Series({task: cross.loc[task, task] for task in TASKS})
    assert (own == table.loc["Fine-tuned (STL)"]).all()


def test_printed_averages_are_those_of_the_rows():
    kept = paper.part("methods", "fusionbench")
    gap = paper.frame("methods", "fusionbench").mean(axis=1) - kept["printed average"]
    assert gap.abs().max() < 0.051


def test_another_work_is_told_what_there_is():
    with pytest.raises(ValueError, match="choose one of paper, fusionbench"):
        paper.frame("methods", "mergebench")


def test_printed_methods_are_methods_here():
    assert set(METHODS_HERE) == set(paper.frame("methods", "fusionbench").index)
    assert set(published().index) - {"expert", "base"} <= set(METHODS)


def test_standing_is_what_it_is_by_hand():
    table = pd.DataFrame(
        {"a": [1.0, 0.5, 0.8, 0.4], "b": [0.5, 0.4, 0.5, 0.5]},
        index=pd.Index(["expert", "base", "one", "two"], name="method"),
    )
    found = summary(table)
    assert found.loc["one"].tolist() == pytest.approx([0.65, 0.9, 0.8, "a", ""])
    assert found.loc["two"].tolist() == pytest.approx([0.45, 0.7, 0.4, "a", "a"])


def test_rte_is_below_the_unmerged_base_for_both_best_published_merges():
    found = summary(published())
    assert "RTE" in found.loc["task_arithmetic", "below_base"]
    assert "RTE" in found.loc["ties", "below_base"]


def test_margins_are_those_of_a_binomial_share():
    table = pd.DataFrame({"a": [0.5], "b": [0.9]}, index=["one"])
    found = margins(table, pd.Series({"a": 100, "b": 400})) / 1.959964
    assert found.loc["one"].tolist() == pytest.approx(
        [0.05, 0.015, (0.025**2 + 0.0075**2) ** 0.5], rel=1e-5
    )


def test_the_sweep_holds_every_scale_of_both_methods():
    found = sweep()
    assert len(found) == 2 * 11 * len(TASKS)
    best = found.query("method == 'ties' and scale == 0.6").set_index("task").accuracy
    assert_series_equal(
        best, paper.frame("ties", "fusionbench").loc[0.6], check_names=False, check_index_type=False
    )


def test_a_measured_table_has_the_form_of_the_published_one():
    rows = [
        {"suite": "s", "subset": "x+y", "method": m, "seed": 0, "task": t, "predicted": p}
        for m, p in (("expert", "0101"), ("base", "0000"), ("average", "0100"))
        for t in ("x", "y")
    ]
    frame = pd.DataFrame(rows).assign(gold="0101")
    found = measured(Report(frame))
    assert found.loc["average"].tolist() == [0.75, 0.75]
    assert summary(found).loc["average", "normalised"] == 0.75
