"""Measured tables come back as they were stored, and a chapter draws the one it says."""

import math

import pandas as pd

from divmerge_core import tables
from divmerge_core.report import origin

FACTS = {
    **{"suite": "toys", "encoder": "tiny", "tasks": ["a", "b"], "size": "full"},
    **{"seeds": [0, 1], "rows": 40, "device": "cpu"},
}


def table(values: list) -> pd.DataFrame:
    counts = range(len(values))
    return pd.DataFrame({"name": [f"row {n}" for n in counts], "count": counts, "value": values})


def test_tables_come_back_as_they_were_stored(tmp_path):
    rows = table([1.5, math.nan, 2.0])
    path = tmp_path / "folder" / "study.json"
    tables.save(path, {"rows": rows, "whole": table([1.0, 2.0])}, **FACTS)
    found, facts = tables.load(path)
    pd.testing.assert_frame_equal(found["rows"], rows, check_dtype=False)
    assert found["rows"].value.dtype == float and found["whole"]["count"].dtype == int
    assert facts == origin(**FACTS)


def test_a_chapter_draws_the_stored_tables_unless_told_otherwise(tmp_path):
    path, own = tmp_path / "study.json", {"rows": table([1.0])}
    first = tables.drawn(path, own, **FACTS)
    assert first.source == "this run" and not path.exists()
    assert tables.drawn(path, {"rows": table([2.0])}, publish=True, **FACTS).source != "this run"
    stored = tables.drawn(path, own, **FACTS)
    assert stored.source == "the stored run" and stored["rows"].value.tolist() == [2.0]
    live = tables.drawn(path, own, live=True, **FACTS)
    assert live.source == "this run" and live["rows"].value.tolist() == [1.0]


def test_a_study_is_run_where_its_tables_are_wanted_and_at_size_smoke(tmp_path):
    path, runs = tmp_path / "study.json", []

    def study() -> dict:
        runs.append(1)
        return {"rows": table([float(len(runs))])}

    def drawn(**changed: object) -> tables.Measured:
        return tables.drawn(path, study, **{**FACTS, **changed})

    assert drawn(publish=True).source == "the stored run" and len(runs) == 1
    assert drawn()["rows"].value.tolist() == [1.0] and len(runs) == 1  # nothing is measured
    assert drawn(size="smoke").source == "the stored run" and len(runs) == 2  # all code is run
    assert drawn(live=True)["rows"].value.tolist() == [3.0]


def test_tables_of_another_suite_or_encoder_do_not_stand_in_for_this_runs(tmp_path):
    path = tmp_path / "study.json"
    tables.save(path, {"rows": table([1.0])}, **FACTS)
    for change in ({"suite": "others"}, {"encoder": "larger"}):
        found = tables.drawn(path, {"rows": table([2.0])}, **{**FACTS, **change})
        assert found.source == "this run" and found["rows"].value.tolist() == [2.0]


def test_the_caption_says_what_was_measured_where_and_when(tmp_path):
    said = tables.drawn(tmp_path / "study.json", {"rows": table([1.0])}, **FACTS).caption
    for words in ("this run", "tiny, toys, 2 tasks, full size, 2 seeds", "40 test rows", "cpu"):
        assert words in said
    assert "measured 20" in said
