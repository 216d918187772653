"""ANP by the number of merged tasks, and what subsets, seeds and test rows add to its spread."""

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.stored_tables import load, save
from divmerge_book.figures import scaling as draw
from divmerge_book.studies import scores
from divmerge_book.studies.scaling import EXPERT, MAJORITY, packed
from divmerge_book.studies.scores import by_subset, floor, over_seeds, over_subsets, ratios, spreads


def toy_scores(values: dict[tuple, float]) -> pd.DataFrame:
    """`by_subset` rows from {(seed, method, subset): anp}."""
    rows = [(*key, key[2].count("+") + 1, value) for key, value in values.items()]
    return pd.DataFrame(rows, columns=["seed", "method", "subset", "T", "anp"])


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """A Report's rows: three tasks of two answers, two seeds, experts and two methods."""
    gold = {task: np.random.default_rng(ord(task)).integers(2, size=40) for task in "abc"}
    gold["c"][:] = 0  # its expert cannot beat the majority class
    found, chances = [], {EXPERT: 0.9, "average": 0.6, "ties": 0.7}
    for seed in (0, 3):
        for subset in ("a+b", "a+c", "a+b+c"):
            for n, (method, chance) in enumerate(chances.items()):
                for task in subset.split("+"):
                    draws = np.random.default_rng([seed, ord(task), n, n and len(subset)])
                    said = np.where(draws.random(40) < chance, gold[task], 1 - gold[task])
                    label = {"suite": "toy", "subset": subset, "method": method, "seed": seed}
                    lists = {"predicted": said.tolist(), "gold": gold[task].tolist()}
                    found.append({**label, "task": task, **lists})
    return pd.DataFrame(found)


@pytest.fixture(scope="module")
def answers(rows) -> pd.DataFrame:
    """The same rows as a table of `scaling`."""
    pairs = zip(rows.predicted.map(torch.tensor), rows.gold.map(torch.tensor), strict=True)
    table = rows.assign(js=0.1, right=[packed(said == gold) for said, gold in pairs])
    own = table[table.method == EXPERT].drop_duplicates(["seed", "task"])
    own = own.assign(subset=own.task)
    common = [packed(torch.tensor(g) == max((0, 1), key=g.count)) for g in own.gold]
    merged = table[table.method != EXPERT]
    found = pd.concat([own, own.assign(method=MAJORITY, right=common), merged])
    return found[["seed", "method", "subset", "task", "right", "js"]]


@pytest.fixture(scope="module")
def table(answers) -> pd.DataFrame:
    return by_subset(ratios(answers, answers))


def test_scores_are_those_of_a_report(rows, answers, table):
    report = Report.of(rows)
    own = floor(answers)
    assert list(own.index) == report.counted("toy") == ["a", "b"]
    each = report.against_experts()
    expert = each[each.method == EXPERT].groupby("task")[["value", "floor"]].mean()
    assert own.tolist() == pytest.approx((expert.floor / expert.value)[own.index])
    with pytest.raises(ValueError, match="no expert of c beats the majority class by 2 points"):
        floor(answers[answers.task == "c"])
    ours = table.set_index(["seed", "method", "subset"])
    theirs = report.metrics().query("task == 'all' and method != 'expert'")
    for row in theirs[theirs.metric != "below_majority"].itertuples():
        assert ours.loc[(row.seed, row.method, row.subset), row.metric] == pytest.approx(row.value)
    assert (ours.xs("a+c", level="subset")["T"] == 2).all()  # a task without a say is still merged


def test_a_stored_table_gives_the_same_scores(tmp_path, answers, table):
    save(tmp_path / "sample.json", {"answers": answers}, device="cpu")
    again = load(tmp_path / "sample.json")[0]["answers"]
    after = by_subset(ratios(again, again))
    pd.testing.assert_frame_equal(table, after, check_dtype=False)
    numbers = after[["T", "anp", "worst", "js"]]
    assert all(isinstance(kind, np.dtype) for kind in numbers.dtypes)
    assert all(isinstance(kind, np.dtype) for kind in over_subsets(after)[["T", "low"]].dtypes)


def test_the_error_of_test_rows_is_the_binomial_one():
    count, rows = 400, []
    for method, chance in ((EXPERT, 1.0), (MAJORITY, 0.5), ("average", 0.8)):
        right = packed(torch.arange(count) < round(chance * count))
        for task in "ab":
            subset = "a+b" if method == "average" else task
            rows.append((0, method, subset, task, right, 0.1))
    table = pd.DataFrame(rows, columns=["seed", "method", "subset", "task", "right", "js"])
    found = scores.row_errors(table, draws=2000).error.item()
    assert found == pytest.approx((0.8 * 0.2 / count / 2) ** 0.5, rel=0.08)


def test_intervals_over_subsets_need_two_subsets_and_hold_the_mean():
    values = {(0, "ties", name): 0.7 + 0.05 * n for n, name in enumerate(["a+b", "a+c", "b+c"])}
    found = over_subsets(toy_scores({**values, (0, "ties", "a+b+c"): 0.6, (1, "ties", "a+b"): 0.1}))
    pairs, whole = found.itertuples()
    assert pairs.value == pytest.approx(0.75) and pairs.low < 0.75 < pairs.high
    half = 4.302653 * 0.05 / 3**0.5  # Student's t with two degrees of freedom
    assert (pairs.low, pairs.high) == pytest.approx((0.75 - half, 0.75 + half))
    assert whole.value == 0.6 and np.isnan(whole.low) and np.isnan(whole.high)


def test_a_method_always_better_by_as_much_has_an_interval_of_no_width():
    values = {"a+b": 0.5, "a+c": 0.9, "b+c": 0.7}
    gaps = {"ties": 0.1, "average": 0}
    found = toy_scores({(0, m, s): v + gap for m, gap in gaps.items() for s, v in values.items()})
    row = scores.differences(found, "ties", ["average"]).iloc[0]
    np.testing.assert_allclose([row.value, row.low, row.high, row.won], [0.1, 0.1, 0.1, 1])


def test_seeds_are_compared_on_subsets_that_all_of_them_merged():
    values = {(0, "ties", "a+b"): 0.8, (0, "ties", "a+c"): 0.1, (1, "ties", "a+b"): 0.6}
    assert over_seeds(toy_scores(values)).value.tolist() == [0.8, 0.6]


def test_spreads_by_hand(answers, table):
    found = spreads(answers).set_index(["source", "method", "T"]).sd
    own = table[table.method == "ties"].set_index(["seed", "subset"]).anp
    two = own.loc[0].loc[["a+b", "a+c"]]
    assert found["subsets", "ties", 2] == pytest.approx(two.std())
    within = [own.xs(name, level="subset").var() for name in two.index]
    assert found["seeds", "ties", 2] == pytest.approx(np.mean(within) ** 0.5)
    assert np.isnan(found["subsets", "ties", 3]) and found["test rows", "ties", 3] > 0


def test_figures_against_t_have_a_line_for_every_method(ax, answers, table):
    assert len(draw.score_curve(ax, over_subsets(table)).get_legend_handles_labels()[1]) == 2
    assert ax.get_xlabel() == "tasks merged, $T$"
    draw.seed_curve(ax, over_seeds(table), ["average"])
    draw.variance_sources(ax, spreads(answers))
    assert {"subsets", "seeds", "test rows"} <= set(ax.get_legend_handles_labels()[1])
    ax.figure.canvas.draw()
