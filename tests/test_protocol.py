"""What the chapter on the protocol measures, on toy experts and on cases by hand."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from divmerge_core.bench import prepare
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.figures import protocol as draw
from divmerge_core.fitting import OPTIMIZERS
from divmerge_core.methods import METHODS
from divmerge_core.studies import descents as runs
from divmerge_core.studies.inputs import (
    WRONGS,
    amounts,
    divergence_sum,
    few,
    mixed,
    shifts,
    wrong_inputs,
)
from divmerge_core.studies.protocol import (
    DEFAULT,
    EFFORTS,
    ablation,
    compared,
    layers,
    readings,
    told_apart,
    variants,
)
from divmerge_core.tables import load, save


@pytest.fixture
def bench(toys, once, tmp_path, monkeypatch):
    monkeypatch.setattr("divmerge_core.studies.protocol.cell", lambda *what: tmp_path / name(what))
    monkeypatch.setattr("divmerge_core.studies.inputs.cell", lambda *what: tmp_path / name(what))
    monkeypatch.setattr(runs, "cell", lambda *what: tmp_path / name(what))
    if "bench" not in once:
        once["bench"] = prepare("toy", size="toy")
    return once["bench"]


def name(what: tuple) -> str:
    return str(abs(hash(repr(what[1:]) + what[0].digest)))


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


# --- intervals ------------------------------------------------------------------------------------


def answers(method: str, right: int) -> dict:
    """Ten answers, so many of them right; the expert's are all right."""
    given = "1" * right + "0" * (10 - right)
    return {"method": method, "seed": 0, "task": "one", "predicted": given, "gold": "1111111100"}


def test_the_default_differs_from_itself_by_nothing():
    gold = answers("expert", 8)
    table = compared([answers(DEFAULT, 6), answers("other", 4), gold]).set_index("method")
    assert table.loc[DEFAULT, ["difference", "from_low", "from_high"]].tolist() == [0, 0, 0]
    assert table.loc[DEFAULT, "anp"] == pytest.approx(0.8)
    assert table.loc["other", "difference"] == pytest.approx(-0.2)
    assert table.loc["other", "from_low"] <= -0.2 <= table.loc["other", "from_high"]


def test_differences_are_paired():
    """Equal answers differ in no draw, however wide their own intervals are."""
    table = compared([answers(DEFAULT, 5), answers("twin", 5), answers("expert", 8)])
    twin = table.set_index("method").loc["twin"]
    assert twin.high - twin.low > 0.1
    assert twin.from_low == twin.from_high == 0


# --- settings -------------------------------------------------------------------------------------


def test_told_apart_is_an_interval_without_zero():
    table = pd.DataFrame({"from_low": [-1.0, 0.1, -2.0], "from_high": [1.0, 0.2, -0.5]})
    assert told_apart(table).index.tolist() == [1, 2]


def test_every_setting_is_changed_alone():
    found = variants({"init": (0.0, 0.5), "lr": (0.1,)}, num_tasks=2)
    assert found == {DEFAULT: {}, "init=0.0": {"init": 0.0}, "lr=0.1": {"lr": 0.1}}


def test_the_ablation_holds_each_change_beside_its_default(benches):
    knobs = {"init": (0.0,), "epochs": (1,)}
    table = ablation(benches, knobs, groupings=("task", "layer"), inputs=8)
    assert len(table) == 2 * 3
    assert set(table[table.setting == "init"].value) == {"0.0"}
    assert (table[table.setting == DEFAULT].difference == 0).all()
    assert (table.low <= table.high).all() and set(table.tasks) == {2}
    assert (table.set_index("setting").difference[DEFAULT] == 0).all()
    ax = draw.changes(plt.figure().gca(), table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["start 0.0", "epochs 1"]


def test_a_layer_is_counted_in_coefficients(benches, bench):
    table = layers(benches, ("task", "layer"), inputs=8).set_index("grouping")
    assert table.coefficients["task"] == 2
    assert table.coefficients["layer"] == 2 * len(bench.problem.vectors.layout.names)


def test_in_total_is_less_per_task(benches):
    table = readings(benches, ("task", "layer"), published=8)
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
    table = amounts(benches, (0, 8), groupings=("layer",), steps=4).set_index("inputs")
    average = METHODS["average"](bench.problem)
    answered = runs.evaluate(bench.problem, average, bench.test)
    right = [
        sum(a == b for a, b in zip(row.predicted, row.gold, strict=True)) / len(row.gold)
        for row in answered.itertuples()
    ]
    experts = [
        sum(a == b for a, b in zip(row["predicted"], row["gold"], strict=True)) / len(row["gold"])
        for row in runs.experts_answers(bench)
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
    table = wrong_inputs(benches, others, **options)
    assert len(table) == 2 + 2 * len(WRONGS)
    assert table[table.kind == DEFAULT].difference.item() == 0
    ax = draw.by_kind(plt.figure().gca(), table)
    assert len(ax.get_yticklabels()) == 1 + len(WRONGS)


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
    courses, ends = found
    assert set(courses.optimizer) == set(OPTIMIZERS) == set(ends.optimizer)
    first = courses.groupby("optimizer").loss.first()
    assert first.max() - first.min() < 1e-5


def test_passes_and_inputs_are_counted(found):
    """Two batches of four inputs a task: a step of Adam reads 4 of each, a pass all 8."""
    courses, _ = found
    adam = courses[courses.optimizer == "adam"]
    assert adam.passes.tolist()[:3] == [0, 1, 2] and adam.read.tolist()[:3] == [0, 4, 8]
    whole = courses[courses.optimizer == "lbfgs"]
    assert whole.passes.iloc[0] == 1 and whole.read.iloc[0] == 8
    assert courses[courses.optimizer != "adam"].passes.max() <= 4
    assert (courses.groupby("optimizer").seconds.diff().dropna() >= 0).all()


def test_the_target_is_adams_last_loss(found, tmp_path):
    courses, ends = found
    adam = ends.set_index("optimizer").loc["adam"]
    assert adam.target == courses[courses.optimizer == "adam"].loss.iloc[-1]
    assert adam.passes <= 8 and adam.difference == 0
    met = ends[ends.reached <= ends.target]
    assert met.passes.notna().all() and ends[ends.reached > ends.target].passes.isna().all()
    save(tmp_path / "ends.json", {"ends": ends}, seeds=[0])  # missing numbers survive it
    assert load(tmp_path / "ends.json")[0]["ends"].passes.isna().sum() == ends.passes.isna().sum()
    ax = draw.falling(plt.figure().gca(), courses, adam.target)
    assert len(ax.get_lines()) == len(OPTIMIZERS) + 1
