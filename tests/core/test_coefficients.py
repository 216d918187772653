"""Coefficients: where they start, what a link allows, and which tensors share one."""

import pytest
import torch
from helpers import INF, NAN, layout_of, normal, refuses
from torch.testing import assert_close

from divmerge_core.merging.coefficients import GROUPINGS, LINKS, Coefficients, groups_of

NAMES = (
    *("embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight"),
    *("encoder.layer.0.attention.self.query.weight", "encoder.layer.0.output.dense.bias"),
    *("encoder.layer.1.attention.self.query.weight", "encoder.layer.10.output.dense.bias"),
    "pooler.dense.weight",
)
LAYOUT = layout_of(**dict.fromkeys(NAMES, (2,)))


def test_groups_are_the_model_transformer_blocks_or_every_tensor():
    assert groups_of(LAYOUT, "task") == (("model",), (0,) * 7)
    assert groups_of(LAYOUT, "layer") == (NAMES, tuple(range(7)))
    blocks = ("embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.10", "pooler")
    assert groups_of(LAYOUT, "block") == (blocks, (0, 0, 1, 1, 2, 3, 4))
    gpt2 = layout_of(**{"wte.weight": (2, 2), "h.0.ln_1.weight": (2,), "h.1.ln_1.weight": (2,)})
    assert groups_of(gpt2, "block")[0] == ("wte", "h.0", "h.1")
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    assert groups_of(layout_of(**dict.fromkeys(names, (2,))), "block")[0] == (
        *("model.embed_tokens", "model.layers.0", "model.norm"),
    )


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_they_start_at_one_over_the_number_of_tasks_and_are_what_is_trained(grouping, num_tasks):
    assert Coefficients(LAYOUT, 1)().item() == 1  # one expert alone starts as itself
    num_groups = len(groups_of(LAYOUT, grouping)[0])
    for link in LINKS:
        coefficients = Coefficients(LAYOUT, num_tasks, grouping=grouping, link=link)
        assert_close(coefficients(), torch.full((num_tasks, num_groups), 1 / num_tasks))
        assert [tuple(p.shape) for p in coefficients.parameters()] == [(num_tasks, num_groups)]


@pytest.mark.parametrize(
    ("link", "value"),
    [("identity", value) for value in (-0.5, 0.0, 0.5, 1.0, 2.5)]
    + [("clamp", value) for value in (0.0, 0.4, 1.0)]
    + [("sigmoid", 0.3)],
)
def test_they_start_where_they_are_told(link, value):
    assert_close(Coefficients(LAYOUT, 3, link=link, init=value)(), torch.full((3, 1), value))


def test_links_keep_what_they_promise():
    """A clamp's gradient is 0 outside of 0 and 1; at the ends, as torch.clamp's, it still is 1."""
    open_, closed, shares = (
        Coefficients(LAYOUT, 5, grouping="block", link=link)
        for link in ("sigmoid", "clamp", "softmax")
    )
    open_.raw.data = closed.raw.data = torch.tensor([[-9.0], [0.0], [0.3], [1.0], [9.0]])
    assert open_().min() > 0 and open_().max() < 1
    found = closed()
    assert found.flatten().tolist() == pytest.approx([0, 0, 0.3, 1, 1])
    found.sum().backward()
    assert closed.raw.grad.flatten().tolist() == [0, 1, 1, 1, 0]
    shares.raw.data = normal(5, 5).float()
    assert_close(shares().sum(0), torch.ones(5))


UNREACHED = {"sigmoid": (0.0, 1.0, 1.5, -0.1), "clamp": (-0.1, 1.1), "softmax": (0.3, -1.0)}
UNREACHED |= {"identity": (NAN, INF)}


@pytest.mark.parametrize(("link", "value"), [(k, v) for k, some in UNREACHED.items() for v in some])
def test_a_value_that_the_link_cannot_reach_is_refused(link, value):
    said = rf"init must be one that link '{link}' reaches, got {value}: "
    with refuses(said + r".*\(0, 1\).*\[0, 1\].* 1/T = 0.5; identity"):
        Coefficients(LAYOUT, 2, link=link, init=value)


def test_tensors_of_one_group_that_start_elsewhere_are_a_group_of_their_own():
    layout = layout_of(a=(2,), b=(3,), c=(4,))
    found = Coefficients(layout, 2, grouping="task", init=[1.0, 0.5, 1.0])
    assert found.groups == ("model from 1", "model from 0.5")
    assert found.segments.rows == ((0, 2, 0), (2, 5, 1), (5, 9, 0))
    assert found().tolist() == [[1.0, 0.5]] * 2
    alike = Coefficients(layout, 2, grouping="layer", init=[1.0, 0.5, 1.0])
    assert alike.groups == ("a", "b", "c")


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (2, {"grouping": "layers"}, "unknown grouping 'layers'; choose one of: task, block, layer"),
        (2, {"link": "tanh"}, "unknown link 'tanh'; choose one of: identity, sigmoid, soft"),
        (0, {}, "at least one task, got 0"),
    ],
)
def test_unknown_names_and_no_task_are_refused(tasks, options, message):
    with refuses(message):
        Coefficients(LAYOUT, tasks, **options)
