"""Learnt from unlabelled inputs: AdaMerging's variants, ProDistill, Surgery, distillation."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from comparisons import adam, mean_divergence, naive_loss, naive_merge, near
from helpers import QUIET, batch_of, layout_of, linear_problem, module_problem, normal, refuses
from torch import nn
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES, entropy
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.linalg import elected
from divmerge_core.merging.problem import Batch, Diverged, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import adaptive
from divmerge_core.methods.adaptive import adamerging, adamerging_plus_plus, entropy_of_mean_logit
from divmerge_core.methods.arithmetic import average, task_arithmetic
from divmerge_core.methods.checks import check_distance
from divmerge_core.methods.corrected import Correction, representation, representations, surgery
from divmerge_core.methods.distilled import distillation
from divmerge_core.methods.divmerge import limit
from divmerge_core.methods.layerwise import prodistill, stages

TINY = 1e-30  # a step size so small that a fit stays where it starts


one_batch = partial(linear_problem, batches=1)  # a step sees all of it


# --- adamerging
@pytest.mark.parametrize("init", [0.0, 0.3])
def test_at_frozen_coefficients_it_is_task_arithmetic(init):
    problem = linear_problem(num_tasks=2)
    merged = adamerging(problem, init=init, lr=TINY, epochs=1, **QUIET)
    assert_close(merged, task_arithmetic(problem, scale=init), rtol=0, atol=1e-7)


def test_the_coefficients_gradient_is_that_of_the_parameters_times_the_task_vector():
    """dL/dlambda[t, l] = <grad of tensor l, tau_t there>, as seen through two of Adam's steps.

    The first step shows its sign alone, being lr g / (|g| + 1e-8); the second its size too.
    """
    problem, seen = one_batch(), []
    adamerging(problem, epochs=2, lr=1e-2, callback=seen.append, **QUIET)
    layout = problem.vectors.layout
    _, groups = groups_of(layout, "layer")

    def slope(coeffs: torch.Tensor) -> torch.Tensor:
        merged = naive_merge(problem, coeffs, groups)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in merged.items()}
        naive_loss(problem, leaves, lambda expert, merged: entropy(merged)).backward()
        rows = [layout.unflatten(row) for row in problem.vectors.deltas]
        slopes = [[(leaf.grad * row[n]).sum() for n, leaf in leaves.items()] for row in rows]
        return torch.tensor(slopes, dtype=torch.float64)

    start = torch.full((3, 5), 0.3, dtype=torch.float64)
    assert_close(seen[-1].coeffs.double(), adam(start, slope, 2, 1e-2), rtol=0, atol=1e-6)


def test_the_mean_logits_entropy_is_what_is_lowered():
    """Two certain rows that contradict each other: no entropy each, log 2 of their mean. And a fit
    is that of a forward pass that has averaged the logits before: every row is the mean then."""
    logits = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    assert_close(entropy(logits), torch.zeros(2))
    assert_close(entropy_of_mean_logit(logits), torch.full((2,), 2.0).log())
    problem = one_batch()

    def averaged(parameters, pairs):
        return [x.mean(0, keepdim=True) for x in problem.forward(parameters, pairs)]

    ones = [[replace(b, weight=torch.ones(1).double()) for b in every] for every in problem.batches]
    already = replace(problem, forward=averaged, batches=ones)
    quick = {"epochs": 4, "lr": 1e-2, **QUIET}
    for method in (adamerging, partial(adamerging_plus_plus, basis="ties:1")):
        assert_close(method(problem, mean_logit=True, **quick), method(already, **quick))


def noisy_problem() -> MergeProblem:
    """A model that drops half of the last layer's inputs in training mode."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 4)).eval()
    shapes = {name: value.shape for name, value in model.named_parameters()}
    drawn = [{k: normal(*s, seed=n).float() for k, s in shapes.items()} for n in range(4)]
    experts = {f"task{n}": {k: drawn[0][k] + 0.3 * drawn[n][k] for k in shapes} for n in (1, 2, 3)}
    batches = linear_problem(dtype=torch.float32).batches
    return module_problem(model, experts, batches, base=drawn[0])


def test_dropout_draws_from_the_seed_at_every_forward_and_leaves_no_trace():
    problem, quick = noisy_problem(), {"epochs": 2, "lr": 1e-2, **QUIET}
    calm, before = adamerging(problem, **quick), torch.get_rng_state()
    first = adamerging(problem, dropout=True, **quick)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(part.training for part in problem.module.modules())
    torch.rand(3)
    assert torch.equal(adamerging(problem, dropout=True, **quick), first)
    assert not torch.equal(first, calm)
    problem.module[0].train()  # a part in another mode than the rest
    noisy = adaptive.with_dropout(problem, seed=0)
    one, other = (noisy.logits(problem.vectors.base, 0, problem.batches[0][0]) for _ in range(2))
    assert not torch.equal(one, other)
    assert [part.training for part in problem.module] == [True, False, False]
    with refuses("dropout=True needs the network .* its `module`"):
        adamerging(replace(problem, module=None), dropout=True, **QUIET)


# --- adamerging++
def test_election_keeps_large_entries_of_the_elected_sign_as_a_loop_does():
    deltas = normal(4, 37, seed=3)
    deltas[:, 0] = torch.tensor([5.0, -5.0, 0, 0])  # opposite entries of one size go both
    given, expected = deltas.clone(), torch.zeros_like(deltas)
    for column in range(37):
        kept = {}
        for task in range(4):
            size = deltas[task, column].abs()
            rank = int((deltas[task].abs() > size).sum())
            if rank < 15:  # 0.4 of 37 is 14.8
                kept[task] = deltas[task, column]
        total = sum(kept.values())
        for task, value in kept.items():
            if value * total > 0:
                expected[task, column] = value
    assert torch.equal(elected(deltas, 0.4), expected) and not expected[:, 0].any()
    assert torch.equal(deltas, given)


def test_it_is_adamerging_of_the_elected_task_vectors():
    problem = linear_problem()
    chosen = replace(problem, vectors=problem.vectors.map(lambda d: elected(d, 0.5)))
    quick = {"epochs": 2, "lr": 1e-2, "progress": False}
    expected = adamerging(chosen, **quick)
    assert_close(adamerging_plus_plus(problem, basis="ties:0.5", **quick), expected, rtol=0, atol=0)


# --- distillation
@pytest.mark.parametrize(
    ("divergence", "init"), [("js", None), ("reverse_kl", 0.0), ("logit_mse", 0.5)]
)
def test_distillation_takes_adams_steps_on_the_weights(divergence, init):
    problem = one_batch()
    options = {"divergence": divergence, "init": init, "lr": 1e-2, "epochs": 3}
    flat = distillation(problem, **options, **QUIET)
    start = average(problem) if init is None else task_arithmetic(problem, scale=init)

    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        parameters = problem.vectors.layout.unflatten(x)
        (grad,) = torch.autograd.grad(naive_loss(problem, parameters, DIVERGENCES[divergence]), x)
        return grad

    assert_close(flat, adam(start, slope, 3, 1e-2), rtol=0, atol=1e-6)


def test_only_parameters_that_some_expert_changed_learn():
    problem = linear_problem(num_tasks=2)

    def sparse(deltas: torch.Tensor) -> torch.Tensor:
        deltas = deltas.clone()
        deltas[:, ::2] = 0
        deltas[0, 1::4] = 0  # one expert is enough
        return deltas

    partly = replace(problem, vectors=problem.vectors.map(sparse))
    flat = distillation(partly, lr=1e-2, epochs=2, **QUIET)
    moved = flat != problem.vectors.base
    assert moved[1::2].all() and not moved[::2].any()


def test_a_tensor_that_the_model_does_not_use_stays_at_its_start():
    layout = layout_of(used=(2, 3), idle=(4,))
    batches = [[batch_of(torch.eye(3))]] * 2
    deltas = normal(2, layout.size).float()
    vectors = TaskVectors(layout, ("a", "b"), torch.zeros(layout.size), deltas)

    def forward(parameters, pairs):
        return [batch.inputs["x"] @ parameters["used"].T for _, batch in pairs]

    problem = MergeProblem(vectors, batches, forward)
    flat = distillation(problem, epochs=2, **QUIET)
    assert torch.equal(flat[6:], average(problem)[6:])
    assert not torch.equal(flat[:6], average(problem)[:6])


# --- prodistill
LAYERS = ("embeddings", "encoder.layer.0.dense", "encoder.layer.1.dense")


def test_stages_are_the_largest_modules_of_one_block_that_run_in_their_order(toy_problem):
    assert tuple(stages(linear_problem())) == LAYERS
    assert list(stages(toy_problem)) == ["embeddings", "encoder.layer.0", "encoder.layer.1"]


def affine(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Weight and bias side by side, [M, K + 1]; a bias that is missing is 0."""
    weight = tensors[f"{name}.weight"]
    bias = tensors.get(f"{name}.bias", torch.zeros_like(weight[:, 0]))
    return torch.cat([weight, bias[:, None]], dim=1)


def mapped(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return x @ matrix[:, :-1].T + matrix[:, -1]


def naive_slope(base, deltas, streams, targets, coeffs) -> torch.Tensor:
    """dL/dW = 2/n sum_t (W z - target)^T z, dL/db the same with z = 1; times tau_t."""
    merged, total = base + (coeffs * deltas).sum(0), 0
    for z, target in zip(streams, targets, strict=True):
        off = 2 * (mapped(z, merged) - target) / len(z)
        total = total + off.T @ torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    return total * deltas


def naive_prodistill(problem: MergeProblem, init: float, steps: int, lr: float) -> torch.Tensor:
    """Three linear maps distilled in turn with matrix algebra, on one batch per task."""
    vectors, places = problem.vectors, problem.vectors.layout.unflatten
    experts = [places(vectors.expert(name)) for name in vectors.tasks]
    streams = targets = [every[0].inputs["x"] for every in problem.batches]
    found = []
    for name in LAYERS:
        base = affine(places(vectors.base), name)
        deltas = torch.stack([affine(places(row), name) for row in vectors.deltas])
        targets = [mapped(z, affine(e, name)) for e, z in zip(experts, targets, strict=True)]
        slope = partial(naive_slope, base, deltas, streams, targets)
        coeffs = adam(torch.full_like(deltas, init), slope, steps, lr)
        merged = base + (coeffs * deltas).sum(0)
        streams = [mapped(z, merged) for z in streams]
        found.append(merged[:, :-1].flatten())
        found += [merged[:, -1]] if f"{name}.bias" in vectors.layout.names else []
    return torch.cat(found)


def test_prodistill_agrees_with_matrix_algebra_in_float64():
    problem = one_batch()
    merged = prodistill(problem, epochs=5, lr=1e-2, **QUIET)
    near(merged, naive_prodistill(problem, 0.3, 5, 1e-2))


def test_prodistill_brings_the_merge_nearer_and_one_expert_back(toy_problem):
    one = one_batch(num_tasks=1, rows=15)
    for problem, options, share in (
        (one, {"lr": 4e-2, "epochs": 60}, 0.05),
        (toy_problem, {"inputs": 8, "epochs": 3, "lr": 5e-2}, 1.0),
    ):
        merged = prodistill(problem, **options, **QUIET)
        before = mean_divergence(problem, task_arithmetic(problem))
        assert mean_divergence(problem, merged) < share * before


def test_prodistill_does_not_see_what_stands_under_padding(toy_problem):
    """Other words there change nothing, though they change the features of those positions."""

    def scribbled(batch: Batch) -> Batch:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        return replace(batch, inputs={**batch.inputs, "input_ids": torch.where(mask > 0, ids, 7)})

    longest = [
        [b for b in every if not b.inputs["attention_mask"].all()][:1]
        for every in toy_problem.batches
    ]
    assert all(longest)
    plain = replace(toy_problem, batches=longest)
    other = replace(toy_problem, batches=[[scribbled(b) for b in every] for every in longest])
    one, two = (prodistill(p, epochs=2, **QUIET) for p in (plain, other))
    assert_close(one, two, rtol=0, atol=1e-6)


def test_parameters_outside_every_stage_keep_the_initial_coefficient():
    """A parameter of the whole model, like a class token, belongs to no stage."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))
            self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)])

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x + self.shift))

    model = Shifted()
    expert = {n: b.detach() + normal(*b.shape).float() for n, b in model.named_parameters()}
    problem = module_problem(model, {"a": expert}, [[batch_of(normal(4, 3).float())]])
    assert list(stages(problem)) == ["blocks.0", "blocks.1"]
    vectors, merged = problem.vectors, prodistill(problem, epochs=3, **QUIET)
    shares = vectors.layout.unflatten((merged - vectors.base) / vectors.deltas[0])
    assert_close(shares["shift"], torch.full((3,), 0.3), rtol=0, atol=1e-5)
    assert (shares["blocks.0.weight"] - 0.3).abs().min() > 1e-3


def test_prodistill_learns_from_a_forward_in_bfloat16_and_needs_a_module_that_runs():
    problem = linear_problem(dtype=torch.float32)

    def half(parameters, pairs):
        with torch.autocast("cpu", torch.bfloat16):
            return [x.float() for x in problem.forward(parameters, pairs)]

    rough = prodistill(replace(problem, forward=half), epochs=2, **QUIET)
    assert rough.dtype == torch.float32
    near(rough, prodistill(problem, epochs=2, **QUIET), 0.05)
    idle = replace(problem, module=linear_problem().module)
    with refuses("no part of the problem's module .* ran: give"):
        prodistill(idle, **QUIET)
    with refuses(r"must put out \[B, D\].*got NoneType"):
        surgery(idle, **QUIET)


# --- surgery
def test_before_its_first_step_surgery_is_the_merge_and_stores_two_factors_per_task_besides():
    problem = linear_problem()
    merged = surgery(problem, merge="average", rank=3, lr=TINY, steps=1, **QUIET)
    batch = problem.batches[1][0]
    assert_close(merged.logits(1, batch), problem.logits(average(problem), 1, batch))
    assert torch.equal(merged.flat, average(problem))
    assert merged.nbytes == (6 * 6 + 6 * 6 + 6 + 4 * 6 + 4 + 3 * (2 * 3 * 4)) * 8


def test_surgery_takes_the_steps_that_its_gradient_by_hand_gives():
    """d/dup of mean|z - up relu(down z) - e| is -sign^T relu / size; down's follows the relu."""
    problem = one_batch(num_tasks=2)
    merged = surgery(problem, rank=3, steps=4, batch_size=5, lr=1e-2, seed=5, **QUIET)
    flat = task_arithmetic(problem)
    drawn = torch.rand(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for task, name in enumerate(problem.vectors.tasks):
        batch = problem.batches[task][0]
        z = problem.logits(flat, task, batch)
        expert = problem.logits(problem.vectors.expert(name), task, batch)

        def slope(values, z=z, expert=expert):
            down, up = values[:12].view(3, 4), values[12:].view(4, 3)
            active = (z @ down.T).clamp(min=0)
            sign = -(z - active @ up.T - expert).sign() / z.numel()
            to_down = ((sign @ up) * (active > 0)).T @ z
            return torch.cat([to_down.flatten(), (sign.T @ active).flatten()])

        start = torch.cat([((2 * drawn - 1) / 2).flatten(), torch.zeros(12, dtype=torch.float64)])
        found = merged.corrections[task]
        expected = adam(start, slope, 4, 1e-2)
        assert_close(found.down.flatten(), expected[:12], rtol=0, atol=1e-9)
        assert_close(found.up.flatten(), expected[12:], rtol=0, atol=1e-9)


def test_surgery_of_few_inputs_is_surgery_on_these():
    problem = linear_problem(batches=4)
    options = {"merge": "average", "steps": 12, "lr": 1e-2, **QUIET}
    given = (problem, 10), (limit(problem, 10, "task"), None), (problem, None)
    merged = (surgery(p, inputs=n, **options).corrections for p, n in given)
    for corrections in zip(*merged, strict=True):
        one, same, other = (torch.cat([c.down, c.up.T]) for c in corrections)
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_surgery_brings_the_merge_that_it_is_told_nearer_to_its_experts():
    problem = linear_problem()
    merged = surgery(problem, merge="adamerging/task", steps=60, lr=5e-2, **QUIET)
    assert_close(merged.flat, adamerging(problem, grouping="task", **QUIET), rtol=0, atol=0)
    assert mean_divergence(problem, merged) < 0.7 * mean_divergence(problem, merged.flat)


def test_surgery_corrects_an_encoders_mean_over_tokens(toy_problem):
    """The head reads z - up relu(down z), z the mean over tokens: linear in what is subtracted."""
    merged = surgery(toy_problem, inputs=8, steps=20, lr=1e-2, **QUIET)
    assert mean_divergence(toy_problem, merged) < mean_divergence(toy_problem, merged.flat)
    batch = toy_problem.batches[0][0]
    z = representations(toy_problem, merged.flat, 0)[: len(batch.weight)]
    plain, corrected, twice = (
        replace(merged, corrections=(Correction(c.down, scale * c.up),)).logits(0, batch)
        for scale in (0.0, 1.0, 2.0)
        for c in merged.corrections[:1]
    )
    assert_close(twice - corrected, corrected - plain, rtol=0, atol=1e-5)
    off = merged.corrections[0](z)
    solved = torch.linalg.lstsq(
        torch.cat([off, torch.zeros_like(off)]),
        torch.cat([plain - corrected, torch.zeros_like(plain)]),
    ).solution
    assert_close(off @ solved, plain - corrected, rtol=0, atol=1e-4)


def test_an_output_without_one_vector_per_input_is_refused():
    ids = torch.zeros(2, 3, dtype=torch.long)
    tokens = Batch({"input_ids": ids}, torch.ones(1), ids > 0)
    with refuses(r"must put out \[B, D\].*got tuple"):
        representation((torch.zeros(2, 3),), batch_of(torch.zeros(2, 3)))
    with refuses("got Tensor of a language model"):
        representation(torch.zeros(2, 3, 5), tokens)


# --- bad input
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (prodistill, "prodistill: NaN or inf at step 0 of stage 'embeddings'; lower lr .now 0.01"),
        (surgery, "surgery: NaN or inf at step 0; lower lr .now 0.001. or check the experts"),
        (distillation, r"distillation: step 0, lr 0.0001 \(lower it if .*: logits hold NaN"),
    ],
)
def test_a_fit_that_stops_being_finite_says_where(problem, method, message):
    broken = problem.batches[0][0].inputs["x"].clone()
    broken[0, 0] = torch.inf
    batches = [[batch_of(broken)], *problem.batches[1:]]
    with pytest.raises(Diverged, match=message):
        method(replace(problem, batches=batches), **QUIET)


def test_how_far_is_too_far():
    """A hundred times as far as the farthest expert; where none moved, not at all."""
    reach = torch.tensor(2.0)
    check_distance("fit", torch.tensor(200.0), reach, 3, 0.1)
    check_distance("fit", torch.tensor(0.0), torch.tensor(0.0), 3, 0.1)
    for way in (200.1, torch.inf, torch.nan):
        with pytest.raises(Diverged, match=r"fit: after step 3 .* any expert \(2\); lower lr"):
            check_distance("fit", torch.tensor(way), reach, 3, 0.1)
