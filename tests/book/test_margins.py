"""Kept margins: by hand, and those of a Report of the same predictions."""

import numpy as np
import pandas as pd
import pytest
from divmerge_book import TASKS, Report
from divmerge_book.studies.margins import majorities, of_lists, scored

MAJORITY = pd.Series({"a": 0.5, "b": 0.8, "c": 0.9})


def test_the_majority_is_that_of_the_first_test_rows():
    labels = TASKS["sms"].load("test")["label"][:50]
    assert majorities(["sms"], 50)["sms"] == np.bincount(labels).max() / 50


def test_margins_by_hand():
    rows = {"task": ["a", "b", "c"], "accuracy": [0.7, 0.7, 0.1], "expert": [0.9, 1.0, 0.91]}
    found = scored(pd.DataFrame(rows), MAJORITY)
    assert found.ratio.tolist() == pytest.approx([0.7 / 0.9, 0.7, 0.1 / 0.91])
    assert found.kept_margin[:2].tolist() == pytest.approx([0.5, -0.5])
    assert found.below[:2].tolist() == [0, 1]
    assert found[["kept_margin", "below"]].iloc[2].isna().all(), "its expert is no better"


def test_lists_are_means_and_counts_over_the_tasks_of_a_row():
    lists = {"accuracies": [[0.7, 0.7], [0.9, 0.8], None], "experts": [[0.9, 1.0]] * 3}
    table = pd.DataFrame({**lists, "majorities": [[0.5, 0.8]] * 3}, index=[7, 7, 7])
    found = of_lists(table, [["a", "b"]] * 3)
    assert found.kept_margin[:2].tolist() == pytest.approx([0, 0.5], abs=1e-12)
    assert found.below[:2].tolist() == [1, 0] and np.isnan(found.kept_margin.iloc[2])
    old = table.drop(columns="majorities")
    assert of_lists(old, [["a", "b"]] * 3) is old


def test_margins_are_those_of_a_report():
    generator, rows = np.random.default_rng(0), []
    for seed in range(3):
        for task, classes in (("a", 2), ("b", 3)):
            gold = np.random.default_rng(classes).integers(classes, size=200)
            for method, share in (("expert", 0.9), ("average", 0.5)):
                right = generator.random(200) < share
                said = np.where(right, gold, (gold + 1) % classes).tolist()
                rows.append(("s", "a+b", method, seed, task, said, gold.tolist()))
    columns = ["suite", "subset", "method", "seed", "task", "predicted", "gold"]
    report = Report.of(pd.DataFrame(rows, columns=columns))
    there = report.against_experts()
    own = there[there.method == "expert"].set_index(["seed", "task"]).value
    here = there[there.method == "average"].rename(columns={"value": "accuracy"})
    keys = list(zip(here.seed, here.task, strict=True))
    found = scored(here.assign(expert=own.loc[keys].to_numpy()), report.majority()["s"])
    assert found.kept_margin.tolist() == pytest.approx(here.kept_margin.tolist())
    assert (found.below == (here.accuracy < here.floor)).all()
