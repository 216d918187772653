"""Spherical means and Model Stock: points on arcs, and ratios from angles."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import layout_of, linear_problem
from test_methods_arithmetic import change, problem_of
from torch.testing import assert_close

from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.arithmetic import average
from divmerge_core.methods.spherical import model_stock, multi_slerp, slerp

# --- slerp ----------------------------------------------------------------------------------------


def test_the_arc_starts_at_the_first_expert_and_ends_at_the_second():
    problem = linear_problem(num_tasks=2)
    assert_close(slerp(problem, t=0.0), problem.vectors.expert("task0"))
    assert_close(slerp(problem, t=1.0), problem.vectors.expert("task1"))


def test_a_third_of_a_right_angle_is_thirty_degrees():
    merged = slerp(problem_of([1, 0], [0, 1]), t=1 / 3)
    assert_close(merged, merged.new_tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_between_unit_vectors_the_arc_is_a_rotation_by_a_share_of_the_angle(t):
    generator = torch.Generator().manual_seed(0)
    one, other = (v / v.norm() for v in torch.randn(2, 7, generator=generator, dtype=torch.float64))
    angle = torch.acos(one @ other)
    across = other - (one @ other) * one
    expected = torch.cos(t * angle) * one + torch.sin(t * angle) * across / across.norm()
    assert_close(slerp(problem_of(one.tolist(), other.tolist()), t=t), expected)


def test_every_tensor_turns_by_its_own_angle():
    problem = problem_of([1, 0, 2, 0], [0, 1, 4, 0], left=(2,), right=(1, 2))
    half = math.sqrt(0.5)
    assert_close(slerp(problem), torch.tensor([half, half, 3, 0], dtype=torch.float64))


def test_it_is_the_experts_weights_that_turn_and_not_the_task_vectors():
    problem = problem_of([0, 1], [0, -1], base=[1.0, 0.0])  # experts at 45 degrees up and down
    assert_close(slerp(problem), torch.tensor([math.sqrt(2), 0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 0], [3, 0], [1.5, 0]),  # parallel
        ([1, 0], [-1, 0], [0.5, 0]),  # opposed: no arc is the shortest
        ([0, 0], [4, 8], [1, 2]),  # no angle
        ([0, 0], [0, 0], [0, 0]),
    ],
)
def test_where_there_is_no_arc_the_way_is_straight(one, other, expected):
    merged = slerp(problem_of(one, other), t=0.25)
    assert_close(merged, merged.new_tensor(expected))


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_slerp_refuses_to_leave_the_arc(t):
    with pytest.raises(ValueError, match=rf"t must be in \[0, 1\], got {t}; 0 is the first"):
        slerp(linear_problem(num_tasks=2), t=t)


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_slerp_takes_two_experts(num_tasks):
    with pytest.raises(ValueError, match=f"slerp takes exactly 2 experts, got {num_tasks}; select"):
        slerp(linear_problem(num_tasks=num_tasks))


# --- multi-slerp ----------------------------------------------------------------------------------


def through_the_tangent_space(problem, weights, origin):
    """The long way: to the tangent space at the mean direction, and back by the exponential map."""
    flat = problem.vectors.base.clone()
    for start, stop in problem.vectors.layout.bounds:
        base = problem.vectors.base[start:stop] if origin == "zero" else 0
        rows = problem.vectors.deltas[:, start:stop] + base
        units = rows / rows.norm(dim=1, keepdim=True)
        mean = sum(w * unit for w, unit in zip(weights, units, strict=True))
        mean = mean / mean.norm()
        tangents = [unit - (unit @ mean) * mean for unit in units]
        tangent = sum(w * v for w, v in zip(weights, tangents, strict=True))
        angle = tangent.norm() + 1e-30
        point = torch.cos(angle) * mean + torch.sin(angle) * tangent / angle
        length = sum(w * row.norm() for w, row in zip(weights, rows, strict=True))
        flat[start:stop] += length * point - base
    return flat


@pytest.mark.parametrize("origin", ["base", "zero"])
def test_the_step_in_the_tangent_space_changes_nothing(problem, origin):
    found = multi_slerp(problem, weights=[1, 3, 4], origin=origin)
    assert_close(found, through_the_tangent_space(problem, [0.125, 0.375, 0.5], origin))


def test_directions_and_lengths_are_averaged_apart():
    """Directions (1, 0) and (0, 1), lengths 3 and 1: the diagonal at length 2."""
    merged = multi_slerp(problem_of([3, 0], [0, 1]))
    assert_close(merged, torch.full((2,), math.sqrt(2), dtype=torch.float64))


def test_between_two_vectors_of_one_length_it_is_slerp_halfway():
    problem = problem_of([0.6, 0.8, 0], [0, 0.6, 0.8])
    assert_close(multi_slerp(problem, origin="zero"), slerp(problem))


def test_parallel_task_vectors_are_averaged():
    problem = problem_of([1, 2], [3, 6], [2, 4], base=5.0)
    assert_close(multi_slerp(problem), average(problem))


def test_one_expert_alone_is_itself():
    problem = linear_problem(num_tasks=1)
    for origin in ("base", "zero"):
        assert_close(multi_slerp(problem, origin=origin), problem.vectors.expert("task0"))


@pytest.mark.parametrize(
    "deltas", [([2, 0], [-1, 0]), ([2, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)])]
)
def test_where_directions_cancel_the_plain_mean_is_taken(deltas):
    problem = problem_of(*deltas, base=1.0)
    assert_close(multi_slerp(problem), average(problem))


def test_directions_that_cancel_but_for_rounding_count_as_cancelling():
    problem = linear_problem(num_tasks=1, dtype=torch.float32)
    row = problem.vectors.deltas[0].double()
    opposed = problem_of(row.tolist(), (-row / 7).tolist())
    vectors = TaskVectors(
        opposed.vectors.layout,
        opposed.vectors.tasks,
        opposed.vectors.base.float(),
        opposed.vectors.deltas.float(),
    )
    rounded = replace(opposed, vectors=vectors)
    assert_close(multi_slerp(rounded), average(rounded))


def test_an_expert_that_left_a_tensor_alone_shortens_the_mean_and_does_not_turn_it():
    assert_close(multi_slerp(problem_of([2, 4], [0, 0])), torch.tensor([1.0, 2.0]).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 2]}, r"one positive, finite weight for each of 3 tasks, got \[1, 2\]"),
        ({"weights": [1, -1, 1]}, "one positive, finite weight for each of 3 tasks"),
        ({"origin": "mean"}, "origin must be one of base, zero; got 'mean'"),
    ],
)
def test_multi_slerp_refuses_what_it_does_not_know(problem, options, message):
    with pytest.raises(ValueError, match=message):
        multi_slerp(problem, **options)


# --- model stock ----------------------------------------------------------------------------------


def slow_stock(problem, filter_wise):
    """Pair by pair and row by row, with angles from acos."""
    merged = {}
    base = problem.vectors.layout.unflatten(problem.vectors.base)
    rows = [problem.vectors.layout.unflatten(row) for row in problem.vectors.deltas]
    for name, tensor in base.items():
        parts = [delta[name] for delta in rows]
        if not (filter_wise and tensor.ndim > 1):
            parts = [part.reshape(1, -1) for part in parts]
        lines = []
        for filters in zip(*parts, strict=True):
            cosines = [
                torch.cosine_similarity(filters[i], filters[j], dim=0)
                for i in range(len(filters))
                for j in range(i)
            ]
            c, count = sum(cosines) / len(cosines), len(filters)
            ratio = count * c / (1 + (count - 1) * c)
            lines.append(ratio * sum(filters) / count)
        merged[name] = tensor + torch.stack(lines).reshape(tensor.shape)
    return problem.vectors.layout.flatten(merged)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("num_tasks", [2, 4])
def test_model_stock_is_what_a_loop_over_pairs_gives(filter_wise, num_tasks):
    problem = linear_problem(num_tasks=num_tasks)
    found = model_stock(problem, filter_wise=filter_wise)
    assert_close(found, slow_stock(problem, filter_wise))


def test_at_sixty_degrees_two_experts_go_two_thirds_of_the_way():
    problem = problem_of([2, 0], [1, math.sqrt(3)], base=1.0)
    assert_close(change(problem, model_stock(problem)), problem.vectors.deltas.mean(dim=0) * 2 / 3)


def test_parallel_task_vectors_go_all_the_way_and_orthogonal_ones_stay():
    parallel, orthogonal = problem_of([1, 2], [2, 4]), problem_of([1, 0], [0, 3], base=7.0)
    assert_close(model_stock(parallel), average(parallel))
    assert_close(model_stock(orthogonal), orthogonal.vectors.base)


def test_obtuse_task_vectors_turn_the_way_back():
    """At c = -1/2 two experts have the ratio -1 / (1 - 1/2) = -2."""
    problem = problem_of([2, 0], [-1, math.sqrt(3)])
    assert_close(model_stock(problem), -2 * problem.vectors.deltas.mean(dim=0))


def test_directions_that_cancel_stay_at_the_base():
    problem = problem_of([2, 0], [-1, 0], base=3.0)
    assert_close(model_stock(problem), problem.vectors.base)


def test_very_short_task_vectors_have_the_angles_of_long_ones():
    problem = linear_problem(num_tasks=3)
    small = change(problem, model_stock(problem))
    deltas = (problem.vectors.deltas * 1e-5).tolist()
    layout = problem.vectors.layout
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    assert_close(model_stock(problem_of(*deltas, **shapes)), small * 1e-5)


def test_a_row_of_its_own_is_a_tensor_of_its_own():
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 8, generator=generator, dtype=torch.float64).tolist()
    matrix = problem_of(*deltas, weight=(2, 3), bias=(2,))
    apart = problem_of(*deltas, first=(3,), second=(3,), bias=(2,))
    assert_close(model_stock(matrix, filter_wise=True), model_stock(apart))


def test_tensors_without_entries_are_no_obstacle():
    for filter_wise in (False, True):
        problem = problem_of([1.0], [1.0], weight=(1,), none=(3, 0))
        assert problem.vectors.layout == layout_of(weight=(1,), none=(3, 0))
        assert model_stock(problem, filter_wise=filter_wise).tolist() == [1]
