"""Singular values and subspaces of task matrices: identities, and cases worked out by hand."""

import pytest
import torch
from divmerge_book.interference import spectra
from divmerge_book.interference.spectra import alignment, dominant, effective_rank, singular_values
from helpers import linear_problem, normal
from torch import float64, tensor
from torch.testing import assert_close

shaped = pytest.mark.parametrize("shape", [(6, 6), (3, 9), (9, 3)])


@shaped
def test_singular_values_are_those_of_the_svd(shape):
    matrix = normal(*shape)
    assert_close(singular_values(matrix), torch.linalg.svdvals(matrix))
    total = matrix.float().double().square().sum()
    assert_close(singular_values(matrix.float()).square().sum(), total, rtol=1e-12, atol=0)


def test_ranks_by_hand():
    values = tensor([2.0, 1.0, 1.0], dtype=float64)
    assert spectra.stable_rank(values) == pytest.approx(6 / 4)
    assert effective_rank(values) == pytest.approx(2**1.5)  # shares of entropy 1.5 log 2


@pytest.mark.parametrize("rank", [spectra.stable_rank, effective_rank])
def test_ranks_count_equal_values_whatever_their_length_and_nothing_in_a_zero_matrix(rank):
    assert rank(torch.full((5,), 0.3, dtype=float64)) == pytest.approx(5)
    assert rank(tensor([0.3, 0.0, 0.0], dtype=float64)) == pytest.approx(1)
    assert rank(torch.zeros(3, dtype=float64)) == 0
    values = singular_values(normal(6, 9))
    assert rank(7 * values) == pytest.approx(rank(values)) and 1 <= rank(values) <= 6


def test_dominant_directions_by_hand():
    squares = tensor([16.0, 8.0, 1.0], dtype=float64)  # a squared norm of 25
    assert dominant(squares, 0.1) == 3  # two leave 1 of 25: a fifth of the norm
    assert dominant(squares, 0.2) == 2  # what may be left is just that
    assert dominant(squares, 0.6) == 1  # one leaves 9 of 25: three fifths
    assert dominant(torch.zeros(3, dtype=float64)) == 0
    for residual in (-0.1, 1.0):
        with pytest.raises(ValueError, match="residual must be in"):
            dominant(squares, residual)


@shaped
def test_a_matrix_is_aligned_with_itself_and_less_as_the_cut_gets_coarser(shape):
    merged, task = normal(*shape), normal(*shape, seed=1)
    assert alignment(merged, [merged], residual=0.0) == [pytest.approx(1)]
    (cut,) = alignment(merged, [merged], residual=0.05)
    assert (1 - 0.05**2) ** 0.5 <= cut <= 1
    assert alignment(5 * merged, [0.1 * task]) == pytest.approx(alignment(merged, [task]))
    found = [alignment(merged, [task], residual=r)[0] for r in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert found == sorted(found, reverse=True)


def test_matrices_with_orthogonal_columns_or_zeros_are_not_aligned():
    one, other, zero = torch.zeros(3, 4, 3, dtype=float64)
    one[:2], other[2:] = normal(2, 3), normal(2, 3, seed=1)
    assert alignment(one, [other]) == [0.0]
    assert alignment(other, [one, other]) == [0.0, pytest.approx(1, abs=0.002)]
    assert alignment(one, [zero]) == alignment(zero, [one]) == [0.0]


@shaped
@pytest.mark.parametrize("residual", [0.05, 0.3, 0.6])
def test_alignment_is_that_of_the_slow_projection(shape, residual):
    merged, task = normal(*shape), normal(*shape, seed=1)
    left, values, _ = torch.linalg.svd(merged, full_matrices=False)
    rest = [values[count:].norm() <= residual * values.norm() for count in range(len(values) + 1)]
    left = left[:, : rest.index(True)]
    expected = (left @ left.T @ task).norm() / task.norm()
    assert alignment(merged, [task], residual=residual) == [pytest.approx(expected.item())]


def test_by_chance_the_squared_alignment_is_the_share_of_directions():
    merged = normal(40, 40)
    others = [normal(40, 40, seed=n) for n in range(1, 41)]
    squares = tensor(alignment(merged, others, residual=0.5)).square()
    expected = spectra.chance_alignment(merged, residual=0.5) ** 2
    assert expected == dominant(singular_values(merged).square(), 0.5) / 40
    assert squares.mean().item() == pytest.approx(expected, abs=0.01)


def test_embeddings_are_no_linear_layer():
    found = spectra.inner_matrices(linear_problem().vectors)
    assert list(found) == ["encoder.layer.0.dense.weight", "encoder.layer.1.dense.weight"]


def test_every_task_lies_in_the_space_of_its_own_change():
    vectors = linear_problem(num_tasks=2).vectors
    own = spectra.mean_alignment(vectors, vectors.deltas[1], residual=0.0)
    assert own[1] == pytest.approx(1)
    between = spectra.alignment_between(vectors, residual=0.0)
    assert between[:, 1].tolist() == pytest.approx(own)
    assert between.diagonal().tolist() == pytest.approx([1, 1])


def test_tasks_that_use_other_outputs_do_not_lie_in_each_others_space():
    vectors = linear_problem(num_tasks=2).vectors
    for matrices in spectra.inner_matrices(vectors).values():  # views of the task vectors
        half = matrices.shape[1] // 2
        matrices[0, :half], matrices[1, half:] = 0, 0
    assert_close(spectra.alignment_between(vectors, residual=0.0), torch.eye(2).double())
