"""Methods that search with a score: references, controls at equal budget, corrupted pools."""

from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from helpers import layout_of, linear_problem
from torch import Tensor
from torch.testing import assert_close

from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.arithmetic import average, task_arithmetic
from divmerge_core.methods.evolved import evolved_coefficients, layer_evolution
from divmerge_core.methods.paths import RATES, Path, Paths, Pool, Population, mutant
from divmerge_core.methods.selected import learned_policy, selection_policy

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
    """129 scores, as many at random, and greedy search's 72: groups that act alone are its case."""
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


def greedy(pool: Pool, start: Path, score, budget: int) -> float:
    """The best score of changing one gene at a time wherever that helps, group after group."""
    genes, best = list(start.genes), score(pool.model(start))
    trials = (
        (group, gene) for _ in range(budget) for group in range(len(genes)) for gene in pool.choices
    )
    for group, gene in islice(trials, budget - 1):
        value = score(pool.model(Path((*genes[:group], gene, *genes[group + 1 :]))))
        if value > best:
            genes[group], best = gene, value
    return best


def test_where_groups_act_together_evolution_wins_more_often_than_not_at_65_scores_each():
    """Layers of a linear model, to answer as a path drawn at random does; no search always wins."""
    beats_random = beats_greedy = 0
    for seed in range(8):
        problem = linear_problem(seed=seed, scale=1.0, batches=1)
        pool, generator = Pool.of(problem, "layer"), torch.Generator().manual_seed(100 + seed)
        teacher = pool.model(some_path(pool, generator))
        gold = [problem.logits(teacher, 0, batch) for batch in problem.batches[0]]

        def score(merged, problem=problem, gold=gold) -> float:
            found = [problem.logits_of(merged, 0, batch) for batch in problem.batches[0]]
            return -sum(float((f - g).square().mean()) for f, g in zip(found, gold, strict=True))

        seen: list[float] = []

        def first_task(value: float, seen=seen) -> None:
            seen.append(value)
            if len(seen) == 65:
                raise StopIteration

        options = {"score": score, "grouping": "layer", "steps": 16, "seed": seed}
        with pytest.raises(StopIteration):
            layer_evolution(problem, **options, seen=first_task, **QUIET)
        start = Path(((0, 1.0),) * 5)
        drawn = max(score(pool.model(some_path(pool, generator))) for _ in range(64))
        beats_random += seen[64] > max(drawn, seen[0])
        beats_greedy += seen[64] > greedy(pool, start, score, 65)
    assert beats_random > 4 and beats_greedy > 4


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


def test_bytes_count_every_gene_of_a_group_once():
    """Groups of 4 and 8 numbers: two genes in the first, one in the second, in 8 bytes each."""
    problem = blocks_problem(3)
    segments = Segments(((0, 4, 0), (4, 12, 1)))
    one, other = Path(((0, 1.0), (1, 0.5))), Path(((2, 1.0), (1, 0.5)))
    flats = [problem.vectors.base] * 3
    paths = Paths(problem, flats, (one, other, one), segments)
    assert paths.nbytes == (2 * 4 + 8) * 8
    assert replace(paths, paths=(one, one, one)).nbytes == 12 * 8
    halves = [flat.float() for flat in flats]
    assert replace(paths, flats=halves).nbytes == (2 * 4 + 8) * 4


def test_sharing_genes_saves_storage_and_three_experts_take_three_models():
    problem = blocks_problem(4, num_tasks=2)
    options = {"score": lambda paths: 1.0, "grouping": "layer", "steps": 12, **QUIET}
    apart = layer_evolution(problem, **options)
    merged = layer_evolution(problem, size_base=0.5, **options)
    whole = problem.vectors.base.nbytes
    assert apart.nbytes == 2 * whole > 1.3 * merged.nbytes >= 1.3 * whole


def test_every_score_is_followed_by_the_tasks_best_so_far(problem):
    values, seen = [], []

    def score(paths) -> float:
        values.append(float(sum(flat[len(values) % 7] for flat in paths.flats)))
        return values[-1]

    layer_evolution(problem, score=score, steps=5, children=2, seen=seen.append, **QUIET)
    calls = 1 + 5 * 2  # of one task
    expected = []
    for task in range(3):
        of_task = values[task * calls : (task + 1) * calls]
        expected += [max(of_task[: count + 1]) for count in range(calls)]
    assert seen == expected


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


def test_the_same_seed_scores_the_same_merges_and_another_seed_others(problem):
    runs = []
    for seed in (0, 0, 1):
        seen: list[Tensor] = []

        def score(flat: Tensor, seen=seen) -> float:
            seen.append(flat.clone())
            return -float(flat.square().sum())

        evolved_coefficients(problem, score=score, steps=3, seed=seed, **QUIET)
        runs.append(torch.stack(seen))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0], runs[2])


def test_the_search_draws_from_no_global_generator_prints_nothing_and_writes_no_file(
    problem, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    np.random.seed(5)
    before = np.random.get_state(), torch.get_rng_state()
    for score in (lambda flat: float(flat[0]), lambda flat: 1.0):
        evolved_coefficients(problem, score=score, steps=20, **QUIET)
    after = np.random.get_state()
    assert (before[0][1] == after[1]).all() and before[0][2:] == after[2:]
    assert torch.equal(before[1], torch.get_rng_state())
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_the_first_merges_lie_around_the_start_at_the_width_asked_for():
    problem, points = linear_problem(num_tasks=3), []
    vectors = problem.vectors

    def score(flat: Tensor) -> float:
        solved = torch.linalg.lstsq(vectors.deltas.T, (flat - vectors.base)[:, None]).solution
        points.append(solved[:, 0])
        return 1.0

    for seed in range(40):
        evolved_coefficients(problem, score=score, init=0.4, sigma=0.2, steps=1, seed=seed, **QUIET)
    spread = torch.stack([point for number, point in enumerate(points) if number % 8]) - 0.4
    assert_close(points[0], torch.full((3,), 0.4).double(), rtol=0, atol=1e-6)
    assert spread.mean().abs() < 0.03
    assert spread.std().item() == pytest.approx(0.2, rel=0.1)


def test_the_search_beats_as_many_random_merges_of_the_same_width():
    for seed in range(3):
        problem = linear_problem(num_tasks=6, seed=seed)
        wanted = torch.randn(6, generator=torch.Generator().manual_seed(seed)).double()
        target, calls = problem.vectors.merge(wanted.tolist()), []

        def score(flat: Tensor, target=target, calls=calls) -> float:
            calls.append(-float((flat - target).norm()))
            return calls[-1]

        evolved_coefficients(problem, score=score, steps=25, seed=seed, **QUIET)
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            -float((problem.vectors.merge(point.tolist()) - target).norm())
            for point in 0.5 + torch.randn(len(calls), 6, generator=generator).double() / 6
        ]
        assert max(calls) > 0.3 * max(drawn)  # nearer than a third of the way


def test_one_coefficient_is_searched_too():
    problem = linear_problem(num_tasks=1)
    target = problem.vectors.merge([0.8])
    merged = evolved_coefficients(
        problem, score=lambda flat: -float((flat - target).norm()), steps=30, **QUIET
    )
    assert_close(merged, target, rtol=0, atol=1e-3)


# --- selection policy -----------------------------------------------------------------------------


def corrupted_pool(share: float, seed: int, experts: int = 10, shifted: bool = False):
    """Noisy experts of one problem, the first of them corrupted: scores and who is corrupted.

    Corrupted in turn: trained on permuted labels, sign of the task vector flipped, mere noise; or
    all of them trained on another domain, where the same labels go by other features.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth, base, x = normal(4, 16), 0.3 * normal(4, 16), normal(1400, 16)
    gold, deltas = (x @ truth.T).argmax(-1), []
    corrupt = torch.arange(experts) < round(share * experts)
    for number in range(experts):
        delta = truth - base + 0.6 * normal(4, 16)
        if corrupt[number] and shifted:
            delta = truth.roll(3, 1) - base + 0.6 * normal(4, 16)
        elif corrupt[number]:
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


@cache
def selected(share: float) -> tuple[Tensor, list[Tensor]]:
    """What the method merges of a pool in 200 steps, and what it told of its trust."""
    pool, score, _, _ = corrupted_pool(share, 0)
    told: list[Tensor] = []
    return selection_policy(pool, score=score, steps=200, trusted=told.append, **QUIET), told


@pytest.mark.parametrize("share", SHARES)
def test_the_mass_on_corrupted_experts_goes_to_zero(share):
    for seed in range(2):
        trust, corrupt = published_policy(share, seed), corrupted_pool(share, seed)[-1]
        assert trust.sum() == pytest.approx(1)
        assert trust[corrupt].sum() < 0.05 < share


@pytest.mark.parametrize("share", SHARES)
def test_the_merge_of_the_trusted_closes_most_of_the_gap_to_the_sound_experts_alone(share):
    pool, _, test, corrupt = corrupted_pool(share, 0)
    names = pool.vectors.tasks
    merged = test(selected(share)[0])
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


@pytest.mark.parametrize("share", SHARES)
def test_what_the_policy_learned_is_told_once_and_no_corrupted_expert_is_trusted(share):
    pool, score, _, corrupt = corrupted_pool(share, 0)
    merged, (trust,) = selected(share)
    if share == 0.4:
        expected = learned_policy(pool, score, average, draw=None, steps=200, lr=0.1, **QUIET)
        assert torch.equal(trust, expected)
    assert (trust[corrupt] < 0.5).all() and separation(trust, corrupt) > 0.9
    names = [name for name, t in zip(pool.vectors.tasks, trust, strict=True) if t >= 0.5]
    assert_close(merged, average(pool.select(names)))


def test_experts_of_a_shifted_domain_are_kept_out_too():
    pool, score, test, corrupt = corrupted_pool(0.4, 0, shifted=True)
    told: list[Tensor] = []
    options = {"score": score, "steps": 120, "trusted": told.append}
    merged = selection_policy(pool, **options, **QUIET)
    assert (told[0][corrupt] < 0.5).all() and separation(told[0], corrupt) > 0.9
    assert test(merged) > test(average(pool))


def test_norms_do_not_tell_corrupted_experts_that_are_as_long_as_the_others():
    found = []
    for seed in range(4):
        pool, _, _, corrupt = corrupted_pool(0.4, seed)
        far = (pool.vectors.norms() - pool.vectors.norms().median()).abs()
        found.append(separation(-far, corrupt))
    assert sum(found) / 4 < 0.8


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
