"""The paper's numbers are whole, say where they come from, and agree with each other."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from divmerge_book.published import paper

from divmerge_core.methods import METHODS, parse

ROOT = Path(__file__).resolve().parents[2]
GLUE = ["CoLA", "SST-2", "QQP", "QNLI", "MNLI", "RTE", "MRPC"]


def test_every_part_is_a_table_of_its_rows_and_columns_and_says_its_source():
    assert set(paper.parts()) >= {*(f"table {n}" for n in (2, 3, 4, 5, 6, 7, 9)), "figure 5 js"}
    for name in paper.parts():
        found, kept = paper.frame(name), paper.part(name)
        assert found.shape == (len(kept["values"]), len(kept["columns"])), name
        assert found.notna().all(axis=None) and found.columns.is_unique, name
        assert found.attrs["holds"] and "2509.02108" in found.attrs["source"], name


def test_accuracies_are_shares_of_the_test_rows_that_they_imply():
    """Table 5: a printed percentage is a whole number of right answers out of 500, 277 or 400."""
    rows = pd.Series({**dict.fromkeys(GLUE, 500), "RTE": 277, "MRPC": 400})
    right = paper.table(5) / 100 * rows
    assert list(right.columns) == GLUE
    gap = (right.round() / rows * 100 - paper.table(5)).abs()
    assert gap.max(axis=None) < 0.0051  # half of the last printed digit


@pytest.mark.parametrize("panel", ["kl", "js"])
def test_divergences_are_zero_on_the_diagonal_alone_and_js_is_bounded(panel):
    values = paper.figure(5, panel).to_numpy()
    assert (np.diag(values) == 0).all() and (values[~np.eye(7, dtype=bool)] > 0).all()
    assert panel == "kl" or values.max() < np.log(2)


def test_js_is_at_most_a_quarter_of_kl_and_half_of_log_2():
    """KL(p || m) <= KL(p || q) / 2 by convexity, and KL(q || m) <= log 2."""
    kl, js = paper.figure(5, "kl"), paper.figure(5, "js")
    assert (js <= kl / 4 + np.log(2) / 2).all(axis=None)


def test_cosines_are_symmetric():
    values = paper.figure(6, "glue").to_numpy()
    assert (values == values.T).all() and (np.diag(values) == 1).all()


@pytest.mark.parametrize("number", [2, 6, 7])
def test_printed_averages_are_those_of_the_columns(number):
    gap = (paper.table(number).mean() - paper.averages(number)).abs()
    last = {2: 0.001, 6: 0.01, 7: 0.01}[number]
    assert (gap < last).all()


def test_tables_6_and_7_name_the_methods_of_table_3():
    assert set(paper.table(6)) == set(paper.table(7)) == set(paper.table(3).index)
    assert list(paper.table(6).index) == [2, 3, 4, 5, 6, 7]
    assert set(paper.METHODS_HERE) == set(paper.table(6))
    for spec in paper.METHODS_HERE.values():
        assert parse(spec)[0] in METHODS


def test_the_margins_of_pairs_stand_in_two_tables():
    """Table 4's margins at two models are the +- of Table 3, where both print them."""
    pairs, margins = paper.table(3)["generation margin"], paper.table(4)[2]
    assert (pairs[margins.index] == margins).all()


def test_a_table_that_is_not_kept_is_told_what_is():
    for ask in (lambda: paper.table(1), lambda: paper.figure(5, "tv"), lambda: paper.figure(2, "")):
        with pytest.raises(ValueError, match="choose one of table 2, .*figure 5 kl"):
            ask()
    with pytest.raises(ValueError, match="these do: table 2, table 6, table 7"):
        paper.averages(5)


def test_changing_a_frame_leaves_the_file_alone():
    frame = paper.table(6)
    frame.loc[2, "TIES"] = 0.0
    assert paper.table(6).loc[2, "TIES"] > 0


def test_the_data_file_is_packaged():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["divmerge_book"]
    assert any(fnmatch("published/paper.json", pattern) for pattern in patterns)
