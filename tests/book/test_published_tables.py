"""Numbers printed by others are whole, say where they come from, and agree with each other."""

import tomllib
from fnmatch import fnmatch

import numpy as np
import pandas as pd
import pytest
from divmerge_book.evaluation.report import Report
from divmerge_book.findings import published as find
from divmerge_book.published import leaderboard_summary as board
from divmerge_book.published import paper
from divmerge_book.published.leaderboard_summary import published, scored_rows, summary
from helpers import ROOT

from divmerge_core.methods import METHODS, parse

GLUE = ["CoLA", "SST-2", "QQP", "QNLI", "MNLI", "RTE", "MRPC"]
PARTS = [(work, name) for work in paper.WORKS for name in paper.printed(work)["parts"]]
SWEEPS = [part for part, _ in board.SCALED.values()]


def fusionbench(name: str) -> pd.DataFrame:
    return paper.frame(name, "fusionbench")


@pytest.mark.parametrize(("work", "name"), PARTS)
def test_every_part_is_a_table_of_its_rows_and_columns_and_says_its_source(work, name):
    found, kept = paper.frame(name, work), paper.part(name, work)
    assert found.shape == (len(kept["values"]), len(kept["columns"]))
    assert found.notna().all(axis=None) and found.columns.is_unique and found.attrs["holds"]
    assert {"paper": "2509.02108", "fusionbench": "FusionBench"}[work] in found.attrs["source"]
    assert work == "paper" or sorted(found) == sorted(GLUE)


def test_the_papers_tables_are_kept():
    assert {*(f"table {n}" for n in (2, 3, 4, 5, 6, 7, 9))} < set(paper.printed()["parts"])
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["divmerge_book"]
    assert any(fnmatch("published/paper.json", pattern) for pattern in patterns)


def test_what_is_not_kept_is_refused_with_what_is():
    for ask in (lambda: paper.table(1), lambda: paper.figure(5, "tv"), lambda: paper.figure(2, "")):
        with pytest.raises(ValueError, match="choose one of table 2, .*figure 5 kl"):
            ask()
    with pytest.raises(ValueError, match="these do: table 2, table 6, table 7"):
        paper.averages(5)
    with pytest.raises(ValueError, match="choose one of paper, fusionbench"):
        paper.frame("methods", "mergebench")


def test_changing_a_frame_leaves_the_file_alone():
    frame = paper.table(6)
    frame.loc[2, "TIES"] = 0.0
    assert paper.table(6).loc[2, "TIES"] > 0


# --- the paper ------------------------------------------------------------------------------------
def test_accuracies_are_shares_of_the_test_rows_that_they_imply():
    """Table 5: a printed percentage is a whole number of right answers out of 500, 277 or 400."""
    rows = pd.Series({**dict.fromkeys(GLUE, 500), "RTE": 277, "MRPC": 400})
    right = paper.table(5) / 100 * rows
    gap = (right.round() / rows * 100 - paper.table(5)).abs()
    assert list(right.columns) == GLUE and gap.max(axis=None) < 0.0051  # half of the last digit


def test_divergences_are_zero_on_the_diagonal_alone_and_js_is_bounded():
    """JS <= KL / 4 + log(2) / 2: KL(p || m) <= KL(p || q) / 2 by convexity, KL(q || m) <= log 2."""
    kl, js = (paper.figure(5, panel).to_numpy() for panel in ("kl", "js"))
    for values in (kl, js):
        assert (np.diag(values) == 0).all() and (values[~np.eye(7, dtype=bool)] > 0).all()
    assert js.max() < np.log(2) and (js <= kl / 4 + np.log(2) / 2).all()


def test_cosines_are_symmetric():
    values = paper.figure(6, "glue").to_numpy()
    assert (values == values.T).all() and (np.diag(values) == 1).all()


@pytest.mark.parametrize(("number", "last"), [(2, 0.001), (6, 0.01), (7, 0.01)])
def test_printed_averages_are_those_of_the_columns(number, last):
    assert ((paper.table(number).mean() - paper.averages(number)).abs() < last).all()


def test_tables_6_and_7_name_the_methods_of_table_3():
    assert set(paper.table(6)) == set(paper.table(7)) == set(paper.table(3).index)
    assert list(paper.table(6).index) == [2, 3, 4, 5, 6, 7]
    assert set(paper.METHODS_HERE) == set(paper.table(6))
    assert {parse(spec)[0] for spec in paper.METHODS_HERE.values()} <= set(METHODS)


def test_the_margins_of_pairs_stand_in_two_tables():
    """Table 4's margins at two models are the +- of Table 3, where both print them."""
    pairs, margins = paper.table(3)["generation margin"], paper.table(4)[2]
    assert (pairs[margins.index] == margins).all()


# --- FusionBench ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SWEEPS)
def test_shares_are_whole_numbers_of_the_validation_rows(name):
    """So the counts of GLUE's validation splits are those that were scored."""
    right = fusionbench(name) * scored_rows()
    last = 0.5e-6 * scored_rows() + 1e-9  # half of the last printed digit
    assert ((right - right.round()).abs() <= last).all(axis=None)


@pytest.mark.parametrize("method", board.SCALED)
def test_a_printed_method_is_the_best_row_of_its_sweep(method):
    part, scale = board.SCALED[method]
    swept, printed = fusionbench(part), fusionbench("methods").loc[method]
    assert swept.mean(axis=1).idxmax() == scale
    assert (100 * swept.loc[scale] - printed).abs().max() < 0.0501


def test_both_sweeps_start_at_the_same_base_and_hold_every_scale():
    one, other = (fusionbench(part).loc[0.0] for part in SWEEPS)
    assert (one == other).all()
    found = board.sweep()
    assert len(found) == 2 * 11 * len(GLUE)
    best = found.query("method == 'ties' and scale == 0.6").set_index("task").accuracy
    assert best.to_dict() == fusionbench("ties").loc[0.6].to_dict()


def test_experts_stand_on_the_diagonal_of_the_cross_table():
    cross, own = fusionbench("experts"), fusionbench("methods").loc[board.EXPERT]
    assert {task: cross.loc[task, task] for task in GLUE} == own[GLUE].to_dict()


def test_printed_averages_are_those_of_the_rows():
    kept = paper.part("methods", "fusionbench")["printed average"]
    assert (fusionbench("methods").mean(axis=1) - kept).abs().max() < 0.051


def test_printed_methods_are_methods_here():
    assert set(board.METHODS_HERE) == set(fusionbench("methods").index)
    assert set(published().index) - {"expert", "base"} <= set(METHODS)


def test_a_summary_is_what_it_is_by_hand():
    table = pd.DataFrame(
        {"a": [1.0, 0.5, 0.8, 0.4], "b": [0.5, 0.4, 0.5, 0.5]},
        index=pd.Index(["expert", "base", "one", "two"], name="method"),
    )
    found = summary(table)
    assert found.loc["one"].tolist() == pytest.approx([0.65, 0.9, 0.8, "a", ""])
    assert found.loc["two"].tolist() == pytest.approx([0.45, 0.7, 0.4, "a", "a"])
    assert summary(published()).below_base[["task_arithmetic", "ties"]].str.contains("RTE").all()


def test_margins_are_those_of_a_binomial_share():
    table = pd.DataFrame({"a": [0.5], "b": [0.9]}, index=["one"])
    found = board.margins(table, pd.Series({"a": 100, "b": 400})) / 1.959964
    both = (0.025**2 + 0.0075**2) ** 0.5
    assert found.loc["one"].tolist() == pytest.approx([0.05, 0.015, both], rel=1e-5)


def test_a_measured_table_has_the_form_of_the_published_one():
    rows = [
        {"suite": "s", "subset": "x+y", "method": m, "seed": 0, "task": t, "predicted": p}
        for m, p in (("expert", "0101"), ("base", "0000"), ("average", "0100"))
        for t in ("x", "y")
    ]
    found = board.measured(Report(pd.DataFrame(rows).assign(gold="0101")))
    assert found.loc["average"].tolist() == [0.75, 0.75]
    assert summary(found).loc["average", "normalised"] == 0.75


def test_sentences_on_a_printed_table_have_its_numbers():
    said = find.known_to(published(), scored_rows())
    assert "Below the unmerged base on RTE: " in said and f"({scored_rows()['QQP']} rows)" in said
    wide = 100 * fusionbench("task arithmetic")
    best = wide.mean(axis=1).idxmax()
    printed = f"({wide.loc[best].mean():.2f} %) at scale {best:g}, with {wide.RTE[best]:.1f} % on"
    assert find.scales(board.sweep()).startswith(f"Task arithmetic has its best mean {printed} RTE")
