"""The optimisation loop: its gradient, what it visits, what it reaches, and what it is shown."""

import copy
import importlib
import inspect
import math
import sys
import threading
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers import fewer, layout_of, linear_problem, naive_loss, naive_merge
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES, entropy, js, objective
from divmerge_core.kernels.expert_cache import log_softmax
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.merging import fit
from divmerge_core.merging.coefficients import GROUPINGS, Coefficients, groups_of
from divmerge_core.merging.fit import OPTIMIZERS, fit_coefficients
from divmerge_core.merging.fit_checkpoint import code_of, digest
from divmerge_core.merging.merged_model import (
    GRADIENTS,
    MergedModel,
    expert_logits,
    moved_tensors,
    schedule,
)
from divmerge_core.merging.problem import Batch, Diverged, MergeProblem
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.methods import METHODS

every_grouping = pytest.mark.parametrize("grouping", GROUPINGS)
OBJECTIVES = {**DIVERGENCES, "entropy": lambda expert, merged: entropy(merged)}


def coefficients_of(problem: MergeProblem, **options) -> Coefficients:
    return Coefficients(problem.vectors.layout, len(problem.vectors.tasks), **options)


def core_gradient(problem: MergeProblem, objective, **options):
    """dL/d(free parameters) as the loop's live buffers give it, from one step."""
    coefficients = coefficients_of(problem, **options)
    start = copy.deepcopy(coefficients)
    fit_coefficients(fewer(problem, 1), coefficients, objective, epochs=1, progress=False)
    return start, coefficients.raw.grad


def naive_gradient(problem: MergeProblem, start: Coefficients, objective, grouping: str):
    """The same by autograd through a dictionary of tensors."""
    _, numbers = groups_of(problem.vectors.layout, grouping)
    loss = naive_loss(problem, naive_merge(problem, start(), numbers), objective)
    return torch.autograd.grad(loss, start.raw)[0]


# --- the gradient ---------------------------------------------------------------------------------


CASES = [(name, "block", "identity") for name in OBJECTIVES]
CASES += [("js", grouping, "identity") for grouping in GROUPINGS if grouping != "block"]
CASES += [("js", "block", link) for link in ("sigmoid", "softmax")]


@pytest.mark.parametrize(("objective", "grouping", "link"), CASES)
def test_the_gradient_is_autograds_through_the_naive_merge(problem, objective, grouping, link):
    start, found = core_gradient(problem, OBJECTIVES[objective], grouping=grouping, link=link)
    expected = naive_gradient(problem, start, OBJECTIVES[objective], grouping)
    assert expected.abs().max() > 1e-4
    assert (found - expected).norm() < 1e-5 * expected.norm()


@every_grouping
def test_the_gradient_agrees_with_finite_differences(problem, grouping):
    _, numbers = groups_of(problem.vectors.layout, grouping)
    start, found = core_gradient(problem, js, grouping=grouping)
    at, step = start().detach().double(), 1e-5

    def loss(coeffs):
        return naive_loss(problem, naive_merge(problem, coeffs, numbers), js)

    for t, g in [(0, 0), (1, at.shape[1] - 1), (2, at.shape[1] // 2)]:
        nudge = torch.zeros_like(at)
        nudge[t, g] = step
        slope = (loss(at + nudge) - loss(at - nudge)) / (2 * step)
        assert_close(found[t, g].double(), slope, rtol=1e-5, atol=1e-8)


@every_grouping
def test_the_merges_gradient_passes_gradcheck(grouping):
    """grouped_merge and grouped_inner, joined into an autograd function, in float64."""
    problem = linear_problem(features=2, classes=2, num_tasks=2)
    vectors = problem.vectors
    segments = coefficients_of(problem, grouping=grouping).segments

    class Merge(torch.autograd.Function):
        @staticmethod
        def forward(context, coeffs):
            return grouped_merge(vectors.base, vectors.deltas, coeffs, segments)

        @staticmethod
        def backward(context, grad):
            return grouped_inner(grad, vectors.deltas, segments)

    coeffs = torch.rand(2, segments.num_groups, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Merge.apply, (coeffs,))


def test_the_gradient_is_autograds_on_a_transformer_too(toy_problem):
    start, found = core_gradient(toy_problem, js, grouping="layer")
    expected = naive_gradient(fewer(toy_problem, 1), start, js, "layer")
    assert (found - expected).norm() < 1e-5 * expected.norm()


# --- the loop -------------------------------------------------------------------------------------


def losses_of(
    problem: MergeProblem, coefficients: Coefficients, objective=js, **options
) -> list[float]:
    losses = []
    fit_coefficients(
        problem,
        coefficients,
        objective,
        callback=lambda step: losses.append(step.loss),
        progress=False,
        **options,
    )
    return losses[:-1]


@pytest.mark.parametrize(
    ("grouping", "link"), [("task", "identity"), ("block", "sigmoid"), ("layer", "softmax")]
)
def test_the_loss_falls(problem, grouping, link):
    coefficients = coefficients_of(problem, grouping=grouping, link=link)
    losses = losses_of(problem, coefficients, epochs=8, lr=0.03)
    epoch = len(problem.batches[0])
    assert sum(losses[-epoch:]) < 0.95 * sum(losses[:epoch])


def test_one_expert_alone_has_nothing_to_lose():
    problem = linear_problem(num_tasks=1)
    losses = losses_of(problem, coefficients_of(problem), epochs=2)
    assert max(losses) < 1e-9


def test_the_result_is_the_merge_with_the_trained_coefficients(problem):
    coefficients = coefficients_of(problem, grouping="block")
    merged = fit_coefficients(problem, coefficients, js, epochs=2, progress=False)
    vectors = problem.vectors
    expected = grouped_merge(vectors.base, vectors.deltas, coefficients(), coefficients.segments)
    assert_close(merged, expected, rtol=0, atol=0)
    assert not torch.allclose(coefficients(), torch.tensor(1 / 3))


def test_a_fit_leaves_the_problem_as_it_was(problem):
    before = copy.deepcopy((problem.vectors, problem.batches))
    fit_coefficients(problem, coefficients_of(problem), js, epochs=1, progress=False)
    assert_close(problem.vectors.base, before[0].base, rtol=0, atol=0)
    assert_close(problem.vectors.deltas, before[0].deltas, rtol=0, atol=0)
    for every, old in zip(problem.batches, before[1], strict=True):
        for batch, old_batch in zip(every, old, strict=True):
            assert_close(batch.inputs["x"], old_batch.inputs["x"], rtol=0, atol=0)
    assert problem.vectors.base.grad is None and not problem.vectors.deltas.requires_grad


def test_the_objective_sees_the_expert_first_and_the_mean_is_weighted():
    """Three rows that weigh 1/2, 1/2 and 0: the third is as if it were not there."""
    problem = linear_problem(num_tasks=1, batches=1, rows=3)
    weight = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    batch = Batch(problem.batches[0][0].inputs, weight)
    weighted = MergeProblem(problem.vectors, [[batch]], problem.forward)
    seen, losses = [], []

    def objective(expert, merged):
        seen.append((expert, merged.detach().clone()))
        return (merged - expert).square().sum(-1)

    coefficients = coefficients_of(weighted, init=0.5)
    callback = lambda step: losses.append(step.loss)  # noqa: E731
    fit_coefficients(weighted, coefficients, objective, epochs=1, callback=callback, progress=False)
    (expert, merged), vectors = seen[0], weighted.vectors
    assert_close(expert, weighted.logits(vectors.expert("task0"), 0, batch))
    assert_close(merged, weighted.logits(vectors.base + 0.5 * vectors.deltas[0], 0, batch))
    rows = (merged - expert).square().sum(-1)
    assert_close(losses[0], (0.5 * (rows[0] + rows[1])).item())


def test_the_same_seed_gives_the_same_fit_and_another_order_another(problem):
    def fit(seed: int):
        coefficients = coefficients_of(problem, grouping="layer")
        return fit_coefficients(problem, coefficients, js, seed=seed, epochs=2, progress=False)

    assert torch.equal(fit(0), fit(0))
    assert not torch.equal(fit(0), fit(1))


def test_experts_are_asked_once(problem):
    asked = Counter()

    def forward(parameters, pairs):
        asked["expert" if not next(iter(parameters.values())).requires_grad else "merged"] += 1
        return problem.forward(parameters, pairs)

    counted = MergeProblem(problem.vectors, problem.batches, forward)
    fit_coefficients(counted, coefficients_of(problem), js, epochs=5, progress=False)
    assert asked == {"expert": 9, "merged": 15}


def test_the_experts_answers_given_as_targets_change_nothing(problem):
    ends = []
    for targets in (None, expert_logits(problem)):
        coefficients = coefficients_of(problem, grouping="block")
        options = {"targets": targets, "epochs": 2, "progress": False}
        ends.append(fit_coefficients(problem, coefficients, js, **options))
    assert torch.equal(*ends)


def test_targets_stand_in_for_the_experts(problem):
    """Held to its own answers, the merged model has nothing to lose and does not move."""
    coefficients = coefficients_of(problem, init=0.4)
    vectors = problem.vectors
    merged = grouped_merge(vectors.base, vectors.deltas, coefficients(), coefficients.segments)
    own = [
        [problem.logits(merged, task, batch).detach() for batch in batches]
        for task, batches in enumerate(problem.batches)
    ]
    losses = losses_of(problem, coefficients, targets=own, epochs=1)
    assert max(losses) < 1e-9
    assert_close(coefficients(), torch.full((3, 1), 0.4))


def lopsided(problem: MergeProblem) -> MergeProblem:
    """Three, two and one batches."""
    kept = [every[: 3 - n] for n, every in enumerate(problem.batches)]
    return replace(problem, batches=kept)


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_the_loss_on_all_inputs_is_each_tasks_mean_over_its_batches(problem, gradients):
    """Value and gradient, with other numbers of batches per task; and no step leaves a rest."""
    some = lopsided(problem)
    coefficients = coefficients_of(some, grouping="block")
    _, numbers = groups_of(some.vectors.layout, "block")
    targets = expert_logits(some)
    coeffs = coefficients().detach().double().requires_grad_()
    merged = naive_merge(some, coeffs, numbers)
    expected = 0
    for task, batches in enumerate(some.batches):
        for number, batch in enumerate(batches):
            logits = some.forward(merged, [(task, batch)])[0]
            each = batch.weight @ js(targets[task][number], logits)
            expected = expected + each / len(batches)
    (slope,) = torch.autograd.grad(expected, coeffs)
    live = MergedModel.of(some, coefficients, js, targets, gradients)
    live.merge()
    for _ in range(2):
        assert live.backward_all() == pytest.approx(expected.item(), rel=1e-6)
        assert_close(live.collect().double(), slope, rtol=1e-5, atol=1e-8)
    assert not live.collect().any()


# --- other optimisers -----------------------------------------------------------------------------


def test_lbfgs_ends_lower_than_adam_and_with_more_coefficients_no_higher(problem):
    ends = []
    fits = [("adam", 25, "layer"), ("lbfgs", 12, "layer"), ("lbfgs", 12, "task")]
    for name, epochs, grouping in fits:
        coefficients = coefficients_of(problem, grouping=grouping)
        options = {"optimizer": name, "epochs": epochs, "progress": False}
        fit_coefficients(problem, coefficients, js, **options)
        model = MergedModel.of(problem, coefficients, js, expert_logits(problem), "stream")
        model.merge()
        ends.append(model.backward_all())
    assert ends[1] < ends[0] and ends[1] <= ends[2]


@pytest.mark.parametrize("link", ["sigmoid", "softmax"])
def test_links_keep_their_promise_under_lbfgs(problem, link):
    coefficients = coefficients_of(problem, grouping="block", link=link)
    losses = losses_of(problem, coefficients, optimizer="lbfgs", epochs=8)
    assert min(losses) < 0.95 * losses[0]
    assert coefficients().min() > 0 and coefficients().max() < 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_epoch_is_a_pass_over_the_inputs(problem, optimizer):
    """Each batch is read once an epoch."""
    read = Counter()

    def forward(parameters, pairs):
        if torch.is_grad_enabled():
            read.update(id(batch) for _, batch in pairs)
        return problem.forward(parameters, pairs)

    counted = MergeProblem(problem.vectors, problem.batches, forward)
    losses_of(counted, coefficients_of(problem), optimizer=optimizer, epochs=5)
    assert len(read) == 9
    assert set(read.values()) == {5}


def test_the_best_point_is_kept(problem):
    coefficients, seen = coefficients_of(problem, grouping="layer"), []
    merged = fit_coefficients(
        problem,
        coefficients,
        js,
        optimizer="lbfgs",
        epochs=7,
        callback=lambda step: seen.append((step.loss, step.coeffs)),
        progress=False,
    )
    lowest = min(range(len(seen) - 1), key=lambda n: seen[n][0])
    assert torch.equal(coefficients().detach(), seen[lowest][1])
    vectors, segments = problem.vectors, coefficients.segments
    assert torch.equal(
        merged.detach(), grouped_merge(vectors.base, vectors.deltas, coefficients(), segments)
    )


def test_step_k_of_n_annealed_has_the_size_lr_times_one_minus_k_over_n():
    """Under a gradient that never changes, Adam's steps are its step sizes."""
    layout = layout_of(w=(2,))
    vectors = TaskVectors(layout, ("one",), torch.zeros(2), torch.ones(1, 2))
    batch = Batch({"x": torch.zeros(1, 1)}, torch.ones(1))

    def forward(parameters, pairs):
        return [parameters["w"][None] for _ in pairs]

    seen = []
    fit_coefficients(
        MergeProblem(vectors, [[batch] * 3], forward),
        Coefficients(layout, 1, init=0.0),
        lambda expert, merged: -merged.sum(-1),
        optimizer="annealed_adam",
        epochs=2,
        callback=lambda step: seen.append(step.coeffs.item()),
        progress=False,
    )
    steps = [after - before for before, after in pairwise(seen)]
    assert steps == pytest.approx([0.01 * (1 - k / 6) for k in range(6)], rel=1e-4)


@pytest.mark.parametrize("method", ["divmerge", "adamerging", "adamerging++"])
def test_methods_hand_their_optimiser_on(problem, method):
    found, expected = (
        METHODS[method](problem, grouping="task", progress=False, **options)
        for options in ({"optimizer": "lbfgs", "epochs": 6}, {"epochs": 6})
    )
    assert torch.isfinite(found).all() and not torch.equal(found, expected)


@pytest.mark.parametrize(("seed", "scale"), [(0, 3.0)])
def test_a_line_search_goes_on_where_float32_would_overflow(seed, scale):
    """Chi squared grows so fast that fourth powers of its gradient do; the fit still falls."""
    problem = linear_problem(seed=seed, scale=scale)
    losses = losses_of(
        *(problem, coefficients_of(problem, grouping="layer"), DIVERGENCES["chi_squared"]),
        optimizer="lbfgs",
        epochs=12,
    )
    assert all(map(math.isfinite, losses)) and min(losses) < losses[0]


def walled(wall: float, outside) -> tuple[MergeProblem, list[float]]:
    """A loss (coefficient - 1)^2 below a wall; beyond it the logits, or the loss, are undefined."""
    layout, asked = layout_of(w=(1,)), []
    vectors = TaskVectors(layout, ("one",), torch.zeros(1), torch.ones(1, 1))
    batch = Batch({"x": torch.zeros(1, 1)}, torch.ones(1))

    def forward(parameters, pairs):
        asked.append(parameters["w"].item())
        return [outside(parameters["w"][None]) for _ in pairs]

    return MergeProblem(vectors, [[batch]], forward), asked


def beyond(wall, value):
    return lambda w: w if w.item() < wall else w * value


def held(expert, merged):
    """5 (coefficient - 1)^2; undefined logits are refused as every divergence refuses them."""
    log_softmax(merged)
    return 5 * (merged - 1).square().sum(-1)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_minimum_is_found_beside_points_without_a_value(value):
    problem, asked = walled(1.1, beyond(1.1, value))
    coefficients = coefficients_of(problem, init=0.2)
    fit_coefficients(problem, coefficients, held, optimizer="lbfgs", epochs=30, progress=False)
    assert max(asked[1:]) > 1.1, "no trial point lay beyond the wall"
    assert_close(coefficients(), torch.ones(1, 1), rtol=1e-3, atol=1e-3)


def test_no_possible_step_is_reported_with_advice_that_fits(problem):
    """All but the start is beyond the wall."""
    walled_problem, _ = walled(0.2, lambda w: w if w.item() == 0 else w * math.nan)
    options = {"optimizer": "lbfgs", "epochs": 9, "progress": False}
    with pytest.raises(Diverged, match=r"none of 8 steps .*\(init\), .*'adam'") as told:
        fit_coefficients(walled_problem, coefficients_of(walled_problem, init=0.0), held, **options)
    assert "lower lr" not in str(told.value)
    nowhere, _ = walled(0.0, beyond(-1.0, math.nan))
    with pytest.raises(Diverged, match=r"loss is nan at step 0, .*; start elsewhere \(init\)"):
        fit_coefficients(nowhere, coefficients_of(nowhere, init=0.0), held, **options)


@pytest.mark.parametrize("optimizer", ["adam", "annealed_adam"])
def test_a_last_gradient_that_is_no_number_is_reported(problem, optimizer):
    """Its step leads to coefficients that no later step would look at."""
    few = fewer(problem, 1)

    def broken(expert, merged):
        """0, with a slope that is NaN."""
        return torch.sqrt(0 * merged.sum(-1))

    options = {"optimizer": optimizer, "epochs": 1, "progress": False}
    with pytest.raises(Diverged, match="loss is None at step 1, the largest coefficient nan"):
        fit_coefficients(few, coefficients_of(few), broken, **options)


# --- what is visited, and what is shown -----------------------------------------------------------


@pytest.mark.parametrize("counts", [[4], [3, 3], [5, 2, 1]])
def test_every_epoch_visits_every_batch(counts):
    epochs = 3
    steps = schedule(counts, epochs, torch.Generator().manual_seed(0))
    assert len(steps) == epochs * max(counts)
    for epoch in range(epochs):
        taken = steps[epoch * max(counts) : (epoch + 1) * max(counts)]
        for task, count in enumerate(counts):
            assert {step[task] for step in taken} == set(range(count))
    if counts == [3, 3]:
        assert all(first == second for first, second in steps), "tasks share one order"
    assert steps[: max(counts)] != steps[max(counts) : 2 * max(counts)] or max(counts) < 4


def test_a_task_with_fewer_batches_takes_each_of_them_equally_often():
    """A third as many batches: each is drawn three times an epoch."""
    steps = schedule([6, 2], 1, torch.Generator().manual_seed(0))
    assert Counter(step[0] for step in steps) == dict.fromkeys(range(6), 1)
    assert Counter(step[1] for step in steps) == {0: 3, 1: 3}


def test_the_watcher_sees_every_step_and_the_end(problem):
    seen = []

    def callback(step):
        seen.append((step.number, step.loss, step.coeffs, step.flat.clone()))

    coefficients = coefficients_of(problem, grouping="block")
    merged = fit_coefficients(
        problem, coefficients, js, epochs=2, callback=callback, progress=False
    )
    assert [number for number, *_ in seen] == list(range(7))
    assert [loss is None for _, loss, *_ in seen] == [False] * 6 + [True]
    assert_close(seen[0][2], torch.full((3, 3), 1 / 3))
    assert_close(seen[-1][2], coefficients().detach())
    assert_close(seen[-1][3], merged)
    vectors, segments = problem.vectors, coefficients.segments
    for _, _, coeffs, flat in seen:
        assert_close(flat, grouped_merge(vectors.base, vectors.deltas, coeffs, segments))


# --- what is refused ------------------------------------------------------------------------------


def test_a_task_without_inputs_is_named(problem):
    bare = MergeProblem(problem.vectors, [problem.batches[0], [], []], problem.forward)
    with pytest.raises(
        ValueError, match=r"needs unlabelled inputs .*none for \['task1', 'task2'\]"
    ):
        fit_coefficients(bare, coefficients_of(problem), js, progress=False)


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}, {"lr": float("inf")}],
)
def test_epochs_and_step_size_must_be_positive(problem, options):
    with pytest.raises(ValueError, match="epochs must be 1 or more and lr above 0 and finite, got"):
        fit_coefficients(problem, coefficients_of(problem), js, progress=False, **options)


@pytest.mark.parametrize("epochs", [1, 2])
def test_coefficients_that_run_away_are_reported_with_their_step(problem, epochs):
    with pytest.raises(Diverged, match=r"at step \d, the largest coefficient .*e\+03; lower lr"):
        fit_coefficients(
            problem, coefficients_of(problem), js, lr=2e3, epochs=epochs, progress=False
        )


def test_a_loss_that_is_no_number_is_reported_with_its_step(problem):
    def objective(expert, merged):
        return merged.sum(-1) * float("inf")

    with pytest.raises(
        ValueError, match=r"the loss is -?(inf|nan) at step 0, the largest.*lower lr \(now 0.01\)"
    ):
        fit_coefficients(problem, coefficients_of(problem), objective, progress=False)


@pytest.mark.parametrize("cut", ["task", "batch", "rows"])
def test_targets_must_fit_the_batches(problem, cut):
    targets = expert_logits(problem)
    if cut == "task":
        targets = targets[:2]
    elif cut == "batch":
        targets[1] = targets[1][:2]
    else:
        targets[2][0] = targets[2][0][:4]
    with pytest.raises(ValueError, match=r"targets must hold logits \[A, V\] for every task"):
        fit_coefficients(problem, coefficients_of(problem), js, targets=targets, progress=False)


# --- a fit that is killed -------------------------------------------------------------------------


def stopping(problem: MergeProblem, passes: int) -> MergeProblem:
    """The problem, whose model can be asked so often and then stops the program."""
    left = iter(range(passes))

    def forward(parameters, pairs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return problem.forward(parameters, pairs)

    return replace(problem, forward=forward)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fit_goes_on_where_it_was_stopped_bit_for_bit(problem, optimizer, tmp_path):
    options = {"optimizer": optimizer, "epochs": 4, "lr": 0.05, "progress": False}
    whole = coefficients_of(problem, grouping="block")
    fit_coefficients(problem, whole, js, **options)

    path = tmp_path / "fit.pt"
    for passes in (17, 20, 1000):  # twice it is stopped; the third time it comes to its end
        again = coefficients_of(problem, grouping="block")
        stopped = stopping(problem, passes)
        try:
            fit_coefficients(stopped, again, js, checkpoint=path, **options)
        except KeyboardInterrupt:
            assert passes < 1000
    assert torch.equal(again.raw, whole.raw)


def test_what_is_known_is_not_asked_again(problem, tmp_path):
    path, first = tmp_path / "fit.pt", coefficients_of(problem)
    merged = fit_coefficients(problem, first, js, epochs=2, checkpoint=path, progress=False)
    again = coefficients_of(problem)
    options = {"targets": expert_logits(problem), "checkpoint": path, "progress": False}
    asked = stopping(problem, 3)  # the base, once a task: whether the model is the same
    found = fit_coefficients(asked, again, js, epochs=2, **options)
    assert torch.equal(found, merged)


def test_a_checkpoint_of_another_fit_is_refused(problem, tmp_path):
    path = tmp_path / "fit.pt"
    fit_coefficients(
        problem, coefficients_of(problem), js, epochs=1, checkpoint=path, progress=False
    )
    with pytest.raises(ValueError, match="a fit with other epochs, lr; delete it"):
        fit_coefficients(problem, coefficients_of(problem), js, epochs=2, lr=0.5, checkpoint=path)


def scaled(expert, merged, factor=1.0):
    return factor * js(expert, merged)


def kept_fit() -> dict:
    """All arguments of a fit that decide its result, as they are before anything is changed."""
    problem = linear_problem()
    options = {"optimizer": "adam", "epochs": 1, "lr": 0.01, "seed": 0, "gradients": "stream"}
    objective = partial(scaled, factor=2.0)
    coefficients = {"grouping": "block", "link": "sigmoid", "init": 0.3}
    given = {"problem": problem, "coefficients": coefficients, "objective": objective}
    return {**given, "targets": expert_logits(problem), **options}


def with_vectors(given: dict, **changes) -> dict:
    problem = given["problem"]
    return {"problem": replace(problem, vectors=replace(problem.vectors, **changes))}


def renamed(layout: Layout) -> Layout:
    """A last tensor that the model takes for another shape: it has as many numbers."""
    return Layout(layout.names, (*layout.shapes[:-1], (1, *layout.shapes[-1])))


def with_batch(given: dict, change) -> dict:
    """The last batch of the last task, changed."""
    *others, last = given["problem"].batches
    batches = [*others, [*last[:-1], change(last[-1])]]
    return {"problem": replace(given["problem"], batches=batches)}


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    """The same, but for its last number."""
    result = tensor.clone()
    result.view(-1)[-1] += 1e-6
    return result


def with_forward(given: dict) -> dict:
    forward = given["problem"].forward
    return {"problem": replace(given["problem"], forward=lambda *a: [2 * x for x in forward(*a)])}


def with_links(given: dict, **changes) -> dict:
    return {"coefficients": {**given["coefficients"], **changes}}


# What is changed -> the names by which it is refused, and the change itself.
CHANGES = {
    "optimizer": ("code, optimizer", lambda g: {"optimizer": "annealed_adam"}),
    "epochs": ("epochs", lambda g: {"epochs": 2}),
    "lr": ("lr", lambda g: {"lr": 0.02}),
    "seed": ("seed", lambda g: {"seed": 1}),
    "gradients": ("gradients", lambda g: {"gradients": "buffer"}),
    "objective": ("objective", lambda g: {"objective": js}),
    "objective, a number": ("objective", lambda g: {"objective": partial(scaled, factor=3.0)}),
    "objective, its text": ("objective", lambda g: {"objective": lambda p, q: 2 * js(p, q)}),
    "objective, temperature": ("objective", lambda g: {"objective": objective("js", 2.0)}),
    "targets": ("targets", lambda g: {"targets": [[nudged(x) for x in t] for t in g["targets"]]}),
    "coefficients, grouping": ("grouping, start", lambda g: with_links(g, grouping="layer")),
    "coefficients, link": ("link, start", lambda g: with_links(g, link="identity")),
    "coefficients, init": ("start", lambda g: with_links(g, init=0.4)),
    "vectors, layout": (
        "layout",
        lambda g: with_vectors(g, layout=renamed(g["problem"].vectors.layout)),
    ),
    "vectors, tasks": ("tasks", lambda g: with_vectors(g, tasks=("a", "b", "c"))),
    "vectors, base": (
        "base, model",
        lambda g: with_vectors(g, base=nudged(g["problem"].vectors.base)),
    ),
    "vectors, deltas": (
        "task vectors",
        lambda g: with_vectors(g, deltas=nudged(g["problem"].vectors.deltas)),
    ),
    "problem, forward": ("model", with_forward),
    "batch, inputs": (
        "inputs",
        lambda g: with_batch(g, lambda b: replace(b, inputs={"x": nudged(b.inputs["x"])})),
    ),
    "batch, weight": (
        "inputs",
        lambda g: with_batch(g, lambda b: replace(b, weight=nudged(b.weight))),
    ),
    "batch, answer": (
        "inputs",
        lambda g: with_batch(g, lambda b: replace(b, answer=torch.ones(5, 1, dtype=torch.bool))),
    ),
    "batch, expert": (
        "inputs",
        lambda g: with_batch(g, lambda b: replace(b, expert=torch.zeros(5, 4))),
    ),
}


def kept(path, given: dict) -> torch.Tensor:
    given = dict(given)
    problem, options = given.pop("problem"), given.pop("coefficients")
    coefficients = coefficients_of(problem, **options)
    return fit_coefficients(
        *(problem, coefficients, given.pop("objective")),
        checkpoint=path,
        progress=False,
        **given,
    )


@pytest.fixture(scope="module")
def kept_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "fit.pt"
    kept(path, kept_fit())
    return path


def test_the_same_fit_made_anew_finds_its_checkpoint(kept_path):
    assert torch.equal(kept(kept_path, kept_fit()), kept(None, kept_fit()))


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_a_fit_tells_its_checkpoint(kept_path, change):
    """Any one of them changed, the checkpoint is refused by the names of what differs."""
    names, make = CHANGES[change]
    given = kept_fit()
    with pytest.raises(ValueError, match=f"by a fit with other {names}; delete it or give"):
        kept(kept_path, {**given, **make(given)})


def test_every_argument_of_a_fit_is_among_what_decides_it():
    """What only tells of a fit, and what is refused with a checkpoint, is not."""
    tried = {change.partition(",")[0] for change in CHANGES}
    taken = set(inspect.signature(fit_coefficients).parameters)
    assert taken - {"checkpoint", "callback", "progress"} == tried & taken
    parts = {"vectors": TaskVectors, "batch": Batch, "problem": MergeProblem}
    for name, kind in parts.items():
        own = {change.partition(", ")[2] for change in CHANGES if change.startswith(f"{name},")}
        elsewhere = {"vectors", "batches", "module", "reducer"}  # module: see forward
        assert {one.name for one in fields(kind)} - elsewhere == own


def test_code_of_ones_own_and_of_the_package_tells_a_checkpoint(kept_path, monkeypatch):
    monkeypatch.setattr(fit, "package_digest", lambda: "other")
    with pytest.raises(ValueError, match="other code; delete it"):
        kept(kept_path, kept_fit())


def test_an_edited_module_of_ones_own_tells_its_functions_apart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for text in ("def loss(p, q): return q", "def loss(p, q): return 2 * q"):
        (tmp_path / "losses_of_my_own.py").write_text(text)
        sys.modules.pop("losses_of_my_own", None)
        importlib.invalidate_caches()
        found.append(code_of(importlib.import_module("losses_of_my_own").loss))
    assert found[0] != found[1]


HELPERS = """
SCALE = {scale}
def helper(q): return {helper}
def loss(p, q): return [helper(q) for _ in (1,)][0]
"""


@pytest.mark.parametrize("change", [{"scale": 3}, {"helper": "q * SCALE"}])
def test_an_objectives_own_helpers_and_numbers_are_part_of_it(change):
    found = []
    for given in ({"scale": 2, "helper": "q + SCALE"}, change):
        scope = {"__name__": "__main__"}
        exec(HELPERS.format(**{"scale": 2, "helper": "q + SCALE", **given}), scope)
        found.append(code_of(scope["loss"]))
    assert found[0] != found[1]


def test_what_an_objective_cannot_be_told_by_is_refused(problem, tmp_path):
    lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot tell .* from other functions .*or no checkpoint"):
        fit_coefficients(
            *(problem, coefficients_of(problem), lambda p, q: js(p, q) if lock else 0),
            checkpoint=tmp_path / "fit.pt",
            progress=False,
        )


@pytest.mark.parametrize("content", [b"", b"no fit", {"weights": torch.zeros(2)}])
def test_a_file_of_another_kind_is_no_checkpoint(problem, tmp_path, content):
    path = tmp_path / "fit.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="fit.pt holds no fit that was stopped; delete it or give"):
        fit_coefficients(problem, coefficients_of(problem), js, checkpoint=path, progress=False)


STORES = {
    "int8": lambda v: v.stored_as("int8"),
    "streamed": lambda v: v.stored_as("streamed"),
    "bfloat16": lambda v: v.stored_as("bfloat16"),
}


@pytest.mark.parametrize("store", STORES)
def test_every_store_has_a_digest_of_its_content(store):
    problems = [linear_problem(dtype=torch.float32, seed=seed) for seed in (0, 0, 1)]
    found = [digest(STORES[store](one.vectors).deltas) for one in problems]
    assert found[0] == found[1] != found[2]
    with pytest.raises(TypeError, match="object has no digest"):
        digest(object())


def test_tensors_that_no_expert_moved_take_no_gradient(problem):
    """A backward pass ends above them, and the coefficients are the same."""
    vectors, (start, stop) = problem.vectors, problem.vectors.layout.bounds[0]
    deltas = vectors.deltas.clone()
    deltas[:, start:stop] = 0
    still = replace(problem, vectors=replace(vectors, deltas=deltas))
    assert moved_tensors(still.vectors) == [False, True, True, True, True]
    for gradients in ("stream", "buffer"):
        seen = coefficients_of(still, grouping="layer")
        fit_coefficients(still, seen, js, epochs=1, gradients=gradients, progress=False)
        assert (seen()[:, 0] == 1 / 3).all() and (seen()[:, 1:] != 1 / 3).all()
    nothing = replace(vectors, deltas=torch.zeros_like(deltas))
    assert all(moved_tensors(nothing))
