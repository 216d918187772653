"""Sentences about who is ahead: each says one thing of one Report by hand, the other of another."""

from dataclasses import replace

import pandas as pd
import pytest
from divmerge_book.evaluation.report import Report
from divmerge_book.figures import baselines, task_table
from divmerge_book.findings import contests
from helpers import RESULTS

RUN, BOTH = "this run", "even+uneven"
GOLD = {"even": [0, 1] * 50, "uneven": ([1] + [0] * 9) * 10}  # majority classes: 50 and 90 rows


def made(**right: tuple[int, int]) -> Report:
    """Two seeds of methods with known numbers of right answers on `even` and `uneven`, of 100.

    Names: `_` stands for `/`. Every merge of DivMerge takes 1 s, of others 2 s; a search tried two
    candidates, where there is a row `NAME:published`.
    """
    rows, fits = [], []
    right = {"expert": (100, 100), "base": (50, 90), **right}
    cost = {"peak_bytes": 1.0, "inputs": 0, "stored_bytes": 250, "model_bytes": 100}
    for seed, (name, counts) in ((seed, item) for seed in (0, 1) for item in right.items()):
        labels = {"suite": "toy", "subset": BOTH, "method": name.replace("_", "/"), "seed": seed}
        for (task, gold), count in zip(GOLD.items(), counts, strict=True):
            predicted = [a if n < count else 1 - a for n, a in enumerate(gold)]
            rows.append({**labels, "task": task, "predicted": predicted, "gold": gold})
        if name not in ("expert", "base"):
            found = {"search": [{}] * 2} if f"{name}:published" in right else {}
            own = {**cost, "seconds": 1.0 if "div" in name else 2.0, "calls": 0, "answer_ms": 1.0}
            fits.append({**labels, "options": {}, "cost": own, **found})
    return Report.of(pd.DataFrame(rows), fits)


AHEAD = made(divmerge_task=(95, 99), average=(50, 90))
BEHIND = made(divmerge_task=(50, 80), average=(95, 99))
# a constant answer on `uneven` has the higher ANP, and the lower kept margin
MIXED = made(divmerge_task=(60, 90), average=(80, 75))


def verdict(report: Report) -> str:
    return contests.verdict(report, BOTH, baselines.summary(report, BOTH))


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (
            BEHIND,
            [
                "By ANP the best DivMerge is DivMerge, per task, number 2 of 2 with 65.0 %",
                "By kept margin the best DivMerge is DivMerge, per task, number 2 of 2",
                *("| Average | +32.0 [", " | +140.0 [", "DivMerge, per task takes 1.0 s."),
                "| 2.0 | no data | 1 |",
            ],
        ),
        (AHEAD, ["number 1 of 2", "No other method has a higher ANP or kept margin."]),
        (
            MIXED,
            [
                "By ANP the best DivMerge is DivMerge, per task, number 2 of 2",
                "By kept margin the best DivMerge is DivMerge, per task, number 1 of 2",
                "| Average | +2.5 [",
            ],
        ),
        (made(divmerge_task=(60, 92), emr=(95, 99)), ["| no data | 2.50 |"]),
        (made(ties=(60, 90)), ["DivMerge is not among"]),
    ],
    ids=["behind", "ahead", "ahead by one score alone", "several models", "absent"],
)
def test_the_verdict_speaks_of_both_scores_and_the_price(report, said):
    text = verdict(report)
    for words in said:
        assert words in text


EVEN = {"divmerge_task": (80, 95), "average": (50, 90)}


@pytest.mark.parametrize(
    ("right", "said", "times"),
    [
        ({"divmerge_task": (95, 99), "average": (50, 90)}, "is ahead of", 2),
        ({"divmerge_task": (50, 80), "average": (95, 99)}, "is behind the best other single", 2),
        (EVEN | {"emr": (99, 99)}, "is ahead of the best", 2),
        ({"divmerge_task": (80, 95), "average": (80, 95)}, "does not differ significantly from", 2),
        # published options are no rival of the searched ones
        (EVEN | {"average:published": (99, 99)}, "(70.0 %)", 1),
        ({"expert": (50, 90), "divmerge_task": (50, 90)}, "no task counts", 1),
        ({"ties": (60, 90)}, "there is no DivMerge, or no single", 1),
        ({"divmerge_task": (60, 90)}, "or no single model of another method", 1),
    ],
)
def test_the_best_divmerge_is_ahead_or_behind_or_neither(right, said, times):
    assert contests.standing(made(**right), RUN).count(said) == times


def test_the_standing_names_scores_and_who_is_below_the_majority():
    text = contests.standing(AHEAD, RUN)
    assert text.startswith("On toy in this run, T = 2: by ANP, DivMerge, per task (97.0 %) is")
    assert "by kept margin, DivMerge, per task (90.0 %) is ahead of" in text
    assert "No method is below the majority class" in text
    text = contests.standing(BEHIND, RUN)
    assert "1 of 2 methods are below the majority class on at least one" in text
    assert "counted task; DivMerge, per task on most, 1 of 2." in text


def test_differences_of_pairs_are_listed_by_both_scores():
    text = contests.gaps(AHEAD, BOTH, ["divmerge/task"], ["average", "divmerge/task"])
    assert text.startswith("- DivMerge, per task minus Average: +27.0 points of ANP [")
    assert "and +90.0 points of kept margin [" in text and "(includes 0)" not in text
    text = contests.gaps(AHEAD, BOTH, ["average"], ["base"])
    assert "+0.0 points of ANP [+0.0, +0.0] (includes 0)" in text and text.count("\n") == 0


def test_gains_by_task_are_in_kept_margin_and_name_what_is_lost():
    text = contests.by_task(MIXED, BOTH, "divmerge/task", "average")
    assert "seed): `even` -40 (-40 to -40), `uneven` +150 (+150 to +150)." in text
    assert "It is behind on `even`." in text
    assert "on `uneven` (10.0 points) and `even` (50.0 points); the less, the fewer" in text
    text = contests.by_task(AHEAD, BOTH, "divmerge/task", "average")
    assert "It is behind on no task." in text


def summary(**rows: tuple) -> pd.DataFrame:
    """A table as of `baselines.summary`: block, value, kept, published, kept_published."""
    columns = ["block", "value", "kept", "published", "kept_published"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.assign(counted=8, tried=6.0, below=0)


def test_an_account_compares_with_the_best_rival_and_gives_every_accuracy(tmp_path):
    """Facts that its caption needs are those of a comparison; no file is no account."""
    facts = {"encoder": "small", "size": "smoke", "rows_per_task": {"test": 100}}
    facts |= {"device": "cpu", "precision": "float32"}
    report = replace(MIXED, provenance=MIXED.provenance | facts)
    report.save(tmp_path / "one.json")
    text = contests.account(contests.stored(tmp_path / "one.json"), "divmerge/task")
    assert text.startswith("*small, smoke size, 2 seeds, 100 test rows a task")
    assert "DivMerge, per task minus Average: -2.5 points of ANP" in text
    assert "DivMerge, per task minus Average by task" in text
    assert "| Average | 80.0 | 75.0 |" in text
    assert "| Majority class | 50.0 | 90.0 |" in text
    none = contests.stored(tmp_path / "none.json")
    assert contests.account(none, "divmerge/task") == "Not measured here."


def test_data_access_matters_more_only_where_blocks_differ_more():
    ties, average = ("no data", 0.50, 0.1, 0.5, 0.1), ("no data", 0.52, 0.3, 0.5, 0.1)
    table = summary(
        ties=ties,
        average=average,
        fisher=(baselines.INPUTS, 0.90, 0.2, 0.5, 0.1),
        regmean=(baselines.INPUTS, 0.92, 0.3, 0.5, 0.1),
        emr=("no data", 0.99, 0.9, 0.5, 0.1),  # more than one model
    )
    anp, _, kept = contests.by_access(table, RUN).partition("By kept")
    assert "By ANP the best are Average (52.0 %; no data) and RegMean (92.0 %;" in anp
    assert "matters more than" in anp and "matters less than" in kept and "EMR" not in anp + kept
    alike, single = {"ties": ties, "average": average}, (baselines.INPUTS, 0.9, 0.2, 0.5, 0.1)
    for few in (alike, {"ties": ties, "fisher": single}):
        assert "data, or each at its own" in contests.by_access(summary(**few), RUN)


def test_what_the_search_is_worth_is_set_beside_the_distance_of_neighbours():
    ties, average = ("no data", 0.50, 0.1, 0.40, 0.1), ("no data", 0.52, 0.3, 0.52, 0.0)
    text = contests.searching(summary(ties=ties, average=average), RUN)
    assert "ANP by +0.0 to +10.0 points (most: TIES)" in text
    assert "neighbours in the ranking (2.0) for 1 of 2 methods" in text
    assert "kept margin by +0.0 to +30.0 points (most: Average)" in text
    assert "made no search" in contests.searching(summary(ties=ties), RUN)


def test_the_chapters_findings_are_a_bullet_each():
    text = contests.summary(AHEAD, baselines.summary(AHEAD, BOTH), RUN)
    assert text.count("\n- ") == 2 and "is ahead of the best other single model" in text


# --- task by task ---------------------------------------------------------------------------------
def tasks_of(rows: list[tuple]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["method", "task", "predicted", "gold"])
    return task_table(Report(table.assign(suite="toy", subset="s", seed=0)), "s")


def test_the_own_metric_of_a_glue_task_stands_beside_its_accuracy():
    gold, said = [1, 1, 1, 0], {"expert": [1, 1, 1, 0], "average": [1, 0, 1, 0]}
    tasks = ("cola", "mrpc", "sst2")
    table = tasks_of([(m, task, answers, gold) for task in tasks for m, answers in said.items()])
    assert list(table) == [*tasks, "cola, matthews", "mrpc, f1"]
    assert list(table.index) == ["Experts, one per task", "Average", "Majority class"]
    assert table.loc["Average", "mrpc, f1"] == pytest.approx(0.8)
    assert table.loc["Average", "cola, matthews"] == pytest.approx(2 / 12**0.5)
    majority = [0.75, 0.75, 0.75, 0.0, 6 / 7]
    assert list(table.loc["Majority class"]) == pytest.approx(majority)


def test_a_graded_task_has_its_grade_and_a_majority_of_nothing():
    rows = [("expert", "say", [0.5, 1.0], "rouge1"), ("expert", "mood", [0, 0], [0, 1])]
    assert tasks_of(rows).to_numpy().tolist() == [[0.75, 0.5], [0.0, 0.5]]


def test_stored_reports_have_findings():
    report = Report.load(RESULTS / "glue_encoder.json")
    assert "T = 5 (2 counted): by ANP, DivMerge" in contests.standing(report, "the stored run")
    table = task_table(report, report.rows.subset.iloc[0])
    assert {"cola, matthews", "mrpc, f1"} < set(table)
