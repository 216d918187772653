"""Accuracy against the number of tasks: subsets, answers, intervals; what may explain a drop."""

from dataclasses import replace
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import SIZES, Experiment, Size
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.stored_tables import load, save
from divmerge_book.figures import scaling as draw
from divmerge_book.models.finetuning import Expert
from divmerge_book.studies import additive, scores, task_attribution
from divmerge_book.studies import scaling as module
from divmerge_book.studies.additive import forecasts, pair_forecasts, r_squared, skill
from divmerge_book.studies.scaling import (
    COMMONEST,
    EXPERT,
    Effort,
    first_of_each,
    fixed,
    geometry,
    judged,
    packed,
    plan,
    references,
    scaling,
    settings_of,
    subsets_of,
    unpacked,
)
from divmerge_book.studies.scores import (
    by_subset,
    counted,
    differences,
    over_seeds,
    over_subsets,
    ratios,
    row_errors,
    spreads,
)
from divmerge_book.studies.task_attribution import Geometry, mantel, marginal, parts_played, places
from helpers import linear_problem
from test_arrivals import bench_of, forbid

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.methods import METHODS

TASKS = list("abcdef")
SMALL = Size("none", (0,), epochs=1, candidates=2)


def bench_with(base, digest: str = "linear", seed: int = 0) -> Experiment:
    """A bench of four linear tasks that can be cut."""
    bench = bench_of(linear_problem(num_tasks=4, scale=0.8, seed=seed), base, digest)
    return replace(bench, experts=[Expert(t, {}, {}, {}) for t in bench.problem.vectors.tasks])


@pytest.fixture
def bench(tiny, cache) -> Experiment:
    return bench_with(tiny)


# --- subsets --------------------------------------------------------------------------------------


def test_a_sample_holds_as_many_distinct_subsets_of_every_size_as_asked():
    found = subsets_of(TASKS, 5)
    assert len(set(found)) == len(found)
    sizes = [len(subset) for subset in found]
    assert {n: sizes.count(n) for n in range(2, 7)} == {2: 5, 3: 5, 4: 5, 5: 5, 6: 1}
    assert all(list(subset) == [t for t in TASKS if t in subset] for subset in found)


def test_whole_sizes_hold_all_their_subsets():
    found = subsets_of(TASKS, 1, whole=(2, -1))
    assert {s for s in found if len(s) == 2} == set(combinations(TASKS, 2))
    assert {s for s in found if len(s) == 5} == set(combinations(TASKS, 5))
    assert sum(len(s) == 3 for s in found) == 1


def test_a_larger_sample_begins_with_the_smaller_one():
    small, large = subsets_of(TASKS, 2), subsets_of(TASKS, 6, whole=(2,))
    assert first_of_each(large, 2) == small
    assert subsets_of(TASKS, 2) == small != subsets_of(TASKS, 2, seed=1)


@pytest.mark.parametrize(("tasks", "count"), [(["a"], 3), (TASKS, 0)])
def test_a_sample_needs_two_tasks_and_a_subset(tasks, count):
    with pytest.raises(ValueError, match="two tasks or more and one subset or more"):
        subsets_of(tasks, count)


def test_a_plan_of_every_subset_has_single_tasks_too():
    _, some, every = plan(TASKS, Effort(("average",), subsets=3))
    assert len(every) == len(set(every)) == 2 ** len(TASKS) - 1
    assert max(sum(len(s) == n for s in some) for n in range(2, 7)) == 3


def test_settings_hold_a_sizes_budget_and_unknown_sizes_are_told():
    settings, effort = settings_of("full")
    assert settings.candidates == effort.budget and len(effort.methods) > 8
    assert settings_of("smoke")[0].test_rows == SIZES["smoke"].test_rows
    with pytest.raises(ValueError, match="smoke, default, full"):
        settings_of("huge")


# --- answers --------------------------------------------------------------------------------------


def test_packed_rows_come_back():
    for bits in ([False, False, True], [True] * 9, [False] * 5, [True, False] * 40):
        assert unpacked(packed(torch.tensor(bits))) == bits


def test_an_expert_is_right_on_its_own_task_and_at_no_distance_from_itself(bench):
    rows = judged(bench, bench.problem.vectors.expert("task1"), references(bench))
    assert rows[1]["js"] == 0 and all(unpacked(rows[1]["right"]))  # gold is the expert's answer
    assert all(row["js"] > 0 for n, row in enumerate(rows) if n != 1)


def test_js_is_the_mean_over_test_rows(bench):
    merged, problem = METHODS["average"](bench.problem), bench.problem
    for number, row in enumerate(judged(bench, merged, references(bench))):
        found = []
        for batch in bench.test[number].batches:
            expert = problem.vectors.expert(row["task"])
            pair = [problem.logits(flat, number, batch) for flat in (expert, merged)]
            found += DIVERGENCES["js"](*pair).tolist()
        assert row["js"] == pytest.approx(np.mean(found), abs=1e-5)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """Two seeds merged by three methods, once for this file: cache folder, bench, both tables."""
    folder = tmp_path_factory.mktemp("scaling")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVMERGE_CACHE", str(folder))
        benches = {0: bench_with(tiny), 7: bench_with(tiny, "others", 1)}
        subsets = subsets_of(benches[0].problem.vectors.tasks, 2)
        methods = ["average", "task_arithmetic", "divmerge/task"]
        tables = scaling(benches, subsets, methods=methods, size=SMALL, repeated=1)
    return folder, benches[0], subsets, *tables


def test_every_method_merges_the_same_subsets(measured):
    rows = measured[3]
    merged = rows[~rows.method.isin([EXPERT, COMMONEST])]
    groups = merged.groupby(["seed", "method"]).subset.apply(lambda s: tuple(s.unique()))
    assert groups[0].nunique() == groups[7].nunique() == 1
    first, other = groups[0].iloc[0], groups[7].iloc[0]
    assert [name.count("+") + 1 for name in first] == [2, 2, 3, 3, 4]
    assert list(other) == [first[0], first[2], first[4]]
    assert merged[merged.method == "divmerge/task"].coefficient.notna().all()
    assert merged[merged.method == "average"].coefficient.isna().all()


def test_options_are_found_once_for_a_method_and_number_of_tasks(measured):
    found = measured[4]
    assert not found.duplicated(["method", "T"]).any() and len(found) == 9
    assert set(found[found.method == "task_arithmetic"].tried) == {2}
    assert set(found[found.method == "average"].tried) == {1}


def test_finished_merges_are_not_made_again(measured, monkeypatch):
    folder, bench, subsets, rows, _ = measured
    monkeypatch.setenv("DIVMERGE_CACHE", str(folder))
    monkeypatch.setattr(module, "judged", forbid)
    again, _ = scaling({0: bench}, subsets, methods=["average", "divmerge/task"], size=SMALL)
    before = rows.query("seed == 0 and method != 'task_arithmetic'").reset_index(drop=True)
    pd.testing.assert_frame_equal(again, before)


def test_a_fixed_share_of_one_over_t_is_the_average(bench):
    subset = ("task0", "task2", "task3")
    rows = fixed(bench, [subset, ("task1",)], [None, 1.0])
    chosen = bench.select(subset)
    expected = judged(chosen, METHODS["average"](chosen.problem), references(bench))
    some = rows[~rows.fixed & (rows.subset == "task0+task2+task3")]
    assert some.right.tolist() == [row["right"] for row in expected]
    assert set(some.scale) == {1 / 3}
    assert rows[rows.subset == "task1"].js.tolist() == [0, 0]  # the expert itself


def test_geometry_is_that_of_the_task_vectors(bench):
    deltas, table = bench.problem.vectors.deltas, geometry(bench)
    found = Geometry.of(table)
    np.testing.assert_allclose(found.inner, (deltas @ deltas.T).numpy(), rtol=1e-9)
    assert found.tasks == bench.problem.vectors.tasks
    assert table[table.task == table.other].conflict.eq(0).all()


# --- scores ---------------------------------------------------------------------------------------


def random_rows(seed: int = 0) -> pd.DataFrame:
    """A Report's rows: three tasks of two answers, two seeds, experts and two methods."""
    generator, rows = np.random.default_rng(seed), []
    gold = {task: generator.integers(2, size=40) for task in "abc"}
    gold["c"][:] = 0  # its expert cannot beat the commonest answer
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
    found = pd.concat([own, own.assign(method=COMMONEST, right=common), merged])
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
    for method, chance in ((EXPERT, 1.0), (COMMONEST, 0.5), ("average", 0.8)):
        for task in "ab":
            right = torch.arange(count) < round(chance * count)
            subset = "a+b" if method == "average" else task
            rows.append((0, method, subset, task, packed(right), 0.1))
    answers = pd.DataFrame(rows, columns=["seed", "method", "subset", "task", "right", "js"])
    found = row_errors(answers, draws=2000).error.item()
    assert found == pytest.approx((0.8 * 0.2 / count / 2) ** 0.5, rel=0.08)


def toy_scores(values: dict[tuple, float]) -> pd.DataFrame:
    """`by_subset` rows from {(seed, method, subset): anp}."""
    rows = [(*key, key[2].count("+") + 1, value) for key, value in values.items()]
    return pd.DataFrame(rows, columns=["seed", "method", "subset", "T", "anp"])


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


# --- do pairs add up ------------------------------------------------------------------------------


def losses_by(rule, tasks: str = "abcde") -> pd.DataFrame:
    """`ratios` rows of all subsets whose losses are `rule(task, partners)`."""
    rows = [
        ("+".join(s), n, task, 1 - rule(task, [o for o in s if o != task]))
        for n in range(1, len(tasks) + 1)
        for s in combinations(tasks, n)
        for task in s
    ]
    return pd.DataFrame(rows, columns=["subset", "T", "task", "ratio"])


def harm(task: str, other: str) -> float:
    return 0.01 * ((3 * ord(task) + 5 * ord(other)) % 7)


def test_losses_that_add_up_are_foretold_by_the_sum():
    table = losses_by(lambda task, others: 0.05 + sum(harm(task, other) for other in others))
    found = forecasts(table)
    np.testing.assert_allclose(found["sum"], found.loss, atol=1e-12)
    whole = skill(found, draws=20).set_index(["T", "forecast"])
    assert whole.r2[0, "sum"] == pytest.approx(1) and whole.r2[0, "line"] == pytest.approx(1)
    assert whole.r2[0, "mean"] < 0.9


def test_losses_may_be_those_of_the_kept_margin():
    table = losses_by(lambda task, others: 0.1 * len(others))
    table = table.assign(kept_margin=3 * table.ratio - 2)  # a majority of two thirds of the expert
    by_ratio, by_margin = pair_forecasts(table), pair_forecasts(table, "kept_margin")
    for column in ("loss", "sum", "worst", "mean"):
        assert by_margin[column].tolist() == pytest.approx(3 * by_ratio[column])
    parts = parts_played(table).set_index("task")
    kept = parts_played(table, "kept_margin").set_index("task").loc[parts.index]
    assert kept.caused.tolist() == pytest.approx(3 * parts.caused)
    assert kept.suffered.tolist() == pytest.approx(3 * parts.suffered)


def test_losses_of_the_worst_partner_are_foretold_by_the_worst_pair():
    table = losses_by(lambda task, others: max([harm(task, other) for other in others] or [0.0]))
    found = forecasts(table)
    np.testing.assert_allclose(found.worst, found.loss, atol=1e-12)
    assert (found["sum"] >= found.loss - 1e-12).all()


def test_tasks_whose_pairs_were_not_merged_are_left_out():
    table = losses_by(lambda task, others: 0.1 * len(others), "abcd")
    found = forecasts(table[table.subset != "a+b"])
    both = found[found.subset.str.startswith("a+b")]
    assert set(both.task) == {"c", "d"} and set(found.task) == set("abcd")


def test_what_a_subset_loses_does_not_enter_its_own_forecast():
    table = losses_by(lambda task, others: sum(harm(task, other) for other in others))
    before = forecasts(table).set_index(["subset", "task"])
    table.loc[table.subset == "a+b+c", "ratio"] -= 0.3
    after = forecasts(table).set_index(["subset", "task"])
    names = ["sum", "worst", "mean", "line", "usual"]
    pd.testing.assert_frame_equal(before.loc[["a+b+c"], names], after.loc[["a+b+c"], names])
    assert not np.allclose(before.usual["a+b+d"], after.usual["a+b+d"])


def test_r_squared_is_one_for_the_truth_nought_for_the_mean_and_below_for_worse():
    loss = np.array([0.1, 0.4, 0.2])
    assert r_squared(loss, loss) == 1
    assert r_squared(loss, np.full(3, loss.mean())) == pytest.approx(0)
    assert r_squared(loss, -loss) < 0 and np.isnan(r_squared(np.ones(3), loss))


def test_a_bootstrap_keeps_a_subset_whole_and_every_t_as_large():
    table = losses_by(lambda task, others: 0.0)
    for chosen in additive.drawn_subsets(table, 5):
        some = table.iloc[chosen]
        assert (some.groupby("subset").size() % some.groupby("subset")["T"].first() == 0).all()
        assert some["T"].value_counts().to_dict() == table["T"].value_counts().to_dict()


# --- numbers of a subset --------------------------------------------------------------------------


def geometry_of(vectors: list[list[float]]) -> Geometry:
    rows = np.array(vectors, dtype=float)
    lengths = np.linalg.norm(rows, axis=1)
    inner = rows @ rows.T
    cosine = inner / np.outer(lengths, lengths)
    return Geometry(tuple(TASKS[: len(rows)]), inner, cosine, np.zeros_like(inner))


def test_numbers_of_task_vectors_by_hand():
    found = geometry_of([[1, 0], [0, 2], [1, 0], [-1, 0]])
    right, same, against = (found.numbers(name) for name in ("a+b", "a+c", "a+d"))
    assert (right["growth"], right["cosine"], right["lengths"]) == (pytest.approx(1), 0, 2)
    assert (same["growth"], same["cosine"]) == (pytest.approx(2**0.5), 1)
    assert (against["growth"], against["cosine"]) == (0, -1)


def test_ranks_run_from_minus_one_to_one_and_equals_share():
    assert places(np.array([3.0, 1.0, 2.0])).tolist() == [1, -1, 0]
    assert places(np.array([1.0, 1.0, 2.0])).tolist() == [-0.5, -0.5, 1]


def test_what_t_says_is_left_out_of_a_rank_correlation():
    sizes = np.repeat([2, 3], 4)
    number = np.tile([1.0, 2, 3, 4], 2) + 10 * (sizes == 2)  # higher, on the whole, at T = 2 ...
    anp = np.tile([0.4, 0.3, 0.2, 0.1], 2) + 0.5 * (sizes == 2)  # ... where the ANP is higher too
    assert np.corrcoef(number, anp)[0, 1] > 0
    assert task_attribution.rank_correlation(sizes, number, anp) == pytest.approx(-1)
    assert np.isnan(task_attribution.rank_correlation(sizes[:2], number[:2], anp[:2]))


@pytest.fixture
def numbered() -> tuple[pd.DataFrame, Geometry]:
    """Subsets whose ANP is minus the mean cosine of their task vectors."""
    shape = geometry_of(np.random.default_rng(0).standard_normal((6, 4)).tolist())
    names = ["+".join(s) for n in range(2, 7) for s in combinations(TASKS, n)]
    table = toy_scores({(0, "average", name): -shape.numbers(name)["cosine"] for name in names})
    floor = dict(zip(TASKS, np.linspace(0.3, 0.9, 6), strict=True))
    return task_attribution.with_numbers(table.assign(js=-table.anp), shape, floor), shape


def test_a_number_that_decides_the_anp_is_found_and_trades_of_names_lose_it(numbered):
    table, shape = numbered
    found = task_attribution.related(table, draws=20).set_index("number")
    assert found.rho["cosine"] == pytest.approx(-1) and found.rho["js"] == pytest.approx(-1)
    p = mantel(table, shape, draws=99)
    assert p["cosine"] < 0.05 and all(0 < value <= 1 for n, value in p.items() if n != "conflict")
    assert np.isnan(found.rho["conflict"]) and np.isnan(p["conflict"])  # it never varies


def test_pairs_and_floor_are_means_over_the_subset(numbered):
    table = numbered[0].set_index("subset")
    pairs = [1 - table.anp[name] for name in ("a+b", "a+c", "b+c")]
    assert table.pairs["a+b+c"] == pytest.approx(np.mean(pairs))
    assert table.floor["a+b+c"] == pytest.approx((0.3 + 0.42 + 0.54) / 3)


def test_a_trade_of_names_moves_rows_and_columns_together():
    shape = geometry_of([[1, 0], [0, 2], [3, 1]])
    traded = shape.traded([2, 0, 1])
    assert traded.inner[0, 1] == shape.inner[2, 0] and traded.inner[1, 1] == shape.inner[0, 0]


# --- single tasks ---------------------------------------------------------------------------------


def test_parts_by_hand():
    """Task b costs everyone it joins 0.2, the others nothing."""
    table = losses_by(lambda task, others: 0.2 * ("b" in others), "abc")
    steps = marginal(table)
    np.testing.assert_allclose(steps[steps.added == "b"].change, -0.2)
    np.testing.assert_allclose(steps[steps.added != "b"].change, 0, atol=1e-12)
    assert len(steps) == 3 * 2 + 3  # every task joins two single ones and one pair
    found = parts_played(table).set_index("task")
    assert found.caused["b"] == pytest.approx(-0.2) and found.suffered["b"] == pytest.approx(0)
    # Of the two subsets of two one holds b, and so does the one of three.
    assert found.suffered["a"] == pytest.approx(-(0.1 + 0.2) / 2)


def test_a_table_without_nested_subsets_has_no_marginal_effects():
    table = losses_by(lambda task, others: 0.1, "abc")
    assert marginal(table[table["T"] == 2]).empty


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    figure.canvas.draw()
    plt.close(figure)


def test_figures_against_t_have_a_line_for_every_method(ax):
    answers = as_answers(random_rows())
    table = by_subset(ratios(answers, answers))
    assert len(draw.lines(ax, over_subsets(table)).get_legend_handles_labels()[1]) == 2
    kept = over_subsets(table, statistic="kept_margin")
    draw.of_method(ax, over_subsets(table), table, "ties", kept)
    assert ax.get_title() == "TIES" and ax.get_xlabel() == "tasks merged, $T$"
    draw.seeds(ax, over_seeds(table), ["average"])
    draw.sources(ax, spreads(answers))
    assert {"subsets", "seeds", "test rows"} <= set(ax.get_legend_handles_labels()[1])


def test_figures_of_explanations_say_what_their_axes_are(ax, numbered):
    table = losses_by(lambda task, others: 0.1 * len(others) + 0.01 * ord(task) % 0.05)
    found = forecasts(table)
    assert "pairs add up" in draw.forecast(ax, found, "sum").get_xlabel()
    draw.skills(ax, skill(found, draws=5).assign(method="average"))
    assert ax.get_xlabel() == "$R^2$ of a task's loss"
    draw.correlations(ax, task_attribution.related(numbered[0], draws=5).assign(method="ties"))
    assert "rank correlation" in ax.get_xlabel()
    draw.parts(ax, parts_played(table))
    assert [label.get_text() for label in ax.get_yticklabels()] == list(parts_played(table).task)


def test_the_average_is_ringed_on_every_curve_over_scales(ax):
    rows = [(n, s, True, 0.5) for n in (2, 4) for s in (0.1, 1.0)]
    rows += [(n, 1 / n, False, 0.6) for n in (2, 4)]
    table = pd.DataFrame(rows, columns=["T", "scale", "fixed", "anp"])
    draw.over_scales(ax, table)
    rings = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert sorted(rings) == [0.25, 0.5]
    draw.coefficients(ax, {"found": pd.Series([0.6, 0.3], index=[2, 4])})


def test_the_floor_is_the_commonest_answer_over_the_expert():
    answers = as_answers(random_rows())
    own = answers[answers.method.isin([EXPERT, COMMONEST])]
    means = (
        own.assign(value=own.right.map(scores.accuracy)).groupby(["method", "task"]).value.mean()
    )
    for task, value in scores.floor(answers).items():
        assert value == pytest.approx(means[COMMONEST, task] / means[EXPERT, task])
