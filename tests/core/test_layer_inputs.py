"""What goes into linear layers: against the layers' own arithmetic, and without padding."""

from dataclasses import replace

import pytest
import torch
from comparisons import inputs_of
from helpers import refuses
from torch.testing import assert_close

from divmerge_core.merging.layer_inputs import layer_inputs, linear_layers, visit_layer_inputs


def seen(problem, flat, task):
    found = {}
    visit_layer_inputs(problem, flat, task, lambda name, x: found.setdefault(name, []).append(x))
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_the_inputs_of_every_linear_layer_are_what_the_layers_before_put_out(problem):
    flat = problem.vectors.expert("task1")
    first, second, shift, *_ = problem.vectors.layout.unflatten(flat).values()
    x = inputs_of(problem, 1)
    expected = {"embeddings.weight": x, "encoder.layer.0.dense.weight": x @ first.T}
    expected["encoder.layer.1.dense.weight"] = x @ first.T @ second.T + shift
    assert list(linear_layers(problem)) == list(expected)
    assert_close(seen(problem, flat, 1), expected)
    for name, sums in layer_inputs(problem, flat, 1).items():
        x = expected[name]
        assert_close((sums.total, sums.gram, sums.count), (x.sum(0), x.T @ x, len(x)))
    assert list(layer_inputs(problem, flat, 1, names=["embeddings.weight"])) == [*expected][:1]


def test_padding_is_left_out(toy_problem):
    tokens = sum(int(b.inputs["attention_mask"].sum()) for b in toy_problem.batches[0])
    found = seen(toy_problem, toy_problem.vectors.base, 0)
    assert found and {len(x) for x in found.values()} == {tokens}


def test_no_hook_stays_behind_and_a_problem_without_a_module_is_refused(problem):
    def stop(name, x):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        visit_layer_inputs(problem, problem.vectors.base, 0, stop)
    assert not any(layer._forward_pre_hooks for layer in linear_layers(problem).values())
    with refuses("give MergeProblem its `module`, the network that"):
        linear_layers(replace(problem, module=None))
