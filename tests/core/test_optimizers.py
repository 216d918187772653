"""L-BFGS finds minima of functions known by hand, and stays within its passes."""

import pytest
import torch
from helpers import INF, NAN
from torch.testing import assert_close

from divmerge_core.merging.optimizers import lbfgs

START = torch.zeros(6, dtype=torch.float64)
# A positive definite matrix with eigenvalues from 1 to 100, and the minimum's place.
GENERATOR = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64))[0]
PLACE = torch.randn(6, generator=GENERATOR, dtype=torch.float64)
MATRIX = BASIS * torch.logspace(0, 2, 6, dtype=torch.float64) @ BASIS.T


@pytest.fixture
def quadratic():
    """The function with its gradient, and a list of the points at which it was asked."""
    points = []

    def evaluate(point):
        points.append(point)
        away = point - PLACE
        return 0.5 * float(away @ MATRIX @ away), MATRIX @ away

    return evaluate, points


@pytest.mark.parametrize("passes", [1, 3, 8, 60])
def test_the_best_point_within_the_passes_is_returned_and_in_time_the_minimum(quadratic, passes):
    evaluate, points = quadratic
    found = lbfgs(evaluate, START, passes)
    assert 1 <= len(points) <= passes
    assert evaluate(found)[0] == min(evaluate(point)[0] for point in list(points))
    if passes == 60:
        assert_close(found, PLACE, rtol=1e-4, atol=1e-4)


def test_a_start_at_the_minimum_or_where_nothing_has_a_value_is_returned(quadratic):
    assert torch.equal(lbfgs(quadratic[0], PLACE, 9), PLACE)
    assert len(quadratic[1]) == 1
    assert torch.equal(lbfgs(lambda point: (NAN, point * NAN), START, 9), START)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("what", ["value", "slope"])
def test_points_without_a_value_or_a_slope_are_stepped_back_from(quadratic, value, what):
    """The minimum lies beside a wall: a function with no value on its other side."""
    wall, walls = PLACE.norm() + 5e-4, []

    def walled(point):
        found, slope = quadratic[0](point)
        if point.norm() < wall:
            return found, slope
        walls.append(point)
        return (value, slope) if what == "value" else (found, slope * value)

    found = lbfgs(walled, START, 80)
    assert walls and torch.isfinite(found).all()
    assert_close(found, PLACE, rtol=1e-3, atol=1e-3)
