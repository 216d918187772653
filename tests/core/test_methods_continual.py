"""Experts that arrive one at a time: OPCM and its baselines, and the mixture of merged models."""

import math
import random
from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch
from helpers import QUIET, linear_problem, normal, problem_of, refuses
from torch import nn
from torch.testing import assert_close

from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import average, task_arithmetic
from divmerge_core.methods.clustered import Clusters, crp_prior, dp_mixture, posterior_score
from divmerge_core.methods.continual import opcm, projected, running_average, sequential_ties


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def turned(problem: MergeProblem, seed: int) -> MergeProblem:
    """The same problem with its tasks in another order."""
    tasks = list(problem.vectors.tasks)
    random.Random(seed).shuffle(tasks)
    return problem.select(tasks)


# --- sums that grow by one expert
def test_running_sums_end_at_the_sums_themselves_also_on_the_way(problem):
    """theta becomes (t theta + theta_{t+1}) / (t + 1), on the experts themselves."""
    first, *others = (problem.vectors.expert(task) for task in problem.vectors.tasks)
    merged = first
    for count, expert in enumerate(others, start=1):
        merged = (count * merged + expert) / (count + 1)
    for expected in (merged, average(problem)):
        assert_close(running_average(problem), expected, rtol=0, atol=1e-14)
    found = METHODS["sequential_task_arithmetic"](problem, scale=-0.5)
    assert_close(found, task_arithmetic(problem, scale=-0.5), rtol=0, atol=1e-14)


def test_sequential_ties_adds_the_trimmed_sum_to_what_was_merged_as_worked_out_by_hand():
    """keep=0.4 of five keeps two entries.

    After the first: 0.5 x [4, -2, 0, 6, 2] = [2, -1, 0, 3, 1], untrimmed.
    Second: [2, 0, 0, 3, 0] meets [-8, 0, 0, 4, 0]: signs -, +; sums -8 and 7; half of them added.
    Third: [-2, 0, 0, 6.5, 0] meets [0, 9, 0, 0, -9]: nothing collides.
    """
    deltas = torch.tensor([[4.0, -2, 0, 6, 2], [-8, 1, 0, 4, 1], [0, 9, 1, 1, -9]])
    steps = ([3, 0, 1, 4, 2], [-1, 0, 1, 7.5, 2], [-2, 4.5, 1, 10.75, -2.5])
    for count, expected in enumerate(steps, start=1):
        found = sequential_ties(problem_of(*deltas[:count], base=1.0), keep=0.4, scale=0.5)
        assert found.tolist() == expected


# --- the projection of opcm
def slowly_projected(delta, before, share, cross):
    """Entry by entry in the full bases of the singular directions of a matrix of full rank."""
    left, values, right = torch.linalg.svd(before, full_matrices=True)
    lead = next(
        (i for i in range(len(values)) if values[: i + 1].sum() > share * values.sum()), len(values)
    )
    result = torch.zeros_like(delta)
    for i in range(delta.shape[0]):
        for j in range(delta.shape[1]):
            leading = (i < lead) + (j < lead)
            if i != j and leading < (2 if cross else 1):
                direction = torch.outer(left[:, i], right[j])
                result += (delta * direction).sum() * direction
    return result


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(
    ("shape", "share"),
    [((5, 5), 0.0), ((4, 5), 0.3), ((5, 3), 0.5), ((5, 5), 0.8), ((1, 6), 0.5), ((6, 1), 0.3)],
)
def test_the_projection_takes_out_entry_by_entry_what_is_protected(shape, share, cross):
    delta, before = normal(*shape), normal(*shape, seed=1)
    expected = slowly_projected(delta, before, share, cross)
    assert_close(projected(delta, before, share, cross), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(("rank", "share"), [(1, 0.5), (2, 1.0), (3, 0.3), (5, 0.8), (5, 0.0)])
def test_the_projection_is_orthogonal_to_the_merged_change_and_turns_with_it(rank, share, cross):
    """Also where its rank is deficient, and its null directions arbitrary."""
    before, delta = normal(5, rank) @ normal(rank, 6, seed=1), normal(5, 6, seed=2)
    rest = projected(delta, before, share, cross)
    assert abs((rest * before).sum()) < 1e-12 * before.norm() * delta.norm()
    left, right = rotation(5, seed=3), rotation(6, seed=4)
    found = projected(left @ delta @ right, left @ before @ right, share, cross)
    assert_close(found, left @ rest @ right, rtol=0, atol=1e-11)
    if share == 1.0:  # nothing in the merged directions is left
        left, _, right = torch.linalg.svd(before)
        inside = left[:, :rank].T @ rest @ right[:rank].T
        assert_close(inside, torch.zeros_like(inside))
    apart = torch.block_diag(normal(3, 4), normal(2, 2, seed=1))  # other rows and other columns
    before, delta = apart.clone(), apart.clone()
    before[3:], delta[:3] = 0, 0
    right = rotation(6, seed=4)
    before, delta = rotation(5, seed=3) @ before @ right, rotation(5, seed=3) @ delta @ right
    assert_close(projected(delta, before, share, cross), delta, rtol=0, atol=1e-12)
    assert torch.equal(projected(delta, 0 * before, share, cross), delta)


# --- opcm
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


@pytest.mark.parametrize(("share", "cross"), [(0.0, True), (0.5, False), (0.8, True)])
def test_opcm_is_the_recursion_on_models(share, cross):
    problem = linear_problem(features=4)
    found = opcm(problem, share=share, cross=cross, **QUIET)
    assert_close(found, slowly_opcm(problem, share, cross), rtol=0, atol=1e-10)


def test_opcm_without_matrices_with_an_idle_expert_and_with_experts_that_cancel():
    deltas = normal(4, 9)
    found = opcm(problem_of(*deltas, base=1.0, bias=(4,), norm=(5,)), **QUIET) - 1
    total = deltas.sum(dim=0)  # brought to the mean length
    assert_close(found, total * deltas.norm(dim=1).mean() / total.norm())
    deltas = normal(2, 12)
    deltas[1] = 0  # it shortens the merged model alone
    assert_close(opcm(problem_of(*deltas, base=1.0, weight=(3, 4)), **QUIET) - 1, deltas[0] / 2)
    deltas = torch.stack([torch.ones(4), -torch.ones(4), torch.tensor([0.0, 3, 0, 4])]).double()
    cancelled = problem_of(*deltas[:2], base=1.0, bias=(4,))
    assert torch.equal(opcm(cancelled, **QUIET), cancelled.vectors.base)
    found = opcm(problem_of(*deltas, base=1.0, bias=(4,)), **QUIET) - 1
    assert_close(found, deltas[2] / 5 * 3)  # the next one starts anew; lengths 2, 2 and 5


def test_only_linear_weights_are_projected_where_the_module_is_known():
    module = nn.ModuleDict({"words": nn.Embedding(5, 3), "dense": nn.Linear(3, 4)})
    shapes = {"words.weight": (5, 3), "dense.weight": (4, 3), "dense.bias": (4,)}
    deltas = normal(2, 15 + 12 + 4)
    words, dense = slice(0, 15), slice(15, 27)
    known = opcm(problem_of(*deltas, base=1.0, module=module, **shapes), **QUIET) - 1
    unknown = opcm(problem_of(*deltas, base=1.0, **shapes), **QUIET) - 1

    def along(found, place):  # 1 for all of the second expert on top of the first
        plain = (deltas[0] + deltas[1])[place]
        return torch.nn.functional.cosine_similarity(found[place], plain, dim=0)

    assert_close(along(known, words), torch.ones(()).double())
    assert along(unknown, words) < 0.999
    assert along(known, dense) < 0.999


# --- a mixture of merged models
PER_FAMILY = 3


@cache
def families(related: float = 0.9) -> MergeProblem:
    """Three families of experts; the second and third change the base in opposite directions.

    `related` is the cosine between task vectors of one family; task n is of family
    n // PER_FAMILY.
    """
    num_tasks = 3 * PER_FAMILY
    toy = {"features": 16, "classes": 8, "batches": 2, "rows": 8}
    problem = linear_problem(num_tasks=num_tasks, **toy)
    centres = normal(3, problem.vectors.layout.size, seed=100)
    centres[2] = -centres[1]
    own = normal(num_tasks, problem.vectors.layout.size, seed=200)
    shared = centres.repeat_interleave(PER_FAMILY, dim=0)
    deltas = 0.1 * (math.sqrt(related) * shared + math.sqrt(1 - related) * own)
    return replace(problem, vectors=problem.vectors.map(lambda _: deltas))


@cache
def mixed(order: int, **options) -> Clusters:
    """The mixture of the families' experts in an order of their own."""
    return dp_mixture(turned(families(), order), **QUIET, **options)


def grouped(problem: MergeProblem, like: Clusters, numbers: list[int]) -> Clusters:
    """OPCM merges of groups that someone else chose."""
    tasks, models = problem.vectors.tasks, []
    for number in sorted(set(numbers)):
        members = [task for task, own in zip(tasks, numbers, strict=True) if own == number]
        models.append(opcm(problem.select(members), **QUIET))
    return replace(like, problem=problem, models=tuple(models), numbers=tuple(numbers))


@pytest.mark.parametrize(
    ("order", "options"),
    [(1, {}), (2, {}), (3, {}), (0, {"zeta": 0.1}), (0, {"zeta": 5.0}), (0, {"zeta": 0.5})]
    + [(0, {"posterior": "published"})],
)
def test_the_mixture_finds_planted_families_and_merges_each_by_opcm(order, options):
    """In any order, whatever zeta. Perfect agreement; a neighbouring number of groups passes."""
    problem, found = turned(families(), order), mixed(order, **options)
    planted = [int(task.removeprefix("task")) // PER_FAMILY for task in problem.vectors.tasks]
    assert abs(len(found.models) - 3) <= 1
    pairs = list(combinations(range(len(planted)), 2))
    agree = [(planted[a] == planted[b]) == (found.numbers[a] == found.numbers[b]) for a, b in pairs]
    assert sum(agree) >= 0.9 * len(pairs)
    expected = grouped(problem, found, list(found.numbers))
    assert all(map(torch.equal, found.models, expected.models))
    assert found.nbytes == len(found.models) * problem.vectors.layout.size * 8
    for task, batches in enumerate(problem.batches):
        model = found.models[found.numbers[task]]
        assert torch.equal(found.logits(task, batches[0]), problem.logits(model, task, batches[0]))


def test_at_zeta_0_the_mixture_is_one_opcm_merge_and_at_infinity_the_experts():
    problem = linear_problem()
    found = dp_mixture(problem, zeta=0.0, share=0.3, **QUIET)
    assert found.numbers == (0, 0, 0)
    assert torch.equal(found.models[0], opcm(problem, share=0.3, **QUIET))
    found = dp_mixture(problem, zeta=math.inf, **QUIET)
    assert found.numbers == (0, 1, 2)
    for model, delta in zip(found.models, problem.vectors.deltas, strict=True):
        assert torch.equal(model, problem.vectors.base + delta)


@pytest.mark.parametrize(("zeta", "models"), [(0.0, 1), (0.5, 1), (2.0, 3), (math.inf, 3)])
def test_for_experts_that_changed_nothing_the_prior_alone_decides(zeta, models):
    problem = linear_problem(num_tasks=3)
    still = replace(problem, vectors=problem.vectors.map(torch.zeros_like))
    found = dp_mixture(still, zeta=zeta, **QUIET)
    assert all(torch.equal(model, problem.vectors.base) for model in found.models)
    assert len(found.models) == models


@pytest.mark.parametrize(
    ("counts", "zeta", "expected"),
    [
        ([], 0.0, [1]),
        ([1], 2.0, [1 / 3, 2 / 3]),
        ([3, 1, 2], 0.5, [3 / 6.5, 1 / 6.5, 2 / 6.5, 0.5 / 6.5]),
        ([2, 1], math.inf, [0, 0, 1]),
    ],
)
def test_the_prior_is_sizes_over_all_that_came_plus_zeta(counts, zeta, expected):
    assert crp_prior(counts, zeta) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("posterior", "counts", "softness"),
    [("log", [3, 1], 0), ("published", [1, 1], 0.2 - 2 / 90), ("published", [9, 9], 0.1)],
)
def test_the_posterior_is_prior_times_likelihood(posterior, counts, softness):
    """Against Bayes' rule on densities, up to a constant; the published score orders like softmax
    of the likelihoods times softmax of c times the prior, errors cut at 3 sigma."""
    errors = torch.tensor([[0.1, 4.0 if softness else 0.4], [0.3, 0.2], [0.5, 0.5]])
    found = posterior_score(list(errors), counts, zeta=2.0, sigma=0.25, posterior=posterior)
    density = torch.distributions.Normal(0.0, 0.25)
    cut = errors.clamp(max=0.75) if softness else errors
    likelihoods = density.log_prob(cut).mean(1).exp().double()
    prior = torch.tensor(crp_prior(counts, 2.0)).double()
    expected = likelihoods * prior
    if softness:
        expected = likelihoods.softmax(0) * (softness * prior).softmax(0)
    assert_close(torch.softmax(found, 0).double(), expected / expected.sum())


def test_logits_that_are_not_finite_are_reported_with_the_tasks_name(problem):
    def forward(parameters, pairs):
        return [logits / 0 for logits in problem.forward(parameters, pairs)]

    with refuses("logits on the inputs of 'task0' are not finite"):
        dp_mixture(replace(problem, forward=forward), **QUIET)
