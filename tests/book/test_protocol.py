"""What the chapter on the protocol measures, on toy experts and on cases by hand."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import prepare
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.stored_tables import ResultTable, load, save
from divmerge_book.figures import protocol as draw
from divmerge_book.studies import convergence as runs
from divmerge_book.studies.learning_curve import (
    WRONGS,
    amounts,
    divergence_sum,
    few,
    mixed,
    shifts,
    wrong_inputs,
)
from divmerge_book.studies.predictions import (
    NARROW,
    compared,
    of_score,
    packed,
    report_of,
    scored,
    split,
    text,
)
from divmerge_book.studies.protocol import (
    COLUMNS,
    DEFAULT,
    EFFORTS,
    ablation,
    experts_answers,
    layers,
    readings,
    significant,
    variants,
)

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.merging.fit import OPTIMIZERS
from divmerge_core.methods import METHODS


@pytest.fixture
def bench(toys, once):
    if "bench" not in once:
        once["bench"] = prepare("toy", size="toy")
    return once["bench"]


@pytest.fixture
def benches(bench):
    return {0: bench}


@pytest.fixture
def others(bench):
    return {0: bench.problem.batches}


def rows(batches) -> list[int]:
    return [sum(len(batch.weight) for batch in own) for own in batches]


def generator():
    return torch.Generator().manual_seed(0)


def in_columns(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Scores of a study's predictions, with the methods in the columns of a stored table."""
    return split(compared(table, draws=200), COLUMNS[name])


# --- predictions and intervals --------------------------------------------------------------------


def answers(method: str, right: int, seed: int = 0) -> dict:
    """Ten answers, so many of them right; the gold ones are 1 for eight of ten."""
    gold = [1] * 8 + [0] * 2
    given = [g if n < right else 1 - g for n, g in enumerate(gold)]
    return {"method": method, "seed": seed, "task": "one", "predicted": given, "gold": gold}


def test_the_default_differs_from_itself_by_nothing():
    rows = [answers(DEFAULT, 6), answers("other", 4), answers("expert", 10)]
    table = compared(packed(rows)).set_index("method")
    assert table.loc[DEFAULT, ["difference", "from_low", "from_high"]].tolist() == [0, 0, 0]
    assert math.isnan(table.p[DEFAULT]) and table.loc[DEFAULT, "anp"] == pytest.approx(0.6)
    assert table.loc["other", "difference"] == pytest.approx(-0.2)
    assert table.loc["other", "from_low"] <= -0.2 <= table.loc["other", "from_high"]
    # the majority class has .8, the expert 1: a margin of .2, of which .6 is less than nothing
    assert table.loc[DEFAULT, "kept_margin"] == pytest.approx(-1)
    assert table.loc["other", "kept_difference"] == pytest.approx(-1)
    assert table.below.tolist() == [1, 1] and table.counted.tolist() == [1, 1]


def test_differences_are_paired():
    """Equal answers differ in no draw, however wide their own intervals are."""
    rows = [answers(DEFAULT, 5), answers("twin", 5), answers("expert", 10)]
    twin = compared(packed(rows)).set_index("method").loc["twin"]
    assert twin.high - twin.low > 0.1
    assert twin.from_low == twin.from_high == 0 and twin.p == twin.holm == 1


def test_scores_of_stored_predictions_are_those_of_the_reports(tmp_path):
    rows = [
        {**answers(method, right, seed), "grouping": "task", "suite": "", "subset": ""}
        for seed in (0, 1)
        for method, right in ((DEFAULT, 9 - seed), ("lr=0.1", 7), ("expert", 10))
    ]
    report = Report(pd.DataFrame(rows).assign(suite="suite", subset="all"))
    save(tmp_path / "one.json", {"changed": packed(rows)}, seeds=[0, 1])
    stored = load(tmp_path / "one.json")[0]["changed"]
    pd.testing.assert_frame_equal(report_of(stored).metrics(), report.metrics())
    table = in_columns(stored, "changed").set_index("setting")
    assert table.value.to_dict() == {DEFAULT: "", "lr": "0.1"} and set(table.grouping) == {"task"}
    for score, column in (("anp", "difference"), ("kept_margin", "kept_difference")):
        found = report.difference("suite", "all", "lr=0.1", DEFAULT, statistic=score, draws=200)
        names = [column, *(f"{'kept_' * (score != 'anp')}from_{end}" for end in ("low", "high"))]
        assert table.loc["lr", names].tolist() == pytest.approx(list(found))
        assert of_score(table, score).difference["lr"] == table[column]["lr"]


def test_a_class_is_one_character():
    assert text([0, 9, 10, 35]) == "09az"
    with pytest.raises(ValueError, match="up to 36 classes, got class 36"):
        text([1, 36])


@pytest.mark.parametrize(
    "seeds, words", [([0, 1], NARROW), ([0], "holds no predictions, so no kept margin")]
)
def test_a_run_stored_without_predictions_is_drawn_and_marked(seeds, words):
    table = pd.DataFrame({"setting": ["lr"], "value": ["1"], "low": [0.1], "difference": [0.2]})
    facts = {"seeds": seeds, **dict.fromkeys(("encoder", "suite", "size", "rows", "device"), "x")}
    facts |= {"tasks": ["a"], **dict.fromkeys(("machine", "torch", "date"), "x")}
    old = scored(
        ResultTable({"changed": table}, facts, "the stored run", "; asked for was y"), COLUMNS
    )
    assert old["changed"] is table and words in old.caption
    assert "; asked for was y. Th" in old.caption and old.caption.endswith(("them.", "margin."))
    new = packed([answers(DEFAULT, 6), answers("lr=0.1", 4), answers("expert", 10)])
    run = scored(ResultTable({"changed": new, "other": table}, facts, "this run"), COLUMNS)
    assert "predictions" not in run.caption and run["other"] is table
    assert run["changed"].setting.tolist() == [DEFAULT, "lr"]


# --- settings -------------------------------------------------------------------------------------


def test_significant_is_an_interval_without_zero():
    table = pd.DataFrame({"from_low": [-1.0, 0.1, -2.0], "from_high": [1.0, 0.2, -0.5]})
    assert significant(table).index.tolist() == [1, 2]


def test_every_setting_is_changed_alone():
    found = variants({"init": (0.0, 0.5), "lr": (0.1,)}, num_tasks=2)
    assert found == {DEFAULT: {}, "init=0.0": {"init": 0.0}, "lr=0.1": {"lr": 0.1}}


def test_the_ablation_holds_each_change_beside_its_default(benches):
    knobs = {"init": (0.0,), "epochs": (1,)}
    table = ablation(benches, knobs, groupings=("task", "layer"), inputs=8)
    table = in_columns(table, "changed")
    assert len(table) == 2 * 3
    assert set(table[table.setting == "init"].value) == {"0.0"}
    assert (table[table.setting == DEFAULT].difference == 0).all()
    assert (table.low <= table.high).all() and set(table.tasks) == {2}
    assert (table.set_index("setting").difference[DEFAULT] == 0).all()
    ax = draw.changes(plt.figure().gca(), table, score="kept_margin")
    assert ax.get_xlabel() == "kept margin minus the default's, points"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["start 0.0", "epochs 1"]


def test_a_layer_is_counted_in_coefficients(benches, bench):
    table = layers(benches, ("task", "layer"), inputs=8)
    table = in_columns(table, "kinds").set_index("grouping")
    assert table.coefficients["task"] == 2
    assert table.coefficients["layer"] == 2 * len(bench.problem.vectors.layout.names)


def test_in_total_is_less_per_task(benches):
    table = in_columns(readings(benches, ("task", "layer"), published=8), "read")
    sizes = table.set_index(["grouping", "reading"]).inputs
    assert sizes.to_dict() == {
        ("task", "per task"): 8,
        ("task", "in total"): 4,
        ("layer", "per task"): 16,
        ("layer", "in total"): 8,
    }


@pytest.mark.parametrize("size", EFFORTS)
def test_a_size_draws_from_enough_inputs(size):
    effort = EFFORTS[size]
    assert effort.merge_rows >= max(effort.inputs, 2 * effort.pool, *effort.counts)
    assert effort.merge_rows <= 400 and max(effort.several) <= 8


# --- few inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6, 24])
def test_few_are_exactly_as_many(bench, count):
    chosen = few(bench.problem.batches, count, generator())
    assert rows(chosen) == [count, count]
    assert all(abs(float(b.weight.sum()) - 1) < 1e-6 for own in chosen for b in own)


def test_all_of_them_is_the_most_there_are(bench):
    assert rows(few(bench.problem.batches, 10**6, generator())) == rows(bench.problem.batches)


def test_no_inputs_leave_the_average(benches, bench):
    table = amounts(benches, (0, 8), groupings=("layer",), steps=4)
    table = in_columns(table, "needed").set_index("inputs")
    average = METHODS["average"](bench.problem)
    answered = runs.evaluate(bench.problem, average, bench.test)
    right = [
        sum(a == b for a, b in zip(row.predicted, row.gold, strict=True)) / len(row.gold)
        for row in answered.itertuples()
    ]
    experts = [
        sum(a == b for a, b in zip(row["predicted"], row["gold"], strict=True)) / len(row["gold"])
        for row in experts_answers(bench)
    ]
    expected = sum(r / e for r, e in zip(right, experts, strict=True)) / 2
    assert table.anp[0] == pytest.approx(expected)
    assert table.difference[8] == 0
    ax = draw.needed(plt.figure().gca(), table.reset_index())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "8"]


# --- wrong inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRONGS)
def test_wrong_inputs_stand_in_for_every_tasks_own(bench, kind):
    found = WRONGS[kind](bench, bench.problem.batches, generator())
    assert len(found) == 2
    for task, batches in enumerate(found):
        for batch in batches:
            logits = bench.problem.logits(bench.problem.vectors.base, task, batch)
            assert logits.shape[1] == (2, 3)[task]  # the task's own head


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_special_tokens_and_padding_stay_in_place(bench, kind):
    special = torch.tensor(bench.base.tokenizer.all_special_ids)
    changed = 0
    found = WRONGS[kind](bench, [], generator())
    for own, others in zip(bench.problem.batches, found, strict=True):
        for old, new in zip(own, others, strict=True):
            ids, other = old.inputs["input_ids"], new.inputs["input_ids"]
            kept = torch.isin(ids, special)
            assert torch.equal(ids[kept], other[kept])
            assert torch.equal(kept, torch.isin(other, special))
            assert torch.equal(old.inputs["attention_mask"], new.inputs["attention_mask"])
            changed += int((ids != other).sum())
            if kind == "shuffled":
                assert torch.equal(ids.sort(dim=1).values, other.sort(dim=1).values)
    assert changed > 0


def test_another_tasks_inputs_are_the_next_ones(bench):
    found = WRONGS["other_task"](bench, [], generator())
    assert found[0] is bench.problem.batches[1] and found[1] is bench.problem.batches[0]


def test_another_domain_needs_a_task_that_is_not_merged(bench):
    with pytest.raises(ValueError, match="need a task that is not merged; name one more"):
        WRONGS["outside"](bench, [], generator())


@pytest.mark.parametrize("share, wrong", [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_a_share_is_replaced(bench, share, wrong):
    own = bench.problem.batches
    found = mixed(own, WRONGS["shuffled"](bench, [], generator()), share, generator())
    for old, new in zip(own, found, strict=True):
        assert sum(a is not b for a, b in zip(old, new, strict=True)) == wrong


def test_wrong_inputs_are_held_beside_right_ones(benches, others):
    options = {"inputs": 8, "shares": (0.5, 1.0), "groupings": ("task",), "steps": 2}
    table = in_columns(wrong_inputs(benches, others, **options), "wrong")
    assert len(table) == 2 + 2 * len(WRONGS)
    assert table[table.kind == DEFAULT].difference.item() == 0
    ax = draw.by_kind(plt.figure().gca(), table)
    assert len(ax.get_yticklabels()) == 1 + len(WRONGS)
    assert table[table.kind == DEFAULT].share.item() == 0 and set(table.share) == {0, 0.5, 1}


# --- Proposition 3 --------------------------------------------------------------------------------


def test_the_objective_is_summed_over_tasks(bench):
    problem, flat = bench.problem, bench.problem.vectors.base
    expected = 0.0
    for task, batches in enumerate(problem.batches):
        expert = problem.vectors.expert(problem.vectors.tasks[task])
        for batch in batches:
            p, q = problem.logits(expert, task, batch), problem.logits(flat, task, batch)
            expected += DIVERGENCES["js"](p, q).mean().item() / len(batches)
    assert divergence_sum(problem, flat) == pytest.approx(expected, rel=1e-5)


def test_the_objective_is_linear_in_the_share(bench):
    """The mixture's objective lies between the right one's and the wrong one's, in proportion."""
    problem, flat = bench.problem, bench.problem.vectors.base
    wrong = WRONGS["shuffled"](bench, [], generator())
    half = mixed(problem.batches, wrong, 0.5, generator())
    rest = mixed(wrong, problem.batches, 0.5, generator())  # the same places, the other way round
    ends = [divergence_sum(replace(problem, batches=b), flat) for b in (problem.batches, wrong)]
    both = [divergence_sum(replace(problem, batches=b), flat) for b in (half, rest)]
    assert sum(both) == pytest.approx(sum(ends), rel=1e-5)


def test_proposition_3_holds_and_half_its_bound_too(benches, others):
    """JS lies in [0, log 2], so that its mean changes by no more than log 2 per task."""
    table = shifts(benches, others, inputs=8, steps=2)
    assert len(table) == 2 * len(WRONGS)
    assert (table.bound == 2 * math.log(2) * 2).all()
    assert (table.apart <= table.bound / 2).all()
    pd.testing.assert_series_equal(
        table.apart, (table.right - table.wrong).abs(), check_names=False
    )
    assert draw.both_sides(plt.figure().gca(), table).get_xscale() == "log"


# --- optimisers -----------------------------------------------------------------------------------


@pytest.fixture
def found(bench, toys, once):
    if "found" not in once:
        budget = {"pool": 8, "adam": 8, "passes": 4}
        once["found"] = runs.descents(bench, [toys], groupings=("task",), **budget)
    return once["found"]


def test_all_optimisers_start_at_the_same_loss(found):
    courses, ends = found["courses"], found["ends"]
    assert set(courses.optimizer) == set(OPTIMIZERS) == set(ends.optimizer)
    first = courses.groupby("optimizer").loss.first()
    assert first.max() - first.min() < 1e-5


def test_passes_and_inputs_are_counted(found):
    """Two batches of four inputs a task: a step of Adam reads 4 of each, a pass all 8."""
    courses = found["courses"]
    adam = courses[courses.optimizer == "adam"]
    assert adam.passes.tolist()[:3] == [0, 1, 2] and adam.read.tolist()[:3] == [0, 4, 8]
    whole = courses[courses.optimizer == "lbfgs"]
    assert whole.passes.iloc[0] == 1 and whole.read.iloc[0] == 8
    assert courses[courses.optimizer != "adam"].passes.max() <= 4
    assert (courses.groupby("optimizer").seconds.diff().dropna() >= 0).all()


def test_the_target_is_adams_last_loss(found, tmp_path):
    measured = runs.with_scores(ResultTable(found, {"seeds": [0]}, "this run"))
    courses, ends = measured["courses"], measured["ends"]
    adam = ends.set_index("optimizer").loc["adam"]
    assert adam.target == courses[courses.optimizer == "adam"].loss.iloc[-1]
    assert adam.passes <= 8 and adam.difference == adam.kept_difference == 0
    met = ends[ends.reached <= ends.target]
    assert met.passes.notna().all() and ends[ends.reached > ends.target].passes.isna().all()
    save(tmp_path / "ends.json", {"ends": ends}, seeds=[0])  # missing numbers survive it
    assert load(tmp_path / "ends.json")[0]["ends"].passes.isna().sum() == ends.passes.isna().sum()
    ax = draw.falling(plt.figure().gca(), courses, adam.target)
    assert len(ax.get_lines()) == len(OPTIMIZERS) + 1
