"""Coefficients: where they start, what a link allows, and which tensors share one."""

import pytest
import torch
from helpers import layout_of
from torch.testing import assert_close

from divmerge_core.merging.coefficients import GROUPINGS, Coefficients, groups_of

LAYOUT = layout_of(
    **{
        "embeddings.word_embeddings.weight": (3, 2),
        "embeddings.LayerNorm.weight": (2,),
        "encoder.layer.0.attention.self.query.weight": (2, 2),
        "encoder.layer.0.output.dense.bias": (2,),
        "encoder.layer.1.attention.self.query.weight": (2, 2),
        "encoder.layer.10.output.dense.bias": (2,),
        "pooler.dense.weight": (2, 2),
    }
)


def test_a_task_has_one_coefficient_for_the_whole_model():
    assert groups_of(LAYOUT, "task") == (("model",), (0,) * 7)


def test_blocks_are_transformer_layers_with_embeddings_and_the_rest_apart():
    names, numbers = groups_of(LAYOUT, "block")
    blocks = ("embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.10", "pooler")
    assert names == blocks
    assert numbers == (0, 0, 1, 1, 2, 3, 4)


def test_gpt2s_blocks_are_found_too():
    layout = layout_of(**{"wte.weight": (2, 2), "h.0.ln_1.weight": (2,), "h.1.ln_1.weight": (2,)})
    assert groups_of(layout, "block")[0] == ("wte", "h.0", "h.1")


def test_every_tensor_is_a_layer():
    assert groups_of(LAYOUT, "layer") == (LAYOUT.names, tuple(range(7)))


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_they_start_at_one_over_the_number_of_tasks(grouping, num_tasks):
    coefficients = Coefficients(LAYOUT, num_tasks, grouping=grouping)
    num_groups = len(groups_of(LAYOUT, grouping)[0])
    assert_close(coefficients(), torch.full((num_tasks, num_groups), 1 / num_tasks))


def test_the_papers_other_initial_value_can_be_chosen():
    assert_close(Coefficients(LAYOUT, 3, init=0.5)(), torch.full((3, 1), 0.5))


def test_one_expert_alone_starts_as_itself():
    assert Coefficients(LAYOUT, 1)().item() == 1


@pytest.mark.parametrize("value", [-0.5, 0.0, 1.0, 2.5])
def test_unconstrained_coefficients_start_anywhere(value):
    assert_close(Coefficients(LAYOUT, 2, init=value)(), torch.full((2, 1), value))


def test_a_sigmoid_keeps_each_between_0_and_1():
    coefficients = Coefficients(LAYOUT, 2, link="sigmoid", init=0.3)
    assert_close(coefficients(), torch.full((2, 1), 0.3))
    coefficients.raw.data = torch.tensor([[-9.0], [9.0]])
    assert coefficients().min() > 0 and coefficients().max() < 1


def test_a_clamp_cuts_to_0_and_1_and_its_gradient_is_0_outside():
    """As torch.clamp in a forward pass: at the ends themselves the gradient still is 1."""
    coefficients = Coefficients(LAYOUT, 5, link="clamp")
    coefficients.raw.data = torch.tensor([[-0.5], [0.0], [0.3], [1.0], [1.5]])
    found = coefficients()
    assert found.flatten().tolist() == pytest.approx([0, 0, 0.3, 1, 1])
    found.sum().backward()
    assert coefficients.raw.grad.flatten().tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("init", [0.0, 0.4, 1.0])
def test_a_clamp_starts_anywhere_in_its_interval(init):
    assert_close(Coefficients(LAYOUT, 2, link="clamp", init=init)(), torch.full((2, 1), init))


def test_a_softmax_keeps_the_sum_over_tasks_at_1_in_every_group():
    coefficients = Coefficients(LAYOUT, 3, grouping="block", link="softmax")
    coefficients.raw.data = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert_close(coefficients().sum(0), torch.ones(5))


def test_they_are_the_only_trainable_numbers():
    coefficients = Coefficients(LAYOUT, 2, grouping="layer")
    assert [tuple(p.shape) for p in coefficients.parameters()] == [(2, 7)]


# --- what cannot be -------------------------------------------------------------------------------


def test_an_unknown_grouping_is_answered_with_the_choices():
    with pytest.raises(
        ValueError, match="unknown grouping 'layers'; choose one of: task, block, layer"
    ):
        Coefficients(LAYOUT, 2, grouping="layers")


def test_an_unknown_link_is_answered_with_the_choices():
    with pytest.raises(
        ValueError, match="unknown link 'tanh'; choose one of: identity, sigmoid, soft"
    ):
        Coefficients(LAYOUT, 2, link="tanh")


@pytest.mark.parametrize(
    ("link", "value"),
    [
        ("sigmoid", 0.0),
        ("sigmoid", 1.0),
        ("sigmoid", 1.5),
        ("sigmoid", -0.1),
        ("clamp", -0.1),
        ("clamp", 1.1),
        ("softmax", 0.3),
        ("softmax", -1.0),
        ("identity", float("nan")),
        ("identity", float("inf")),
    ],
)
def test_a_value_that_the_link_cannot_reach_is_refused(link, value):
    with pytest.raises(
        ValueError,
        match=rf"link '{link}' cannot start at {value}: .*\(0, 1\).*\[0, 1\].* 1/T = 0.5; identity",
    ):
        Coefficients(LAYOUT, 2, link=link, init=value)


def test_no_task_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one task, got 0"):
        Coefficients(LAYOUT, 0)


def test_tensors_of_one_group_that_start_elsewhere_are_a_group_of_their_own():
    layout = layout_of(a=(2,), b=(3,), c=(4,))
    found = Coefficients(layout, 2, grouping="task", init=[1.0, 0.5, 1.0])
    assert found.groups == ("model from 1", "model from 0.5")
    assert found.segments.rows == ((0, 2, 0), (2, 5, 1), (5, 9, 0))
    assert found().tolist() == [[1.0, 0.5]] * 2
    alike = Coefficients(layout, 2, grouping="layer", init=[1.0, 0.5, 1.0])
    assert alike.groups == ("a", "b", "c")
