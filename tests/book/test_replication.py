"""The paper's claims against Reports and tables made by hand."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.findings import replication
from divmerge_book.findings.in_short import Stored
from divmerge_book.findings.replication import OPEN, OPPOSITE, REPLICATED, Check
from divmerge_book.published import paper
from divmerge_book.studies.scaling import packed
from scipy import stats

RIGHT = {"expert": 100, "divmerge/layer": 95, "divmerge/task": 60, "average": 60, "ties": 95}


def report() -> Report:
    """Two tasks of 100 rows; a method answers the first RIGHT[method] rows right."""
    gold = [0, 1] * 50
    rows = [
        {
            **{"suite": "toy", "subset": "a+b", "method": method, "seed": seed, "task": task},
            "predicted": [g if n < right else 1 - g for n, g in enumerate(gold)],
            "gold": gold,
        }
        for seed in (0, 1, 2)
        for task in "ab"
        for method, right in RIGHT.items()
    ]
    return Report.of(pd.DataFrame(rows), [], suite="toy", encoder="tiny")


def test_an_ordering_is_replicated_reversed_or_open_by_its_interval():
    found = {one.claim: one for one in replication.orders(report())}
    pair = "DivMerge, per {} is above {}".format
    assert found[pair("layer", "Average")].verdict == REPLICATED
    assert found[pair("layer", "Average")].value == pytest.approx(35)
    assert found[pair("layer", "TIES")].verdict == OPEN
    assert found[pair("task", "TIES")].verdict == OPPOSITE
    kept = [found[pair(*names)].kept for names in (("layer", "Average"), ("task", "TIES"))]
    assert kept == [REPLICATED, OPPOSITE] and not any(one.weak for one in found.values())
    poor = report()
    poor.rows.loc[poor.rows.method == "ties", "method"] = "base"
    poor.rows.loc[poor.rows.method == "average", "method"] = "ties"
    weak = {one.claim: one.weak for one in replication.orders(poor)}
    assert weak[pair("layer", "TIES")] and weak[pair("layer", "TIES")] in weak.values()
    printed = paper.table(6).loc[7]
    assert found[pair("task", "TIES")].paper == pytest.approx(printed["TL JS"] - printed["TIES"])
    assert not any("AdaMerging" in claim for claim in found), "what was not measured is not checked"


def test_orderings_over_subsets_are_means_over_sizes_without_the_largest_merge(monkeypatch):
    """The average is right on 80 of 100 rows of every task; by hand: (12 + 6) / 2 points."""
    ours = {"a+b": 90, "a+c": 94, "b+c+d": 84, "a+b+c": 88, "a+b+c+d": 10}
    rows = [("expert", t, t, 100) for t in "abcd"]
    rows += [("commonest answer", t, t, 50) for t in "abcd"]
    for method, subsets in {"average": dict.fromkeys(ours, 80), "divmerge/layer": ours}.items():
        rows += [(method, s, task, n) for s, n in subsets.items() for task in s.split("+")]
    table = pd.DataFrame(rows, columns=["method", "subset", "task", "right"]).assign(seed=1, js=0.0)
    table["right"] = [packed(torch.arange(100) < count) for count in table.right]
    found = ResultTable({"answers": table}, {"suite": "glue", "encoder": "tiny"}, "stored")
    monkeypatch.setattr(Stored, "tables", lambda self, name: found)
    (one,) = replication.over_subsets(Stored(Path("none")))
    assert one.claim == "DivMerge, per layer is above Average"
    assert one.setting == "`glue`, `tiny`, T = 2 to 3, 4 subsets (4 tasks counted)"
    half = stats.t.ppf(0.975, 2) * ((8 / 2 + 8 / 2) / 4) ** 0.5  # variances of 10, 14 and of 4, 8
    assert (one.value, one.low, one.high) == pytest.approx((9, 9 - half, 9 + half))
    printed = paper.table(6).loc[2:6]
    assert one.paper == pytest.approx((printed["LL JS"] - printed["Model averaging"]).mean())


def test_a_summary_counts_verdicts_and_names_what_is_not_replicated():
    yes, no = ({"paper": 1.0, "value": v, "low": v - 1, "high": v + 1} for v in (2.0, -2.0))
    found = [Check("x", "one", **yes), Check("x", "two", **no), Check("y", "two", **no)]
    counts, opposite, unknown = replication.summary(found).splitlines()
    assert counts.endswith(": 1 replicated, 2 not replicated and 0 cannot be told.")
    assert opposite == "- Not replicated: x; y (two)." and unknown == "- Cannot be told: none."
    assert list(replication.table(found).Verdict) == [REPLICATED, OPPOSITE, OPPOSITE]


def test_the_papers_own_correlation_without_the_own_expert_is_small(monkeypatch):
    """With it .82, as its Table 2 prints; without it .27 (from its Figure 5 and Table 5)."""
    cross = paper.figure(5, "js").stack().rename("js").to_frame()
    cross["accuracy"] = paper.table(5).T.stack().to_numpy()
    cross = cross.rename_axis(["task", "model"]).reset_index().assign(seed=0)
    both = pd.concat([cross, cross.assign(seed=1)])

    found = ResultTable({"cross": both}, {"encoder": "tiny"}, "stored")
    monkeypatch.setattr(Stored, "tables", lambda self, name: found)
    kept, others = replication.predicts(Stored(Path("none")))
    assert kept.paper == pytest.approx(0.818, abs=1e-3) == kept.value
    assert others.paper == pytest.approx(0.274, abs=1e-3) == others.value


def test_ones_own_report_is_checked_and_named_and_stored_ones_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(replication, "caption", lambda one: "a run")
    report().save(path := tmp_path / "mine.json")
    monkeypatch.setenv("PWD", str(tmp_path))  # where the command was typed
    found, origin = replication.drawn(path.name)
    assert len(found) == len(list(replication.orders(report()))) and f"`{path.name}`" in origin
    monkeypatch.setattr(replication, "PLACES", (tmp_path,))
    monkeypatch.setattr(Stored, "report", lambda self, name: self.dates.update({name: "d"}))
    for name in ("orders", "objectives", "over_subsets", "predicts", "lead"):
        monkeypatch.setattr(replication, name, lambda one: [])
    said = replication.in_short(stored := Stored(tmp_path))[0]
    assert said.startswith("Of 0 checks of the paper's claims: 0")
    assert replication.drawn(path.name)[1].endswith("no two methods that the paper puts in order.")
    monkeypatch.setattr(Stored, "report", None)
    assert replication.drawn() == ([], stored.origin())
