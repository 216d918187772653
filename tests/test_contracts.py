"""What every registered method, grouping and link promises: a new entry is tested as it is."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import fewer, linear_problem, specs
from torch.testing import assert_close

from divmerge_core.coefficients import GROUPINGS, LINKS, Coefficients, groups_of
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.methods import METHODS, options_of, parse
from divmerge_core.methods.arithmetic import task_arithmetic
from divmerge_core.problem import MergeProblem

every_method = pytest.mark.parametrize("spec", specs())
every_grouping = pytest.mark.parametrize("grouping", GROUPINGS)
every_link = pytest.mark.parametrize("link", LINKS)


def merge(problem: MergeProblem, spec: str, **options) -> torch.Tensor:
    """Run a method by its name, quickly where it has steps to run."""
    name, fixed = parse(spec)
    quick = {"epochs": 2, "progress": False, "seed": 0}
    taken = {key: value for key, value in quick.items() if key in options_of(name)}
    return METHODS[name](problem, **{**taken, **fixed, **options})


# --- methods --------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_is_a_finite_vector_in_the_bases_precision(spec, num_tasks, dtype):
    problem = linear_problem(num_tasks=num_tasks, dtype=dtype)
    merged = merge(problem, spec)
    assert merged.shape == problem.vectors.base.shape
    assert merged.dtype == dtype
    assert torch.isfinite(merged).all()


@every_method
def test_the_result_is_in_no_autograd_graph(spec):
    assert not merge(linear_problem(), spec).requires_grad


@every_method
def test_the_problem_is_untouched(spec):
    problem = linear_problem()
    before = copy.deepcopy(problem.vectors), copy.deepcopy(problem.batches)
    merged = merge(problem, spec)
    merged.fill_(float("nan"))  # the result shares no memory with the problem
    assert torch.equal(problem.vectors.base, before[0].base)
    assert torch.equal(problem.vectors.deltas, before[0].deltas)
    for every, old in zip(problem.batches, before[1], strict=True):
        for batch, old_batch in zip(every, old, strict=True):
            assert torch.equal(batch.inputs["x"], old_batch.inputs["x"])
            assert torch.equal(batch.weight, old_batch.weight)


@every_method
def test_the_same_seed_gives_the_same_result_whatever_was_drawn_before(spec):
    first = merge(linear_problem(), spec)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(first, merge(linear_problem(), spec))


@every_method
def test_the_global_random_numbers_are_left_alone(spec):
    problem = linear_problem()
    before = torch.get_rng_state()
    merge(problem, spec)
    assert torch.equal(before, torch.get_rng_state())


@every_method
def test_zero_task_vectors_give_back_the_base(spec):
    problem = linear_problem()
    still = replace(problem, vectors=problem.vectors.map(torch.zeros_like))
    assert_close(merge(still, spec), problem.vectors.base, rtol=0, atol=0)


@every_method
def test_parameters_that_no_expert_changed_stay_as_they_were(spec):
    problem = linear_problem()
    start, stop = problem.vectors.layout.bounds[1]

    def freeze(deltas):
        deltas = deltas.clone()
        deltas[:, start:stop] = 0
        return deltas

    partly = replace(problem, vectors=problem.vectors.map(freeze))
    assert torch.equal(merge(partly, spec)[start:stop], problem.vectors.base[start:stop])


@every_method
def test_the_order_of_tasks_is_immaterial_where_the_method_says_so(spec):
    if not METHODS.facts[parse(spec)[0]]["symmetric"]:
        pytest.skip("the method does not promise it")
    problem = linear_problem()
    turned = problem.select(["task2", "task0", "task1"])
    assert_close(merge(turned, spec), merge(problem, spec), rtol=1e-4, atol=1e-5)


@every_method
def test_unlabelled_inputs_are_asked_for_or_not_needed(spec):
    bare = fewer(linear_problem(), 0)
    if METHODS.facts[parse(spec)[0]]["needs"] == "unlabelled inputs":
        with pytest.raises(ValueError, match="needs unlabelled inputs of every task; none for"):
            merge(bare, spec)
    else:
        assert torch.isfinite(merge(bare, spec)).all()


@every_method
def test_one_expert_alone_gives_a_point_between_base_and_expert(spec):
    """With T = 1 the expert itself loses nothing; no method leaves the box that the two span."""
    problem = linear_problem(num_tasks=1)
    moved = merge(problem, spec) - problem.vectors.base
    share = moved / problem.vectors.deltas[0]
    assert share.min() > -0.05 and share.max() < 1.05


# --- groupings and links --------------------------------------------------------------------------


@every_grouping
def test_every_tensor_is_in_one_group_and_every_group_has_a_tensor(grouping):
    layout = linear_problem().vectors.layout
    names, numbers = groups_of(layout, grouping)
    assert len(numbers) == len(layout.names)
    assert set(numbers) == set(range(len(names)))
    assert len(set(names)) == len(names)


@every_grouping
def test_the_groups_tile_the_vector(grouping):
    layout = linear_problem().vectors.layout
    rows = Coefficients(layout, 2, grouping=grouping).segments.rows
    assert rows[0][0] == 0 and rows[-1][1] == layout.size
    assert all(before[1] == after[0] for before, after in zip(rows, rows[1:], strict=False))


@every_grouping
def test_equal_coefficients_give_task_arithmetic(grouping):
    problem = linear_problem()
    coefficients = Coefficients(problem.vectors.layout, 3, grouping=grouping, init=0.4)
    vectors = problem.vectors
    merged = grouped_merge(vectors.base, vectors.deltas, coefficients(), coefficients.segments)
    assert_close(merged, task_arithmetic(problem, scale=0.4), rtol=1e-6, atol=1e-6)


@every_grouping
def test_one_expert_at_coefficient_1_is_that_expert(grouping):
    vectors = linear_problem(num_tasks=1).vectors
    coefficients = Coefficients(vectors.layout, 1, grouping=grouping, init=1.0)
    merged = grouped_merge(vectors.base, vectors.deltas, coefficients(), coefficients.segments)
    assert_close(merged, vectors.expert("task0"), rtol=0, atol=0)


@every_grouping
def test_one_coefficient_changes_its_group_alone(grouping):
    vectors = linear_problem(num_tasks=2).vectors
    coefficients = Coefficients(vectors.layout, 2, grouping=grouping, init=0.0)
    chosen = coefficients().detach().clone()
    chosen[1, -1] = 1.0
    merged = grouped_merge(vectors.base, vectors.deltas, chosen, coefficients.segments)
    _, numbers = groups_of(vectors.layout, grouping)
    for (start, stop), number in zip(vectors.layout.bounds, numbers, strict=True):
        source = vectors.expert("task1") if number == chosen.shape[1] - 1 else vectors.base
        assert torch.equal(merged[start:stop], source[start:stop])


@every_link
@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_every_link_reaches_its_initial_value(link, num_tasks):
    layout = linear_problem().vectors.layout
    coefficients = Coefficients(layout, num_tasks, grouping="layer", link=link)
    assert_close(coefficients(), torch.full((num_tasks, 5), 1 / num_tasks))


@every_link
def test_every_link_lets_gradients_through(link):
    coefficients = Coefficients(linear_problem().vectors.layout, 3, link=link)
    slope = torch.tensor([[1.0], [2.0], [-1.0]])
    (coefficients() * slope).sum().backward()
    assert coefficients.raw.grad.abs().min() > 1e-3
