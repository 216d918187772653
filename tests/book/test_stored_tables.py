"""ResultTable tables come back as they were stored, and a chapter draws the one it says."""

import math

import pandas as pd
import pytest
from divmerge_book.evaluation.provenance import origin
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.stored_tables import load, save, stored_or_measure, stored_or_report

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
    save(path, {"rows": rows, "whole": table([1.0, 2.0])}, **FACTS)
    found, facts = load(path)
    pd.testing.assert_frame_equal(found["rows"], rows, check_dtype=False)
    assert found["rows"].value.dtype == float and found["whole"]["count"].dtype == int
    assert facts == origin(**FACTS)


def test_a_chapter_draws_the_stored_tables_and_measures_where_these_are_wanted(tmp_path):
    """At size `smoke` it measures in any case, so that all code is run."""
    path, runs = tmp_path / "study.json", []

    def study() -> dict:
        runs.append(1)
        return {"rows": table([float(len(runs))])}

    def drawn(**changed: object) -> tuple[str, float]:
        found = stored_or_measure(path, study, **{**FACTS, **changed})
        return found.source, found["rows"].value[0]

    assert drawn() == ("this run", 1.0) and not path.exists()
    assert drawn(publish=True) == ("the stored run", 2.0)
    assert drawn() == ("the stored run", 2.0) and len(runs) == 2  # nothing is measured
    assert drawn(size="smoke") == ("the stored run", 2.0) and len(runs) == 3
    assert drawn(live=True) == ("this run", 4.0) and drawn() == ("the stored run", 2.0)


ASKED = {"suite": "others", "encoder": "larger", "tasks": ["a"], "seeds": [7], "rows": 41}
ASKED["device"] = "cuda"


@pytest.mark.parametrize("name", ASKED)
def test_a_stored_table_is_drawn_only_where_each_fact_asked_for_agrees(tmp_path, name, monkeypatch):
    monkeypatch.setattr("divmerge_book.evaluation.provenance.device_name", lambda device: device)
    path = tmp_path / "study.json"
    save(path, {"rows": table([1.0])}, **FACTS)
    changed = {**FACTS, name: ASKED[name]}
    for asked in (None, {name}, {"suite", name}):
        found = stored_or_measure(path, {"rows": table([2.0])}, asked=asked, **changed)
        assert found.source == "this run" and found["rows"].value.tolist() == [2.0]
        assert found.caption.endswith(f"; the stored run has other {name}.")
    left = set(FACTS) - {name}
    found = stored_or_measure(path, {"rows": table([2.0])}, asked=left, **changed)
    assert found.source == "the stored run" and found["rows"].value.tolist() == [1.0]


def test_what_the_size_says_may_differ_and_is_told(tmp_path):
    """What a reader who sets nothing sees at the default size: the stored run of size full."""
    path = tmp_path / "study.json"
    save(path, {"rows": table([1.0])}, **FACTS)
    less = {**FACTS, "size": "default", "tasks": ["a"], "seeds": [0], "rows": 10}
    found = stored_or_measure(path, {"rows": table([2.0])}, asked={"suite", "encoder"}, **less)
    assert found.source == "the stored run"
    assert found.caption.endswith(" here give size default, rows 10, seeds 0, tasks a.")
    assert "unmerged" in stored_or_measure(path, {}, asked={"others"}, **FACTS, others=[]).caption
    same = stored_or_measure(path, {"rows": table([2.0])}, **{**FACTS, "size": "default"})
    assert same.caption.endswith("; the parameters here give size default.")
    plain = stored_or_measure(path, {}, **FACTS).caption
    assert "asked" not in plain and plain.endswith(f", in `{tmp_path.name}/study.json`.")


def test_a_stored_table_of_a_smaller_size_does_not_stand_in_for_a_larger(tmp_path):
    path = tmp_path / "study.json"
    save(path, {"rows": table([1.0])}, **{**FACTS, "size": "default"})
    for size, source in (("default", "the stored run"), ("full", "this run")):
        found = stored_or_measure(path, {"rows": table([2.0])}, asked=(), **{**FACTS, "size": size})
        assert found.source == source, size
    assert found.caption.endswith("; the stored run has other size.")


@pytest.mark.parametrize("knows", ["neither", "this run", "the stored run"])
def test_what_was_asked_for_and_is_not_known_of_both_runs_differs(tmp_path, knows):
    path, planes = tmp_path / "study.json", {"planes": ["a+b"]}
    save(path, {"rows": table([1.0])}, **FACTS, **planes if "stored" in knows else {})
    facts = {**FACTS, **(planes if knows == "this run" else {})}
    found = stored_or_measure(path, {"rows": table([2.0])}, asked={"suite", "planes"}, **facts)
    assert found.source == "this run"


def report(*methods: str, tasks: str = "a+b", **facts: object) -> Report:
    """A Report of perfect answers, with these methods and facts."""
    same = {"suite": "toys", "subset": tasks, "seed": 0, "predicted": "01", "gold": "01"}
    rows = [{**same, "method": m, "task": t} for m in methods for t in tasks.split("+")]
    known = {"suite": "toys", "encoder": "tiny", "size": "default", "seeds": [0], **facts}
    known |= {"rows_per_task": {"test": 2}, "precision": "float32"}
    return Report.of(pd.DataFrame(rows), **known)


def test_a_stored_report_is_drawn_by_the_same_rule(tmp_path):
    path, plain = tmp_path / "report.json", ("expert", "base", "average", "ties", "ties:published")
    own = report(*plain)
    assert stored_or_report(path, own, lr=0.1)[1].startswith("Drawn from this run: tiny")
    kept, said = stored_or_report(path, own, publish=True, asked={"lr"}, lr=0.1)
    assert said.startswith("Drawn from the stored run") and kept.provenance["lr"] == 0.1
    asked = {"suite", "methods", "tasks", "lr", "seeds"}
    kept, _ = stored_or_report(path, own, asked=asked, lr=0.1)
    assert kept is not own and kept.provenance["date"] == own.provenance["date"]
    changes = {
        "lr": (own, 0.2),
        "methods": (report("expert", "average"), 0.1),
        "tasks": (report(*plain, tasks="a+c"), 0.1),
        "seeds": (report(*plain, seeds=[0, 1]), 0.1),
        "size": (report(*plain, size="full"), 0.1),
    }
    for name, (other, lr) in changes.items():
        found, said = stored_or_report(path, other, asked=asked, lr=lr)
        assert found.rows is other.rows or found.rows.equals(other.rows)
        assert said.endswith(f"; the stored run has other {name}."), name
    _, said = stored_or_report(path, report("expert", "average"), asked={"lr"}, lr=0.1)
    assert said.endswith("; the parameters here give methods average.")


def test_the_caption_says_what_was_measured_where_and_when(tmp_path):
    said = stored_or_measure(tmp_path / "study.json", {"rows": table([1.0])}, **FACTS).caption
    for words in ("this run", "tiny, toys, 2 tasks, full size, 2 seeds", "40 test rows", "cpu"):
        assert words in said
    assert "measured 20" in said
