"""How task vectors stand to one another: identities, and cases worked out by hand."""

import pytest
import torch
from helpers import linear_problem
from torch.testing import assert_close

from divmerge_core.coefficients import GROUPINGS, groups_of
from divmerge_core.interference.weights import cosine, norms_by_group, sign_conflict
from divmerge_core.registry import UnknownName
from divmerge_core.vectors import Layout, TaskVectors


def random_rows(count: int = 3, size: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, dtype=torch.float64, generator=generator)


pairwise = pytest.mark.parametrize("function", [cosine, sign_conflict])


def test_a_vector_has_cosine_one_with_itself_and_minus_one_with_its_negation():
    (row,) = random_rows(1)
    expected = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert_close(cosine(torch.stack([row, -row])), expected)


def test_a_vector_never_conflicts_with_itself_and_always_with_its_negation():
    (row,) = random_rows(1)
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert_close(sign_conflict(torch.stack([row, -row])), expected, rtol=0, atol=0)


def test_cosines_by_hand():
    deltas = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-4.0, 3.0]])
    expected = torch.tensor([[1.0, 0.96, 0.0], [0.96, 1.0, -0.28], [0.0, -0.28, 1.0]])
    assert_close(cosine(deltas), expected)


def test_cosines_are_those_of_torch_for_every_pair():
    deltas = random_rows(4)
    slow = [[torch.cosine_similarity(u, v, dim=0) for v in deltas] for u in deltas]
    assert_close(cosine(deltas), torch.tensor(slow, dtype=torch.float64))


def test_sign_conflict_by_hand_leaves_out_what_either_vector_leaves_unchanged():
    deltas = torch.tensor([[1.0, -2.0, 0.0, 3.0], [-5.0, -0.1, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    # 0 and 1: they share places 0 and 1, opposite in one. 0 and 2: places 0, 1, 3, opposite in one.
    # 1 and 2: places 0 and 1, opposite in both.
    expected = torch.tensor([[0, 1 / 2, 1 / 3], [1 / 2, 0, 1], [1 / 3, 1, 0]])
    assert_close(sign_conflict(deltas), expected)


def test_tiny_parameters_count_like_any_other():
    deltas = torch.tensor([[1e-30, 1e-30], [-1e-30, 1e-30]])  # their product is 0 in float32
    assert sign_conflict(deltas)[0, 1] == 0.5


@pytest.mark.parametrize("value", [0.1, 1.0, 7.0])
@pairwise
def test_scaling_task_vectors_changes_nothing(function, value):
    deltas = random_rows()
    assert_close(function(value * deltas), function(deltas))


@pairwise
def test_the_matrix_is_symmetric_and_of_the_dtype_given(function):
    deltas = random_rows().float()
    found = function(deltas)
    assert found.shape == (3, 3) and found.dtype == torch.float32
    assert_close(found, found.T)


@pairwise
def test_a_zero_task_vector_stands_in_no_relation(function):
    deltas = random_rows(2)
    deltas[1] = 0
    assert_close(function(deltas)[1], torch.zeros(2, dtype=torch.float64))
    assert torch.isfinite(function(deltas)).all()


def test_norms_by_group_by_hand():
    layout = Layout(("head.weight", "encoder.layer.0.weight", "head.bias"), ((2,), (1, 2), (1,)))
    deltas = torch.tensor([[1.0, 2.0, 3.0, 4.0, 2.0], [0.0, 0.0, -6.0, 8.0, 0.0]])
    vectors = TaskVectors(layout, ("a", "b"), torch.zeros(5), deltas)
    assert groups_of(layout, "block")[0] == ("head", "encoder.layer.0")
    assert_close(norms_by_group(vectors, "block"), torch.tensor([[3.0, 5.0], [0.0, 10.0]]))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_squared_norms_of_the_groups_add_up_to_the_whole(grouping):
    vectors = linear_problem().vectors
    found = norms_by_group(vectors, grouping)
    assert found.shape == (3, len(groups_of(vectors.layout, grouping)[0]))
    assert_close(found.square().sum(dim=1).sqrt(), vectors.norms())


def test_an_unknown_grouping_is_refused_with_the_choices():
    with pytest.raises(UnknownName, match="blok.*choose one of.*block"):
        norms_by_group(linear_problem().vectors, "blok")


def test_norms_of_millions_of_parameters_are_exact_to_six_digits():
    size = 4_000_000
    deltas = 1e-3 * torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    vectors = TaskVectors(Layout(("w",), ((size,),)), ("a",), torch.zeros(size), deltas)
    exact = deltas.double().norm().float()
    assert_close(norms_by_group(vectors, "task")[0, 0], exact, rtol=1e-6, atol=0)
