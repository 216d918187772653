"""The optimisation loop: its gradient, what it visits, what it reaches, and what it is shown."""

import copy
from collections import Counter

import pytest
import torch
from helpers import fewer, linear_problem, naive_loss, naive_merge
from torch.testing import assert_close

from divmerge_core.coefficients import GROUPINGS, Coefficients, groups_of
from divmerge_core.divergences import DIVERGENCES, entropy, js
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.problem import (
    Batch,
    Diverged,
    MergeProblem,
    expert_logits,
    fit_coefficients,
    schedule,
)

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


@every_grouping
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_autograds_through_the_naive_merge(problem, grouping, objective):
    start, found = core_gradient(problem, OBJECTIVES[objective], grouping=grouping)
    expected = naive_gradient(problem, start, OBJECTIVES[objective], grouping)
    assert expected.abs().max() > 1e-4
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("link", ["sigmoid", "softmax"])
def test_the_gradient_goes_through_the_link(problem, link):
    start, found = core_gradient(problem, js, grouping="block", link=link)
    expected = naive_gradient(problem, start, js, "block")
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


@every_grouping
def test_the_gradient_is_autograds_on_a_transformer_too(toy_problem, grouping):
    start, found = core_gradient(toy_problem, js, grouping=grouping)
    expected = naive_gradient(fewer(toy_problem, 1), start, js, grouping)
    assert (found - expected).norm() < 1e-5 * expected.norm()


# --- the loop -------------------------------------------------------------------------------------


def losses_of(problem: MergeProblem, coefficients: Coefficients, **options) -> list[float]:
    losses = []
    fit_coefficients(
        problem,
        coefficients,
        js,
        watch=lambda step: losses.append(step.loss),
        progress=False,
        **options,
    )
    return losses[:-1]


@every_grouping
@pytest.mark.parametrize("link", ["identity", "sigmoid", "softmax"])
def test_the_loss_falls(problem, grouping, link):
    coefficients = coefficients_of(problem, grouping=grouping, link=link)
    losses = losses_of(problem, coefficients, epochs=20)
    epoch = len(problem.batches[0])
    assert sum(losses[-epoch:]) < 0.95 * sum(losses[:epoch])


def test_more_coefficients_fit_no_worse(problem):
    ends = []
    for grouping in ("task", "layer"):
        losses = losses_of(problem, coefficients_of(problem, grouping=grouping), epochs=30)
        ends.append(sum(losses[-3:]))
    assert ends[1] <= ends[0]


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
    watch = lambda step: losses.append(step.loss)  # noqa: E731
    fit_coefficients(weighted, coefficients, objective, epochs=1, watch=watch, progress=False)
    (expert, merged), vectors = seen[0], weighted.vectors
    assert_close(expert, weighted.logits(vectors.expert("task0"), 0, batch))
    assert_close(merged, weighted.logits(vectors.base + 0.5 * vectors.deltas[0], 0, batch))
    rows = (merged - expert).square().sum(-1)
    assert_close(losses[0], (0.5 * (rows[0] + rows[1])).item())


def test_the_loss_is_the_unweighted_sum_over_tasks(problem):
    together = losses_of(fewer(problem, 1), coefficients_of(problem), epochs=1)[0]
    _, numbers = groups_of(problem.vectors.layout, "task")
    start = coefficients_of(problem)()
    expected = naive_loss(problem, naive_merge(problem, start, numbers), js)
    assert_close(together, expected.item(), rtol=1e-6, atol=0)


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


def test_the_experts_answers_are_those_of_the_experts(problem):
    cached = expert_logits(problem)
    for number, (task, batches) in enumerate(
        zip(problem.vectors.tasks, problem.batches, strict=True)
    ):
        flat = problem.vectors.expert(task)
        for index, batch in enumerate(batches):
            assert_close(cached[number][index], problem.logits(flat, number, batch))


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
    assert steps[: max(counts)] != steps[max(counts) : 2 * max(counts)] or max(counts) < 4


def test_tasks_share_one_order():
    steps = schedule([6, 6], 2, torch.Generator().manual_seed(0))
    assert all(first == second for first, second in steps)


def test_the_watcher_sees_every_step_and_the_end(problem):
    seen = []

    def watch(step):
        seen.append((step.number, step.loss, step.coeffs, step.flat.clone()))

    coefficients = coefficients_of(problem, grouping="block")
    merged = fit_coefficients(problem, coefficients, js, epochs=2, watch=watch, progress=False)
    assert [number for number, *_ in seen] == list(range(7))
    assert [loss is None for _, loss, *_ in seen] == [False] * 6 + [True]
    assert_close(seen[0][2], torch.full((3, 3), 1 / 3))
    assert_close(seen[-1][2], coefficients().detach())
    assert_close(seen[-1][3], merged)
    vectors, segments = problem.vectors, coefficients.segments
    for _, _, coeffs, flat in seen:
        assert_close(flat, grouped_merge(vectors.base, vectors.deltas, coeffs, segments))


# --- a problem and its parts ----------------------------------------------------------------------


def test_a_part_of_a_problem_answers_as_the_whole(problem):
    part = problem.select(["task2", "task0"])
    assert part.vectors.tasks == ("task2", "task0")
    batch = problem.batches[2][0]
    assert part.batches[0][0] is batch
    flat = problem.vectors.base + 0.1
    assert_close(part.logits(flat, 0, batch), problem.logits(flat, 2, batch))


def test_a_part_keeps_every_tasks_own_head(toy_problem):
    flat = toy_problem.vectors.expert("place")
    batch = toy_problem.batches[1][0]
    alone = toy_problem.select(["place"])
    assert alone.logits(flat, 0, batch).shape[1] == 3
    assert_close(alone.logits(flat, 0, batch), toy_problem.logits(flat, 1, batch))


def test_a_problem_holds_no_labels(toy_problem):
    for batches in toy_problem.batches:
        for batch in batches:
            assert set(batch.inputs) == {"input_ids", "token_type_ids", "attention_mask"}
            assert batch.answer is None


# --- what is refused ------------------------------------------------------------------------------


def test_inputs_for_every_task_are_asked_for(problem):
    with pytest.raises(
        ValueError, match="3 tasks but inputs for 2; give one sequence of batches per"
    ):
        MergeProblem(problem.vectors, problem.batches[:2], problem.forward)


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
