"""Learnt from unlabelled inputs: AdaMerging's variants, ProDistill, Surgery, distillation."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import fewer, layout_of, linear_problem, naive_loss, naive_merge
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES, entropy, js
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.linalg import elected
from divmerge_core.merging.problem import Batch, Diverged, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import METHODS
from divmerge_core.methods.adaptive import (
    adamerging,
    adamerging_plus_plus,
    entropy_of_mean_logit,
    with_dropout,
)
from divmerge_core.methods.arithmetic import average, task_arithmetic
from divmerge_core.methods.corrected import Correction, representation, representations, surgery
from divmerge_core.methods.distilled import check_distance, distillation
from divmerge_core.methods.divmerge import divmerge, limit
from divmerge_core.methods.layerwise import length, prodistill, stages

TINY = 1e-30  # a step size so small that a fit stays where it starts


def one_batch(**options) -> MergeProblem:
    """A problem whose tasks have one batch each, so that a step sees all of it."""
    return linear_problem(**{"batches": 1, **options})


def adam(values: torch.Tensor, slope, steps: int, lr: float) -> torch.Tensor:
    """Adam by its published recursion; `slope` gives the gradient at a point."""
    x, mean, square = values.clone(), torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, steps + 1):
        grad = slope(x)
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * grad**2
        x = x - lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return x


def held_out(problem: MergeProblem, seed: int = 1) -> MergeProblem:
    """The same experts with other inputs."""
    return replace(problem, batches=linear_problem(seed=seed).batches)


def mean_entropy(problem: MergeProblem, flat: torch.Tensor) -> float:
    rows = [
        entropy(problem.logits(flat, task, batch)).mean()
        for task, batches in enumerate(problem.batches)
        for batch in batches
    ]
    return float(torch.stack(rows).mean())


def mean_js(problem: MergeProblem, merged) -> float:
    """Mean divergence of a merged vector or a predictor from every task's expert."""
    rows = [
        js(
            problem.logits(problem.vectors.expert(name), task, batch),
            problem.logits_of(merged, task, batch),
        ).mean()
        for task, name in enumerate(problem.vectors.tasks)
        for batch in problem.batches[task]
    ]
    return float(torch.stack(rows).mean())


def test_inputs_are_counted_in_rows_also_where_a_row_has_several_answers():
    """A language model's batch of 2 rows and 6 answer positions counts 2."""
    problem = linear_problem(num_tasks=1)
    words = torch.zeros(2, 5, dtype=torch.long)
    batch = Batch({"input_ids": words}, torch.full((6,), 1 / 6), words > -1)
    kept = limit(replace(problem, batches=[[batch] * 8]), 5, "task")
    assert len(kept.batches[0]) == 3  # 6 rows, the fewest that hold 5


# --- adamerging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [adamerging, adamerging_plus_plus])
def test_at_coefficient_0_it_is_the_base(method):
    problem = linear_problem()
    merged = method(problem, init=0.0, lr=TINY, epochs=1, progress=False)
    assert_close(merged, problem.vectors.base, rtol=0, atol=1e-12)


def test_at_frozen_coefficients_it_is_task_arithmetic():
    problem = linear_problem()
    merged = adamerging(problem, init=0.3, lr=TINY, epochs=1, progress=False)
    assert_close(merged, task_arithmetic(problem, scale=0.3), rtol=0, atol=1e-7)


def test_the_coefficients_gradient_is_that_of_the_parameters_times_the_task_vector():
    """dL/dlambda[t, l] = <grad of tensor l, tau_t there>, as seen through two of Adam's steps.

    The first step shows its sign alone, being lr g / (|g| + 1e-8); the second its size too.
    """
    problem, seen = one_batch(), []
    adamerging(problem, epochs=2, lr=1e-2, callback=seen.append, progress=False)
    layout = problem.vectors.layout
    _, groups = groups_of(layout, "layer")

    def slope(coeffs: torch.Tensor) -> torch.Tensor:
        leaves = {
            name: tensor.detach().requires_grad_()
            for name, tensor in naive_merge(problem, coeffs, groups).items()
        }
        naive_loss(problem, leaves, lambda expert, merged: entropy(merged)).backward()
        rows = [layout.unflatten(row) for row in problem.vectors.deltas]
        slopes = [[(leaf.grad * row[n]).sum() for n, leaf in leaves.items()] for row in rows]
        return torch.tensor(slopes, dtype=torch.float64)

    start = torch.full((3, 5), 0.3, dtype=torch.float64)
    assert_close(seen[-1].coeffs.double(), adam(start, slope, 2, 1e-2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [adamerging, adamerging_plus_plus])
def test_training_lowers_the_entropy_of_inputs_that_it_did_not_see(method):
    problem = linear_problem()
    others = held_out(problem)
    start = method(problem, lr=TINY, epochs=1, progress=False)
    merged = method(problem, lr=2e-2, epochs=10, progress=False)
    assert mean_entropy(others, merged) < mean_entropy(others, start) - 0.01


def test_the_entropy_of_the_mean_logit_by_hand():
    """Two certain rows that contradict each other: no entropy each, log 2 of their mean."""
    logits = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    assert_close(entropy(logits), torch.zeros(2))
    assert_close(entropy_of_mean_logit(logits), torch.full((2,), 2.0).log())


def test_both_entropies_agree_on_batches_of_one_input_and_differ_on_others():
    alone, several = linear_problem(rows=1), linear_problem(rows=5)
    quick = {"epochs": 2, "lr": 1e-2, "progress": False}
    assert torch.equal(adamerging(alone, **quick), adamerging(alone, mean_logit=True, **quick))
    one, other = (adamerging(several, mean_logit=flag, **quick) for flag in (False, True))
    assert (one - other).abs().max() > 1e-4


def test_the_mean_logits_entropy_is_what_is_lowered():
    """Against a fit whose forward has averaged the logits before: every row is the mean then."""
    problem = one_batch()

    def averaged(parameters, pairs):
        return [x.mean(0, keepdim=True) for x in problem.forward(parameters, pairs)]

    ones = [[replace(b, weight=torch.ones(1).double()) for b in every] for every in problem.batches]
    already = replace(problem, forward=averaged, batches=ones)
    quick = {"epochs": 4, "lr": 1e-2, "progress": False}
    assert_close(adamerging(problem, mean_logit=True, **quick), adamerging(already, **quick))


def noisy_problem() -> MergeProblem:
    """The linear problem with half of the last layer's inputs dropped, in training mode."""
    problem = linear_problem(dtype=torch.float32)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 4)).eval()
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    experts = {
        name: {n: b + 0.3 * torch.randn(b.shape, generator=generator) for n, b in base.items()}
        for name in problem.vectors.tasks
    }

    def forward(parameters, pairs):
        return [functional_call(model, dict(parameters), (b.inputs["x"],)) for _, b in pairs]

    return MergeProblem(TaskVectors.from_states(base, experts), problem.batches, forward, model)


def test_dropout_changes_the_fit_draws_from_the_seed_alone_and_leaves_no_trace():
    problem = noisy_problem()
    quick = {"epochs": 2, "lr": 1e-2, "progress": False}
    calm = adamerging(problem, **quick)
    before = torch.get_rng_state()
    first = adamerging(problem, dropout=True, **quick)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(part.training for part in problem.module.modules())
    torch.rand(3)
    assert torch.equal(adamerging(problem, dropout=True, **quick), first)
    assert not torch.equal(first, calm)


def test_dropout_draws_anew_at_every_forward_and_gives_every_part_its_mode_back():
    problem = noisy_problem()
    problem.module[0].train()  # a part in another mode than the rest
    noisy = with_dropout(problem, seed=0)
    one, other = (noisy.logits(problem.vectors.base, 0, problem.batches[0][0]) for _ in range(2))
    assert not torch.equal(one, other)
    assert [part.training for part in problem.module] == [True, False, False]


def test_dropout_matters_to_an_encoder(toy_problem):
    quick = {"inputs": 4, "epochs": 3, "lr": 1e-2, "progress": False}
    calm, noisy = (adamerging(toy_problem, dropout=flag, **quick) for flag in (False, True))
    assert (calm - noisy).abs().max() > 1e-5


def test_dropout_without_a_module_is_refused():
    problem = replace(linear_problem(), module=None)
    with pytest.raises(ValueError, match="dropout=True needs the network .* its `module`"):
        adamerging(problem, dropout=True, progress=False)


# --- adamerging++ ---------------------------------------------------------------------------------


def test_election_keeps_large_entries_of_the_majority_as_worked_out_by_hand():
    """Three of five are kept: [5, -4, 3, 0, 0] and [-6, 7, 0, -5, 0]; sums -1, 3, 3, -5, 0."""
    deltas = torch.tensor([[5.0, -4, 3, 2, 1], [-6.0, 7, 1, -5, 2]])
    expected = torch.tensor([[0.0, 0, 3, 0, 0], [-6.0, 7, 0, -5, 0]])
    assert torch.equal(elected(deltas, 0.6), expected)
    assert deltas[0, 0] == 5  # the vectors given are left alone


def test_opposite_entries_of_one_size_go_both():
    assert not elected(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), 1.0).any()


def test_election_agrees_with_a_loop_over_entries():
    generator = torch.Generator().manual_seed(3)
    deltas = torch.randn(4, 37, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(deltas)
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
    assert torch.equal(elected(deltas, 0.4), expected)


def test_it_is_adamerging_of_the_elected_task_vectors():
    problem = linear_problem()
    chosen = replace(problem, vectors=problem.vectors.map(lambda d: elected(d, 0.5)))
    quick = {"epochs": 2, "lr": 1e-2, "progress": False}
    expected = adamerging(chosen, **quick)
    assert_close(adamerging_plus_plus(problem, keep=0.5, **quick), expected, rtol=0, atol=0)


def test_one_experts_task_vector_kept_whole_is_adamerging():
    problem = linear_problem(num_tasks=1)
    quick = {"epochs": 2, "progress": False}
    assert torch.equal(
        adamerging_plus_plus(problem, keep=1.0, **quick), adamerging(problem, **quick)
    )


@pytest.mark.parametrize("keep", [0.0, -0.2, 1.5, float("nan")])
def test_it_refuses_a_share_that_is_none(keep):
    with pytest.raises(ValueError, match=rf"keep must be in \(0, 1\], got {keep}; 0.2 keeps"):
        adamerging_plus_plus(linear_problem(), keep=keep, progress=False)


# --- distillation ---------------------------------------------------------------------------------


def test_distillation_reaches_experts_that_no_merge_reaches():
    """Closer to them than DivMerge gets, per task or per layer, on the inputs that both see."""
    problem = one_batch(rows=15)
    free = distillation(problem, lr=2e-2, epochs=25, progress=False)
    merges = [
        divmerge(problem, grouping=grouping, lr=2e-2, epochs=25, progress=False)
        for grouping in ("task", "layer")
    ]
    assert mean_js(problem, free) < 0.7 * min(mean_js(problem, merged) for merged in merges)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distillation_takes_adams_steps_on_the_weights(divergence):
    problem = one_batch()
    flat = distillation(problem, divergence=divergence, lr=1e-2, epochs=3, progress=False)

    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        parameters = problem.vectors.layout.unflatten(x)
        (grad,) = torch.autograd.grad(naive_loss(problem, parameters, DIVERGENCES[divergence]), x)
        return grad

    assert_close(flat, adam(average(problem), slope, 3, 1e-2), rtol=0, atol=1e-6)


def test_distillation_starts_where_it_is_told():
    problem = linear_problem()
    quick = {"lr": TINY, "epochs": 1, "progress": False}
    for init, expected in ((None, average(problem)), (0.0, problem.vectors.base)):
        assert_close(distillation(problem, init=init, **quick), expected, rtol=0, atol=1e-12)


def test_one_expert_alone_stays_itself_under_distillation():
    problem = linear_problem(num_tasks=1)
    flat = distillation(problem, epochs=5, progress=False)  # Adam steps on rounding: not exactly
    assert mean_js(problem, flat) < 1e-6


def test_only_parameters_that_some_expert_changed_learn():
    problem = linear_problem(num_tasks=2)

    def sparse(deltas: torch.Tensor) -> torch.Tensor:
        deltas = deltas.clone()
        deltas[:, ::2] = 0
        deltas[0, 1::4] = 0  # one expert is enough
        return deltas

    flat = distillation(
        replace(problem, vectors=problem.vectors.map(sparse)), lr=1e-2, epochs=2, progress=False
    )
    moved = flat != problem.vectors.base
    assert moved[1::2].all() and not moved[::2].any()


def test_a_tensor_that_the_model_does_not_use_stays_at_its_start():
    layout = layout_of(used=(2, 3), idle=(4,))
    batches = [[Batch({"x": torch.eye(3)}, torch.full((3,), 1 / 3))]] * 2
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, layout.size, generator=generator)
    vectors = TaskVectors(layout, ("a", "b"), torch.zeros(layout.size), deltas)

    def forward(parameters, pairs):
        return [batch.inputs["x"] @ parameters["used"].T for _, batch in pairs]

    problem = MergeProblem(vectors, batches, forward)
    flat = distillation(problem, epochs=2, progress=False)
    assert torch.equal(flat[6:], average(problem)[6:])
    assert not torch.equal(flat[:6], average(problem)[:6])


# --- prodistill -----------------------------------------------------------------------------------


def test_stages_are_the_largest_modules_of_one_block_that_run_in_their_order(toy_problem):
    assert list(stages(linear_problem())) == [
        "embeddings",
        "encoder.layer.0.dense",
        "encoder.layer.1.dense",
    ]
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
    for name in ("embeddings", "encoder.layer.0.dense", "encoder.layer.1.dense"):
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


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_prodistill_agrees_with_matrix_algebra_in_float64(num_tasks):
    problem = one_batch(num_tasks=num_tasks)
    merged = prodistill(problem, epochs=5, lr=1e-2, progress=False)
    assert_close(merged, naive_prodistill(problem, 0.3, 5, 1e-2), rtol=0, atol=1e-9)


def test_lengths_are_those_of_rows_over_all_matrices_together():
    sides = torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([[4.0], [2.0]])
    assert length(sides).tolist() == [5.0, 3.0]


def test_prodistill_starts_as_task_arithmetic():
    problem = linear_problem()
    merged = prodistill(problem, lr=TINY, epochs=1, progress=False)
    assert_close(merged, task_arithmetic(problem, scale=0.3), rtol=0, atol=1e-12)


def test_prodistill_of_one_expert_learns_to_be_that_expert():
    problem = one_batch(num_tasks=1, rows=15)
    merged = prodistill(problem, lr=4e-2, epochs=100, progress=False)
    assert mean_js(problem, merged) < 0.02 * mean_js(problem, task_arithmetic(problem))


def test_prodistill_brings_an_encoder_nearer_to_its_experts(toy_problem):
    before = mean_js(toy_problem, task_arithmetic(toy_problem, scale=0.3))
    merged = prodistill(toy_problem, epochs=3, lr=5e-2, progress=False)
    assert mean_js(toy_problem, merged) < before


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
    one, two = (prodistill(p, epochs=2, progress=False) for p in (plain, other))
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

    model, generator = Shifted().requires_grad_(False), torch.Generator().manual_seed(0)
    base = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    expert = {n: b + torch.randn(b.shape, generator=generator) for n, b in base.items()}
    batch = Batch({"x": torch.randn(4, 3, generator=generator)}, torch.full((4,), 0.25))

    def forward(parameters, pairs):
        return [functional_call(model, dict(parameters), (b.inputs["x"],)) for _, b in pairs]

    problem = MergeProblem(TaskVectors.from_states(base, {"a": expert}), [[batch]], forward, model)
    assert list(stages(problem)) == ["blocks.0", "blocks.1"]
    places = problem.vectors.layout.unflatten
    shares = places(
        (prodistill(problem, epochs=3, progress=False) - problem.vectors.base)
        / problem.vectors.deltas[0]
    )
    assert_close(shares["shift"], torch.full((3,), 0.3), rtol=0, atol=1e-5)
    assert (shares["blocks.0.weight"] - 0.3).abs().min() > 1e-3


def test_prodistill_learns_from_a_forward_in_bfloat16():
    problem = linear_problem(dtype=torch.float32)

    def half(parameters, pairs):
        with torch.autocast("cpu", torch.bfloat16):
            return [x.float() for x in problem.forward(parameters, pairs)]

    rough = prodistill(replace(problem, forward=half), epochs=2, progress=False)
    exact = prodistill(problem, epochs=2, progress=False)
    assert rough.dtype == torch.float32
    assert_close(rough, exact, rtol=0, atol=0.05)


def test_a_module_that_does_not_run_is_refused():
    problem = replace(linear_problem(), module=linear_problem().module)
    with pytest.raises(ValueError, match="no part of the problem's module .* ran: give"):
        prodistill(problem, progress=False)


# --- surgery --------------------------------------------------------------------------------------


def test_the_correction_by_hand():
    """down z = (1, -2), relu keeps 1, up takes it to (3, 0)."""
    correction = Correction(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 3 * torch.eye(2))
    assert correction(torch.tensor([[1.0, 2.0]])).tolist() == [[3.0, 0.0]]


def test_before_its_first_step_surgery_is_the_merge():
    problem = linear_problem()
    merged = surgery(problem, merge="average", lr=TINY, steps=1, progress=False)
    batch = problem.batches[1][0]
    assert_close(merged.logits(1, batch), problem.logits(average(problem), 1, batch))
    assert torch.equal(merged.flat, average(problem))


def test_surgery_takes_the_steps_that_its_gradient_by_hand_gives():
    """d/dup of mean|z - up relu(down z) - e| is -sign^T relu / size; down's follows the relu."""
    problem = one_batch(num_tasks=2)
    merged = surgery(problem, rank=3, steps=4, batch_size=5, lr=1e-2, seed=5, progress=False)
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
    options = {"merge": "average", "steps": 12, "lr": 1e-2, "progress": False}
    found = surgery(problem, inputs=10, **options)
    expected = surgery(limit(problem, 10, "task"), **options)
    everything = surgery(problem, **options)
    for one, same, other in zip(
        *(m.corrections for m in (found, expected, everything)), strict=True
    ):
        assert torch.equal(one.down, same.down) and torch.equal(one.up, same.up)
        assert not torch.equal(one.up, other.up)


@pytest.mark.parametrize("merge", ["task_arithmetic", "adamerging/task"])
def test_surgery_brings_the_merge_nearer_to_its_experts(merge):
    problem = linear_problem()
    merged = surgery(problem, merge=merge, steps=60, lr=5e-2, progress=False)
    assert mean_js(problem, merged) < 0.7 * mean_js(problem, merged.flat)


def test_surgery_corrects_an_encoders_mean_over_tokens(toy_problem):
    """The head reads z - up relu(down z), z the mean over tokens: linear in what is subtracted."""
    merged = surgery(toy_problem, steps=20, lr=1e-2, progress=False)
    assert mean_js(toy_problem, merged) < mean_js(toy_problem, merged.flat)
    z = representations(toy_problem, merged.flat, 0)
    count = len(toy_problem.batches[0][0].weight)
    plain, corrected, twice = (
        replace(merged, corrections=(Correction(c.down, scale * c.up),)).logits(
            0, toy_problem.batches[0][0]
        )
        for scale in (0.0, 1.0, 2.0)
        for c in merged.corrections[:1]
    )
    assert_close(twice - corrected, corrected - plain, rtol=0, atol=1e-5)
    off = merged.corrections[0](z[:count])
    solved = torch.linalg.lstsq(
        torch.cat([off, torch.zeros_like(off)]),
        torch.cat([plain - corrected, torch.zeros_like(plain)]),
    ).solution
    assert_close(off @ solved, plain - corrected, rtol=0, atol=1e-4)


def test_the_representation_leaves_padding_out():
    class Output:
        last_hidden_state = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]]])

    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = Batch({"attention_mask": mask}, torch.full((2,), 0.5))
    assert representation(Output(), batch).tolist() == [[2.0], [4.0]]
    unmasked = Batch({"input_ids": mask}, torch.full((2,), 0.5))
    assert_close(representation(Output(), unmasked), torch.tensor([[104 / 3], [4.0]]))


def test_an_output_without_one_vector_per_input_is_refused():
    batch = Batch({"x": torch.zeros(2, 3)}, torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=r"must put out \[B, D\].*got tuple"):
        representation((torch.zeros(2, 3),), batch)
    tokens = Batch(
        {"input_ids": torch.zeros(2, 3, dtype=torch.long)},
        torch.ones(1),
        torch.zeros(2, 3, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match="got Tensor of a language model"):
        representation(torch.zeros(2, 3, 5), tokens)


def test_surgery_of_a_module_that_does_not_run_is_refused():
    problem = replace(linear_problem(), module=linear_problem().module)
    with pytest.raises(ValueError, match=r"must put out \[B, D\].*got NoneType"):
        surgery(problem, progress=False)


def test_surgery_of_what_is_no_single_vector_is_refused():
    with pytest.raises(ValueError, match="gives one vector and asks for no score, got 'surgery'"):
        surgery(linear_problem(), merge="surgery", progress=False)


def test_surgery_of_what_asks_for_a_score_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "scored", average)
    monkeypatch.setitem(METHODS.facts, "scored", {"needs": "a validation score"})
    with pytest.raises(ValueError, match="asks for no score, got 'scored'"):
        surgery(linear_problem(), merge="scored", progress=False)


# --- bad input ------------------------------------------------------------------------------------

LEARNERS = [prodistill, distillation, surgery]


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_size_that_is_none_is_refused(method, lr):
    with pytest.raises(ValueError, match=f"lr must be above 0 and finite, got {lr}; leave it out"):
        method(linear_problem(), lr=lr, progress=False)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (prodistill, "epochs"),
        (distillation, "epochs"),
        (surgery, "steps"),
        (surgery, "rank"),
        (surgery, "batch_size"),
    ],
)
def test_a_count_below_1_is_refused(method, name):
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got 0; leave it"):
        method(linear_problem(), **{name: 0, "progress": False})


@pytest.mark.parametrize("method", [*LEARNERS, adamerging, adamerging_plus_plus])
def test_inputs_are_asked_for_by_the_methods_name(method):
    name = method.__name__.replace("_plus_plus", r"\+\+")
    with pytest.raises(ValueError, match=f"{name} needs unlabelled inputs of every task; none"):
        method(fewer(linear_problem(), 0), progress=False)
    with pytest.raises(ValueError, match="inputs must be 1 or more per task, got 0"):
        method(linear_problem(), inputs=0, progress=False)


@pytest.mark.parametrize("method", [prodistill, surgery])
def test_a_problem_without_a_module_is_refused(method):
    problem = replace(linear_problem(), module=None)
    with pytest.raises(ValueError, match=f"{method.__name__} looks inside .* its `module`"):
        method(problem, progress=False)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (prodistill, "prodistill: NaN or inf at step 0 of stage 'embeddings'; lower lr .now 0.01"),
        (surgery, "surgery: NaN or inf at step 0; lower lr .now 0.001. or check the experts"),
        (distillation, r"distillation: step 0, lr 0.0001 \(lower it if .*: logits hold NaN"),
    ],
)
def test_a_fit_that_stops_being_finite_says_where(method, message):
    problem = linear_problem()
    broken = problem.batches[0][0].inputs["x"].clone()
    broken[0, 0] = float("inf")
    first = replace(problem.batches[0][0], inputs={"x": broken})
    batches = [[first], *problem.batches[1:]]
    with pytest.raises(Diverged, match=message):
        method(replace(problem, batches=batches), progress=False)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (distillation, "distillation: after step 0 the parameters are .* over 100 times as far"),
        (prodistill, "prodistill: after step 0 of stage 'embeddings' the parameters are .* expert"),
    ],
)
def test_a_fit_that_runs_away_from_the_base_is_stopped_at_its_step(method, message):
    with pytest.raises(Diverged, match=f"{message}.*lower lr .now 1000.0."):
        method(linear_problem(), lr=1e3, progress=False)


def test_a_correction_that_outgrows_what_it_corrects_is_stopped_at_its_step():
    message = "surgery: a correction's mean entry is .* at step 0, above .*; lower lr .now 1000.0."
    with pytest.raises(Diverged, match=message):
        surgery(linear_problem(), lr=1e3, progress=False)


def test_how_far_is_too_far():
    """A hundred times as far as the farthest expert; where none moved, not at all."""
    reach = torch.tensor(2.0)
    check_distance("fit", torch.tensor(200.0), reach, 3, 0.1)
    check_distance("fit", torch.tensor(0.0), torch.tensor(0.0), 3, 0.1)
    for way in (200.1, float("inf"), float("nan")):
        with pytest.raises(Diverged, match=r"fit: after step 3 .* any expert \(2\); lower lr"):
            check_distance("fit", torch.tensor(way), reach, 3, 0.1)


def test_bytes_of_a_corrected_model_are_those_of_the_merge_and_two_factors_per_task():
    problem = linear_problem(dtype=torch.float32)
    merged = surgery(problem, rank=3, steps=1, progress=False)
    assert merged.nbytes == (6 * 6 + 6 * 6 + 6 + 4 * 6 + 4 + 3 * (2 * 3 * 4)) * 4


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="unknown divergence 'jss'; choose one of"):
        distillation(linear_problem(), divergence="jss", progress=False)
