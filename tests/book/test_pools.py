"""Corrupted pools and searches for paths: generators, rankings and budgets."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from divmerge_book.evaluation import cache
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies import corrupted_experts as module
from divmerge_book.studies import searches as searching
from divmerge_book.studies.corrupted_experts import (
    CORRUPTIONS,
    NOISE,
    Judge,
    auc,
    cosine,
    leave_one_out,
    norm,
    poisoned,
    policy,
    pools,
    shuffled,
    unit_pool,
)
from divmerge_book.studies.searches import SEARCHES, Marks, searches
from helpers import linear_problem
from test_arrivals import bench_of, forbid
from torch.testing import assert_close

from divmerge_core.methods import METHODS
from divmerge_core.methods.paths import Pool as Choices


@pytest.fixture
def bench(tiny, cache) -> Experiment:
    return bench_of(linear_problem(num_tasks=4, scale=0.8), tiny)


@pytest.fixture
def strangers():
    return linear_problem(num_tasks=4, scale=0.8, seed=1).vectors


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- generators -----------------------------------------------------------------------------------


def test_noise_is_as_long_as_it_says_and_points_anywhere():
    deltas = torch.randn(3, 5000, generator=generator(), dtype=torch.float64)
    added = CORRUPTIONS["noise"](deltas, deltas, 1, generator()) - deltas[1]
    assert added.norm() == pytest.approx(NOISE * deltas[1].norm().item())
    assert abs(torch.cosine_similarity(added, deltas[1], dim=0)) < 0.1


def test_a_flip_is_the_task_vector_of_the_other_sign(bench, strangers):
    deltas = bench.problem.vectors.deltas
    assert torch.equal(CORRUPTIONS["flip"](deltas, strangers.deltas, 2, generator()), -deltas[2])


def test_a_deceptive_label_is_a_strangers_expert_of_another_task(strangers):
    draws = generator()
    for _ in range(20):
        found = CORRUPTIONS["label"](strangers.deltas, strangers.deltas, 2, draws)
        rows = [n for n, row in enumerate(strangers.deltas) if torch.equal(row, found)]
        assert len(rows) == 1 and rows != [2]


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 1), (0.5, 4), (0.6, 6)])
def test_corrupted_experts_join_the_honest_ones(bench, strangers, kind, share, count):
    pool = poisoned(bench, kind, share, strangers=strangers)
    vectors = pool.problem.vectors
    assert pool.bad.tolist() == [False] * 4 + [True] * count
    assert len(set(vectors.tasks)) == 4 + count and vectors.tasks[:4] == bench.problem.vectors.tasks
    assert torch.equal(vectors.deltas[:4], bench.problem.vectors.deltas)
    assert [len(batches) for batches in pool.problem.batches[4:]] == [0] * count


def test_a_corrupted_expert_answers_with_the_head_that_it_claims(bench, strangers):
    asked = []

    def forward(parameters, pairs):
        asked.extend(task for task, _ in pairs)
        return bench.problem.forward(parameters, pairs)

    watched = replace(bench, problem=replace(bench.problem, forward=forward))
    pool = poisoned(watched, "flip", 0.5, strangers=strangers)
    names = pool.problem.vectors.tasks
    batch = bench.problem.batches[0][0]
    pool.problem.logits(pool.problem.vectors.base, 5, batch)
    assert names[5].startswith(f"task{asked[0]}, flip")


def test_a_pool_is_judged_on_honest_tasks_only(bench, strangers):
    pool = poisoned(bench, "noise", 0.5, strangers=strangers)
    judge = Judge(pool)
    honest = METHODS["average"](bench.problem)
    assert_close(judge.merged((~pool.bad).tolist()), honest)
    alone = [module.expert_accuracies(bench)[task] for task in bench.problem.vectors.tasks]
    found = module.accuracies(bench, honest, bench.problem.vectors.tasks)
    expected = sum(a / b for a, b in zip(found, alone, strict=True)) / 4
    assert judge.test((~pool.bad).tolist())["anp"] == pytest.approx(expected)


def test_a_share_of_one_leaves_nobody_honest(bench, strangers):
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\)"):
        poisoned(bench, "flip", 1.0, strangers=strangers)


# --- rankings -------------------------------------------------------------------------------------


def test_auc_by_hand():
    bad = torch.tensor([False, False, True, True])
    assert auc(torch.tensor([3.0, 2.0, 1.0, 0.0]), bad) == 1
    assert auc(torch.tensor([0.0, 1.0, 2.0, 3.0]), bad) == 0
    assert auc(torch.tensor([1.0, 1.0, 1.0, 1.0]), bad) == 0.5
    assert auc(torch.tensor([3.0, 1.0, 2.0, 1.0]), bad) == (1 + 1 + 0 + 0.5) / 4
    assert math.isnan(auc(torch.tensor([1.0, 2.0]), torch.tensor([False, False])))


def test_the_cosine_is_that_to_the_mean_of_the_others():
    deltas = torch.randn(5, 30, generator=generator(), dtype=torch.float64)
    for number, found in enumerate(cosine(deltas)):
        others = deltas[[n for n in range(5) if n != number]].mean(0)
        assert found.item() == pytest.approx(
            torch.cosine_similarity(deltas[number], others, dim=0).item()
        )


def test_the_norm_finds_lengths_far_from_the_median():
    deltas = torch.eye(5, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1.0, 3.0, 0.25]).double()
    assert_close(norm(deltas), -torch.tensor([1.0, 1.0, 1.0, 3.0, 4.0]).double().log())


def test_leaving_one_out_asks_once_for_all_and_once_for_each(bench, strangers, monkeypatch):
    pool = poisoned(bench, "flip", 0.2, strangers=strangers)
    worth = torch.tensor([4.0, 3.0, 2.0, 1.0, -1.0])

    def score(judge: Judge, chosen: list[bool]) -> float:
        judge.calls += 1
        return float(worth[torch.tensor(chosen)].sum())

    monkeypatch.setattr(Judge, "score", score)
    judge = Judge(pool)
    assert_close(leave_one_out(judge), worth.double())
    assert judge.calls == 6


def test_a_judge_works_every_choice_out_once(bench, strangers):
    judge = Judge(poisoned(bench, "flip", 0.2, strangers=strangers))
    first = judge.score([True] * 4 + [False])
    assert judge.score([True] * 4 + [False]) == first
    assert (judge.calls, judge.scored) == (2, 1)


# --- the policy -----------------------------------------------------------------------------------


def test_averages_of_unit_vectors_are_coefficients():
    problem = unit_pool(["a", "b", "c"])
    found = METHODS["average"](problem.select(["a", "c"]))
    assert found.tolist() == [0.5, 0, 0.5]


def test_the_policy_learns_whom_to_trust(bench, strangers):
    pool = poisoned(bench, "flip", 0.5, strangers=strangers)
    good = (~pool.bad).tolist()

    def score(chosen: list[bool]) -> float:
        return sum((1 if g else -1) for g, c in zip(good, chosen, strict=True) if c) / 8

    trust, chosen, rewards = policy(pool, score, steps=150, seed=0)
    assert chosen == good and auc(trust, pool.bad) == 1 and len(rewards) == 150


def test_shuffled_rewards_are_the_same_rewards():
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5]
    score = shuffled(rewards, 0)
    found = [score([True]) for _ in rewards]
    assert sorted(found) == rewards and found != rewards


def test_pools_compare_every_way_and_repeat_nothing(bench, monkeypatch):
    other = bench_of(linear_problem(num_tasks=4, scale=0.8, seed=1), bench.base, "other experts")
    benches = {0: (bench, other)}
    table = pools(benches, shares=(0.0, 0.5), steps=5)
    assert set(table.kind) == {"none", *CORRUPTIONS}
    methods = {"all", "oracle", "cosine", "norm", "leave_one_out", "policy", "shuffled"}
    assert all(set(some.method) == methods for _, some in table.groupby("kind"))
    oracle = table[table.method == "oracle"]
    assert oracle.anp.nunique() == 1 and set(oracle.kept) == {0}
    corrupt = table[(table.share == 0.5) & (table.method == "all")]
    assert set(corrupt.members) == {8} and set(corrupt.kept) == {0.5}
    assert set(table[table.method == "leave_one_out"].calls) == {5, 9}
    assert set(table[table.method == "policy"].calls) == {5}
    assert set(pools(benches, shares=(0.4,), steps=5).share) == {3 / 7}  # and not 0.4
    clean = table[table.share == 0]
    assert clean.auc.isna().all() and table[table.method == "policy"].mass.notna().all()
    monkeypatch.setattr(module, "compared", forbid)
    pd.testing.assert_frame_equal(pools(benches, shares=(0.0, 0.5), steps=5), table)


# --- searches for paths ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("calls", [5, 17, 33])
def test_every_search_spends_exactly_its_calls(bench, name, calls):
    marks = Marks(bench, calls)
    paths = SEARCHES[name](bench, marks, 0)
    assert len(marks.given) == 4 * calls
    best = marks.best()
    assert len(best) == calls and best == sorted(best)
    assert len(paths.flats) == 4


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_starts_at_the_expert_and_returns_its_best(bench, name, monkeypatch):
    """The score here is nearness to a target that no expert is."""
    vectors = bench.problem.vectors
    target = Choices.of(bench.problem, "block").model
    wanted = target(searching.Path(((1, 1.0), (0, 0.5), (3, 0.25))))
    monkeypatch.setattr(
        searching, "accuracies", lambda bench, flat, tasks: [50 - float((flat - wanted).norm())]
    )
    marks = Marks(bench, 17)
    paths = SEARCHES[name](bench, marks, 0)
    for task, expert in enumerate(vectors.tasks):
        given = marks.given[17 * task : 17 * (task + 1)]
        assert given[0] == pytest.approx(50 - float((vectors.expert(expert) - wanted).norm()))
        if name != "evolution_small":  # the published one weighs size too
            assert 50 - float((paths.flats[task] - wanted).norm()) == pytest.approx(max(given))


def test_searches_are_told_apart_by_rows_and_repeat_nothing(bench, monkeypatch):
    small = replace(bench, digest="fewer rows")
    table = searches({(0, 15): bench, (0, 8): small}, calls=5)
    last = table[table.test.notna()]
    assert set(table.search) == {*SEARCHES, "expert"} and len(last) == 2 * (len(SEARCHES) + 1)
    expert = last[last.search == "expert"].iloc[0]
    assert expert.validation == expert.test == 1 and expert.gap == 0
    assert expert.bytes == 4 * bench.problem.vectors.base.nbytes
    assert (last.gap == last.validation - last.test).all()
    monkeypatch.setattr(cache, "dump_json", forbid)
    pd.testing.assert_frame_equal(searches({(0, 15): bench, (0, 8): small}, calls=5), table)


def test_calls_that_make_no_generations_are_refused(bench):
    with pytest.raises(ValueError, match="1 plus a multiple of 4"):
        searches({(0, 15): bench}, calls=12)
