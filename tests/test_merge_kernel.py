"""The merge kernel and its gradient, against slow loops over single numbers."""

import pytest
import torch
from helpers import layout_of
from torch.testing import assert_close

from divmerge_core.kernels.merge import Segments, check, grouped_inner, grouped_merge

# dtype, rtol, atol: what rounding alone may cost against the float64 loop
PRECISIONS = [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-5)]

# shapes of the tensors, and the group of each
TABLES = {
    "one tensor": ([(7,)], [0]),
    "one number": ([(1,)], [0]),
    "scalars": ([(), (), ()], [0, 1, 0]),
    "one group": ([(3, 2), (5,), (1,)], [0, 0, 0]),
    "a group each": ([(3, 2), (5,), (1,)], [0, 1, 2]),
    "a group that comes back": ([(41,), (1,), (13, 3), (2,)], [0, 1, 0, 2]),
    "an empty tensor": ([(3,), (0, 4), (2,)], [0, 1, 2]),
    "awkward": ([(129, 7), (1,), (1271,), (1,), (3, 3, 3)], [0, 1, 1, 0, 2]),
}
tables = pytest.mark.parametrize("table", TABLES)
tasks = pytest.mark.parametrize("num_tasks", [1, 2, 5])
precisions = pytest.mark.parametrize(("dtype", "rtol", "atol"), PRECISIONS)


def case(table: str, num_tasks: int, dtype: torch.dtype = torch.float64):
    """base [N], deltas [T, N], coefficients [T, G], the group of every number, and the segments."""
    sizes, groups = TABLES[table]
    layout = layout_of(**{f"tensor{n}": size for n, size in enumerate(sizes)})
    generator = torch.Generator().manual_seed(num_tasks)

    def normal(*shape: int):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    owner = [
        group
        for (start, stop), group in zip(layout.bounds, groups, strict=True)
        for _ in range(start, stop)
    ]
    segments = Segments.of(layout.bounds, groups)
    coeffs = normal(num_tasks, 1 + max(groups))
    return normal(layout.size), normal(num_tasks, layout.size), coeffs, owner, segments


def slow_merge(base, deltas, coeffs, owner):
    """theta_i = base_i + sum_t Lambda[t, group of i] tau_{t,i}, number by number."""
    rows, table = deltas.double().tolist(), coeffs.double().tolist()
    merged = [
        value + sum(table[t][owner[i]] * rows[t][i] for t in range(len(rows)))
        for i, value in enumerate(base.double().tolist())
    ]
    return torch.tensor(merged, dtype=torch.float64)


def slow_inner(grad, deltas, num_groups, owner):
    rows, slope = deltas.double().tolist(), grad.double().tolist()
    result = torch.zeros(len(rows), num_groups, dtype=torch.float64)
    for t, row in enumerate(rows):
        for i, group in enumerate(owner):
            result[t, group] += slope[i] * row[i]
    return result


@tables
@tasks
@precisions
def test_the_merge_is_the_loop(table, num_tasks, dtype, rtol, atol):
    base, deltas, coeffs, owner, segments = case(table, num_tasks, dtype)
    expected = slow_merge(base, deltas, coeffs, owner).to(dtype)
    assert_close(grouped_merge(base, deltas, coeffs, segments), expected, rtol=rtol, atol=atol)


@tables
@tasks
def test_what_stood_in_the_output_is_immaterial(table, num_tasks):
    base, deltas, coeffs, _, segments = case(table, num_tasks)
    out = torch.full_like(base, float("nan"))
    given = grouped_merge(base, deltas, coeffs, segments, out=out)
    assert given is out
    assert_close(out, grouped_merge(base, deltas, coeffs, segments), rtol=0, atol=0)


@tables
def test_the_merge_leaves_its_inputs_alone(table):
    given = case(table, 2)
    base, deltas, coeffs, _, segments = given
    before = [tensor.clone() for tensor in given[:3]]
    grouped_merge(base, deltas, coeffs, segments)
    grouped_inner(base, deltas, segments)
    assert all(torch.equal(a, b) for a, b in zip(before, given[:3], strict=True))


@tables
@tasks
@precisions
def test_the_gradient_is_the_loop(table, num_tasks, dtype, rtol, atol):
    grad, deltas, coeffs, owner, segments = case(table, num_tasks, dtype)
    expected = slow_inner(grad, deltas, coeffs.shape[1], owner).to(dtype)
    scale = expected.abs().max().item()
    found = grouped_inner(grad, deltas, segments)
    assert_close(found, expected, rtol=rtol, atol=atol * max(1.0, scale))


@tables
def test_the_gradient_is_the_merges_own(table):
    """The merge is linear: its change in any direction is an inner product with it."""
    grad, deltas, coeffs, _, segments = case(table, 3)
    base = torch.zeros_like(grad)
    along = grad @ grouped_merge(base, deltas, coeffs, segments)
    assert_close((grouped_inner(grad, deltas, segments) * coeffs).sum(), along)


def test_the_gradient_is_bitwise_the_same_on_every_run():
    grad, deltas, _, _, segments = case("awkward", 5, torch.float32)
    first = grouped_inner(grad, deltas, segments)
    assert all(torch.equal(first, grouped_inner(grad, deltas, segments)) for _ in range(20))


def test_coefficients_of_another_precision_are_converted():
    base, deltas, coeffs, owner, segments = case("a group each", 2, torch.float64)
    merged = grouped_merge(base, deltas, coeffs.float(), segments)
    assert merged.dtype == torch.float64
    assert_close(merged, slow_merge(base, deltas, coeffs.float(), owner))


def test_a_merge_and_its_gradient_are_outside_the_autograd_graph():
    base, deltas, coeffs, _, segments = case("a group each", 2)
    assert not grouped_merge(base, deltas, coeffs.requires_grad_(), segments).requires_grad


def test_neighbours_of_one_group_are_one_stretch():
    segments = Segments.of([(0, 2), (2, 5), (5, 6), (6, 9)], [0, 0, 1, 0])
    assert segments.rows == ((0, 5, 0), (5, 6, 1), (6, 9, 0))
    assert segments.num_groups == 2


@pytest.mark.parametrize("bounds", [[(0, 2), (3, 5)], [(0, 2), (1, 5)], [(1, 2), (2, 5)]])
def test_gaps_and_overlaps_are_refused(bounds):
    with pytest.raises(ValueError, match="tensors must lie end to end, got bounds"):
        Segments.of(bounds, [0, 1])


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3, 1), (1, 3)])
def test_coefficients_of_the_wrong_shape_are_refused_with_the_right_one(shape):
    _, deltas, _, _, segments = case("a group each", 2)
    with pytest.raises(ValueError, match=r"must be \[T, G\] = \[2, 3\], .*, got \[\d, \d\]"):
        check(deltas, torch.zeros(shape), segments)


def test_a_merge_with_coefficients_of_the_wrong_shape_is_refused():
    base, deltas, _, _, segments = case("a group each", 2)
    with pytest.raises(
        ValueError, match=r"\[T, G\] = \[2, 3\], one per task and group, got \[2, 2\]"
    ):
        grouped_merge(base, deltas, torch.zeros(2, 2, dtype=base.dtype), segments)


def test_segments_of_another_layout_are_refused():
    base, deltas, coeffs, _, _ = case("a group each", 2)
    short = Segments.of([(0, 4), (4, 5), (5, 6)], [0, 1, 2])
    with pytest.raises(
        ValueError, match="segments end at 6, deltas have 12 columns; make both from"
    ):
        grouped_merge(base, deltas, coeffs, short)
