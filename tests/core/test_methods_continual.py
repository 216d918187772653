"""Experts that arrive one at a time: OPCM and its baselines, and the mixture of merged models."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import layout_of, linear_problem
from torch import nn
from torch.testing import assert_close

from divmerge_core.merging.linalg import matrices
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.arithmetic import average, task_arithmetic
from divmerge_core.methods.clustered import dp_mixture, evidence, restaurant
from divmerge_core.methods.continual import (
    opcm,
    projected,
    running_average,
    sequential_task_arithmetic,
    sequential_ties,
)

SHARES = (0.0, 0.3, 0.5, 0.8, 1.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def of_deltas(deltas: torch.Tensor, module: nn.Module | None = None, **tensors) -> MergeProblem:
    """A problem without inputs around a base of ones."""
    layout, names = layout_of(**tensors), tuple(f"task{n}" for n in range(len(deltas)))
    base = torch.ones(layout.size, dtype=deltas.dtype)
    empty = [[] for _ in names]
    return MergeProblem(TaskVectors(layout, names, base, deltas), empty, lambda *_: [], module)


def turned(problem: MergeProblem, seed: int) -> MergeProblem:
    """The same problem with its tasks in another order."""
    tasks = list(problem.vectors.tasks)
    random.Random(seed).shuffle(tasks)
    return problem.select(tasks)


def relative_spread(results: list[torch.Tensor], base: torch.Tensor) -> float:
    """Root mean square distance from the mean result, in units of the mean's distance from base."""
    rows = torch.stack(results)
    mean = rows.mean(dim=0)
    spread = (rows - mean).square().sum(dim=1).mean().sqrt()
    return (spread / (mean - base).square().sum().sqrt()).item()


# --- sums that grow by one expert -----------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_the_running_average_ends_at_the_average(num_tasks):
    problem = linear_problem(num_tasks=num_tasks)
    assert_close(running_average(problem), average(problem), rtol=0, atol=1e-14)


def test_the_running_average_weighs_the_merged_model_by_the_experts_in_it(problem):
    """theta becomes (t theta + theta_{t+1}) / (t + 1), on the experts themselves."""
    first, *others = (problem.vectors.expert(task) for task in problem.vectors.tasks)
    merged = first
    for count, expert in enumerate(others, start=1):
        merged = (count * merged + expert) / (count + 1)
    assert_close(running_average(problem), merged, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, -0.5])
def test_sequential_task_arithmetic_ends_at_task_arithmetic(problem, scale):
    found = sequential_task_arithmetic(problem, scale=scale)
    assert_close(found, task_arithmetic(problem, scale=scale), rtol=0, atol=1e-14)


def test_sequential_ties_adds_the_trimmed_sum_to_what_was_merged_as_worked_out_by_hand():
    """keep=0.4 of five keeps two entries.

    After the first: 0.5 x [4, -2, 0, 6, 2] = [2, -1, 0, 3, 1], untrimmed.
    Second: [2, 0, 0, 3, 0] meets [-8, 0, 0, 4, 0]: signs -, +; sums -8 and 7; half of them added.
    Third: [-2, 0, 0, 6.5, 0] meets [0, 9, 0, 0, -9]: nothing collides.
    """
    deltas = torch.tensor([[4.0, -2, 0, 6, 2], [-8, 1, 0, 4, 1], [0, 9, 1, 1, -9]])
    steps = (
        ([0], [3, 0, 1, 4, 2]),
        ([0, 1], [-1, 0, 1, 7.5, 2]),
        ([0, 1, 2], [-2, 4.5, 1, 10.75, -2.5]),
    )
    for rows, expected in steps:
        found = sequential_ties(of_deltas(deltas[rows], weight=(5,)), keep=0.4, scale=0.5)
        assert found.tolist() == expected


def test_sequential_ties_of_one_expert_is_the_scaled_expert():
    problem = linear_problem(num_tasks=1)
    found = sequential_ties(problem, scale=0.7)
    assert_close(found, problem.vectors.merge([0.7]), rtol=0, atol=1e-15)


def test_sequential_ties_grows_with_every_repetition_of_one_expert():
    """Untrimmed, m becomes m + s (m + tau): ((1 + s)^T - 1) tau after T of them."""
    problem = linear_problem(num_tasks=1)
    deltas = problem.vectors.deltas.expand(4, -1).contiguous()
    found = sequential_ties(of_deltas(deltas, weight=(deltas.shape[1],)), keep=1.0, scale=0.5)
    assert_close(found - 1, (1.5**4 - 1) * deltas[0])


@pytest.mark.parametrize("keep", [0.0, -0.2, 1.5, float("nan")])
def test_sequential_ties_refuses_a_share_that_is_none(problem, keep):
    with pytest.raises(ValueError, match=rf"keep must be in \(0, 1\], got {keep}; 0.2 keeps"):
        sequential_ties(problem, keep=keep)


@pytest.mark.parametrize("method", [sequential_task_arithmetic, sequential_ties])
def test_a_scale_that_is_not_finite_is_refused(problem, method):
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        method(problem, scale=math.inf)


# --- the projection of opcm -----------------------------------------------------------------------


def slowly_projected(delta, before, share, cross):
    """Entry by entry in the full bases of the singular directions of a matrix of full rank."""
    left, values, right = torch.linalg.svd(before, full_matrices=True)
    lead = next(
        (i for i in range(len(values)) if values[: i + 1].sum() > share * values.sum()),
        len(values),
    )
    result = torch.zeros_like(delta)
    for i in range(delta.shape[0]):
        for j in range(delta.shape[1]):
            leading = (i < lead) + (j < lead)
            if i != j and leading < (2 if cross else 1):
                direction = torch.outer(left[:, i], right[j])
                result += (delta * direction).sum() * direction
    return result


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4), (1, 6), (6, 1)])
@pytest.mark.parametrize("share", SHARES[:-1])
@pytest.mark.parametrize("cross", [True, False])
def test_the_projection_takes_out_entry_by_entry_what_is_protected(shape, share, cross):
    delta, before = normal(*shape), normal(*shape, seed=1)
    expected = slowly_projected(delta, before, share, cross)
    assert_close(projected(delta, before, share, cross), expected, rtol=0, atol=1e-12)


def test_the_projection_in_diagonal_directions_as_worked_out_by_hand():
    """Singular values 3, 2, 1: at 0.9 two directions lead (5 of 6), at 0.5 one (3 of 6)."""
    before = torch.diag(torch.tensor([3.0, 2, 1], dtype=torch.float64))
    delta = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64)
    two = torch.tensor([[0.0, 0, 3], [0, 0, 6], [7, 8, 0]], dtype=torch.float64)
    one = torch.tensor([[0.0, 2, 3], [4, 0, 6], [7, 8, 0]], dtype=torch.float64)
    alone = torch.tensor([[0.0, 0, 0], [0, 0, 6], [0, 8, 0]], dtype=torch.float64)
    for share, cross, expected in (
        (0.9, True, two),
        (0.9, False, torch.zeros_like(two)),
        (0.5, True, one),
        (0.5, False, alone),
    ):
        assert_close(projected(delta, before, share, cross), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_what_is_left_is_orthogonal_to_what_was_merged(share, cross, rank):
    for order in range(10):
        before = normal(6, rank, seed=order) @ normal(rank, 8, seed=order + 50)
        delta = normal(6, 8, seed=order + 100)
        inner = (projected(delta, before, share, cross) * before).sum()
        assert abs(inner) < 1e-12 * before.norm() * delta.norm()


@pytest.mark.parametrize("cross", [True, False])
def test_changes_with_other_rows_and_columns_are_left_whole(cross):
    before, delta = torch.zeros(6, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    before[:3, :4], delta[3:, 4:] = normal(3, 4), normal(3, 4, seed=1)
    left, right = rotation(6), rotation(8)
    before, delta = left @ before @ right, left @ delta @ right
    assert_close(projected(delta, before, 0.5, cross), delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_projection_turns_with_its_matrices_also_where_rank_is_deficient(rank, cross):
    before, delta = normal(5, rank) @ normal(rank, 6, seed=1), normal(5, 6, seed=2)
    left, right = rotation(5, seed=3), rotation(6, seed=4)
    found = projected(left @ delta @ right, left @ before @ right, 0.5, cross)
    expected = left @ projected(delta, before, 0.5, cross) @ right
    assert_close(found, expected, rtol=0, atol=1e-11)


def test_nothing_is_taken_out_where_nothing_was_merged():
    delta = normal(4, 5)
    assert torch.equal(projected(delta, torch.zeros_like(delta), 0.5, True), delta)


def test_at_share_1_nothing_in_the_merged_directions_is_left():
    before, delta = normal(6, 2) @ normal(2, 5, seed=1), normal(6, 5, seed=2)
    rest = projected(delta, before, 1.0, True)
    left, _, right = torch.linalg.svd(before)
    assert_close(left[:, :2].T @ rest @ right[:2].T, torch.zeros(2, 2).double())


# --- opcm -----------------------------------------------------------------------------------------


def slowly_opcm(problem: MergeProblem, share: float, cross: bool) -> torch.Tensor:
    """The recursion on models, tensor by tensor, with the growing sum kept aside."""
    layout, base = problem.vectors.layout, problem.vectors.base
    experts = [problem.vectors.expert(task) for task in problem.vectors.tasks]
    merged, factor, lengths = experts[0], 1.0, [(experts[0] - base).norm()]
    origin = layout.unflatten(base)
    for expert in experts[1:]:
        lengths.append((expert - base).norm())
        old, new = layout.unflatten(merged), layout.unflatten(expert)
        parts = []
        for name in layout.names:
            change, added = old[name] - origin[name], new[name] - origin[name]
            if added.ndim == 2:
                added = slowly_projected(added, change, share, cross)
            parts.append((factor * change + added).flatten())
        total = torch.cat(parts)
        factor = total.norm() / (sum(lengths) / len(lengths))
        merged = base + total / factor
    return merged


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("cross", [True, False])
def test_opcm_is_the_recursion_on_models(share, cross):
    problem = linear_problem(num_tasks=4)
    found = opcm(problem, share=share, cross=cross, progress=False)
    assert_close(found, slowly_opcm(problem, share, cross), rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", range(10))
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_after_every_expert_the_distance_from_the_base_is_the_mean_length(order, share):
    problem = turned(linear_problem(num_tasks=6), order)
    lengths = problem.vectors.norms()
    for count in range(1, 7):
        merged = opcm(problem.select(problem.vectors.tasks[:count]), share=share, progress=False)
        distance = (merged - problem.vectors.base).norm()
        assert_close(distance, lengths[:count].mean(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("order", range(10))
def test_what_an_expert_adds_to_every_matrix_is_orthogonal_to_what_was_merged(order):
    """M_T = M_{T-1} scaled + D with <D, M_{T-1}> = 0, so all matrices share one scale."""
    problem = turned(linear_problem(num_tasks=4), order)
    base = problem.vectors.base
    before = opcm(problem.select(problem.vectors.tasks[:3]), progress=False) - base
    after = opcm(problem, progress=False) - base
    scales = [
        (after[place] @ before[place]) / before[place].square().sum()
        for _, place, _ in matrices(problem.vectors.layout)
    ]
    assert_close(torch.stack(scales), scales[0].expand(len(scales)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", SHARES)
def test_opcm_of_one_expert_is_that_expert(share):
    problem = linear_problem(num_tasks=1)
    found = opcm(problem, share=share, progress=False)
    assert torch.equal(found, problem.vectors.base + problem.vectors.deltas[0])


def test_opcm_depends_less_on_the_order_than_sequential_ties_does():
    problem = linear_problem(num_tasks=5)
    orders = [turned(problem, order) for order in range(10)]
    projection = [opcm(one, progress=False) for one in orders]
    trimming = [sequential_ties(one) for one in orders]
    base = problem.vectors.base
    assert relative_spread(projection, base) < relative_spread(trimming, base)


def test_without_matrices_opcm_is_the_sum_brought_to_the_mean_length():
    deltas = normal(4, 9)
    found = opcm(of_deltas(deltas, bias=(4,), norm=(5,)), progress=False) - 1
    total = deltas.sum(dim=0)
    assert_close(found, total * deltas.norm(dim=1).mean() / total.norm())


def test_an_expert_of_zeros_shortens_the_merged_model_alone():
    deltas = normal(2, 12)
    deltas[1] = 0
    found = opcm(of_deltas(deltas, weight=(3, 4)), progress=False)
    assert_close(found - 1, deltas[0] / 2)


def test_experts_that_cancel_give_the_base_and_the_next_one_starts_anew():
    deltas = torch.stack([torch.ones(4), -torch.ones(4), torch.tensor([0.0, 3, 0, 4])]).double()
    cancelled = of_deltas(deltas[:2], bias=(4,))
    assert torch.equal(opcm(cancelled, progress=False), cancelled.vectors.base)
    found = opcm(of_deltas(deltas, bias=(4,)), progress=False) - 1
    assert_close(found, deltas[2] / 5 * 3)  # lengths 2, 2 and 5


def test_only_linear_weights_are_projected_where_the_module_is_known():
    module = nn.ModuleDict({"words": nn.Embedding(5, 3), "dense": nn.Linear(3, 4)})
    shapes = {"words.weight": (5, 3), "dense.weight": (4, 3), "dense.bias": (4,)}
    deltas = normal(2, 15 + 12 + 4)
    words, dense = slice(0, 15), slice(15, 27)
    known = opcm(of_deltas(deltas, module, **shapes), progress=False) - 1
    unknown = opcm(of_deltas(deltas, **shapes), progress=False) - 1

    def along(found, place):  # 1 for all of the second expert on top of the first
        plain = (deltas[0] + deltas[1])[place]
        return torch.nn.functional.cosine_similarity(found[place], plain, dim=0)

    assert_close(along(known, words), torch.ones(()).double())
    assert along(unknown, words) < 0.999
    assert along(known, dense) < 0.999


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_opcm_refuses_a_share_that_is_none(problem, share):
    with pytest.raises(ValueError, match=rf"share must be in \[0, 1\], got {share}; 0.5 is"):
        opcm(problem, share=share)


# --- a mixture of merged models -------------------------------------------------------------------


def families(related: float = 0.9, per_family: int = 3, seed: int = 0) -> MergeProblem:
    """Three families of experts; the second and third change the base in opposite directions.

    `related` is the cosine between task vectors of one family; task n is of family
    n // per_family.
    """
    num_tasks = 3 * per_family
    problem = linear_problem(
        num_tasks=num_tasks, features=16, classes=8, rows=8, batches=2, seed=seed
    )
    centres = normal(3, problem.vectors.layout.size, seed=seed + 100)
    centres[2] = -centres[1]
    own = normal(num_tasks, problem.vectors.layout.size, seed=seed + 200)
    shared = centres.repeat_interleave(per_family, dim=0)
    deltas = 0.1 * (math.sqrt(related) * shared + math.sqrt(1 - related) * own)
    return replace(problem, vectors=problem.vectors.map(lambda _: deltas))


def planted(problem: MergeProblem, per_family: int = 3) -> list[int]:
    return [int(task.removeprefix("task")) // per_family for task in problem.vectors.tasks]


def rand_index(one: list[int], other: list[int]) -> float:
    """Hubert and Arabie's adjusted Rand index: 1 for equal partitions, 0 expected by chance."""

    def pairs(labels) -> int:
        return sum(math.comb(count, 2) for count in Counter(labels).values())

    both, left, right = pairs(zip(one, other, strict=True)), pairs(one), pairs(other)
    chance = left * right / math.comb(len(one), 2)
    return (both - chance) / ((left + right) / 2 - chance)


def mean_misfit(problem: MergeProblem, merged) -> float:
    """Mean square distance of logits from every expert's own, over all tasks."""
    total = []
    for task, (name, batches) in enumerate(
        zip(problem.vectors.tasks, problem.batches, strict=True)
    ):
        expert = problem.vectors.expert(name)
        for batch in batches:
            found = problem.logits_of(merged, task, batch)
            total.append((found - problem.logits(expert, task, batch)).square().mean())
    return torch.stack(total).mean().item()


def test_the_rand_index_of_partitions_worked_out_by_hand():
    assert rand_index([0, 0, 1, 1], [5, 5, 3, 3]) == 1
    assert rand_index([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)


@pytest.mark.parametrize("order", range(10))
def test_the_mixture_finds_planted_families_in_any_order(order):
    problem = turned(families(), order)
    found = dp_mixture(problem, progress=False)
    assert rand_index(planted(problem), list(found.numbers)) >= 0.8


@pytest.mark.parametrize("zeta", [0.1, 0.5, 1.0, 2.0, 5.0])
def test_the_number_of_models_hardly_depends_on_zeta(zeta):
    problem = turned(families(), 0)
    found = dp_mixture(problem, zeta=zeta, progress=False)
    assert abs(len(found.models) - 3) <= 1
    assert rand_index(planted(problem), list(found.numbers)) >= 0.8


def test_a_model_for_every_family_answers_nearer_to_the_experts_than_others_do():
    """At equal storage: one merged model for all, and random groups of the same sizes."""
    problem = families()
    found = dp_mixture(problem, progress=False)
    single = opcm(problem, progress=False)
    shuffled = list(found.numbers)
    random.Random(0).shuffle(shuffled)
    groups = [[t for t, number in enumerate(shuffled) if number == n] for n in set(shuffled)]
    tasks = problem.vectors.tasks
    merged = tuple(
        opcm(problem.select([tasks[t] for t in group]), progress=False) for group in groups
    )
    by_chance = replace(found, models=merged, numbers=tuple(shuffled))
    assert mean_misfit(problem, found) < 0.5 * mean_misfit(problem, by_chance)
    assert mean_misfit(problem, found) < 0.5 * mean_misfit(problem, single)


def k_means(rows: torch.Tensor, count: int) -> list[int]:
    """Lloyd's algorithm from the first `count` rows that lie farthest from one another."""
    centres = rows[:1]
    while len(centres) < count:
        centres = torch.cat([centres, rows[torch.cdist(rows, centres).amin(1).argmax()][None]])
    for _ in range(20):
        numbers = torch.cdist(rows, centres).argmin(1)
        centres = torch.stack([rows[numbers == n].mean(0) for n in range(count)])
    return numbers.tolist()


@pytest.mark.parametrize("related", [0.9, 0.7, 0.5])
def test_at_equal_storage_the_mixture_comes_within_a_tenth_of_k_means(related):
    """On task vectors; it is told the number of models, which the mixture finds."""
    problem = families(related)
    found = dp_mixture(problem, progress=False)
    numbers = k_means(problem.vectors.deltas, len(found.models))
    groups = [[t for t, number in enumerate(numbers) if number == n] for n in sorted(set(numbers))]
    tasks = problem.vectors.tasks
    merged = tuple(
        opcm(problem.select([tasks[t] for t in group]), progress=False) for group in groups
    )
    by_distance = replace(found, models=merged, numbers=tuple(numbers))
    assert found.nbytes == by_distance.nbytes
    assert mean_misfit(problem, found) < 1.1 * mean_misfit(problem, by_distance)


def test_the_answers_hardly_depend_on_the_order_in_which_experts_come():
    misfits = [
        mean_misfit(one, dp_mixture(one, progress=False))
        for one in (turned(families(), order) for order in range(10))
    ]
    spread = torch.tensor(misfits).std() / torch.tensor(misfits).mean()
    assert spread < 0.1


def test_bytes_of_a_mixture_of_models_are_those_of_its_models():
    problem = families(per_family=2)
    size = problem.vectors.layout.size
    for zeta, models in ((0.0, 1), (math.inf, 6)):
        assert dp_mixture(problem, zeta=zeta, progress=False).nbytes == models * size * 8


def test_at_zeta_0_the_mixture_is_one_opcm_merge():
    problem = families(per_family=2)
    found = dp_mixture(problem, zeta=0.0, share=0.3, progress=False)
    assert set(found.numbers) == {0} and len(found.models) == 1
    assert torch.equal(found.models[0], opcm(problem, share=0.3, progress=False))


def test_at_infinite_zeta_the_mixture_is_the_experts():
    problem = families(per_family=2)
    found = dp_mixture(problem, zeta=math.inf, progress=False)
    assert found.numbers == tuple(range(6))
    for model, delta in zip(found.models, problem.vectors.deltas, strict=True):
        assert torch.equal(model, problem.vectors.base + delta)


def test_every_model_is_the_opcm_merge_of_its_members():
    problem = turned(families(), 1)
    found = dp_mixture(problem, progress=False)
    for number, model in enumerate(found.models):
        members = [
            task
            for task, own in zip(problem.vectors.tasks, found.numbers, strict=True)
            if own == number
        ]
        assert torch.equal(model, opcm(problem.select(members), progress=False))


def test_a_task_is_answered_by_the_model_of_its_cluster():
    problem = families(per_family=2)
    found = dp_mixture(problem, progress=False)
    for task, batches in enumerate(problem.batches):
        expected = problem.logits(found.models[found.numbers[task]], task, batches[0])
        assert torch.equal(found.logits(task, batches[0]), expected)


@pytest.mark.parametrize("zeta", [0.0, 2.0, math.inf])
def test_one_expert_alone_opens_the_only_model(zeta):
    problem = linear_problem(num_tasks=1)
    found = dp_mixture(problem, zeta=zeta, progress=False)
    assert found.numbers == (0,)
    assert torch.equal(found.models[0], problem.vectors.base + problem.vectors.deltas[0])


@pytest.mark.parametrize(("zeta", "models"), [(0.0, 1), (0.5, 1), (2.0, 3), (math.inf, 3)])
def test_for_experts_that_changed_nothing_the_prior_alone_decides(zeta, models):
    problem = linear_problem(num_tasks=3)
    still = replace(problem, vectors=problem.vectors.map(torch.zeros_like))
    found = dp_mixture(still, zeta=zeta, progress=False)
    assert all(torch.equal(model, problem.vectors.base) for model in found.models)
    assert len(found.models) == models


@pytest.mark.parametrize("zeta", [0.1, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("counts", [[], [1], [3, 1, 2]])
def test_chances_of_the_restaurant_are_sizes_over_all_that_came_plus_zeta(counts, zeta):
    chances = restaurant(counts, zeta)
    assert sum(chances) == pytest.approx(1)
    expected = [size / (sum(counts) + zeta) for size in counts] + [zeta / (sum(counts) + zeta)]
    assert chances == pytest.approx(expected)


def test_the_restaurant_begins_with_its_first_table():
    assert restaurant([], 0.0) == [1.0]
    assert restaurant([2, 1], math.inf) == [0, 0, 1]
    assert restaurant([1], 2.0) == pytest.approx([1 / 3, 2 / 3])


def test_evidence_is_prior_times_likelihood():
    """Against Bayes' rule on densities, up to a constant."""
    errors = [torch.tensor([0.1, 0.4]), torch.tensor([0.3, 0.2]), torch.tensor([0.5, 0.5])]
    found = evidence(errors, [3, 1], zeta=2.0, sigma=0.25, posterior="log")
    normal = torch.distributions.Normal(0.0, 0.25)
    likelihoods = torch.stack([normal.log_prob(error).mean().exp() for error in errors])
    expected = torch.tensor([3 / 6, 1 / 6, 2 / 6]) * likelihoods
    assert_close(torch.softmax(found, 0), (expected / expected.sum()).double())


@pytest.mark.parametrize(("counts", "softness"), [([1, 1], 0.2 - 2 / 90), ([9, 9], 0.1)])
def test_the_published_evidence_orders_like_the_product_of_two_softmaxes(counts, softness):
    """Softmax of the likelihoods times softmax of c times the prior, errors cut at 3 sigma."""
    errors = [torch.tensor([0.1, 4.0]), torch.tensor([0.3, 0.2]), torch.tensor([0.5, 0.5])]
    found = evidence(errors, counts, zeta=2.0, sigma=0.25, posterior="published")
    normal = torch.distributions.Normal(0.0, 0.25)
    likelihoods = torch.stack(
        [normal.log_prob(error.clamp(max=0.75)).mean().exp() for error in errors]
    ).double()
    prior = torch.tensor(restaurant(counts, 2.0)).double()
    product = torch.softmax(likelihoods, 0) * torch.softmax(softness * prior, 0)
    assert_close(torch.softmax(found, 0), product / product.sum())


def test_the_published_posterior_finds_planted_families_too():
    problem = turned(families(), 0)
    found = dp_mixture(problem, posterior="published", progress=False)
    assert rand_index(planted(problem), list(found.numbers)) >= 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zeta": -1.0}, "zeta must be 0 or more .* got -1.0, 0.25 and 0.5"),
        ({"zeta": float("nan")}, "zeta must be 0 or more"),
        ({"sigma": 0.0}, "sigma above 0 and finite"),
        ({"sigma": math.inf}, "sigma above 0 and finite"),
        ({"start": 1.0}, r"start in \[0, 1\)"),
        ({"start": -0.1}, r"start in \[0, 1\)"),
        ({"share": 2.0}, r"share must be in \[0, 1\], got 2.0"),
        ({"posterior": "flat"}, "posterior must be one of log, published, got 'flat'"),
    ],
)
def test_the_mixture_refuses_what_it_cannot_use(problem, options, message):
    with pytest.raises(ValueError, match=message):
        dp_mixture(problem, **options)


def test_logits_that_are_not_finite_are_reported_with_the_tasks_name(problem):
    def forward(parameters, pairs):
        return [logits / 0 for logits in problem.forward(parameters, pairs)]

    with pytest.raises(ValueError, match="logits on the inputs of 'task0' are not finite"):
        dp_mixture(replace(problem, forward=forward), progress=False)
