"""Stored predictions: what is packed, and the scores and paired differences computed from it."""

import math

import pandas as pd
import pytest
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.stored_tables import ResultTable, load, save
from divmerge_book.studies import predictions
from divmerge_book.studies.predictions import NO_MARGIN, compared, of_score, packed, scored, text
from divmerge_book.studies.protocol import COLUMNS, DEFAULT


def answers(method: str, right: int, seed: int = 0) -> dict:
    """Ten answers, so many of them right; the gold ones are 1 for eight of ten."""
    gold = [1] * 8 + [0] * 2
    given = [g if n < right else 1 - g for n, g in enumerate(gold)]
    return {"method": method, "seed": seed, "task": "one", "predicted": given, "gold": gold}


def test_the_default_differs_from_itself_by_nothing():
    rows = [answers(DEFAULT, 6), answers("other", 4), answers("expert", 10)]
    table = compared(packed(rows)).set_index("method")
    assert table.loc[DEFAULT, ["difference", "from_low", "from_high"]].tolist() == [0, 0, 0]
    assert math.isnan(table.p[DEFAULT]) and table.loc[DEFAULT, "anp"] == pytest.approx(0.6)
    assert table.loc["other", "difference"] == pytest.approx(-0.2)
    assert table.loc["other", "from_low"] <= -0.2 <= table.loc["other", "from_high"]
    # the majority class has .8, the expert 1: a margin of .2, of which .6 is less than nothing
    assert table.loc[DEFAULT, "kept_margin"] == pytest.approx(-1)
    assert table.loc["other", "kept_difference"] == pytest.approx(-1)
    assert table.below.tolist() == [1, 1] and table.counted.tolist() == [1, 1]
    named = compared(packed(rows), against="other").set_index("method")
    assert named.difference[DEFAULT] == pytest.approx(0.2)
    alone = compared(packed(rows), against=lambda method: None if method == DEFAULT else DEFAULT)
    assert alone.difference.isna().tolist() == [True, False]


def test_differences_are_paired():
    """Equal answers differ in no draw, however wide their own intervals are."""
    rows = [answers(DEFAULT, 5), answers("twin", 5), answers("expert", 10)]
    twin = compared(packed(rows)).set_index("method").loc["twin"]
    assert twin.high - twin.low > 0.1
    assert twin.from_low == twin.from_high == 0 and twin.p == twin.holm == 1


def test_scores_of_stored_predictions_are_those_of_the_reports(tmp_path):
    rows = [
        {**answers(method, right, seed), "grouping": "task"}
        for seed in (0, 1)
        for method, right in ((DEFAULT, 9 - seed), ("lr=0.1", 7), ("expert", 10))
    ]
    report = Report(pd.DataFrame(rows).assign(suite="suite", subset="all"))
    save(tmp_path / "one.json", {"changed": packed(rows)}, seeds=[0, 1])
    stored = load(tmp_path / "one.json")[0]["changed"]
    pd.testing.assert_frame_equal(predictions.report_of(stored).metrics(), report.metrics())
    table = predictions.split(compared(stored, draws=200), COLUMNS["changed"]).set_index("setting")
    assert table.value.to_dict() == {DEFAULT: "", "lr": "0.1"} and set(table.grouping) == {"task"}
    for score, column in (("anp", "difference"), ("kept_margin", "kept_difference")):
        found = report.difference("suite", "all", "lr=0.1", DEFAULT, statistic=score, draws=200)
        names = [column, *(f"{'kept_' * (score != 'anp')}from_{end}" for end in ("low", "high"))]
        assert table.loc["lr", names].tolist() == pytest.approx(list(found))
        assert of_score(table, score).difference["lr"] == table[column]["lr"]


def test_a_class_is_one_character():
    assert text([0, 9, 10, 35]) == "09az"
    with pytest.raises(ValueError, match="up to 36 classes, got class 36"):
        text([1, 36])


def test_a_run_stored_without_predictions_is_drawn_and_marked():
    table = pd.DataFrame({"setting": ["lr"], "value": ["1"], "low": [0.1], "difference": [0.2]})
    facts = {"seeds": [0], "tasks": ["a"]}
    facts |= dict.fromkeys(("encoder", "suite", "size", "rows", "device"), "x")
    facts |= dict.fromkeys(("machine", "torch", "date"), "x")
    stored = ResultTable({"changed": table}, facts, "the stored run", "; y")
    old = scored(stored, COLUMNS)
    assert old["changed"] is table and old.caption.endswith(f"; y{NO_MARGIN}.")
    new = packed([answers(DEFAULT, 6), answers("lr=0.1", 4), answers("expert", 10)])
    run = scored(ResultTable({"changed": new, "other": table}, facts, "this run"), COLUMNS)
    assert "predictions" not in run.caption and run["other"] is table
    assert run["changed"].setting.tolist() == [DEFAULT, "lr"]


def test_significant_is_a_corrected_p_value_below_the_level():
    table = pd.DataFrame({"p": [0.01, 0.02, None, 0.001], "holm": [0.05, 0.06, None, 0.004]})
    assert predictions.significant(table).index.tolist() == [3]
