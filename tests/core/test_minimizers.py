"""L-BFGS finds minima of functions known by hand, and stays within its passes."""

import pytest
import torch
from torch.testing import assert_close

from divmerge_core.merging.optimizers import lbfgs

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


@pytest.mark.parametrize("passes", [1, 3, 8])
def test_passes_are_not_exceeded_and_the_best_point_is_returned(quadratic, passes):
    evaluate, points = asked(*quadratic)
    found = lbfgs(evaluate, start(), passes)
    assert 1 <= len(points) <= passes
    values = [evaluate(point)[0] for point in list(points)]
    assert evaluate(found)[0] == min(values)


def test_a_start_at_the_minimum_is_left_alone(quadratic):
    evaluate, points = asked(*quadratic)
    assert torch.equal(lbfgs(evaluate, quadratic[1], 9), quadratic[1])
    assert len(points) == 1


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("what", ["value", "slope"])
def test_points_without_a_value_or_a_slope_are_stepped_back_from(quadratic, value, what):
    """The minimum lies beside a wall: a function with no value on its other side."""
    evaluate, points = asked(*quadratic)
    wall, walls = quadratic[1].norm() + 5e-4, []

    def walled(point):
        found, slope = evaluate(point)
        if point.norm() < wall:
            return found, slope
        walls.append(point)
        return (value, slope) if what == "value" else (found, slope * value)

    found = lbfgs(walled, start(), 80)
    assert walls and torch.isfinite(found).all()
    assert_close(found, quadratic[1], rtol=1e-3, atol=1e-3)


def test_where_nothing_has_a_value_the_start_is_returned():
    nothing = lambda point: (float("nan"), point * float("nan"))  # noqa: E731
    assert torch.equal(lbfgs(nothing, start(), 9), start())
