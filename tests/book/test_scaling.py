"""Accuracy against the number of tasks: subsets, and what every merge answers."""

from itertools import combinations
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import SIZES, Size
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.studies import scaling as module
from divmerge_book.studies.sizes import settings
from divmerge_book.studies.task_attribution import squares_of
from helpers import linear_experiment, refuse
from test_structure import CHAPTERS, code

from divmerge_core.divergences import js
from divmerge_core.methods import METHODS

TASKS = list("abcdef")


@pytest.mark.parametrize("whole", [(), (2, -1)])
def test_a_sample_holds_distinct_subsets_of_every_size_as_many_as_asked_or_all(whole):
    found = module.subsets_of(TASKS, 5, whole=whole)
    assert len(set(found)) == len(found)
    for n in range(2, 7):
        every = set(combinations(TASKS, n))  # in the order of the tasks
        some = {subset for subset in found if len(subset) == n}
        wanted = len(every) if whole and n in (2, 5) else min(5, len(every))
        assert some <= every and len(some) == wanted


def test_a_larger_sample_begins_with_the_smaller_one():
    small, large = module.subsets_of(TASKS, 2), module.subsets_of(TASKS, 6, whole=(2,))
    assert module.first_of_each(large, 2) == small
    assert module.subsets_of(TASKS, 2) == small != module.subsets_of(TASKS, 2, seed=1)


@pytest.mark.parametrize(("tasks", "count"), [(["a"], 3), (TASKS, 0)])
def test_a_sample_needs_two_tasks_and_a_subset(tasks, count):
    with pytest.raises(ValueError, match="two tasks or more and one subset or more"):
        module.subsets_of(tasks, count)


def test_a_plan_has_a_sizes_budget_and_every_subset_with_single_tasks():
    size, effort = module.settings_of("full")
    assert size.candidates == effort.budget and len(effort.methods) > 8
    assert module.settings_of("smoke")[0].test_rows == SIZES["smoke"].test_rows
    _, some, every = module.plan(TASKS, settings("scaling", "full"))
    assert len(every) == len(set(every)) == 2 ** len(TASKS) - 1
    assert max(sum(len(s) == n for s in some) for n in range(2, 7)) == 3


@pytest.mark.parametrize(("source", "asked"), [("the stored run", {"suite"}), ("this run", None)])
def test_a_chapter_divides_fixed_merges_by_experts_of_their_own_run(source, asked):
    """Other methods leave the fixed merges as they are, but not another run's experts."""
    (cell,) = [c for c in code(CHAPTERS[10]) if '"fixed.json"' in c.source]
    seen, table = [], pd.DataFrame({"fixed": [False]})

    def drawn(path, measure, **facts):
        seen.append(facts["asked"])
        return ResultTable({"every": table, "curves": table}, {"seeds": [0]}, source)

    space = {"given": {"suite", "methods"}, "facts": {}, "folder": Path(), "numbers": [0]}
    space |= dict.fromkeys(("study", "partial", "effort", "first", "every", "some"), MagicMock())
    space |= {"experiments": {}}
    exec(cell.source, {**space, "run": drawn("", None, asked=0), "stored_or_measure": drawn})
    assert seen == [0, asked, asked]


def test_packed_rows_come_back():
    for bits in ([False, False, True], [True] * 9, [False] * 5, [True, False] * 40):
        assert module.unpacked(module.packed(torch.tensor(bits))) == bits


def test_an_expert_is_right_on_its_own_task_and_js_is_the_mean_over_test_rows(linear):
    problem = linear.problem
    own, merged = problem.vectors.expert("task1"), METHODS["average"](problem)
    rows = module.judged(linear, own, module.references(linear))
    assert all(module.unpacked(rows[1]["right"]))  # gold is the expert's answer
    assert [row["js"] == 0 for row in rows] == [False, True, False, False]
    for number, row in enumerate(module.judged(linear, merged, module.references(linear))):
        models = [problem.vectors.expert(row["task"]), merged]
        batches = linear.test[number].batches
        pairs = [[problem.logits(flat, number, batch) for flat in models] for batch in batches]
        expected = torch.cat([js(*pair) for pair in pairs]).mean().item()
        assert row["js"] == pytest.approx(expected, abs=1e-5)


def test_all_methods_merge_the_same_subsets_once_with_options_found_once(tiny, linear, monkeypatch):
    experiments = {0: linear, 7: linear_experiment(tiny, 4, digest="others", seed=1)}
    subsets = module.subsets_of(linear.problem.vectors.tasks, 2)
    size = Size("none", (0,), epochs=1, candidates=2)
    methods = ["average", "task_arithmetic", "divmerge/task"]
    rows, found = module.scaling(experiments, subsets, methods=methods, size=size)
    merged = rows[~rows.method.isin([module.EXPERT, module.MAJORITY])]
    groups = merged.groupby(["seed", "method"]).subset.apply(lambda s: tuple(s.unique()))
    assert groups[0].nunique() == groups[7].nunique() == 1
    first, other = groups[0].iloc[0], groups[7].iloc[0]
    assert [name.count("+") + 1 for name in first] == [2, 2, 3, 3, 4]
    assert list(other) == [first[0], first[2], first[4]]
    assert merged[merged.method == "divmerge/task"].coefficient.notna().all()
    assert merged[merged.method == "average"].coefficient.isna().all()
    assert not found.duplicated(["method", "T"]).any() and len(found) == 9
    assert set(found[found.method == "task_arithmetic"].tried) == {2}
    assert set(found[found.method == "average"].tried) == {1}
    monkeypatch.setattr(module, "judged", refuse)
    again, _ = module.scaling({0: linear}, subsets, methods=methods[::2], size=size)
    before = rows.query("seed == 0 and method != 'task_arithmetic'").reset_index(drop=True)
    pd.testing.assert_frame_equal(again, before)


def test_a_fixed_share_of_one_over_t_is_the_average(linear):
    subset = ("task0", "task2", "task3")
    rows = module.fixed({0: linear}, [subset, ("task1",)], [None, 1.0])
    chosen = linear.select(subset)
    expected = module.judged(chosen, METHODS["average"](chosen.problem), module.references(linear))
    some = rows[~rows.fixed & (rows.subset == "task0+task2+task3")]
    assert some.right.tolist() == [row["right"] for row in expected]
    assert set(some.scale) == {1 / 3}
    assert rows[rows.subset == "task1"].js.tolist() == [0, 0]  # the expert itself


def test_geometry_is_that_of_the_task_vectors(linear):
    deltas, table = linear.problem.vectors.deltas, module.geometry(linear)
    tasks, squares = squares_of(table)
    np.testing.assert_allclose(squares["inner"], (deltas @ deltas.T).numpy(), rtol=1e-9)
    assert tuple(tasks) == linear.problem.vectors.tasks
    assert table[table.task == table.other].conflict.eq(0).all()
