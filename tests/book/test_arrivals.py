"""Experts that arrive one at a time, and several merged models: by hand on a linear model."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.studies import continual_merging as module
from divmerge_book.studies.clustering import (
    Groups,
    arranged,
    k_means,
    members_of,
    mixture,
    random_labels,
)
from divmerge_book.studies.continual_merging import (
    BATCH,
    arrivals,
    continual,
    expert_accuracies,
    forgetting,
    orders,
)
from helpers import linear_problem
from torch.testing import assert_close

from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import METHODS
from divmerge_core.methods.clustered import dp_mixture

SUMS = [name for name in BATCH if METHODS.facts[name]["symmetric"]]


def bench_of(problem: MergeProblem, base, digest: str = "linear") -> Experiment:
    """A bench whose right answers are those of every task's expert."""
    exams = []
    for number, task in enumerate(problem.vectors.tasks):
        expert = problem.vectors.expert(task)
        gold = [problem.logits(expert, number, b).argmax(-1) for b in problem.batches[number]]
        exams.append(LabelledSplit(problem.batches[number], torch.cat(gold)))
    return Experiment(base, [], problem, exams, exams, digest)


@pytest.fixture
def bench(tiny, cache) -> Experiment:
    return bench_of(linear_problem(num_tasks=4, scale=0.8), tiny)


def forbid(*args, **options):
    pytest.fail("finished work is repeated")


# --- arrivals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BATCH)
def test_every_state_is_the_method_on_the_experts_so_far(bench, method):
    order = ["task2", "task0", "task3", "task1"]
    options = {"progress": False} if method == "opcm" else {}
    for count, state in enumerate(continual(bench, method, order), start=1):
        expected = METHODS[method](bench.problem.select(order[:count]), **options)
        assert_close(state, expected, rtol=1e-9, atol=1e-12)
    assert count == 4


def test_orders_differ_and_are_no_more_than_there_are():
    assert len(set(orders("abcd", 10))) == 10
    assert all(sorted(order) == list("abcd") for order in orders("abcd", 10))
    assert sorted(orders("ab", 10)) == [("a", "b"), ("b", "a")]
    assert orders("abcd", 3) == orders("abcd", 10)[:3]


def test_identical_experts_are_never_forgotten(tiny, cache):
    vectors = linear_problem().vectors
    same = TaskVectors(vectors.layout, vectors.tasks, vectors.base, vectors.deltas[:1].repeat(3, 1))
    problem = replace(linear_problem(), vectors=same)
    found = forgetting(arrivals(bench_of(problem, tiny), count=3)).set_index("method")
    average = found.loc["running_average"]
    assert list(average.bwt) == [0, 0, 0]
    assert list(average.acc) == [1, 1, 1] and list(average.ratio) == [1, 1, 1]


def test_sums_forget_their_order_in_the_end(bench):
    found = forgetting(arrivals(bench, count=6))
    for method in SUMS:
        some = found[found.method == method]
        batch = found[found.method == BATCH[method]].acc.item()
        assert list(some.acc) == pytest.approx([batch] * 6)
    assert found[found.method == "opcm"].acc.nunique() > 1


def test_after_each_arrival_all_tasks_seen_so_far_are_asked(bench):
    table = arrivals(bench, count=2)
    some = table[(table.method == "opcm") & (table.order == 1)]
    assert list(some.groupby("arrived").task.nunique()) == [1, 2, 3, 4]
    order = orders(bench.problem.vectors.tasks, 2)[1]
    assert tuple(some[some.arrived == 4].task) == order
    assert some[some.arrived == 1].accuracy.item() == 1  # the expert itself


def test_backward_transfer_and_accuracy_by_hand():
    def row(arrived: int, task: str, accuracy: float) -> dict:
        return {"method": "m", "order": 0, "arrived": arrived, "task": task, "accuracy": accuracy}

    rows = [row(1, "b", 0.9), row(2, "b", 0.8), row(2, "a", 0.7)]
    rows += [row(3, "b", 0.6), row(3, "a", 0.75), row(3, "c", 0.5)]
    whole = {"method": "all", "order": -1, "arrived": 3, "task": "a", "accuracy": 0.4}
    table = pd.DataFrame([*rows, whole]).assign(expert=0.8)
    found = forgetting(table).set_index("method")
    assert found.acc["m"] == pytest.approx((0.6 + 0.75 + 0.5) / 3)
    assert found.ratio["m"] == pytest.approx((0.6 + 0.75 + 0.5) / 3 / 0.8)
    assert found.bwt["m"] == pytest.approx(((0.6 - 0.9) + (0.75 - 0.7)) / 2)
    assert math.isnan(found.bwt["all"]) and found.acc["all"] == 0.4


def test_finished_arrivals_are_not_repeated(bench, monkeypatch):
    first = arrivals(bench, count=2)
    monkeypatch.setattr(module, "accuracies", forbid)
    monkeypatch.setattr(module, "join", forbid)
    pd.testing.assert_frame_equal(arrivals(bench, count=2), first)


def test_interrupted_arrivals_go_on_where_they_stopped(bench, monkeypatch):
    count, score = [], module.accuracies

    def interrupted(*given):
        if len(count) == 9:
            raise KeyboardInterrupt
        count.append(given)
        return score(*given)

    monkeypatch.setattr(module, "accuracies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        arrivals(bench, count=2)
    left = []
    monkeypatch.setattr(module, "accuracies", lambda *given: left.append(given) or score(*given))
    arrivals(bench, count=2)
    monkeypatch.setattr(module, "accuracies", score)
    fresh = bench_of(linear_problem(num_tasks=4, scale=0.8), bench.base, "again")
    whole = []
    monkeypatch.setattr(module, "accuracies", lambda *given: whole.append(given) or score(*given))
    arrivals(fresh, count=2)
    assert len(count) + len(left) == len(whole)


# --- several models -------------------------------------------------------------------------------


@pytest.mark.parametrize("zeta", [0.0, 0.03, 0.5, 2.0, math.inf])
def test_the_sweep_makes_the_mixtures_own_choices(bench, zeta):
    for sigma in (0.25, 1.0):
        expected = dp_mixture(bench.problem, zeta=zeta, sigma=sigma, progress=False)
        found = arranged(Groups(bench), zeta=zeta, sigma=sigma)
        assert found == members_of(expected.numbers)


def test_a_partition_scores_what_its_predictor_answers(bench):
    predictor = dp_mixture(bench.problem, zeta=0.5, sigma=1.0, progress=False)
    found = Groups(bench).scores(members_of(predictor.numbers))
    tasks = bench.problem.vectors.tasks
    assert found == pytest.approx(module.accuracies(bench, predictor, tasks))


def test_mixtures_run_from_one_model_to_all_experts(bench):
    table = mixture(bench, zetas=(0.0, 0.5, math.inf), sigmas=(1.0,), draws=2)
    own = table[table.how == "dp_mixture"].set_index("zeta")
    alone = expert_accuracies(bench)
    assert own.models["0"] == 1 and own.models["inf"] == len(alone)
    assert own.anp["inf"] == 1
    alike = dp_mixture(bench.problem, zeta=math.inf, progress=False)
    assert own.bytes["inf"] == alike.nbytes
    opcm = METHODS["opcm"](bench.problem, progress=False)
    reached = np.array(module.accuracies(bench, opcm, list(alone))) / list(alone.values())
    assert own.anp["0"] == pytest.approx(reached.mean())
    for how in ("k_means", "random"):
        some = table[table.how == how]
        assert all(
            text.count("|") + 1 == n for text, n in zip(some.groups, some.models, strict=True)
        )
    assert set(table[table.how == "k_means"].models) == set(own.models)


def test_finished_mixtures_are_not_repeated(bench, monkeypatch):
    first = mixture(bench, zetas=(0.0, 0.5), draws=1)
    monkeypatch.setattr("divmerge_book.studies.clustering.accuracies", forbid)
    monkeypatch.setattr("divmerge_book.studies.clustering.misfits", forbid)
    monkeypatch.setattr("divmerge_book.studies.clustering.join", forbid)
    pd.testing.assert_frame_equal(mixture(bench, zetas=(0.0, 0.5), draws=1), first)


def test_k_means_finds_planted_groups_from_inner_products():
    generator = np.random.default_rng(0)
    centres = 10 * generator.standard_normal((3, 20))
    points = centres[[0, 1, 2, 0, 1, 2, 0]] + 0.1 * generator.standard_normal((7, 20))
    labels = k_means(points @ points.T, 3)
    assert members_of(labels) == [(0, 3, 6), (1, 4), (2, 5)]
    assert members_of(k_means(points @ points.T, 7)) == [(n,) for n in range(7)]
    with pytest.raises(ValueError, match="1 to 7 clusters"):
        k_means(points @ points.T, 8)


def test_random_groups_are_never_empty():
    for seed in range(20):
        assert set(random_labels(5, 3, seed)) == {0, 1, 2}
