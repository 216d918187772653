"""Sentences about who is ahead: each says one thing of one Report by hand, the other of another."""

from pathlib import Path

import pandas as pd
import pytest
from divmerge_book.evaluation.report import Report
from divmerge_book.figures import baselines, task_table
from divmerge_book.findings import contests

RUN = "this run"
TASKS = ("even", "uneven")  # their majority classes have 50 and 90 of 100 rows
GOLD = {"even": [0, 1] * 50, "uneven": [1] + [0] * 9}
GOLD["uneven"] *= 10


def answers(task: str, right: int) -> list[int]:
    """Right on the first rows, wrong on the others."""
    return [a if n < right else 1 - a for n, a in enumerate(GOLD[task])]


def made(**right: tuple[int, int]) -> Report:
    """Two seeds of methods with known numbers of right answers on `even` and `uneven`, of 100.

    Names: `_` stands for `/`. Every merge of DivMerge takes 1 s, of others 2 s; a search tried two
    candidates, where there is a row `NAME:published`.
    """
    rows, fits = [], []
    right = {"expert": (100, 100), "base": (50, 90), **right}
    for seed in (0, 1):
        for name, counts in right.items():
            method = name.replace("_", "/")
            labels = {"suite": "toy", "subset": "+".join(TASKS), "method": method, "seed": seed}
            rows += [
                {**labels, "task": t, "predicted": answers(t, count), "gold": GOLD[t]}
                for t, count in zip(TASKS, counts, strict=True)
            ]
            if method in ("expert", "base"):
                continue
            cost = {"seconds": 1.0 if "div" in name else 2.0, "peak_bytes": 1.0, "inputs": 0}
            cost |= {"stored_bytes": 250, "model_bytes": 100, "calls": 0, "answer_ms": 1.0}
            found = {"search": [{}] * 2} if f"{name}:published" in right else {}
            fits.append({**labels, "options": {}, "cost": cost, **found})
    return Report.of(pd.DataFrame(rows), fits)


AHEAD = made(divmerge_task=(95, 99), average=(50, 90))
BEHIND = made(divmerge_task=(50, 80), average=(95, 99))
# a constant answer on `uneven` has the higher ANP, and the lower kept margin
MIXED = made(divmerge_task=(60, 90), average=(80, 75))


def test_the_verdict_speaks_of_both_scores_and_the_price():
    table = baselines.summary(BEHIND, "even+uneven")
    text = contests.verdict(BEHIND, "even+uneven", table)
    assert "By ANP the best DivMerge is DivMerge, per task, number 2 of 2 with 65.0 %" in text
    assert "By kept margin the best DivMerge is DivMerge, per task, number 2 of 2" in text
    assert "Average: +32.0 points of ANP [" in text and "+140.0 points of kept margin [" in text
    assert "2.0 s against 1.0 s; looks at no data" in text and "models stored" not in text
    text = contests.verdict(AHEAD, "even+uneven", baselines.summary(AHEAD, "even+uneven"))
    assert "number 1 of 2" in text and "No other method has a higher ANP or kept margin." in text


def test_a_method_ahead_by_one_score_alone_is_in_the_verdict():
    table = baselines.summary(MIXED, "even+uneven")
    assert table.value["average"] > table.value["divmerge/task"]
    assert table.kept["average"] < table.kept["divmerge/task"]
    text = contests.verdict(MIXED, "even+uneven", table)
    assert "By ANP the best DivMerge is DivMerge, per task, number 2 of 2" in text
    assert "By kept margin the best DivMerge is DivMerge, per task, number 1 of 2" in text
    assert "- Average: +2.5 points of ANP [" in text


def test_several_models_are_named_with_their_storage():
    report = made(divmerge_task=(60, 92), emr=(95, 99))
    text = contests.verdict(report, "even+uneven", baselines.summary(report, "even+uneven"))
    assert "no single model: 2.50 models stored" in text


def test_a_table_without_divmerge_has_a_verdict_too():
    report = made(ties=(60, 90))
    table = baselines.summary(report, "even+uneven")
    assert "DivMerge is not among" in contests.verdict(report, "even+uneven", table)
    assert "no DivMerge to compare" in contests.standing(report, RUN)


def test_the_best_divmerge_is_ahead_or_behind_or_neither():
    text = contests.standing(AHEAD, RUN)
    assert text.startswith(
        "On toy in this run, T = 2: by ANP, DivMerge, per task (97.0 %) is ahead"
    )
    assert "by kept margin, DivMerge, per task (90.0 %) is ahead of" in text
    assert "No method is below the majority class" in text
    text = contests.standing(BEHIND, RUN)
    assert text.count("is behind the best other single model, Average") == 2
    assert "1 of 2 methods are below the majority class" in text
    assert "most tasks: DivMerge, per task (1 of 2)." in text
    text = contests.standing(made(divmerge_task=(80, 95), average=(50, 90), emr=(99, 99)), RUN)
    assert text.count("is ahead of the best other single model, Average") == 2
    text = contests.standing(made(divmerge_task=(80, 95), average=(80, 95)), RUN)
    assert text.count("does not differ significantly from") == 2


def test_published_options_are_no_rival_of_the_searched_ones():
    report = made(divmerge_task=(80, 95), average=(50, 90), **{"average:published": (99, 99)})
    assert "Average (70.0 %)" in contests.standing(report, RUN)


def test_a_run_in_which_no_task_counts_has_no_ranking():
    assert "no task counts" in contests.standing(made(expert=(50, 90), divmerge_task=(50, 90)), RUN)


def test_differences_of_pairs_are_listed_by_both_scores():
    text = contests.gaps(AHEAD, "even+uneven", ["divmerge/task"], ["average", "divmerge/task"])
    assert text.startswith("- DivMerge, per task minus Average: +27.0 points of ANP [")
    assert "and +90.0 points of kept margin [" in text and "(includes 0)" not in text
    text = contests.gaps(AHEAD, "even+uneven", ["average"], ["base"])
    assert "+0.0 points of ANP [+0.0, +0.0] (includes 0)" in text and text.count("\n") == 0


def summary(**rows: tuple) -> pd.DataFrame:
    """A table as of `baselines.summary`: block, value, kept, published, kept_published, below."""
    columns = ["block", "value", "kept", "published", "kept_published", "below"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.assign(counted=8, tried=6.0)


def test_data_access_matters_more_only_where_blocks_differ_more():
    text = contests.by_access(
        summary(
            ties=("no data", 0.50, 0.1, 0.5, 0.1, 0),
            average=("no data", 0.52, 0.3, 0.5, 0.1, 0),
            fisher=(baselines.INPUTS, 0.90, 0.2, 0.5, 0.1, 0),
            regmean=(baselines.INPUTS, 0.92, 0.3, 0.5, 0.1, 0),
            emr=("no data", 0.99, 0.9, 0.5, 0.1, 0),  # more than one model
        ),
        RUN,
    )
    assert "By ANP the best are Average (52.0 %; no data) and RegMean (92.0 %;" in text
    assert "By ANP" in text and "data access matters more than" in text.partition("By kept")[0]
    assert "data access matters less than" in text.partition("By kept")[2]
    assert "EMR" not in text
    one = summary(ties=("no data", 0.5, 0.1, 0.5, 0.1, 0))
    assert "look at the same data" in contests.by_access(one, RUN)


def test_what_the_search_is_worth_is_set_beside_the_distance_of_neighbours():
    text = contests.searching(
        summary(
            ties=("no data", 0.50, 0.1, 0.40, 0.1, 0),
            average=("no data", 0.52, 0.3, 0.52, 0.0, 0),
        ),
        RUN,
    )
    assert "ANP by +0.0 to +10.0 points (most: TIES)" in text
    assert "neighbours in the ranking (2.0) for 1 of 2 methods" in text
    assert "kept margin by +0.0 to +30.0 points (most: Average)" in text
    alone = summary(ties=("no data", 0.5, 0.1, 0.4, 0.1, 0))
    assert "made no search" in contests.searching(alone, RUN)


def test_the_chapters_findings_are_a_bullet_each():
    table = baselines.summary(AHEAD, "even+uneven")
    text = contests.summary(AHEAD, table, RUN)
    assert text.count("\n- ") == 2 and "is ahead of the best other single model" in text


# --- task by task ---------------------------------------------------------------------------------


def test_the_own_metric_of_a_glue_task_stands_beside_its_accuracy():
    gold = [1, 1, 1, 0]
    rows = [
        {"method": method, "task": task, "predicted": said, "gold": gold}
        for task in ("cola", "mrpc", "sst2")
        for method, said in (("expert", gold), ("average", [1, 0, 1, 0]))
    ]
    report = Report(pd.DataFrame(rows).assign(suite="glue", subset="s", seed=0))
    table = task_table(report, "s")
    assert list(table) == ["cola", "mrpc", "sst2", "cola, matthews", "mrpc, f1"]
    assert list(table.index) == ["Experts, one per task", "Average", "Majority class"]
    assert table.loc["Average", "mrpc, f1"] == pytest.approx(0.8)
    assert table.loc["Average", "cola, matthews"] == pytest.approx(2 / 12**0.5)
    majority = [0.75, 0.75, 0.75, 0.0, 6 / 7]
    assert list(table.loc["Majority class"]) == pytest.approx(majority)


def test_a_graded_task_has_its_grade_and_a_majority_of_nothing():
    rows = [
        {"method": "expert", "task": "say", "predicted": [0.5, 1.0], "gold": "rouge1"},
        {"method": "expert", "task": "mood", "predicted": [0, 0], "gold": [0, 1]},
    ]
    report = Report(pd.DataFrame(rows).assign(suite="toy", subset="s", seed=0))
    assert task_table(report, "s").to_numpy().tolist() == [[0.75, 0.5], [0.0, 0.5]]


def test_stored_reports_have_findings():
    results = Path(__file__).resolve().parents[2] / "book" / "results"
    report = Report.load(results / "glue_encoder.json")
    assert "T = 5: by ANP, DivMerge" in contests.standing(report, "the stored run")
    table = task_table(report, report.rows.subset.iloc[0])
    assert {"cola, matthews", "mrpc, f1"} < set(table)
