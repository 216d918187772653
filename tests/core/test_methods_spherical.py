"""Spherical means and Model Stock: points on arcs, and ratios from angles."""

import math

import pytest
import torch
from comparisons import change
from helpers import linear_problem, normal, problem_of
from torch.testing import assert_close

from divmerge_core.methods.spherical import model_stock, multi_slerp, slerp


# --- slerp
def test_the_arc_starts_at_the_first_expert_and_ends_at_the_second():
    problem = linear_problem(num_tasks=2)
    assert_close(slerp(problem, t=0.0), problem.vectors.expert("task0"))
    assert_close(slerp(problem, t=1.0), problem.vectors.expert("task1"))


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_between_unit_vectors_the_arc_is_a_rotation_by_a_share_of_the_angle(t):
    one, other = (v / v.norm() for v in normal(2, 7))
    angle = torch.acos(one @ other)
    across = other - (one @ other) * one
    expected = torch.cos(t * angle) * one + torch.sin(t * angle) * across / across.norm()
    assert_close(slerp(problem_of(one.tolist(), other.tolist()), t=t), expected)


def test_every_tensor_turns_by_its_own_angle_and_not_its_task_vector():
    problem = problem_of([1, 0, 2, 0], [0, 1, 4, 0], left=(2,), right=(1, 2))
    half = math.sqrt(0.5)
    assert_close(slerp(problem), torch.tensor([half, half, 3, 0], dtype=torch.float64))
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


# --- multi-slerp
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


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        (([3, 0], [0, 1]), [2 * math.sqrt(0.5)] * 2),  # directions and lengths averaged apart
        (([1, 2], [3, 6], [2, 4]), [2, 4]),  # parallel
        (([2, 4], [0, 0]), [1, 2]),  # a tensor left alone shortens the mean, and turns nothing
        (([3, 0], [0, 1], [0, 0]), [4 / 3 * math.sqrt(0.5)] * 2),
        (([2, 0], [-1, 0]), [0.5, 0]),  # where directions cancel: the plain mean
        (([2, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]), [1 / 3, 0]),
        (([0.7, 0.1], [-0.1, -0.1 / 7]), [0.3, 0.3 / 7]),  # ... but for rounding
        (([3, 5],), [3, 5]),
    ],
)
def test_multi_slerp_as_worked_out_by_hand(deltas, expected):
    problem = problem_of(*deltas, base=1.0)
    assert_close(change(problem, multi_slerp(problem)), normal(2).new_tensor(expected))


def test_multi_slerp_of_two_vectors_of_one_length_is_slerp_halfway():
    problem = problem_of([0.6, 0.8, 0], [0, 0.6, 0.8])
    assert_close(multi_slerp(problem, origin="zero"), slerp(problem))


# --- model stock
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


@pytest.mark.parametrize(
    ("deltas", "ratio"),
    [
        (([2, 0], [1, math.sqrt(3)]), 2 / 3),  # at sixty degrees
        (([1, 2], [2, 4]), 1),
        (([1, 0], [0, 3]), 0),
        (([1, 0], [0, 0]), 0),  # no direction
        (([3, 5],), 1),
        (([2, 0], [-1, math.sqrt(3)]), -2),  # c = -1/2: -1 / (1 - 1/2)
        (([2, 0], [-1, 0]), 0),  # directions that cancel
        (([2e-6, 0], [1e-6, math.sqrt(3) * 1e-6]), 2 / 3),  # short ones have angles too
    ],
)
def test_model_stock_goes_as_far_as_the_angle_says(deltas, ratio):
    problem = problem_of(*deltas)
    assert_close(model_stock(problem), ratio * problem.vectors.deltas.mean(dim=0))


def test_a_row_of_its_own_is_a_tensor_of_its_own():
    deltas = normal(3, 9)
    matrix = problem_of(*deltas, weight=(2, 3), bias=(2,), none=(3, 0), scalar=())
    apart = problem_of(*deltas, first=(3,), second=(3,), bias=(2,), scalar=())
    assert_close(model_stock(matrix, filter_wise=True), model_stock(apart))
