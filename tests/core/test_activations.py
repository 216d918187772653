"""What goes into linear layers: against the layers' own arithmetic, and without padding."""

from dataclasses import replace

import pytest
import torch
from helpers import linear_problem
from torch.testing import assert_close

from divmerge_core.merging.layer_inputs import linear_layers, watch_inputs


def seen(problem, flat, task):
    found = {}
    watch_inputs(problem, flat, task, lambda name, x: found.setdefault(name, []).append(x))
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_every_linear_layer_is_found_under_its_weights_name():
    names = [n for n in linear_problem().vectors.layout.names if n.endswith("weight")]
    assert list(linear_layers(linear_problem())) == names


def test_inputs_are_what_the_layers_before_put_out():
    problem = linear_problem()
    flat = problem.vectors.expert("task1")
    first, second, shift, *_ = problem.vectors.layout.unflatten(flat).values()
    x = torch.cat([batch.inputs["x"] for batch in problem.batches[1]])
    found = seen(problem, flat, 1)
    assert_close(found["embeddings.weight"], x)
    assert_close(found["encoder.layer.0.dense.weight"], x @ first.T)
    assert_close(found["encoder.layer.1.dense.weight"], x @ first.T @ second.T + shift)


def test_padding_is_left_out(toy_problem):
    tokens = sum(int(b.inputs["attention_mask"].sum()) for b in toy_problem.batches[0])
    found = seen(toy_problem, toy_problem.vectors.base, 0)
    assert found and {len(x) for x in found.values()} == {tokens}


def test_no_hook_stays_behind():
    problem = linear_problem()
    with pytest.raises(RuntimeError, match="stop"):
        watch_inputs(problem, problem.vectors.base, 0, stop)
    assert not any(layer._forward_pre_hooks for layer in linear_layers(problem).values())


def stop(name, x):
    raise RuntimeError("stop")


def test_a_problem_without_a_module_is_refused():
    with pytest.raises(ValueError, match="give MergeProblem its `module`, the network that"):
        linear_layers(replace(linear_problem(), module=None))
