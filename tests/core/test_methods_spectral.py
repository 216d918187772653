"""Spectral methods: identities of their singular values, cases by hand, slower definitions."""

from itertools import product

import numpy as np
import pytest
import torch
from comparisons import near
from helpers import linear_problem, normal, problem_of

from divmerge_core.merging.linalg import isometry, polar, rank_of, svd
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.arithmetic import average, ties
from divmerge_core.methods.spectral import common_basis, iso_c, iso_cts, knots, split_of, tsv_m

EVERY = (tsv_m, iso_c, iso_cts, knots)
every_method = pytest.mark.parametrize("method", EVERY)


def change(method, *deltas: torch.Tensor, **options) -> torch.Tensor:
    """What a method adds to the base, as the tensor that it is."""
    problem = problem_of(*deltas, base=0.5)
    return (method(problem, **options) - 0.5).view(deltas[0].shape)


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def inverse_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


# --- what they share
@every_method
def test_tensors_that_are_no_matrices_take_the_mean_or_ties_and_matrices_do_not(method):
    """Their number of axes is immaterial: as if their entries lay in a row."""
    for shape in [(), (3,), (2, 2, 3)]:
        problem = problem_of(normal(*shape), normal(*shape, seed=1))
        plain = ties(problem, keep=0.2) if method is knots else average(problem)
        near(method(problem, scale=1.0), plain)
    matrices = normal(4, 3), normal(4, 3, seed=1)
    flat = change(method, *(matrix.flatten() for matrix in matrices), scale=1.0)
    assert (change(method, *matrices, scale=1.0).flatten() - flat).abs().max() > 0.05
    for shape in [(0,), (0, 3), (3, 0)]:  # without entries: no obstacle
        assert change(method, torch.zeros(shape), torch.zeros(shape)).shape == shape


# --- pieces of linear algebra
def test_a_matrix_that_float32_does_not_decompose_is_decomposed_in_float64(monkeypatch):
    """As LAPACK fails on some residuals of Iso-CTS, which have low rank; NaN is refused as ever."""
    plain = torch.linalg.svd

    def fails_in_float32(matrix, **how):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return plain(matrix, **how)

    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    wanted = svd(matrix)
    monkeypatch.setattr(torch.linalg, "svd", fails_in_float32)
    found = svd(matrix)
    assert [part.dtype for part in found] == [torch.float32] * 3
    left, values, right = found
    torch.testing.assert_close(left * values @ right, matrix)
    torch.testing.assert_close(values, wanted[1])
    with pytest.raises(torch.linalg.LinAlgError):
        svd(torch.full((2, 2), torch.nan))


def test_the_isometry_is_the_polar_factor_and_spans_no_more_than_the_matrix():
    for shape in ((5, 3), (3, 5), (4, 4)):
        near(isometry(normal(*shape)), polar(normal(*shape)))
    matrix = normal(6, 2) @ normal(2, 5, seed=1)
    found = isometry(matrix)
    near(torch.linalg.svdvals(found), torch.tensor([1.0, 1, 0, 0, 0], dtype=float))
    near(found @ found.T @ matrix, matrix)
    assert not isometry(torch.zeros(3, 2)).any() and isometry(torch.zeros(3, 0)).shape == (3, 0)
    rounded = (normal(40, 3).float() @ normal(3, 30, seed=1).float()).double()
    values = torch.linalg.svdvals(rounded)  # rank is counted above the rounding of the entries
    assert rank_of(values, (40, 30), torch.float32) == 3 < rank_of(values, (40, 30))


# --- TSV-M
@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        # each keeps two of four directions, and these are orthogonal
        (((4, 3, 0.5, 0), (0, 0.1, 2, 1)), (4, 3, 2, 1)),
        (((4, 3, 2, 1), (0, 0, 0, 0)), (4, 3, 0, 0)),  # a task that changed nothing
        (((4, 3, 2, 1), (4, 3, 2, 1)), (4, 3, 0, 0)),  # equal experts count once
    ],
)
def test_tsv_m_of_diagonal_matrices_as_worked_out_by_hand(deltas, expected):
    near(change(tsv_m, *(diagonal(*delta) for delta in deltas)), diagonal(*expected))


def test_tsv_m_is_whitening_by_inverse_roots():
    """U (U^T U)^(-1/2) is U's polar factor; here from eigenvalues, and singular vectors as well."""
    deltas = [normal(8, 7, seed=n) for n in range(3)]
    lefts, rights, scales = [], [], []
    for delta in deltas:
        values, vectors = torch.linalg.eigh(delta.T @ delta)
        for number in (-1, -2):  # 7 // 3 directions, the largest last
            scales.append(values[number].sqrt())
            rights.append(vectors[:, number])
            lefts.append(delta @ rights[-1] / scales[-1])
    left, right = torch.stack(lefts, 1), torch.stack(rights, 1)
    left, right = left @ inverse_root(left.T @ left), right @ inverse_root(right.T @ right)
    near(change(tsv_m, *deltas), left @ torch.diag(torch.stack(scales)) @ right.T)


def test_tsv_m_of_one_expert_of_low_rank_and_without_room_for_every_task():
    """The expert itself; a merge in the experts' space; the average."""
    for shape in ((5, 3), (3, 5), (4, 4)):
        near(change(tsv_m, normal(*shape)), normal(*shape))
    lefts = [normal(8, 1, seed=n) for n in range(2)]
    found = change(tsv_m, *(left @ normal(1, 8, seed=5) for left in lefts))
    basis = torch.linalg.qr(torch.cat(lefts, dim=1)).Q
    near(basis @ (basis.T @ found), found)
    deltas = [normal(2, 5, seed=n) for n in range(3)]
    near(change(tsv_m, *deltas), sum(deltas) / 3)


# --- Iso-C
def test_iso_c_is_the_sum_over_its_own_root_and_spreads_low_rank_over_all_directions():
    """polar(S) = (S S^T)^(-1/2) S, and the nuclear norm is the trace of (S S^T)^(1/2)."""
    near(change(iso_c, diagonal(3, 1), diagonal(1, -1)), diagonal(2, 2))  # of the sum: 4, 0
    deltas = [normal(4, 6, seed=n) for n in range(2)]
    total = deltas[0] + deltas[1]
    root = inverse_root(total @ total.T)
    near(change(iso_c, *deltas), torch.linalg.inv(root).trace() / 4 * root @ total)
    left, right = normal(4, 1), normal(1, 4, seed=1)
    found, size = change(iso_c, left @ right), left.norm() * right.norm()
    near(torch.linalg.svdvals(found), (size / 4).expand(4))
    near(left.T @ found @ right.T, (size**2 / 4).view(1, 1))


# --- Iso-CTS
def test_iso_cts_takes_directions_of_single_tasks_as_worked_out_by_hand():
    """Of four directions two are common: the sum is (6, 5, 1, 3), so these are the first two.

    Without them the tasks are (0, 0, 2, 0) and (0, 0, -1, 3), and give one each: 2 and 3.
    """
    found = change(iso_cts, diagonal(6, 0, 2, 0), diagonal(0, 5, -1, 3), common=0.5)
    near(found, diagonal(4, 4, 4, 4))  # (6 + 5 + 2 + 3) / 4; Iso-C has (6 + 5 + 1 + 3) / 4


def test_iso_cts_with_all_directions_in_common_or_of_one_expert_is_iso_c(problem):
    near(iso_cts(problem, common=1.0), iso_c(problem))
    problem = linear_problem(num_tasks=1)
    for common in (0.0, 0.3, 0.8):
        near(iso_cts(problem, common=common), iso_c(problem))


@pytest.mark.parametrize("shape", [(10, 12), (12, 10)])
def test_iso_cts_is_the_same_in_numpy_step_by_step(shape):
    """r = 10 and T = 2: eight directions in common, one of each task's own."""
    deltas = [normal(*shape, seed=n).numpy() for n in range(2)]
    left, values, right = np.linalg.svd(deltas[0] + deltas[1], full_matrices=False)
    lefts, all_values, rights = list(left.T[:8]), list(values[:8]), list(right[:8])
    for delta in deltas:
        rest = delta.copy()
        for column in left.T[:8]:
            rest -= np.outer(column, column @ delta)
        own = np.linalg.svd(rest, full_matrices=False)
        lefts.append(own[0][:, 0])
        all_values.append(own[1][0])
        rights.append(own[2][0])
    outer, inner = torch.tensor(np.array(lefts)), torch.tensor(np.array(rights))
    outer, inner = inverse_root(outer @ outer.T) @ outer, inverse_root(inner @ inner.T) @ inner
    expected = float(np.mean(all_values)) * outer.T @ inner
    near(change(iso_cts, *map(torch.tensor, deltas)), expected)


def test_common_and_own_directions_fill_the_matrix():
    for rank, num_tasks, common in product((1, 2, 5, 39), range(1, 9), (0.0, 0.2, 0.8, 1.0)):
        shared, own = split_of(rank, num_tasks, common)
        assert shared >= 0 and own >= 0 and shared + own * num_tasks == rank
    assert split_of(768, 8, 0.8) == (616, 19)  # 614 and 154 / 8 = 19.25
    assert split_of(10, 4, 0.7) == (6, 1)  # 3 / 4 rounds to 1
    assert split_of(5, 3, 0.0) == (2, 1)  # 5 / 3 rounds to 2, and 3 tasks have no 6 directions


# --- KnOTS
def test_the_input_side_is_the_output_side_of_the_transposed():
    deltas = [normal(4, 6, seed=n) for n in range(2)]
    over = change(knots, *(delta.T for delta in deltas), shared="output")
    near(change(knots, *deltas, shared="input"), over.T)
    for shared in ("output", "input"):  # one expert untrimmed comes back
        near(change(knots, deltas[0], keep=1.0, scale=1.0, shared=shared), deltas[0])


def test_knots_is_ties_in_the_eigenvectors_of_what_the_tasks_put_out():
    """U holds the eigenvectors of sum_t D_t D_t^T, and the pieces are U^T D_t; TIES in loops."""
    deltas, keep = [normal(4, 5, seed=n) for n in range(3)], 0.5
    basis = torch.linalg.eigh(sum(delta @ delta.T for delta in deltas)).eigenvectors
    pieces = [(basis.T @ delta).flatten().tolist() for delta in deltas]
    floors = [sorted(map(abs, piece))[-round(keep * 20)] for piece in pieces]
    merged = []
    for entries in zip(*pieces, strict=True):
        kept = [e if abs(e) >= floor else 0 for e, floor in zip(entries, floors, strict=True)]
        agree = [entry for entry in kept if entry * sum(kept) > 0]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
    expected = 0.6 * basis @ torch.tensor(merged, dtype=torch.float64).view(4, 5)
    near(change(knots, *deltas, keep=keep), expected)


def test_one_direction_is_left_where_tasks_share_their_outputs():
    """Rank-one experts with one column in common: TIES sees one row of five numbers per task."""
    column, row = torch.tensor([[0.6], [0.8]]).double(), [[5, 4, 3, 2, 1], [-6, 7, 1, -5, 2]]
    rows = torch.tensor(row, dtype=torch.float64)
    assert common_basis(column @ rows[:, None]).shape == (2, 1)
    found = change(knots, column @ rows[:1], column @ rows[1:], keep=0.6, scale=1.0)
    expected = ties(problem_of(*rows), keep=0.6) - problem_of(*rows).vectors.base
    near(found, column * expected)


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_the_common_basis_gives_every_task_back_in_any_unit(unit):
    deltas = unit * torch.stack([normal(7, 2, seed=n) for n in range(2)])
    assert common_basis(0 * deltas).shape == (7, 1)
    basis = common_basis(deltas)
    assert basis.shape == (7, 4)
    near(basis.T @ basis, torch.eye(4, dtype=float))
    near(basis @ (basis.T @ deltas) / unit, deltas / unit)


def test_experts_from_adapters_merge_as_their_products_do():
    base = {"weight": torch.zeros(6, 5)}
    pairs = [(normal(6, 1, seed=n).float(), normal(1, 5, seed=n + 9).float()) for n in range(2)]
    adapters = {f"task{n}": {"weight": pair} for n, pair in enumerate(pairs)}
    vectors = TaskVectors.from_adapters(base, adapters)
    problem = MergeProblem(vectors, [[], []], lambda parameters, pairs: [])
    products = [left.double() @ right.double() for left, right in pairs]
    expected = change(knots, *products, keep=0.5)
    near(knots(problem, keep=0.5).view(6, 5), expected.float(), 1e-5)
