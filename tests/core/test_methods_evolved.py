"""Methods that search with a score: references, searches at equal budget, corrupted pools."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers import QUIET, linear_problem, normal, problem_of, refuses
from torch import Tensor
from torch.testing import assert_close

from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods.arithmetic import average, task_arithmetic
from divmerge_core.methods.evolved import evolved_coefficients, layer_evolution
from divmerge_core.methods.paths import RATES, Path, Paths, Pool, Population, mutant
from divmerge_core.methods.selected import learned_policy, selection_policy


def blocks_problem(num_groups: int, num_tasks: int = 3) -> MergeProblem:
    """Groups of four numbers each, and nothing to run."""
    shapes = {f"tensor{n}": (4,) for n in range(num_groups)}
    return problem_of(*normal(num_tasks, 4 * num_groups), **shapes)


def some_path(pool: Pool, generator: torch.Generator) -> Path:
    numbers = torch.randint(len(pool.choices), (pool.segments.num_groups,), generator=generator)
    return Path(tuple(pool.choices[n] for n in numbers.tolist()))


# --- layer evolution
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


def test_callback_is_told_the_best_score_so_far_and_the_best_is_what_comes_out(problem):
    values, seen = [], []

    def score(paths) -> float:
        values.append(float(sum(flat[len(values) % 7] for flat in paths.flats)))
        return values[-1]

    options = {"score": score, "steps": 5, "children": 2, "on_score": seen.append}
    merged = layer_evolution(problem, grouping="layer", **options, **QUIET)
    by_task = torch.tensor(values).view(3, 1 + 5 * 2)
    assert seen == pytest.approx(by_task.cummax(dim=1).values.flatten().tolist())
    best = int(by_task[-1].argmax()) + 2 * 11
    assert float(sum(flat[best % 7] for flat in merged.flats)) == pytest.approx(max(values[22:]))


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


def test_where_size_counts_and_scores_do_not_tasks_share_their_genes_and_storage():
    problem = blocks_problem(4, num_tasks=2)
    options = {"score": lambda paths: 1.0, "grouping": "layer", "steps": 12, **QUIET}
    apart = layer_evolution(problem, **options)
    merged = layer_evolution(problem, size_base=0.5, **options)
    shared = [(one.flats[0] == one.flats[1]).sum() / 4 for one in (apart, merged)]
    assert shared[0] == 0 and shared[1] >= 3
    whole = problem.vectors.base.nbytes
    assert apart.nbytes == 2 * whole > 1.3 * merged.nbytes >= 1.3 * whole


def test_bytes_count_every_gene_of_a_group_once():
    """Groups of 4 and 8 numbers: two genes in the first, one in the second, in 8 bytes each."""
    problem, segments = blocks_problem(3), Segments(((0, 4, 0), (4, 12, 1)))
    one, other = Path(((0, 1.0), (1, 0.5))), Path(((2, 1.0), (1, 0.5)))
    paths = Paths(problem, [problem.vectors.base] * 3, (one, other, one), segments)
    assert paths.nbytes == (2 * 4 + 8) * 8
    assert replace(paths, paths=(one, one, one)).nbytes == 12 * 8
    assert replace(paths, flats=[flat.float() for flat in paths.flats]).nbytes == (2 * 4 + 8) * 4


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


# --- evolved coefficients
@pytest.mark.parametrize("num_tasks", [1, 6])
def test_the_search_finds_coefficients_and_beats_as_many_random_merges(num_tasks):
    """Random coefficients of the same width come a third as near, or less."""
    problem, wanted, scores = linear_problem(num_tasks=num_tasks), normal(num_tasks), []
    target = problem.vectors.merge(wanted.tolist())

    def score(flat: Tensor) -> float:
        scores.append(-float((flat - target).norm()))
        return scores[-1]

    merged = evolved_coefficients(problem, score=score, steps=25, **QUIET)
    drawn = 0.5 + normal(len(scores), num_tasks, seed=1) / 6
    random = [-float((problem.vectors.merge(c.tolist()) - target).norm()) for c in drawn]
    assert max(scores) > 0.3 * max(random)
    assert score(merged) == pytest.approx(max(scores))  # the best that was scored comes out


def test_a_step_scores_as_many_merges_as_cma_es_prescribes(problem):
    """15 coefficients: 4 + floor(3 ln 15) = 12. The seed decides which, after the start."""
    runs = []
    for seed in (0, 0, 1):
        seen: list[Tensor] = []

        def score(flat: Tensor, seen=seen) -> float:
            seen.append(flat.clone())
            return -float(flat.square().sum())

        options = {"grouping": "layer", "steps": 2, "seed": seed}
        evolved_coefficients(problem, score=score, **options, **QUIET)
        runs.append(torch.stack(seen))
    assert len(runs[0]) == 1 + 2 * 12
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(("init", "scale"), [(0.5, 0.5), (None, 1 / 3), (0.0, 0.0)])
def test_a_score_that_tells_nothing_leaves_the_start(problem, init, scale):
    merged = evolved_coefficients(problem, score=lambda flat: 1.0, init=init, steps=3, **QUIET)
    assert_close(merged, task_arithmetic(problem, scale=scale), rtol=0, atol=1e-7)


def test_the_search_draws_from_no_global_generator_prints_nothing_and_writes_no_file(
    problem, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    np.random.seed(5)
    before = np.random.get_state(), torch.get_rng_state()
    for score in (lambda flat: float(flat[0]), lambda flat: 1.0):
        evolved_coefficients(problem, score=score, steps=4, **QUIET)
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

    for seed in range(20):
        evolved_coefficients(problem, score=score, init=0.4, sigma=0.2, steps=1, seed=seed, **QUIET)
    spread = torch.stack([point for number, point in enumerate(points) if number % 8]) - 0.4
    assert_close(points[0], torch.full((3,), 0.4).double(), rtol=0, atol=1e-6)
    assert spread.mean().abs() < 0.03
    assert spread.std().item() == pytest.approx(0.2, rel=0.1)


# --- selection policy
@dataclass(frozen=True)
class CorruptedPool:
    """Noisy experts of one problem, the first of them corrupted."""

    problem: MergeProblem
    corrupt: Tensor  # [T], which are
    validation: Callable[[Tensor], float]  # accuracies
    test: Callable[[Tensor], float]

    def sound(self) -> MergeProblem:
        kept = zip(self.problem.vectors.tasks, self.corrupt.tolist(), strict=True)
        return self.problem.select([task for task, bad in kept if not bad])


@cache
def corrupted_pool(share: float, seed: int = 0, shifted: bool = False) -> CorruptedPool:
    """A share of ten experts corrupted.

    In turn: trained on permuted labels, sign of the task vector flipped, mere noise; or all of them
    trained on another domain, where the same labels go by other features.
    """
    generator, experts = torch.Generator().manual_seed(seed), 10

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth, base, x = drawn(4, 16), 0.3 * drawn(4, 16), drawn(1400, 16)
    gold, deltas = (x @ truth.T).argmax(-1), []
    corrupt = torch.arange(experts) < round(share * experts)
    for number in range(experts):
        delta = truth - base + 0.6 * drawn(4, 16)
        if corrupt[number] and shifted:
            delta = truth.roll(3, 1) - base + 0.6 * drawn(4, 16)
        elif corrupt[number]:
            other = truth.roll(1, 0) - base + 0.6 * drawn(4, 16)
            noise = drawn(4, 16) * delta.norm() / 8
            delta = (other, -delta, noise)[number % 3]
        deltas.append(delta)

    def accuracy(rows: slice) -> Callable[[Tensor], float]:
        def score(flat: Tensor) -> float:
            return float(((x[rows] @ flat.view(4, 16).T).argmax(-1) == gold[rows]).double().mean())

        return score

    problem = problem_of(*deltas, base=base.flatten().tolist(), weight=(4, 16))
    return CorruptedPool(problem, corrupt, accuracy(slice(400)), accuracy(slice(400, None)))


def separation(trust: Tensor, corrupt: Tensor) -> float:
    """The share of pairs in which the sound expert is trusted more: 1/2 is chance."""
    sound, bad = trust[~corrupt][:, None], trust[corrupt][None]
    return float(((sound > bad).double() + (sound == bad).double() / 2).mean())


PUBLISHED = {"draw": 4, "steps": 120, "lr": 0.1, **QUIET}


@cache
def published_policy(share: float) -> Tensor:
    """What the published policy learns of a pool."""
    pool = corrupted_pool(share)
    return learned_policy(pool.problem, pool.validation, average, **PUBLISHED)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_weight_of_corrupted_experts_goes_to_zero(share):
    trust, corrupt = published_policy(share), corrupted_pool(share).corrupt
    assert trust.sum() == pytest.approx(1)
    assert trust[corrupt].sum() < 0.05 < share


@pytest.mark.parametrize(("share", "shifted"), [(0.2, False), (0.6, False), (0.4, True)])
def test_the_merge_of_the_trusted_closes_most_of_the_gap_to_the_sound_experts(share, shifted):
    pool, trusted = corrupted_pool(share, shifted=shifted), []
    options = {"score": pool.validation, "steps": 120, "on_trust": trusted.append}
    merged = selection_policy(pool.problem, **options, **QUIET)
    (trust,) = trusted
    assert (trust[pool.corrupt] < 0.5).all() and separation(trust, pool.corrupt) > 0.9
    tasks = zip(pool.problem.vectors.tasks, trust, strict=True)
    assert_close(merged, average(pool.problem.select([task for task, t in tasks if t >= 0.5])))
    every, sound = pool.test(average(pool.problem)), pool.test(average(pool.sound()))
    assert pool.test(merged) - every > 0.6 * (sound - every) > 0


def test_the_method_trusts_as_the_policy_has_learned():
    pool, trusted = corrupted_pool(0.4), []
    options = {"score": pool.validation, "steps": 9, "on_trust": trusted.append}
    selection_policy(pool.problem, **options, **QUIET)
    options = {"draw": None, "steps": 9, "lr": 0.1}
    expected = learned_policy(pool.problem, pool.validation, average, **options, **QUIET)
    assert torch.equal(trusted[0], expected)


def test_no_harm_is_done_where_no_expert_is_corrupted():
    """By experts drawn one by one; the softmax, whose sum is 1, drops good ones."""
    pool = corrupted_pool(0.0)
    merged = selection_policy(pool.problem, score=pool.validation, steps=120, **QUIET)
    assert pool.test(merged) - pool.test(average(pool.problem)) > -0.01
    assert (published_policy(0.0) < 0.05).any()


def test_a_reward_that_belongs_to_other_draws_teaches_nothing():
    found = []
    for seed in range(4):
        pool, past = corrupted_pool(0.4, seed), []
        generator = torch.Generator().manual_seed(seed)

        def shuffled(flat: Tensor, pool=pool, past=past, generator=generator) -> float:
            past.append(pool.validation(flat))
            return past[int(torch.randint(len(past), (1,), generator=generator))]

        options = {**PUBLISHED, "steps": 40, "seed": seed}
        trust = learned_policy(pool.problem, shuffled, average, **options)
        found.append(separation(trust, pool.corrupt))
    assert 0.3 < sum(found) / len(found) < 0.7


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


def test_one_expert_alone_is_that_expert():
    problem = linear_problem(num_tasks=1)
    expert = problem.vectors.expert("task0")
    merged = selection_policy(problem, score=lambda flat: 1.0, steps=3, **QUIET)
    assert_close(merged, expert, rtol=0, atol=1e-12)
    paths = layer_evolution(problem, score=lambda merged: 1.0, steps=2, **QUIET)
    assert torch.equal(paths.flats[0], expert)


def test_negative_scores_are_refused_where_size_counts(problem):
    with refuses("size_base needs scores of 0 or more, got -1.0; shift"):
        layer_evolution(problem, score=lambda paths: -1.0, size_base=0.9, **QUIET)
