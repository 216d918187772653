"""Corrupted pools: corruptions, rankings, the learned policy, and the table over pools."""

import math
from dataclasses import replace

import pytest
import torch
from divmerge_book.studies import corrupted_experts as corruption
from divmerge_book.studies.corrupted_experts import CORRUPTIONS, NOISE, auc, contaminate, cosine
from divmerge_book.studies.evaluator import accuracies
from helpers import linear_experiment, linear_problem
from torch.testing import assert_close

from divmerge_core.methods import METHODS


@pytest.fixture
def strangers():
    return linear_problem(num_tasks=4, scale=0.8, seed=1).vectors


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_corruptions_by_hand(strangers):
    deltas = torch.randn(3, 5000, generator=generator(), dtype=torch.float64)
    added = CORRUPTIONS["noise"](deltas, deltas, 1, generator()) - deltas[1]
    assert added.norm() == pytest.approx(NOISE * deltas[1].norm().item())
    assert abs(torch.cosine_similarity(added, deltas[1], dim=0)) < 0.1
    assert torch.equal(CORRUPTIONS["flip"](deltas, deltas, 2, generator()), -deltas[2])
    draws = generator()
    for _ in range(20):  # a deceptive label: a stranger's expert of another task
        found = CORRUPTIONS["label"](strangers.deltas, strangers.deltas, 2, draws)
        rows = [n for n, row in enumerate(strangers.deltas) if torch.equal(row, found)]
        assert len(rows) == 1 and rows != [2]


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 1), (0.5, 4), (0.6, 6)])
def test_corrupted_experts_join_the_honest_ones(linear, strangers, kind, share, count):
    pool, honest = contaminate(linear, kind, share, strangers=strangers), linear.problem.vectors
    vectors = pool.problem.vectors
    assert pool.bad.tolist() == [False] * 4 + [True] * count
    assert len(set(vectors.tasks)) == 4 + count and vectors.tasks[:4] == honest.tasks
    assert torch.equal(vectors.deltas[:4], honest.deltas)
    assert [len(batches) for batches in pool.problem.batches[4:]] == [0] * count


def test_a_corrupted_expert_uses_the_head_that_it_claims(linear, strangers):
    used = []

    def forward(parameters, pairs):
        used.extend(task for task, _ in pairs)
        return linear.problem.forward(parameters, pairs)

    watched = replace(linear, problem=replace(linear.problem, forward=forward))
    problem = contaminate(watched, "flip", 0.5, strangers=strangers).problem
    problem.logits(problem.vectors.base, 5, linear.problem.batches[0][0])
    assert problem.vectors.tasks[5].startswith(f"task{used[0]}, flip")
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\)"):
        contaminate(linear, "flip", 1.0, strangers=strangers)


def test_a_pool_is_scored_on_honest_tasks_and_every_subset_once(linear, strangers):
    pool = contaminate(linear, "noise", 0.5, strangers=strangers)
    score, chosen = corruption.subset_score(pool), tuple((~pool.bad).tolist())
    average = METHODS["average"](linear.problem)
    assert_close(pool.average(chosen), average)
    expected = sum(accuracies(linear, average)) / 4  # experts get all right; rows are the same
    assert score(chosen) == score(chosen) == pytest.approx(expected)
    assert score.cache_info().misses == 1


def test_auc_by_hand():
    bad = torch.tensor([False, False, True, True])
    for values, expected in (
        ([3.0, 2.0, 1.0, 0.0], 1),
        ([0.0, 1.0, 2.0, 3.0], 0),
        ([1.0, 1.0, 1.0, 1.0], 0.5),
        ([3.0, 1.0, 2.0, 1.0], (1 + 1 + 0 + 0.5) / 4),
    ):
        assert auc(torch.tensor(values), bad) == expected
    assert math.isnan(auc(torch.tensor([1.0, 2.0]), torch.tensor([False, False])))


def test_cosines_and_norms_against_the_others():
    deltas = torch.randn(5, 30, generator=generator(), dtype=torch.float64)
    for number, found in enumerate(cosine(deltas)):
        others = deltas[[n for n in range(5) if n != number]].mean(0)
        assert_close(found, torch.cosine_similarity(deltas[number], others, dim=0))
    norms = torch.tensor([1.0, 1.0, 1.0, 3.0, 0.25], dtype=torch.float64)
    assert_close(corruption.norm(norms.diag()), -torch.tensor([1.0, 1, 1, 3, 4]).double().log())


def test_leaving_one_out_scores_once_all_and_once_each():
    worth, calls = torch.tensor([4.0, 3.0, 2.0, 1.0, -1.0]), []

    def score(chosen: tuple[bool, ...]) -> float:
        calls.append(chosen)
        return float(worth[list(chosen)].sum())

    assert_close(corruption.leave_one_out(score, 5), worth.double())
    assert len(calls) == 6


def test_the_policy_learns_which_experts_are_honest(linear, strangers):
    pool = contaminate(linear, "flip", 0.5, strangers=strangers)
    good = (~pool.bad).tolist()

    def score(chosen: tuple[bool, ...]) -> float:
        return sum((1 if g else -1) for g, c in zip(good, chosen, strict=True) if c) / 8

    trust, chosen, rewards = corruption.policy(pool, score, steps=150, seed=0)
    assert chosen == good and auc(trust, pool.bad) == 1 and len(rewards) == 150
    control = corruption.shuffled(rewards, 0)
    found = [control([True]) for _ in rewards]
    assert sorted(found) == sorted(rewards) and found != rewards


def test_pools_compare_every_detection(linear):
    other = linear_experiment(linear.base, 4, digest="other", seed=1)
    table = corruption.corrupted_pools({0: (linear, other)}, shares=(0.0, 0.4), steps=5)
    assert set(table.kind) == {"none", *CORRUPTIONS}
    methods = {"all", "oracle", "cosine", "norm", "leave_one_out", "policy", "shuffled"}
    assert all(set(some.method) == methods for _, some in table.groupby("kind"))
    assert set(table.share) == {0, 3 / 7}  # of the pool itself, and not 0.4
    oracle = table[table.method == "oracle"]
    assert oracle.anp.nunique() == 1 and set(oracle.kept) == {0}
    corrupt = table[(table.share > 0) & (table.method == "all")]
    assert set(corrupt.members) == {7} and set(corrupt.kept) == {3 / 7}
    assert set(table[table.method == "leave_one_out"].calls) == {5, 8}
    assert set(table[table.method == "policy"].calls) == {5}
    assert table[table.share == 0].auc.isna().all()
    assert table[table.method == "policy"].mass.notna().all()
