"""Reports: ANP by hand, intervals that hold what they promise, and exact, atomic files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from divmerge_core import report as module
from divmerge_core.report import COLUMNS, MARGIN, Report, caption

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
    names = {"accuracy", "macro_f1", "matthews", "ratio", "anp", "worst"}
    assert set(report.metrics().metric) == names


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


@pytest.mark.parametrize("statistic", ["anp", "worst", "accuracy"])
def test_an_interval_covers_its_point(report, statistic):
    table = report.intervals(statistic=statistic, draws=500)
    assert (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()
    assert table.num_seeds.tolist() == [2] * 4


def test_points_are_the_means_over_seeds_of_the_metrics(report):
    for statistic in ("anp", "worst"):
        table = report.intervals(statistic=statistic, draws=10).set_index("method")
        for method in MISTAKES:
            mean = np.mean([value(report, method, statistic, seed=seed) for seed in (0, 1)])
            assert table.value[method] == pytest.approx(mean)
    table = report.intervals(statistic="accuracy", draws=10).set_index("method")
    assert table.value["merge"] == pytest.approx((9 + 15 + 8 + 20) / 80)


def test_the_experts_interval_is_exactly_1(report):
    row = report.intervals(draws=200).set_index("method").loc["expert"]
    assert (row.low, row.value, row.high) == (1, 1, 1)


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


def test_an_unknown_statistic_is_answered_with_the_choices(report):
    with pytest.raises(ValueError, match="statistic must be anp, worst or accuracy, got 'median'"):
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

    def fail(data, file, **options):
        file.write('{"half')
        raise failure

    monkeypatch.setattr(module.json, "dump", fail)
    with pytest.raises(type(failure)):
        Report.of(report.rows, fits()).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_is_plain_json_of_predictions(report, tmp_path):
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert set(data) == {"provenance", "rows", "fits"}
    assert data["rows"][0] == dict(zip(COLUMNS, report.rows.iloc[0], strict=True))


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
