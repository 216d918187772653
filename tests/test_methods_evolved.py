"""Methods that search with a score: references, controls at equal budget, corrupted pools."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers import layout_of, linear_problem
from torch import Tensor
from torch.testing import assert_close

from divmerge_core.methods.arithmetic import average, task_arithmetic
from divmerge_core.methods.cma import CmaEs
from divmerge_core.methods.evolved import (
    evolved_coefficients,
    layer_evolution,
    learned_policy,
    selection_policy,
)
from divmerge_core.methods.paths import RATES, Path, Pool, Population, mutant
from divmerge_core.problem import MergeProblem
from divmerge_core.vectors import TaskVectors

QUIET = {"progress": False}


def blocks_problem(num_groups: int, num_tasks: int = 3, seed: int = 0) -> MergeProblem:
    """Groups of four numbers each, and nothing to run."""
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of(**{f"tensor{n}": (4,) for n in range(num_groups)})
    deltas = torch.randn(num_tasks, 4 * num_groups, generator=generator, dtype=torch.float64)
    names = tuple(f"task{t}" for t in range(num_tasks))
    vectors = TaskVectors(layout, names, 0 * deltas[0], deltas)
    return MergeProblem(vectors, [[] for _ in names], lambda parameters, pairs: [])


def some_path(pool: Pool, generator: torch.Generator) -> Path:
    numbers = torch.randint(len(pool.choices), (pool.segments.num_groups,), generator=generator)
    return Path(tuple(pool.choices[n] for n in numbers.tolist()))


# --- layer evolution ------------------------------------------------------------------------------


def test_a_path_takes_from_every_group_what_its_gene_says(problem):
    pool, layout = Pool.of(problem, "layer"), problem.vectors.layout
    path = Path(((0, 0.0), (1, 1.0), (2, 0.25), (0, 0.5), (1, 0.75)))
    found = layout.unflatten(pool.model(path))
    for name, (expert, amount) in zip(layout.names, path.genes, strict=True):
        delta = layout.unflatten(problem.vectors.deltas[expert])[name]
        expected = layout.unflatten(problem.vectors.base)[name] + amount * delta
        assert_close(found[name], expected)
    assert torch.equal(pool.model(Path(((1, 1.0),) * 5)), problem.vectors.expert("task1"))


def test_a_score_that_the_start_cannot_improve_leaves_every_expert_as_it_is(problem):
    experts = [problem.vectors.expert(task) for task in problem.vectors.tasks]

    def score(paths) -> float:
        return -sum(float((f - e).norm()) for f, e in zip(paths.flats, experts, strict=True))

    merged = layer_evolution(problem, score=score, steps=4, **QUIET)
    assert all(torch.equal(f, e) for f, e in zip(merged.flats, experts, strict=True))


def test_a_finished_tasks_answers_stay_the_same_to_the_last_bit():
    problem, history = linear_problem(), []

    def score(paths) -> float:
        history.append([flat.clone() for flat in paths.flats])
        return float(paths.logits(len(history) % 3, problem.batches[0][0]).sum())

    merged = layer_evolution(problem, score=score, steps=5, children=2, **QUIET)
    calls = 1 + 5 * 2  # of one task
    assert len(history) == 3 * calls
    for task, batches in enumerate(problem.batches):
        expected = merged.logits(task, batches[0])
        for flats in history[(task + 1) * calls :]:
            assert torch.equal(problem.logits(flats[task], task, batches[0]), expected)
        for flats in history[: task * calls]:
            assert torch.equal(flats[task], problem.vectors.base)


def test_the_best_score_never_falls_and_the_best_is_what_comes_out(problem):
    seen = [[] for _ in problem.vectors.tasks]
    targets = torch.randn(3, problem.vectors.layout.size, generator=torch.Generator()).double()

    def score(paths) -> float:
        task = sum(map(bool, seen)) - 1 if seen[0] else 0
        if len(seen[task]) == 17:
            task += 1
        value = -sum(float((f - t).norm()) for f, t in zip(paths.flats, targets, strict=True))
        seen[task].append(value)
        return value

    merged = layer_evolution(problem, score=score, grouping="layer", steps=8, children=2, **QUIET)
    last = -sum(float((f - t).norm()) for f, t in zip(merged.flats, targets, strict=True))
    assert [len(values) for values in seen] == [17] * 3
    assert last == max(seen[-1]) >= max(seen[1]) >= max(seen[0])


def test_evolution_beats_random_search_and_greedy_search_beats_both_where_groups_act_alone():
    """129 scores each. Groups that do not interact are what greedy search is made for."""
    for seed in range(2):
        problem = blocks_problem(8, num_tasks=2, seed=seed)
        pool, generator = Pool.of(problem, "layer"), torch.Generator().manual_seed(seed)
        target = pool.model(some_path(pool, generator))

        def distance(flat: Tensor, target: Tensor = target) -> float:
            return float((flat - target).norm())

        merged = layer_evolution(
            problem,
            score=lambda paths, far=distance: -far(paths.flats[0]),
            grouping="layer",
            seed=seed,
            **QUIET,
        )
        evolved = distance(merged.flats[0])
        drawn = min(distance(pool.model(some_path(pool, generator))) for _ in range(129))
        genes = [(0, 1.0)] * 8
        for group in range(8):  # 8 x 9 scores
            ways = [(*genes[:group], gene, *genes[group + 1 :]) for gene in pool.choices]
            genes = list(min(ways, key=lambda way: distance(pool.model(Path(way)))))
        assert distance(pool.model(Path(tuple(genes)))) < 1e-9 <= evolved < drawn


def test_what_was_found_for_one_task_helps_the_next():
    """The second task wants what the first wanted: it starts from its path, not from afar."""
    problem, calls = blocks_problem(8, num_tasks=2), []
    pool = Pool.of(problem, "layer")
    target = pool.model(some_path(pool, torch.Generator().manual_seed(0)))

    def score(paths) -> float:
        calls.append([float((flat - target).norm()) for flat in paths.flats])
        return -sum(calls[-1])

    layer_evolution(problem, score=score, grouping="layer", steps=16, **QUIET)
    first, second = [c[0] for c in calls[:65]], [c[1] for c in calls[65:]]
    assert min(second[:20]) < min(first[:20])


def test_size_counts_every_gene_once_among_the_tasks_that_use_it():
    pool = Pool.of(blocks_problem(4), "layer")
    path = Path(((0, 1.0), (0, 1.0), (1, 0.5), (0, 0.0)))
    other = Path(((0, 1.0), (0, 0.5), (1, 0.5), (0, 0.0)))
    assert pool.accounted(path, []) == 1
    assert pool.accounted(path, [other]) == (0.5 + 1 + 0.5 + 0.5) / 4
    assert pool.accounted(path, [other, other]) == pytest.approx((1 / 3 + 1 + 1 / 3 + 1 / 3) / 4)


def test_where_size_counts_and_scores_do_not_tasks_share_their_genes():
    problem = blocks_problem(4, num_tasks=2)
    options = {"score": lambda paths: 1.0, "grouping": "layer", "steps": 12, **QUIET}
    apart = layer_evolution(problem, **options)
    merged = layer_evolution(problem, size_base=0.5, **options)
    shared = [(one.flats[0] == one.flats[1]).sum() / 4 for one in (apart, merged)]
    assert shared[0] == 0 and shared[1] >= 3


def test_a_mutant_differs_and_its_rate_stays_in_its_range():
    pool, generator = Pool.of(blocks_problem(6), "layer"), torch.Generator().manual_seed(0)
    path, changes, rates = Path(((0, 1.0),) * 6), [], set()
    for _ in range(400):
        child = mutant(path, pool.choices, generator)
        changes.append(sum(a != b for a, b in zip(path.genes, child.genes, strict=True)))
        rates.add(child.rate)
        path = child
    assert min(changes) >= 1 and set(path.genes) <= set(pool.choices)
    assert rates <= set(RATES) and {0.1, 0.3} <= rates


def test_parents_are_taken_best_first_and_less_often_with_every_child():
    best, worse, seed = Path(((0, 1.0),)), Path(((0, 0.5),)), Path(((1, 1.0),))
    population = Population([(1.0, worse), (2.0, best)], (seed,))
    generator = torch.Generator().manual_seed(0)
    assert {population.parent(generator) for _ in range(20)} == {best}  # no child: probability 1
    population.children = {best: 1}
    shares = [population.parent(generator) for _ in range(400)]
    assert 0.4 < shares.count(best) / 400 < 0.6 and shares.count(worse) == 400 - shares.count(best)
    population.children = {best: 60, worse: 60}
    assert {population.parent(generator) for _ in range(20)} == {seed}
    population.children[seed] = 60
    assert {population.parent(generator) for _ in range(60)} == {best, worse, seed}


# --- CMA-ES ---------------------------------------------------------------------------------------


def test_the_constants_are_the_tutorials():
    """n = 2: lambda = 6; weights ln 3.5 - ln i, i = 1, 2, 3, over their sum 1.9666."""
    search = CmaEs(torch.zeros(2), 1.0, torch.Generator())
    raw = [math.log(3.5) - math.log(i) for i in (1, 2, 3)]
    assert search.count == 6
    assert search.weights.tolist() == pytest.approx([value / sum(raw) for value in raw])
    assert search.mass == pytest.approx(sum(raw) ** 2 / sum(value**2 for value in raw))
    assert [CmaEs(torch.zeros(n), 1.0, torch.Generator()).count for n in (1, 10, 100)] == [
        4,
        10,
        17,
    ]


def reference(points: list[np.ndarray], values: list[np.ndarray], sigma: float):
    """The same steps in NumPy: means, step sizes and covariance from the points alone."""
    n = points[0].shape[1]
    lam = len(points[0])
    mu = lam // 2
    w = np.array([math.log((lam + 1) / 2) - math.log(i + 1) for i in range(mu)])
    w = w / w.sum()
    mueff = 1 / (w**2).sum()
    cc, cs = (4 + mueff / n) / (n + 4 + 2 * mueff / n), (mueff + 2) / (n + mueff + 5)
    c1 = 2 / ((n + 1.3) ** 2 + mueff)
    cmu = min(1 - c1, 2 * (mueff - 2 + 1 / mueff) / ((n + 2) ** 2 + mueff))
    damps = 1 + 2 * max(0, math.sqrt((mueff - 1) / (n + 1)) - 1) + cs
    chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    mean, pc, ps, C = np.zeros(n), np.zeros(n), np.zeros(n), np.eye(n)
    for g, (x, f) in enumerate(zip(points, values, strict=True), 1):
        best = x[sorted(range(lam), key=lambda k: -f[k])[:mu]]
        old, mean = mean, sum(wi * b for wi, b in zip(w, best, strict=True))
        y = (mean - old) / sigma
        D, B = np.linalg.eigh(C)
        ps = (1 - cs) * ps + math.sqrt(cs * (2 - cs) * mueff) * (B @ np.diag(D**-0.5) @ B.T @ y)
        norm = np.linalg.norm(ps)
        hs = norm / math.sqrt(1 - (1 - cs) ** (2 * g)) / chi < 1.4 + 2 / (n + 1)
        pc = (1 - cc) * pc + hs * math.sqrt(cc * (2 - cc) * mueff) * y
        rank_mu = sum(
            wi * np.outer((b - old) / sigma, (b - old) / sigma)
            for wi, b in zip(w, best, strict=True)
        )
        rank_1 = np.outer(pc, pc) + (1 - hs) * cc * (2 - cc) * C
        C = (1 - c1 - cmu) * C + c1 * rank_1 + cmu * rank_mu
        sigma = sigma * math.exp((cs / damps) * (norm / chi - 1))
    return mean, sigma, C


@pytest.mark.parametrize("size", [1, 3, 6])
def test_mean_step_size_and_covariance_move_as_in_the_tutorial(size):
    search = CmaEs(torch.zeros(size), 0.5, torch.Generator().manual_seed(size))
    points, values = [], []
    for _ in range(12):
        asked = search.ask()
        told = -(asked - 3).square() @ torch.arange(1.0, size + 1).double()
        search.tell(told)
        points.append(asked.numpy())
        values.append(told.numpy())
    mean, sigma, covariance = reference(points, values, 0.5)
    assert_close(search.mean, torch.from_numpy(mean), rtol=1e-8, atol=1e-10)
    assert search.sigma == pytest.approx(sigma, rel=1e-8)
    assert_close(search.covariance, torch.from_numpy(covariance), rtol=1e-8, atol=1e-10)


def test_the_search_solves_a_long_narrow_valley_in_any_direction():
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator()).double()).Q
    scales = torch.tensor([1.0, 10.0, 100.0, 1000.0]).double()
    for axes in (torch.eye(4).double(), turn):
        search = CmaEs(torch.ones(4), 0.5, torch.Generator().manual_seed(0))
        for _ in range(220):
            search.tell(-((search.ask() @ axes) * scales).square().sum(1))
        assert search.mean.norm() < 1e-5


def test_only_the_order_of_values_matters():
    means = []
    for bend in (lambda x: x, lambda x: -((-x) ** 3)):
        search = CmaEs(torch.ones(3), 0.5, torch.Generator().manual_seed(0))
        for _ in range(10):
            search.tell(bend(-search.ask().square().sum(1)))
        means.append(search.mean)
    assert torch.equal(*means)


# --- evolved coefficients -------------------------------------------------------------------------


def test_the_coefficients_that_score_best_are_found(problem):
    target = problem.vectors.merge([0.9, -0.2, 0.4])
    merged = evolved_coefficients(
        problem, score=lambda flat: -float((flat - target).norm()), steps=60, **QUIET
    )
    assert_close(merged, target, rtol=0, atol=1e-3)


def test_the_result_is_the_best_merge_that_was_scored_and_never_below_the_start(problem):
    seen = []

    def score(flat: Tensor) -> float:
        seen.append(-float(flat.square().sum()))
        return seen[-1]

    merged = evolved_coefficients(problem, score=score, grouping="layer", steps=6, **QUIET)
    assert score(merged) == max(seen)
    assert len(seen) == 1 + 6 * 12 + 1  # 15 coefficients: lambda = 4 + floor(3 ln 15) = 12


@pytest.mark.parametrize(("init", "scale"), [(0.5, 0.5), (None, 1 / 3), (0.0, 0.0)])
def test_a_score_that_tells_nothing_leaves_the_start(problem, init, scale):
    merged = evolved_coefficients(problem, score=lambda flat: 1.0, init=init, steps=3, **QUIET)
    assert_close(merged, task_arithmetic(problem, scale=scale), rtol=0, atol=1e-7)


# --- selection policy -----------------------------------------------------------------------------


def corrupted_pool(share: float, seed: int, experts: int = 10):
    """Noisy experts of one problem, the first of them corrupted: scores and who is corrupted.

    Corrupted in turn: trained on permuted labels, sign of the task vector flipped, mere noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth, base, x = normal(4, 16), 0.3 * normal(4, 16), normal(1400, 16)
    gold, deltas = (x @ truth.T).argmax(-1), []
    corrupt = torch.arange(experts) < round(share * experts)
    for number in range(experts):
        delta = truth - base + 0.6 * normal(4, 16)
        if corrupt[number]:
            other = truth.roll(1, 0) - base + 0.6 * normal(4, 16)
            noise = normal(4, 16) * delta.norm() / 8
            delta = (other, -delta, noise)[number % 3]
        deltas.append(delta.flatten())
    names = tuple(f"expert{n}" for n in range(experts))
    vectors = TaskVectors(layout_of(weight=(4, 16)), names, base.flatten(), torch.stack(deltas))

    def accuracy(rows: slice):
        def score(flat: Tensor) -> float:
            return float(((x[rows] @ flat.view(4, 16).T).argmax(-1) == gold[rows]).double().mean())

        return score

    pool = MergeProblem(vectors, [[] for _ in names], lambda parameters, pairs: [])
    return pool, accuracy(slice(400)), accuracy(slice(400, None)), corrupt


def separation(trust: Tensor, corrupt: Tensor) -> float:
    """The share of pairs in which the sound expert is trusted more: 1/2 is chance."""
    sound, bad = trust[~corrupt][:, None], trust[corrupt][None]
    return float(((sound > bad).double() + (sound == bad).double() / 2).mean())


SHARES = (0.2, 0.4, 0.6)


@cache
def published_policy(share: float, seed: int) -> Tensor:
    """What the published policy learns of a pool in 200 steps."""
    pool, score, _, _ = corrupted_pool(share, seed)
    return learned_policy(pool, score, average, draw=4, steps=200, lr=0.1, seed=seed, **QUIET)


@pytest.mark.parametrize("share", SHARES)
def test_the_mass_on_corrupted_experts_goes_to_zero(share):
    for seed in range(2):
        trust, corrupt = published_policy(share, seed), corrupted_pool(share, seed)[-1]
        assert trust.sum() == pytest.approx(1)
        assert trust[corrupt].sum() < 0.05 < share


@pytest.mark.parametrize("share", SHARES)
def test_the_merge_of_the_trusted_closes_most_of_the_gap_to_the_sound_experts_alone(share):
    pool, score, test, corrupt = corrupted_pool(share, 0)
    names = pool.vectors.tasks
    merged = test(selection_policy(pool, score=score, steps=200, **QUIET))
    every = test(average(pool))
    sound = [name for name, bad in zip(names, corrupt, strict=True) if not bad]
    assert merged - every > 0.6 * (test(average(pool.select(sound))) - every) > 0


def test_no_harm_is_done_where_no_expert_is_corrupted():
    """By experts drawn one by one; the softmax, whose mass adds up to 1, drops good ones."""
    changes = []
    for seed in range(2):
        pool, score, test, _ = corrupted_pool(0.0, seed)
        merged = selection_policy(pool, score=score, steps=200, seed=seed, **QUIET)
        changes.append(test(merged) - test(average(pool)))
    assert min(changes) > -0.01
    assert (published_policy(0.0, 0) < 0.05).any()


def test_a_reward_that_belongs_to_other_draws_teaches_nothing():
    found = []
    for seed in range(6):
        pool, score, _, corrupt = corrupted_pool(0.4, seed)
        past, generator = [], torch.Generator().manual_seed(seed)

        def shuffled(flat: Tensor, score=score, past=past, generator=generator) -> float:
            past.append(score(flat))
            return past[int(torch.randint(len(past), (1,), generator=generator))]

        trust = learned_policy(
            pool, shuffled, average, draw=4, steps=60, lr=0.1, seed=seed, **QUIET
        )
        found.append(separation(trust, corrupt))
    assert 0.3 < sum(found) / len(found) < 0.7


def test_leaving_one_out_does_as_well_for_fewer_scores_and_the_cosine_fails_where_most_are_bad():
    """What a policy has to beat: 11 scores for leaving each out, none for the cosine."""
    cosines = {}
    for share in SHARES:
        pool, score, _, corrupt = corrupted_pool(share, 0)
        names, deltas, every = pool.vectors.tasks, pool.vectors.deltas, score(average(pool))
        without = [score(average(pool.select([n for n in names if n != o]))) for o in names]
        near = torch.nn.functional.cosine_similarity(deltas, deltas.mean(0)[None])
        cosines[share] = separation(near, corrupt)
        assert separation(published_policy(share, 0), corrupt) > 0.95
        assert separation(every - torch.tensor(without), corrupt) > 0.9
    assert cosines[0.2] > 0.9 and cosines[0.6] < 0.8


def test_a_score_that_tells_nothing_keeps_all_experts(problem):
    for draw in (None, 1):
        merged = selection_policy(problem, score=lambda flat: 1.0, draw=draw, steps=5, **QUIET)
        assert_close(merged, average(problem))


def test_where_every_expert_harms_one_is_still_merged(problem):
    def score(flat: Tensor) -> float:
        return float((flat - problem.vectors.base).norm())  # the fewer averaged, the farther

    merged = selection_policy(problem, score=score, steps=60, lr=0.5, **QUIET)
    experts = [problem.vectors.expert(task) for task in problem.vectors.tasks]
    assert min(float((merged - expert).norm()) for expert in experts) < 1e-9


def test_any_data_free_rule_merges_the_drawn_and_the_trusted(problem):
    seen = []

    def score(flat: Tensor) -> float:
        seen.append(flat)
        return 1.0

    merged = selection_policy(problem, score=score, rule="task_arithmetic", steps=8, **QUIET)
    assert_close(merged, task_arithmetic(problem))
    deltas = problem.vectors.deltas
    subsets = [[n for n in range(3) if bits >> n & 1] for bits in range(1, 8)]
    possible = [problem.vectors.base + 0.3 * deltas[numbers].sum(0) for numbers in subsets]
    assert all(any(torch.allclose(flat, one) for one in possible) for flat in seen)


# --- bad input ------------------------------------------------------------------------------------

METHODS_HERE = (layer_evolution, evolved_coefficients, selection_policy)


@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_missing_score_is_refused_by_name(problem, method):
    with pytest.raises(
        ValueError, match=f"{method.__name__} needs a validation score: give score="
    ):
        method(problem, **QUIET)


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(problem, method, value):
    with pytest.raises(ValueError, match=f"{method.__name__}: score gave {value}; it must give"):
        method(problem, score=lambda merged: value, steps=2, **QUIET)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (layer_evolution, {"steps": 0}, "layer_evolution: steps must be 1 or more, got 0"),
        (layer_evolution, {"children": 0}, "layer_evolution: children must be 1 or more, got 0"),
        (layer_evolution, {"size_base": 0.0}, r"size_base must be in \(0, 1\], got 0.0; 1 ignores"),
        (layer_evolution, {"size_base": 1.1}, r"size_base must be in \(0, 1\], got 1.1"),
        (layer_evolution, {"grouping": "head"}, "unknown grouping 'head'"),
        (
            evolved_coefficients,
            {"steps": 0},
            "evolved_coefficients: steps must be 1 or more, got 0",
        ),
        (evolved_coefficients, {"sigma": 0.0}, "sigma must be above 0 and finite, got 0.0; the"),
        (evolved_coefficients, {"grouping": "head"}, "unknown grouping 'head'"),
        (selection_policy, {"steps": -1}, "selection_policy: steps must be 1 or more, got -1"),
        (selection_policy, {"draw": 0}, "selection_policy: draw must be 1 or more, got 0"),
        (selection_policy, {"lr": 0.0}, "lr must be above 0 and finite, got 0.0; the paper"),
        (selection_policy, {"rule": "avrage"}, "unknown method 'avrage'.*mean 'average'"),
        (
            selection_policy,
            {"rule": "divmerge"},
            "rule must merge any number .* 'divmerge' does not",
        ),
        (selection_policy, {"rule": "selection_policy"}, "'selection_policy' does not, 'average'"),
        (selection_policy, {"rule": "logits_fusion"}, "one vector.* 'logits_fusion' does not"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_scored(
    problem, method, options, message
):
    def never(merged) -> float:
        raise AssertionError("something was scored")

    with pytest.raises(ValueError, match=message):
        method(problem, score=never, **QUIET, **options)


def test_negative_scores_are_refused_where_size_counts(problem):
    with pytest.raises(ValueError, match="size_base needs scores of 0 or more, got -1.0; shift"):
        layer_evolution(problem, score=lambda paths: -1.0, size_base=0.9, **QUIET)


def test_zero_task_vectors_and_a_single_expert_are_no_special_case():
    problem = linear_problem(num_tasks=1)
    for one in (problem, replace(problem, vectors=problem.vectors.map(torch.zeros_like))):
        expert = one.vectors.expert("task0")
        merged = selection_policy(one, score=lambda flat: 1.0, steps=3, **QUIET)
        assert_close(merged, expert, rtol=0, atol=1e-12)
        paths = layer_evolution(one, score=lambda merged: 1.0, steps=2, **QUIET)
        assert torch.equal(paths.flats[0], expert)
