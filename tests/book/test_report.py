"""Reports: ANP by hand, intervals with the promised coverage, and exact, atomic files."""

import importlib.metadata
import json
import re
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation import provenance
from divmerge_book.evaluation import report as module
from divmerge_book.evaluation.metrics import combine, own_scores, scores
from divmerge_book.evaluation.report import COLUMNS, MARGIN, STATISTICS, Report, caption
from helpers import raising

SUITE, SUBSET = "toy", "a+b"


def rows(
    mistakes: dict[str, dict[str, tuple[int, ...]]], size: int = 20, suite: str = SUITE
) -> pd.DataFrame:
    """method -> task -> wrong predictions, the first ones, per seed; half of the gold is zeros."""
    gold = [0, 1] * (size // 2)
    found = [
        (suite, SUBSET, method, seed, task, [1 - g for g in gold[:wrong]] + gold[wrong:], gold)
        for method, tasks in mistakes.items()
        for task, per_seed in tasks.items()
        for seed, wrong in enumerate(per_seed)
    ]
    return pd.DataFrame(found, columns=COLUMNS)


MISTAKES = {
    "expert": {"a": (2, 4), "b": (0, 0)},
    "base": {"a": (11, 11), "b": (10, 10)},
    "merge": {"a": (11, 12), "b": (5, 0)},
    "mean": {"a": (8, 8), "b": (6, 2)},
}


@pytest.fixture
def report() -> Report:
    facts = {"encoder": "tiny", "size": "smoke", "precision": "float32", "seeds": [0, 1]}
    return Report.of(rows(MISTAKES), rows_per_task={"test": 20}, **facts)


def value(report: Report, method: str, metric: str, task: str = "all", seed: int = 0) -> float:
    tidy = report.metrics()
    chosen = (tidy.method == method) & (tidy.metric == metric)
    return tidy[chosen & (tidy.task == task) & (tidy.seed == seed)].value.item()


def interval(report: Report, method: str = "merge", **options) -> pd.Series:
    return report.intervals(**options).set_index("method").loc[method]


def test_scores_by_hand(report):
    assert value(report, "merge", "anp") == pytest.approx((9 / 18 + 15 / 20) / 2)
    assert value(report, "merge", "anp", seed=1) == pytest.approx((8 / 16 + 20 / 20) / 2)
    assert value(report, "merge", "worst") == pytest.approx(9 / 18)
    assert value(report, "mean", "worst") == pytest.approx(min(12 / 18, 14 / 20))
    for seed in (0, 1):
        assert value(report, "expert", "anp", seed=seed) == 1
        assert value(report, "expert", "worst", seed=seed) == 1
    assert value(report, "merge", "accuracy", "a") == pytest.approx(9 / 20)
    assert value(report, "merge", "ratio", "a") == pytest.approx(9 / 18)
    names = {"accuracy", "macro_f1", "matthews", "f1", "ratio", "kept_margin"}
    overall = {"anp", "worst", "kept_margin", "below_majority"}
    assert set(report.metrics().metric) == names | overall
    assert set(report.metrics().query("task == 'all'").metric) == overall


@pytest.mark.filterwarnings("error")
def test_beside_an_expert_that_gets_none_right_there_is_no_ratio(report):
    none = Report(rows({**MISTAKES, "expert": {"a": (20, 20), "b": (0, 0)}}), [], report.provenance)
    found = none.against_experts().query("task == 'a'")
    assert found.ratio.isna().all() and not found.counted.any()
    assert np.isnan(combine(np.zeros((1, 1, 1, 2)), np.zeros((1, 1)), 0, "anp")).all()


def test_the_kept_margin_is_the_share_of_the_experts_margin_over_the_majority(report):
    """The expert's margin is its mean over seeds: on task a (0.9 + 0.8) / 2 - 0.5."""
    margins = {"a": 0.85 - 0.5, "b": 1 - 0.5}
    a, b = (9 / 20 - 0.5) / margins["a"], (15 / 20 - 0.5) / margins["b"]
    assert value(report, "merge", "kept_margin", "a") == pytest.approx(a)
    assert value(report, "merge", "kept_margin", "b") == pytest.approx(b)
    assert value(report, "merge", "kept_margin") == pytest.approx((a + b) / 2)
    expert = [value(report, "expert", "kept_margin", seed=seed) for seed in (0, 1)]
    assert np.mean(expert) == pytest.approx(1)


def test_a_constant_prediction_keeps_no_margin_though_its_anp_is_high():
    frame = rows({"expert": {"a": (0,)}, "constant": {"a": (0,)}})
    gold = [0] * 18 + [1] * 2
    frame["gold"], frame["predicted"] = [gold, gold], [gold, [0] * 20]
    report = Report.of(frame)
    assert report.majority()[SUITE, "a"] == 18 / 20
    assert value(report, "constant", "anp") == pytest.approx(0.9)
    assert value(report, "constant", "kept_margin") == pytest.approx(0)


@pytest.mark.parametrize("wrong", [10, 11])
def test_a_task_whose_expert_is_not_above_the_majority_is_left_out_of_scores_and_intervals(wrong):
    frame = rows({"expert": {"a": (0,), "b": (wrong,)}, "merge": {"a": (5,), "b": (1,)}})
    report = Report.of(frame)
    assert np.isnan(value(report, "merge", "kept_margin", "b"))
    assert value(report, "merge", "kept_margin") == pytest.approx(0.5)
    assert value(report, "merge", "anp") == pytest.approx(15 / 20)
    assert value(report, "merge", "accuracy", "b") == pytest.approx(19 / 20)
    assert interval(report, draws=50).value == pytest.approx(15 / 20)


def test_tasks_below_the_majority_are_counted_and_named(report):
    assert value(report, "merge", "below_majority") == 1  # 9 of 20 on task a
    assert value(report, "mean", "below_majority") == 0
    assert value(report, "base", "below_majority") == 1  # on task b it equals the majority
    table = report.below_majority().set_index("method")
    assert table.below.to_dict() == {"expert": 0, "base": 1, "merge": 1, "mean": 0}
    assert table.tasks["merge"] == ["a"] and table.counted.tolist() == [2] * 4


def test_of_a_graded_task_the_kept_margin_is_the_ratio():
    frame = rows({"expert": {"a": (0,)}, "merge": {"a": (0,)}})
    frame["predicted"], frame["gold"] = [[0.5, 0.9] * 10, [0.25, 0.45] * 10], "rouge1"
    report = Report.of(frame)
    assert report.majority()[SUITE, "a"] == 0
    assert value(report, "merge", "kept_margin") == pytest.approx(0.5)
    assert value(report, "merge", "anp") == pytest.approx(0.5)


def test_glue_tasks_are_scored_by_their_own_metric():
    report = Report.of(rows({"expert": {"cola": (2,), "qqp": (2,), "rte": (2,)}}))
    own = own_scores(scores(report.rows)).set_index("task")
    assert own.metric.to_dict() == {"cola": "matthews", "qqp": "f1", "rte": "accuracy"}
    tidy = report.metrics().set_index(["task", "metric"]).value
    assert all(own.value[task] == tidy[task, metric] for task, metric in own.metric.items())


def test_a_task_counts_where_its_expert_beats_the_majority_by_the_margin_in_the_mean():
    enough = round(100 * (0.5 - MARGIN))
    report = Report.of(rows({"expert": {"a": (enough,), "b": (enough + 1,), "c": (0,)}}, 100))
    assert report.counted(SUITE) == ["a", "c"]
    report = Report.of(rows({"expert": {"a": (0, 10), "b": (9, 10), "c": (10, 10)}}))
    assert report.counted(SUITE) == ["a", "b"]  # 0.75 and 0.525 over seeds, above 0.5 + MARGIN


def test_suites_are_kept_apart(report):
    other = rows({"expert": {"a": (0,)}, "merge": {"a": (10,)}}, suite="second")
    both = Report.of(pd.concat([report.rows, other]))
    table = both.intervals(draws=50).set_index(["suite", "method"]).value
    assert table["second", "merge"] == pytest.approx(10 / 20)
    assert table["toy", "merge"] == pytest.approx(interval(report, draws=50).value)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_interval_contains_its_point_the_mean_over_seeds(report, statistic):
    table = report.intervals(statistic=statistic, draws=500).set_index("method")
    assert (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()
    assert table.num_seeds.tolist() == [2] * 4
    if statistic == "accuracy":
        assert table.value["merge"] == pytest.approx((9 + 15 + 8 + 20) / 80)
        return
    for method in MISTAKES:
        mean = np.mean([value(report, method, statistic, seed=seed) for seed in (0, 1)])
        assert table.value[method] == pytest.approx(mean)
    assert table.loc["expert", ["low", "value", "high"]].tolist() == pytest.approx([1, 1, 1])


def test_seeds_on_other_rows_have_no_joint_interval(report):
    frame = report.rows.copy()
    frame.at[1, "gold"] = frame.gold[1][::-1]
    with pytest.raises(ValueError, match="seeds and methods must answer the same rows of 'a'"):
        Report.of(frame).intervals()


def test_an_interval_depends_on_seed_and_level(report):
    first, again = report.intervals(draws=200), report.intervals(draws=200)
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(report.intervals(draws=200, seed=1))
    wide, narrow = interval(report, level=0.99), interval(report, level=0.5)
    assert wide.high - wide.low > narrow.high - narrow.low
    assert report.sampled(SUITE, SUBSET, draws=2).freedom == 2 * 20 - 2


def test_seeds_that_differ_widen_the_interval():
    def width(*per_seed: int) -> float:
        expert = {"a": (0,) * len(per_seed)}
        row = interval(Report.of(rows({"expert": expert, "merge": {"a": per_seed}}, 400)))
        return row.high - row.low

    assert width(40, 160) > 2 * width(100, 100)
    assert width(100, 100, 100) == pytest.approx(width(100))  # equal seeds say no more than one


def test_a_difference_is_antisymmetric_and_contains_its_point(report):
    assert report.difference(SUITE, SUBSET, "merge", "merge") == (0, 0, 0)
    there = report.difference(SUITE, SUBSET, "merge", "mean")
    back = report.difference(SUITE, SUBSET, "mean", "merge")
    assert there == pytest.approx((-back[0], -back[2], -back[1]))
    assert there[1] <= there[0] <= there[2]
    table = report.intervals(draws=10).set_index("method").value
    assert there[0] == pytest.approx(table["merge"] - table["mean"])


def test_the_width_of_a_difference_is_that_of_the_normal_approximation():
    """Within 10 %, and paired: the methods are wrong on many rows together."""
    size, rng = 500, np.random.default_rng(1)
    gold = np.arange(size) % 2
    wrong = {"expert": np.zeros(size, bool), "m": rng.random(size) < 0.3}
    wrong["n"] = np.where(rng.random(size) < 0.5, wrong["m"], rng.random(size) < 0.4)
    frame = [
        (SUITE, SUBSET, name, 0, "a", np.where(w, 1 - gold, gold).tolist(), gold.tolist())
        for name, w in wrong.items()
    ]
    report = Report.of(pd.DataFrame(frame, columns=COLUMNS))
    gaps = wrong["n"].astype(float) - wrong["m"]
    for statistic, scale in (("anp", 1.0), ("kept_margin", 2.0), ("accuracy", 1.0)):
        found, low, high = report.difference(SUITE, SUBSET, "m", "n", statistic=statistic)
        assert found == pytest.approx(scale * gaps.mean())
        exact = scale * 2 * 1.96 * gaps.std() / np.sqrt(size)
        assert high - low == pytest.approx(exact, rel=0.1)


def test_an_unknown_statistic_and_a_report_without_a_counted_task_are_refused(report):
    with pytest.raises(ValueError, match="statistic must be anp, .*, accuracy, got 'median'"):
        report.intervals(statistic="median")
    none = Report.of(rows({"expert": {"a": (10,)}, "merge": {"a": (10,)}}))
    message = "no task of .* counts in the ANP, as no expert .* by 0.02; merge other tasks too"
    with pytest.raises(ValueError, match=message):
        none.intervals()


FITS = [{"method": "merge", "coefficients": [[0.1, 1 / 3], [2.0, -1e-17]], "losses": [0.5, 0.25]}]


def test_a_report_comes_back_from_its_file_exactly(report, tmp_path):
    full = Report.of(report.rows, FITS, size="smoke", seeds=[0, 1], lr=1e-2)
    full.save(tmp_path / "deep" / "report.json")
    back = Report.load(tmp_path / "deep" / "report.json")
    pd.testing.assert_frame_equal(back.rows, full.rows)
    assert back.fits == full.fits and back.provenance == full.provenance
    pd.testing.assert_frame_equal(back.intervals(draws=50), full.intervals(draws=50))
    back.save(tmp_path / "two.json")
    text = (tmp_path / "deep" / "report.json").read_text()
    assert (tmp_path / "two.json").read_text() == text
    assert sum(line.startswith('{"suite"') for line in text.splitlines()) == len(report.rows)
    data = json.loads(text)
    assert set(data) == {"provenance", "rows", "fits"}
    assert data["rows"][0] == dict(zip(COLUMNS, report.rows.iloc[0], strict=True))
    for other in ('{"tables": {}, "provenance": {}}', "task,accuracy\n"):
        (tmp_path / "two.json").write_text(other)
        with pytest.raises(ValueError, match="two.json is no Report, which has rows"):
            Report.load(tmp_path / "two.json")


def test_an_interrupted_save_leaves_the_old_file_and_no_other(report, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    report.save(path)
    before = path.read_bytes()
    full = raising(OSError(28, "No space left on device"))
    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(ValueError, match="No space left"):
        Report.of(report.rows, FITS).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_older_files_contain_base_36_text_and_say_the_same(report, tmp_path):
    older = [
        {**row, **{name: "".join(map(str, row[name])) for name in ("predicted", "gold")}}
        for row in rows(MISTAKES).to_dict("records")
    ]
    graded = {**older[0], "task": "c", "predicted": [0.5, 1.0], "gold": "rouge1"}
    many = {**older[0], "task": "d", "predicted": "9abz", "gold": "9abz"}
    data = {"provenance": {}, "rows": [*older, graded, many], "fits": []}
    (tmp_path / "old.json").write_text(json.dumps(data))
    back = Report.load(tmp_path / "old.json").rows
    pd.testing.assert_frame_equal(back[:-2], report.rows)
    assert back.predicted.iloc[-1] == back.gold.iloc[-1] == [9, 10, 11, 35]
    assert (back.predicted.iloc[-2], back.gold.iloc[-2]) == ([0.5, 1.0], "rouge1")


def test_a_report_carries_its_provenance_and_a_caption(report):
    facts, line = report.provenance, caption(report)
    assert facts["size"] == "smoke" and facts["seeds"] == [0, 1]
    assert facts["torch"] == torch.__version__
    assert facts["divmerge_core"] == importlib.metadata.version("divmerge-core")
    for key in ("date", "device", "machine", "python", "transformers", "datasets", "precision"):
        assert facts[key]
    assert line.startswith("tiny, smoke size, 2 seeds, 20 test rows a task, ")
    for key in ("device", "precision", "torch", "transformers", "date"):
        assert str(facts[key]) in line
    assert Report.of(report.rows, device="auto").provenance["device"] != "auto"


def test_a_report_names_the_commit_of_its_checkout(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "book" / "package" / "room").mkdir(parents=True)
    source = root / "book" / "package" / "room" / "report.py"
    monkeypatch.setattr(provenance, "__file__", str(source))
    find = provenance.checkout.__wrapped__
    assert find() == {}  # no checkout
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    source.write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    clean = find()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    source.write_text("two")
    assert find() == {"commit": f"{clean}-dirty"}
