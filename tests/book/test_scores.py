"""ANP by the number of merged tasks, and what subsets, seeds and test rows add to its spread."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.stored_tables import load, save
from divmerge_book.figures import scaling as draw
from divmerge_book.studies.scaling import EXPERT, MAJORITY, packed
from divmerge_book.studies.scores import (
    accuracy,
    by_subset,
    counted,
    differences,
    floor,
    over_seeds,
    over_subsets,
    ratios,
    row_errors,
    spreads,
)
from study_tables import toy_scores


def random_rows(seed: int = 0) -> pd.DataFrame:
    """A Report's rows: three tasks of two answers, two seeds, experts and two methods."""
    generator, rows = np.random.default_rng(seed), []
    gold = {task: generator.integers(2, size=40) for task in "abc"}
    gold["c"][:] = 0  # its expert cannot beat the majority class
    for number in (0, 3):
        for subset in ("a+b", "a+c", "a+b+c"):
            for method, chance in ((EXPERT, 0.9), ("average", 0.6), ("ties", 0.7)):
                for task in subset.split("+"):
                    draws = np.random.default_rng([number, ord(task)] + [len(subset), len(method)])
                    if method == EXPERT:
                        draws = np.random.default_rng([number, ord(task)])
                    answer = np.where(draws.random(40) < chance, gold[task], 1 - gold[task])
                    text = [values.tolist() for values in (answer, gold[task])]
                    labels = ("toy", subset, method, number, task)
                    rows.append((*labels, *text))
    return pd.DataFrame(
        rows, columns=["suite", "subset", "method", "seed", *"task predicted gold".split()]
    )


def as_answers(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows as a table of `scaling`."""
    right = [
        packed(torch.tensor([p == g for p, g in zip(r.predicted, r.gold, strict=True)]))
        for r in rows.itertuples()
    ]
    table = rows.assign(right=right, js=0.1)
    own = table[table.method == EXPERT].drop_duplicates(["seed", "task"])
    own = own.assign(subset=own.task)
    common = [packed(torch.tensor([c == max((0, 1), key=g.count) for c in g])) for g in own.gold]
    merged = table[table.method != EXPERT]
    found = pd.concat([own, own.assign(method=MAJORITY, right=common), merged])
    return found[["seed", "method", "subset", "task", "right", "js"]]


def test_anp_and_worst_are_those_of_a_report():
    rows = random_rows()
    report = Report.of(rows)
    answers = as_answers(rows)
    assert counted(answers) == report.counted("toy") == ["a", "b"]
    ours = by_subset(ratios(answers, answers)).set_index(["seed", "method", "subset"])
    theirs = report.metrics().query(
        "task == 'all' and method != 'expert' and metric != 'below_majority'"
    )
    for row in theirs.itertuples():
        assert ours.loc[(row.seed, row.method, row.subset), row.metric] == pytest.approx(row.value)
    assert (ours.xs("a+c", level="subset")["T"] == 2).all()  # a task without a say is still merged


def test_a_stored_table_gives_the_same_scores(tmp_path):
    answers = as_answers(random_rows())
    save(tmp_path / "sample.json", {"answers": answers}, device="cpu")
    again = load(tmp_path / "sample.json")[0]["answers"]
    before, after = (by_subset(ratios(rows, rows)) for rows in (answers, again))
    pd.testing.assert_frame_equal(before, after, check_dtype=False)
    numbers = after[["T", "anp", "worst", "js"]]
    assert all(isinstance(kind, np.dtype) for kind in numbers.dtypes)
    assert all(isinstance(kind, np.dtype) for kind in over_subsets(after)[["T", "low"]].dtypes)


def test_the_error_of_test_rows_is_the_binomial_one():
    rows, count = [], 400
    for method, chance in ((EXPERT, 1.0), (MAJORITY, 0.5), ("average", 0.8)):
        for task in "ab":
            right = torch.arange(count) < round(chance * count)
            subset = "a+b" if method == "average" else task
            rows.append((0, method, subset, task, packed(right), 0.1))
    answers = pd.DataFrame(rows, columns=["seed", "method", "subset", "task", "right", "js"])
    found = row_errors(answers, draws=2000).error.item()
    assert found == pytest.approx((0.8 * 0.2 / count / 2) ** 0.5, rel=0.08)


def test_intervals_over_subsets_need_two_subsets_and_hold_the_mean():
    table = toy_scores(
        {
            **{
                (0, "average", name): 0.7 + 0.05 * n for n, name in enumerate(["a+b", "a+c", "b+c"])
            },
            **{(0, "average", "a+b+c"): 0.6, (1, "average", "a+b"): 0.1},
        }
    )
    pairs, whole = over_subsets(table).itertuples()
    assert pairs.value == pytest.approx(0.75) and pairs.low < 0.75 < pairs.high
    half = 4.302653 * 0.05 / 3**0.5  # Student's t with two degrees of freedom
    assert (pairs.low, pairs.high) == pytest.approx((0.75 - half, 0.75 + half))
    assert whole.value == 0.6 and np.isnan(whole.low) and np.isnan(whole.high)


def test_a_method_always_better_by_as_much_has_an_interval_of_no_width():
    table = toy_scores(
        {
            (0, m, s): v + gap
            for m, gap in (("ties", 0.1), ("average", 0))
            for s, v in {"a+b": 0.5, "a+c": 0.9, "b+c": 0.7}.items()
        }
    )
    row = differences(table, "ties", ["average"]).iloc[0]
    np.testing.assert_allclose([row.value, row.low, row.high, row.won], [0.1, 0.1, 0.1, 1])


def test_seeds_are_compared_on_subsets_that_all_of_them_merged():
    table = toy_scores(
        {(0, "average", "a+b"): 0.8, (0, "average", "a+c"): 0.1, (1, "average", "a+b"): 0.6}
    )
    assert over_seeds(table).value.tolist() == [0.8, 0.6]


def test_spreads_by_hand():
    answers = as_answers(random_rows())
    table = by_subset(ratios(answers, answers))
    found = spreads(answers).set_index(["source", "method", "T"]).sd
    own = table[table.method == "ties"].set_index(["seed", "subset"]).anp
    two = own.loc[0].loc[["a+b", "a+c"]]
    assert found["subsets", "ties", 2] == pytest.approx(two.std())
    within = [own.xs(name, level="subset").var() for name in two.index]
    assert found["seeds", "ties", 2] == pytest.approx(np.mean(within) ** 0.5)
    assert np.isnan(found["subsets", "ties", 3]) and found["test rows", "ties", 3] > 0


def test_the_floor_is_the_commonest_answer_over_the_expert():
    answers = as_answers(random_rows())
    own = answers[answers.method.isin([EXPERT, MAJORITY])]
    means = own.assign(value=own.right.map(accuracy)).groupby(["method", "task"]).value.mean()
    for task, value in floor(answers).items():
        assert value == pytest.approx(means[MAJORITY, task] / means[EXPERT, task])


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    figure.canvas.draw()
    plt.close(figure)


def test_figures_against_t_have_a_line_for_every_method(ax):
    answers = as_answers(random_rows())
    table = by_subset(ratios(answers, answers))
    assert len(draw.score_curve(ax, over_subsets(table)).get_legend_handles_labels()[1]) == 2
    kept = over_subsets(table, statistic="kept_margin")
    draw.method_curve(ax, over_subsets(table), table, "ties", kept)
    assert ax.get_title() == "TIES" and ax.get_xlabel() == "tasks merged, $T$"
    draw.seed_curve(ax, over_seeds(table), ["average"])
    draw.variance_sources(ax, spreads(answers))
    assert {"subsets", "seeds", "test rows"} <= set(ax.get_legend_handles_labels()[1])
