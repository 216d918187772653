"""Singular values and subspaces of task matrices: identities, and cases worked out by hand."""

import pytest
import torch
from divmerge_book.interference.spectra import (
    alignment,
    alignment_between,
    chance_alignment,
    dominant,
    effective_rank,
    inner_matrices,
    mean_alignment,
    singular_values,
    spectra,
    stable_rank,
)
from helpers import linear_problem
from torch.testing import assert_close

SHAPES = [(6, 6), (3, 9), (9, 3)]
shaped = pytest.mark.parametrize("shape", SHAPES)


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# --- singular values ------------------------------------------------------------------------------


@shaped
def test_singular_values_are_those_of_the_svd(shape):
    matrix = random_matrix(*shape)
    assert_close(singular_values(matrix), torch.linalg.svdvals(matrix))


@shaped
def test_squared_singular_values_sum_to_the_squared_norm(shape):
    matrix = random_matrix(*shape).float()
    total = matrix.double().square().sum()
    assert_close(singular_values(matrix).square().sum(), total, rtol=1e-12, atol=0)


def test_ranks_by_hand():
    values = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    assert stable_rank(values) == pytest.approx(6 / 4)
    shares = (0.5, 0.25, 0.25)  # entropy 1.5 log 2
    assert effective_rank(values) == pytest.approx(2**1.5)
    assert sum(shares) == 1


@pytest.mark.parametrize("rank", [stable_rank, effective_rank])
def test_ranks_count_equal_singular_values_and_nothing_in_a_zero_matrix(rank):
    assert rank(torch.full((5,), 0.3, dtype=torch.float64)) == pytest.approx(5)
    assert rank(torch.tensor([0.3, 0.0, 0.0], dtype=torch.float64)) == pytest.approx(1)
    assert rank(torch.zeros(3, dtype=torch.float64)) == 0


@pytest.mark.parametrize("rank", [stable_rank, effective_rank])
def test_ranks_do_not_depend_on_length_and_stay_below_the_full_rank(rank):
    values = singular_values(random_matrix(6, 9))
    assert rank(7 * values) == pytest.approx(rank(values))
    assert 1 <= rank(values) <= 6


def test_dominant_directions_by_hand():
    squares = torch.tensor([16.0, 8.0, 1.0], dtype=torch.float64)  # a squared norm of 25
    assert dominant(squares, 0.1) == 3  # two leave 1 of 25: a fifth of the norm
    assert dominant(squares, 0.2) == 2  # what may be left is just that
    assert dominant(squares, 0.6) == 1  # one leaves 9 of 25: three fifths
    assert dominant(torch.zeros(3, dtype=torch.float64)) == 0


@pytest.mark.parametrize("residual", [-0.1, 1.0])
def test_a_residual_outside_its_range_is_refused(residual):
    with pytest.raises(ValueError, match="residual must be in"):
        dominant(torch.ones(3, dtype=torch.float64), residual)


# --- alignment ------------------------------------------------------------------------------------


@shaped
def test_a_matrix_is_aligned_with_itself(shape):
    matrix = random_matrix(*shape)
    assert alignment(matrix, [matrix], residual=0.0) == [pytest.approx(1)]
    (cut,) = alignment(matrix, [matrix], residual=0.05)
    assert (1 - 0.05**2) ** 0.5 <= cut <= 1


def test_matrices_with_orthogonal_columns_are_not_aligned():
    one, other = torch.zeros(2, 4, 3, dtype=torch.float64)
    one[:2] = random_matrix(2, 3)
    other[2:] = random_matrix(2, 3, seed=1)
    assert alignment(one, [other]) == [0.0]
    assert alignment(other, [one, other]) == [0.0, pytest.approx(1, abs=0.002)]


def test_alignment_by_hand():
    merged = torch.diag(torch.tensor([3.0, 0.1], dtype=torch.float64))  # one direction dominates
    task = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert alignment(merged, [task], residual=0.05) == [pytest.approx(3 / 5)]
    assert alignment(merged, [task], residual=0.01) == [pytest.approx(1)]


@shaped
@pytest.mark.parametrize("residual", [0.05, 0.3, 0.6])
def test_alignment_is_that_of_the_slow_projection(shape, residual):
    merged, task = random_matrix(*shape), random_matrix(*shape, seed=1)
    left, values, _ = torch.linalg.svd(merged, full_matrices=False)
    for count in range(1, len(values) + 1):
        if values[count:].norm() <= residual * values.norm():
            break
    kept = left[:, :count] @ left[:, :count].T @ task
    assert alignment(merged, [task], residual=residual) == [
        pytest.approx((kept.norm() / task.norm()).item())
    ]


@shaped
def test_alignment_does_not_depend_on_length_and_falls_as_the_cut_gets_coarser(shape):
    merged, task = random_matrix(*shape), random_matrix(*shape, seed=1)
    assert alignment(5 * merged, [0.1 * task]) == pytest.approx(alignment(merged, [task]))
    found = [alignment(merged, [task], residual=r)[0] for r in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert found == sorted(found, reverse=True)


def test_a_zero_matrix_is_aligned_with_nothing():
    matrix, zero = random_matrix(4, 3), torch.zeros(4, 3, dtype=torch.float64)
    assert alignment(matrix, [zero]) == alignment(zero, [matrix]) == [0.0]


def test_by_chance_the_squared_alignment_is_the_share_of_directions():
    merged = random_matrix(40, 40)
    squares = [alignment(merged, [random_matrix(40, 40, seed=n)], residual=0.5)[0] ** 2
               for n in range(1, 41)]  # fmt: skip
    expected = chance_alignment(merged, residual=0.5) ** 2
    assert expected == dominant(singular_values(merged).square(), 0.5) / 40
    assert sum(squares) / 40 == pytest.approx(expected, abs=0.01)


# --- whole models ---------------------------------------------------------------------------------


def test_embeddings_are_no_linear_layer_and_spectra_hold_the_layers_norms():
    vectors = linear_problem().vectors
    found = spectra(vectors)
    assert list(found) == ["encoder.layer.0.dense.weight", "encoder.layer.1.dense.weight"]
    for name, deltas in inner_matrices(vectors).items():
        assert found[name].shape == (3, min(deltas.shape[1:]))
        assert_close(found[name].square().sum(dim=1), deltas.square().sum(dim=(1, 2)))


def test_every_task_lies_in_the_space_of_its_own_change():
    vectors = linear_problem(num_tasks=2).vectors
    own = mean_alignment(vectors, vectors.deltas[1], residual=0.0)
    assert own[1] == pytest.approx(1)
    between = alignment_between(vectors, residual=0.0)
    assert between[:, 1].tolist() == pytest.approx(own)
    assert between.diagonal().tolist() == pytest.approx([1, 1])


def test_tasks_that_use_other_outputs_do_not_lie_in_each_others_space():
    vectors = linear_problem(num_tasks=2).vectors

    def cut(deltas):
        deltas = deltas.clone()
        for name, (start, stop) in zip(vectors.layout.names, vectors.layout.bounds, strict=True):
            shape = dict(zip(vectors.layout.names, vectors.layout.shapes, strict=True))[name]
            if len(shape) == 2:
                part = deltas[:, start:stop].view(2, *shape)
                part[0, : shape[0] // 2] = 0
                part[1, shape[0] // 2 :] = 0
        return deltas

    assert_close(alignment_between(vectors.map(cut), residual=0.0), torch.eye(2).double())
