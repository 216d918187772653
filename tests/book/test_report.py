"""Reports: ANP by hand, intervals that hold what they promise, and exact, atomic files."""

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
from divmerge_book.evaluation.report import COLUMNS, MARGIN, Report, caption

SUITE, SUBSET = "toy", "a+b"


def answers(gold: str, wrong: int) -> str:
    """The right answers, of which the first few are turned round."""
    turned = "".join("1" if character == "0" else "0" for character in gold[:wrong])
    return turned + gold[wrong:]


def rows(
    mistakes: dict[str, dict[str, tuple[int, ...]]], size: int = 20, suite: str = SUITE
) -> pd.DataFrame:
    """method -> task -> mistakes per seed; every gold text is half zeros."""
    gold = "01" * (size // 2)
    found = [
        (suite, SUBSET, method, seed, task, answers(gold, wrong), gold)
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


# --- scores by hand -------------------------------------------------------------------------------


def test_anp_is_the_mean_of_merged_over_expert_accuracy(report):
    assert value(report, "merge", "anp") == pytest.approx((9 / 18 + 15 / 20) / 2)
    assert value(report, "merge", "anp", seed=1) == pytest.approx((8 / 16 + 20 / 20) / 2)


def test_worst_is_the_smallest_ratio(report):
    assert value(report, "merge", "worst") == pytest.approx(9 / 18)
    assert value(report, "mean", "worst") == pytest.approx(min(12 / 18, 14 / 20))


def test_experts_have_anp_1(report):
    for seed in (0, 1):
        assert value(report, "expert", "anp", seed=seed) == 1
        assert value(report, "expert", "worst", seed=seed) == 1


def test_every_task_has_its_own_scores(report):
    assert value(report, "merge", "accuracy", "a") == pytest.approx(9 / 20)
    assert value(report, "merge", "ratio", "a") == pytest.approx(9 / 18)
    names = {"accuracy", "macro_f1", "matthews", "f1", "ratio", "kept_margin"}
    overall = {"anp", "worst", "kept_margin", "below_majority"}
    assert set(report.metrics().metric) == names | overall
    assert set(report.metrics().query("task == 'all'").metric) == overall


def test_the_kept_margin_is_what_is_left_of_the_experts_lead_over_the_majority(report):
    """The expert's lead is its mean over seeds: on task a (0.9 + 0.8) / 2 - 0.5."""
    leads = {"a": 0.85 - 0.5, "b": 1 - 0.5}
    assert value(report, "merge", "kept_margin", "a") == pytest.approx((9 / 20 - 0.5) / leads["a"])
    b = (15 / 20 - 0.5) / leads["b"]
    assert value(report, "merge", "kept_margin", "b") == pytest.approx(b)
    both = ((9 / 20 - 0.5) / leads["a"] + b) / 2
    assert value(report, "merge", "kept_margin") == pytest.approx(both)
    expert = [value(report, "expert", "kept_margin", seed=seed) for seed in (0, 1)]
    assert np.mean(expert) == pytest.approx(1)


def test_a_constant_answer_keeps_no_margin_though_its_anp_is_high():
    frame = rows({"expert": {"a": (0,)}, "constant": {"a": (0,)}})
    gold = [0] * 18 + [1] * 2
    frame["gold"] = [gold, gold]
    frame["predicted"] = [gold, [0] * 20]
    report = Report.of(frame)
    assert value(report, "constant", "anp") == pytest.approx(0.9)
    assert value(report, "constant", "kept_margin") == pytest.approx(0)


def test_the_kept_margin_of_a_task_whose_expert_is_below_the_majority_is_undefined():
    report = Report.of(rows({"expert": {"a": (0,), "b": (11,)}, "merge": {"a": (5,), "b": (1,)}}))
    assert np.isnan(value(report, "merge", "kept_margin", "b"))
    assert value(report, "merge", "kept_margin") == pytest.approx(0.5)


def test_tasks_below_the_majority_are_counted_and_named(report):
    assert value(report, "merge", "below_majority") == 1  # 9 of 20 on task a
    assert value(report, "mean", "below_majority") == 0
    table = report.below_majority().set_index("method")
    assert table.below.to_dict() == {"expert": 0, "base": 1, "merge": 1, "mean": 0}
    assert table.tasks["merge"] == ["a"] and table.counted.tolist() == [2] * 4


def test_of_a_graded_task_the_kept_margin_is_the_ratio():
    frame = rows({"expert": {"a": (0,)}, "merge": {"a": (0,)}})
    frame["predicted"] = [[0.5, 0.9] * 10, [0.25, 0.45] * 10]
    frame["gold"] = "rouge1"
    report = Report.of(frame)
    assert report.majority()[SUITE, "a"] == 0
    assert value(report, "merge", "kept_margin") == pytest.approx(0.5)
    assert value(report, "merge", "anp") == pytest.approx(0.5)


def test_glue_tasks_are_scored_by_their_own_metric():
    frame = rows({"expert": {"cola": (2,), "qqp": (2,), "rte": (2,)}})
    own = Report.of(frame).own_metric().set_index("task")
    assert own.metric.to_dict() == {"cola": "matthews", "qqp": "f1", "rte": "accuracy"}
    tidy = Report.of(frame).metrics().set_index(["task", "metric"]).value
    for task, metric in own.metric.items():
        assert own.value[task] == tidy[task, metric]


def test_the_majority_is_the_commonest_test_answer():
    frame = rows({"expert": {"a": (0,)}})
    frame["gold"] = "0001112200" + "0" * 10
    frame["predicted"] = frame["gold"]
    majority = Report.of(frame).majority()
    assert majority[SUITE, "a"] == pytest.approx(15 / 20)


def test_a_task_counts_when_its_expert_beats_the_majority_by_the_margin():
    size = 100
    enough = round(size * (0.5 - MARGIN))
    mistakes = {"a": (enough,), "b": (enough + 1,), "c": (0,)}
    report = Report.of(rows({"expert": mistakes}, size))
    assert report.counted(SUITE) == ["a", "c"]


def test_a_task_counts_by_the_mean_over_seeds():
    report = Report.of(rows({"expert": {"a": (0, 10), "b": (9, 10)}}, 20))
    assert report.counted(SUITE) == ["a", "b"]  # 0.75 and 0.525, both above 0.5 + MARGIN
    report = Report.of(rows({"expert": {"a": (0, 10), "b": (10, 10)}}, 20))
    assert report.counted(SUITE) == ["a"]


def test_a_task_that_does_not_count_is_left_out_of_anp_and_intervals():
    mistakes = {
        "expert": {"a": (0,), "b": (10,)},
        "merge": {"a": (5,), "b": (1,)},
    }
    report = Report.of(rows(mistakes))
    assert value(report, "merge", "anp") == pytest.approx(15 / 20)
    assert value(report, "merge", "accuracy", "b") == pytest.approx(19 / 20)
    table = report.intervals(draws=50).set_index("method")
    assert table.value["merge"] == pytest.approx(15 / 20)


def test_suites_are_kept_apart(report):
    other = rows({"expert": {"a": (0,)}, "merge": {"a": (10,)}}, suite="second")
    both = Report.of(pd.concat([report.rows, other]))
    table = both.intervals(draws=50).set_index(["suite", "method"]).value
    assert table["second", "merge"] == pytest.approx(10 / 20)
    alone = report.intervals(draws=50).set_index("method").value
    assert table["toy", "merge"] == pytest.approx(alone["merge"])


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["anp", "kept_margin", "worst", "accuracy"])
def test_an_interval_covers_its_point(report, statistic):
    table = report.intervals(statistic=statistic, draws=500)
    assert (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()
    assert table.num_seeds.tolist() == [2] * 4


def test_points_are_the_means_over_seeds_of_the_metrics(report):
    for statistic in ("anp", "kept_margin", "worst"):
        table = report.intervals(statistic=statistic, draws=10).set_index("method")
        for method in MISTAKES:
            mean = np.mean([value(report, method, statistic, seed=seed) for seed in (0, 1)])
            assert table.value[method] == pytest.approx(mean)
    table = report.intervals(statistic="accuracy", draws=10).set_index("method")
    assert table.value["merge"] == pytest.approx((9 + 15 + 8 + 20) / 80)


def test_the_experts_interval_is_exactly_1(report):
    for statistic in ("anp", "kept_margin", "worst"):
        row = report.intervals(statistic=statistic, draws=200).set_index("method").loc["expert"]
        assert [row.low, row.value, row.high] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("statistic", ["anp", "kept_margin", "worst", "accuracy"])
@pytest.mark.parametrize("count", [3, 5])
def test_seeds_that_answer_alike_say_no_more_than_one(statistic, count):
    def width(count: int) -> float:
        mistakes = {"expert": {"a": (10,) * count, "b": (0,) * count}}
        mistakes["merge"] = {"a": (20,) * count, "b": (30,) * count}
        report = Report.of(rows(mistakes, 100))
        row = report.intervals(statistic=statistic).set_index("method").loc["merge"]
        return row.high - row.low

    assert width(count) == pytest.approx(width(1), rel=1e-9)


def test_a_mean_over_seeds_is_sure_as_far_as_seeds_and_rows_let_it():
    """Seeds that are wrong on rows of their own: the width is that of their mean's own spread."""
    size, rng = 400, np.random.default_rng(0)
    gold = [0, 1] * (size // 2)
    found = []
    for seed in range(5):
        wrong = rng.random(size) < 0.3
        said = [1 - g if w else g for g, w in zip(gold, wrong, strict=True)]
        found.append((SUITE, SUBSET, "expert", seed, "a", gold, gold))
        found.append((SUITE, SUBSET, "merge", seed, "a", said, gold))
    report = Report.of(pd.DataFrame(found, columns=COLUMNS))
    row = report.intervals().set_index("method").loc["merge"]
    exact = 2 * 1.96 * np.sqrt(0.3 * 0.7 / size / 5)
    assert 0.5 * exact < row.high - row.low < 2 * exact


def test_seeds_that_answer_other_rows_have_no_joint_interval(report):
    frame = report.rows.copy()
    frame.at[1, "gold"] = frame.gold[1][::-1]
    with pytest.raises(ValueError, match="seeds and methods must answer the same rows of 'a'"):
        Report.of(frame).intervals()


def test_the_same_seed_gives_the_same_interval(report):
    first, again = report.intervals(draws=200), report.intervals(draws=200)
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(report.intervals(draws=200, seed=1))


def test_a_wider_level_is_a_wider_interval(report):
    wide, narrow = report.intervals(level=0.99), report.intervals(level=0.5)
    merge = wide.method == "merge"
    assert (wide.high - wide.low)[merge].item() > (narrow.high - narrow.low)[merge].item()


def test_more_test_rows_are_a_narrower_interval():
    widths = []
    for size in (20, 400):
        mistakes = {"expert": {"a": (0,)}, "merge": {"a": (size // 4,)}}
        row = Report.of(rows(mistakes, size)).intervals().set_index("method").loc["merge"]
        widths.append(row.high - row.low)
        exact = 2 * 1.96 * np.sqrt(0.75 * 0.25 / size)  # of a share, by the normal approximation
        assert widths[-1] == pytest.approx(exact, rel=0.2)
    assert widths[1] < widths[0] / 3


def test_seeds_that_differ_widen_the_interval():
    def width(per_seed: tuple[int, ...]) -> float:
        mistakes = {"expert": {"a": (0, 0)}, "merge": {"a": per_seed}}
        row = Report.of(rows(mistakes, 400)).intervals().set_index("method").loc["merge"]
        return row.high - row.low

    assert width((40, 160)) > 2 * width((100, 100))


def test_a_method_differs_from_itself_by_nothing(report):
    assert report.difference(SUITE, SUBSET, "merge", "merge") == (0, 0, 0)


def test_a_difference_is_antisymmetric_and_covers_its_point(report):
    there = report.difference(SUITE, SUBSET, "merge", "mean")
    back = report.difference(SUITE, SUBSET, "mean", "merge")
    assert there == pytest.approx((-back[0], -back[2], -back[1]))
    assert there[1] <= there[0] <= there[2]
    table = report.intervals(draws=10).set_index("method").value
    assert there[0] == pytest.approx(table["merge"] - table["mean"])


def test_a_difference_is_paired():
    """Two methods that differ in one answer of 200 differ by little, though each is uncertain."""
    mistakes = {"expert": {"a": (0,)}, "m": {"a": (60,)}, "n": {"a": (61,)}}
    report = Report.of(rows(mistakes, 200))
    _, low, high = report.difference(SUITE, SUBSET, "m", "n")
    alone = report.intervals().set_index("method").loc["m"]
    assert high - low < (alone.high - alone.low) / 3


def test_the_width_of_a_difference_is_that_of_the_normal_approximation():
    """Within 10 %; intervals of another level than 95 % are further off."""
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
        value, low, high = report.difference(SUITE, SUBSET, "m", "n", statistic=statistic)
        assert value == pytest.approx(scale * gaps.mean())
        exact = scale * 2 * 1.96 * gaps.std() / np.sqrt(size)
        assert high - low == pytest.approx(exact, rel=0.1)


def test_an_unknown_statistic_is_answered_with_the_choices(report):
    with pytest.raises(ValueError, match="statistic must be anp, .*, accuracy, got 'median'"):
        report.intervals(statistic="median")


def test_a_report_in_which_no_task_counts_says_so():
    report = Report.of(rows({"expert": {"a": (10,)}, "merge": {"a": (10,)}}))
    with pytest.raises(
        ValueError, match=r"must count in the ANP \(its expert beats .* 0.02\), got \[\]"
    ):
        report.intervals()


# --- files ----------------------------------------------------------------------------------------


def fits() -> list[dict]:
    return [
        {"method": "merge", "coefficients": [[0.1, 1 / 3], [2.0, -1e-17]], "losses": [0.5, 0.25]}
    ]


def test_a_report_comes_back_from_its_file_exactly(report, tmp_path):
    full = Report.of(report.rows, fits(), size="smoke", seeds=[0, 1], lr=1e-2)
    full.save(tmp_path / "deep" / "report.json")
    back = Report.load(tmp_path / "deep" / "report.json")
    pd.testing.assert_frame_equal(back.rows, full.rows)
    assert back.fits == full.fits
    assert back.provenance == full.provenance
    pd.testing.assert_frame_equal(back.intervals(draws=50), full.intervals(draws=50))


def test_saving_what_was_loaded_gives_the_same_bytes(report, tmp_path):
    report.save(tmp_path / "one.json")
    Report.load(tmp_path / "one.json").save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file_and_no_other(
    report, tmp_path, monkeypatch, failure
):
    path = tmp_path / "report.json"
    report.save(path)
    before = path.read_bytes()

    def fail(old, new):
        raise failure

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises((ValueError, KeyboardInterrupt), match="No space left|^$"):
        Report.of(report.rows, fits()).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_is_plain_json_of_predictions(report, tmp_path):
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert sum(line.startswith('{"suite"') for line in text.splitlines()) == len(report.rows)
    data = json.loads(text)
    assert set(data) == {"provenance", "rows", "fits"}
    assert data["rows"][0] == dict(zip(COLUMNS, report.rows.iloc[0], strict=True))


def test_older_files_hold_text_and_say_the_same(report, tmp_path):
    older = rows(MISTAKES)
    data = {"provenance": {}, "rows": older.to_dict("records"), "fits": []}
    assert isinstance(data["rows"][0]["predicted"], str)
    (tmp_path / "old.json").write_text(json.dumps(data))
    back = Report.load(tmp_path / "old.json")
    pd.testing.assert_frame_equal(back.rows, report.rows)
    assert back.rows.predicted[0] == [1, 0, *[0, 1] * 9]


def test_more_than_36_answers_are_kept(tmp_path):
    gold = list(range(77))
    frame = rows({"expert": {"a": (0,)}})
    frame["gold"] = frame["predicted"] = [gold]
    Report.of(frame).save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").rows.gold[0] == gold


# --- where numbers come from ----------------------------------------------------------------------


def test_a_report_carries_its_origin(report):
    facts = report.provenance
    assert facts["size"] == "smoke" and facts["seeds"] == [0, 1]
    assert facts["torch"] == torch.__version__
    for key in ("date", "device", "machine", "python", "transformers", "datasets", "precision"):
        assert facts[key]


def test_a_caption_names_encoder_size_seeds_rows_device_precision_versions_and_date(report):
    line = caption(report)
    facts = report.provenance
    assert line.startswith("tiny, smoke size, 2 seeds, 20 test rows a task, ")
    for key in ("device", "precision", "torch", "transformers", "date"):
        assert str(facts[key]) in line


def test_a_report_names_the_package_and_the_commit_of_its_checkout(report, tmp_path, monkeypatch):
    assert report.provenance["divmerge_core"] == importlib.metadata.version("divmerge-core")
    root = tmp_path / "checkout"
    (root / "package").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(root / "package" / "report.py"))
    find = provenance.checkout.__wrapped__
    assert find() == {}  # no checkout
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (root / "package" / "report.py").write_text("one")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = find()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (root / "package" / "report.py").write_text("two")
    assert find() == {"commit": f"{clean}-dirty"}


def test_the_device_that_is_chosen_by_itself_is_named():
    frame = rows({"expert": {"a": (0,)}})
    assert Report.of(frame, device="auto").provenance["device"]
