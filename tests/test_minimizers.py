"""Minimisers: they find minima of functions known by hand, and stay within their passes."""

import pytest
import torch
from torch.testing import assert_close

from divmerge_core.minimizers import conjugate_gradients, gauss_newton, lbfgs

SIZE = 6


@pytest.fixture
def quadratic():
    """A positive definite matrix with eigenvalues from 1 to 100, and the minimum's place."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, 2, SIZE, dtype=torch.float64)
    return basis * values @ basis.T, torch.randn(SIZE, generator=generator, dtype=torch.float64)


def asked(matrix, place):
    """The quadratic as `evaluate`, and a list of the points at which it was asked."""
    points = []

    def evaluate(point):
        points.append(point)
        away = point - place
        return 0.5 * float(away @ matrix @ away), matrix @ away

    return evaluate, points


def start():
    return torch.zeros(SIZE, dtype=torch.float64)


def test_lbfgs_finds_the_minimum(quadratic):
    evaluate, points = asked(*quadratic)
    assert_close(lbfgs(evaluate, start(), 60), quadratic[1], rtol=1e-4, atol=1e-4)
    assert len(points) <= 60


def test_gauss_newton_needs_one_step_where_the_model_is_exact(quadratic):
    """Without damping, with all products: Newton's step on a quadratic."""
    matrix, place = quadratic
    evaluate, points = asked(matrix, place)
    options = {"damping": 0.0, "rounds": SIZE, "tolerance": 0.0, "price": 0.0}
    found = gauss_newton(evaluate, lambda point: matrix.mv, start(), 2, **options)
    assert_close(found, place)
    assert len(points) == 2


def test_conjugate_gradients_solve_the_damped_system(quadratic):
    matrix, place = quadratic
    step, change = conjugate_gradients(matrix.mv, place, 0.5, rounds=SIZE, tolerance=0.0)
    damped = matrix + 0.5 * torch.eye(SIZE, dtype=torch.float64)
    assert_close(step, -torch.linalg.solve(damped, place))
    assert_close(change, matrix @ step)


def test_fewer_products_give_a_step_that_still_falls(quadratic):
    matrix, place = quadratic
    for rounds in range(1, SIZE):
        step, _ = conjugate_gradients(matrix.mv, place, 0.0, rounds=rounds, tolerance=0.0)
        assert place @ step < 0


@pytest.mark.parametrize("passes", [1, 3, 8])
@pytest.mark.parametrize("name", ["lbfgs", "gauss_newton"])
def test_passes_are_not_exceeded_and_the_best_point_is_returned(quadratic, name, passes):
    matrix, place = quadratic
    evaluate, points = asked(matrix, place)
    if name == "lbfgs":
        found = lbfgs(evaluate, start(), passes)
    else:
        found = gauss_newton(evaluate, lambda point: matrix.mv, start(), passes, price=0.5)
    assert 1 <= len(points) <= passes
    values = [evaluate(point)[0] for point in list(points)]
    assert evaluate(found)[0] == min(values)


def test_products_cost_passes(quadratic):
    """Two passes a product: of 12, one for the start, 5 steps at most of one product each."""
    matrix, place = quadratic
    evaluate, points = asked(matrix, place)
    products = []

    def multiply(direction):
        products.append(direction)
        return matrix @ direction

    gauss_newton(evaluate, lambda point: multiply, start(), 12)
    assert len(points) + 2 * len(products) <= 12
    assert len(products) >= 3


def test_a_step_that_rises_is_taken_back():
    """With a metric a hundred times too small, the first steps overshoot; damping mends it."""
    evaluate, points = asked(torch.eye(SIZE, dtype=torch.float64), torch.ones(SIZE).double())
    found = gauss_newton(
        evaluate, lambda point: lambda v: 0.01 * v, start(), 40, price=0.0, damping=1e-2
    )
    assert evaluate(points[1])[0] > evaluate(points[0])[0]
    assert_close(found, torch.ones(SIZE).double(), rtol=1e-2, atol=1e-2)


def test_a_start_at_the_minimum_is_left_alone(quadratic):
    evaluate, points = asked(*quadratic)
    assert torch.equal(gauss_newton(evaluate, lambda point: None, quadratic[1], 9), quadratic[1])
    assert torch.equal(lbfgs(evaluate, quadratic[1], 9), quadratic[1])
    assert len(points) == 2
