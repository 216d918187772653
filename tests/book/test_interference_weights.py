"""How task vectors stand to one another: identities, and cases worked out by hand."""

import pytest
import torch
from divmerge_book.interference import weights
from divmerge_book.interference.weights import by_group, cosine, magnitude_overlap, sign_conflict
from helpers import linear_problem, normal
from torch.testing import assert_close

from divmerge_core.merging.coefficients import GROUPINGS, groups_of
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.registry import UnknownName

pairwise = pytest.mark.parametrize("function", [cosine, sign_conflict, magnitude_overlap])


@pytest.mark.parametrize(
    ("function", "itself", "negation"),
    [(cosine, 1, -1), (sign_conflict, 0, 1), (magnitude_overlap, 1, 1)],
)
def test_a_vector_beside_itself_and_its_negation(function, itself, negation):
    row = normal(50)
    expected = [[itself, negation], [negation, itself]]
    found = function(torch.stack([row, -3 * row]))
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_sign_conflict_by_hand_leaves_out_what_either_vector_leaves_unchanged():
    deltas = torch.tensor([[1.0, -2.0, 0.0, 3.0], [-5.0, -0.1, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    # 0 and 1: they share places 0 and 1, opposite in one. 0 and 2: places 0, 1, 3, opposite in one.
    # 1 and 2: places 0 and 1, opposite in both.
    expected = torch.tensor([[0, 1 / 2, 1 / 3], [1 / 2, 0, 1], [1 / 3, 1, 0]])
    assert_close(sign_conflict(deltas), expected)
    tiny = torch.tensor([[1e-30, 1e-30], [-1e-30, 1e-30]])  # their product is 0 in float32
    assert sign_conflict(tiny)[0, 1] == 0.5


@pairwise
def test_a_measure_is_symmetric_of_the_dtype_given_and_zero_beside_a_zero_vector(function):
    deltas = normal(3, 50)
    found = function(deltas)
    for value in (0.1, 7.0):
        assert_close(function(value * deltas), found)
    assert found.shape == (3, 3) and function(deltas.float()).dtype == torch.float32
    assert_close(found, found.T)
    deltas[1] = 0
    assert_close(function(deltas)[1], torch.zeros(3, dtype=torch.float64))
    assert torch.isfinite(function(deltas)).all()


def test_magnitude_overlap_by_hand():
    deltas = torch.tensor([[5.0, -4.0, 1.0, 2.0, 0.0], [1.0, 6.0, -7.0, 2.0, 9.0]])
    # The last place is left out: the first vector stands still there. Of the other four, the two
    # largest are places 0 and 1 for the first, 1 and 2 for the second: they share one.
    for share, expected in ((0.5, 0.5), (0.25, 0), (1.0, 1)):
        assert magnitude_overlap(deltas, share=share)[0, 1] == expected
    ties = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0]])  # the first two count
    assert magnitude_overlap(ties, share=0.5)[0, 1] == 0
    for share in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="share must be in"):
            magnitude_overlap(deltas, share=share)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_by_chance_the_overlap_is_the_share_itself(share):
    deltas = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0))
    count = share * 200_000  # a hypergeometric count of this many draws and this many marked
    deviation = (count * share * (1 - share) ** 2) ** 0.5 / count
    assert abs(magnitude_overlap(deltas, share=share)[0, 1].item() - share) < 4 * deviation


def word_vectors(*rows: list[list[float]]) -> TaskVectors:
    """Task vectors of an embedding matrix of three words, and a linear layer of the same shape."""
    names = ("embeddings.word_embeddings.weight", "encoder.layer.0.dense.weight")
    base = torch.tensor([2.0, 2.0, 1.0, -1.0, 0.0, 3.0], dtype=torch.float64)
    deltas = torch.tensor(rows, dtype=torch.float64).flatten(1)
    tasks = tuple(f"task{n}" for n in range(len(rows)))
    return TaskVectors(Layout(names, ((3, 2),) * 2), tasks, base.repeat(2), deltas.repeat(1, 2))


def test_rows_that_only_shrank_or_stood_still_are_untouched():
    decay = [[-0.2, -0.2], [0.5, 0.1], [0.0, 0.0]]  # decayed; learned; unchanged
    grown = [[0.2, 0.2], [-0.1, 0.1], [0.0, -0.3]]  # grown, not decay_only; decayed; decayed
    mark = weights.decay_only(word_vectors(decay, grown))
    rows = mark.unflatten(1, (2, 3, 2))
    assert rows[0, 0].all(dim=1).tolist() == [True, False, True]
    assert rows[1, 0].all(dim=1).tolist() == [False, True, True]
    assert torch.equal(rows.all(dim=3), rows.any(dim=3)), "a row is marked as a whole"
    assert not mark[:, 6:].any(), "a linear layer has no words"
    small = word_vectors([[-0.002, -0.002], [0.5, 0.1], [0.0, 0.0]])
    assert_close(weights.trained(small).norms(), small.norms(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("lr", [1e-4, 5e-4])
def test_weight_decay_in_float32_is_found_and_leaves_nothing_to_conflict(lr):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 64, generator=generator)
    layout = Layout(("embeddings.word_embeddings.weight",), ((200, 64),))
    learned = 1e-2 * torch.randn(2, 20, 64, generator=generator)
    experts = []
    for task, change in enumerate(learned):
        theta = base.clone()
        for _ in range(100):  # AdamW decays by lr times weight decay, rounded to float32
            theta *= 1 - lr * 0.01
        theta[20 * task : 20 * task + 20] += change
        experts.append((theta - base).flatten())
    vectors = TaskVectors(layout, ("a", "b"), base.flatten(), torch.stack(experts))
    mark = weights.decay_only(vectors).unflatten(1, (200, 64)).all(dim=2)
    assert mark.sum(dim=1).tolist() == [180, 180]
    assert not mark[0, :20].any() and not mark[1, 20:40].any()
    assert sign_conflict(vectors.deltas)[0, 1] < 0.2, "decay agrees with itself"
    assert sign_conflict(weights.trained(vectors).deltas)[0, 1] == 0, "no word was learned by both"


def test_places_are_depth_and_kind_in_the_order_of_the_layout_and_others_refused():
    named = {
        "embeddings.word_embeddings.weight": "embeddings embedding",
        "embeddings.LayerNorm.weight": "embeddings norm",
        "encoder.layer.0.attention.self.query.bias": "encoder.layer.0 attention",
        "encoder.layer.0.attention.output.dense.weight": "encoder.layer.0 attention",
        "encoder.layer.0.attention.output.LayerNorm.bias": "encoder.layer.0 norm",
        "encoder.layer.1.intermediate.dense.weight": "encoder.layer.1 MLP",
        "encoder.layer.1.output.dense.weight": "encoder.layer.1 MLP",
        "model.layers.3.mlp.up_proj.weight": "model.layers.3 MLP",
        "pooler.weight": "pooler other",
    }
    names, numbers = weights.grouped(Layout(tuple(named), ((1,),) * len(named)), "place")
    assert [names[number] for number in numbers] == list(named.values())
    assert names == tuple(dict.fromkeys(named.values()))
    with pytest.raises(UnknownName, match="blok.*choose one of.*block"):
        weights.norms_by_group(linear_problem().vectors, "blok")


@pytest.mark.parametrize("grouping", [*GROUPINGS, "place"])
def test_squared_norms_and_inner_products_of_the_groups_add_up_to_the_whole(grouping):
    vectors = linear_problem().vectors
    angles, norms = by_group(cosine, vectors, grouping), weights.norms_by_group(vectors, grouping)
    assert norms.shape == (3, len(weights.columns(vectors.layout, grouping)))
    inner = (angles * norms.T[:, :, None] * norms.T[:, None, :]).sum(dim=0)
    assert_close(inner, vectors.deltas @ vectors.deltas.T)


def test_norms_of_millions_of_parameters_are_exact_to_six_digits():
    size = 4_000_000
    deltas = 1e-3 * torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    vectors = TaskVectors(Layout(("w",), ((size,),)), ("a",), torch.zeros(size), deltas)
    exact = deltas.double().norm().float()
    assert_close(weights.norms_by_group(vectors, "task")[0, 0], exact, rtol=1e-6, atol=0)


@pairwise
def test_a_measure_by_group_is_the_measure_of_what_stands_in_the_group(function):
    vectors = linear_problem().vectors
    found, groups = by_group(function, vectors, "block"), weights.columns(vectors.layout, "block")
    assert [name for name, _ in groups] == list(groups_of(vectors.layout, "block")[0])
    for values, (_, slices) in zip(found, groups, strict=True):
        parts = torch.cat([vectors.deltas[:, place] for place in slices], dim=1)
        assert_close(values, function(parts))
    assert_close(by_group(function, vectors, "task")[0], function(vectors.deltas))


def test_the_mean_with_others_leaves_the_task_itself_out():
    pairs = torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 9.0]])
    assert_close(weights.mean_with_others(pairs), torch.tensor([1.5, 2.0, 2.5]))
    with pytest.raises(ValueError, match="two tasks or more"):
        weights.mean_with_others(pairs[:1, :1])
