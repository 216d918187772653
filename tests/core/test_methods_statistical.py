"""Fisher and RegMean: closed forms, slower definitions, and cases that they solve exactly."""

import math
from dataclasses import replace

import pytest
import torch
from comparisons import inputs_of, mean_divergence, near
from helpers import QUIET, batch_of, layout_of, linear_problem, module_problem, normal, problem_of
from torch import nn
from torch.func import jacrev

from divmerge_core.merging.layer_inputs import visit_layer_inputs
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import statistical
from divmerge_core.methods.arithmetic import average
from divmerge_core.methods.regression import regmean, regmean_plus_plus
from divmerge_core.methods.statistical import examples, fisher, fisher_diagonal

FIRST = "embeddings.weight"
every_method = pytest.mark.parametrize("method", [fisher, regmean, regmean_plus_plus])


def numbers(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- Fisher information
def switch(*inputs: list[float], slopes: tuple[float, ...]) -> MergeProblem:
    """One parameter w, and two answers with logits (w x, 0), so that p = sigmoid(w x)."""

    def forward(parameters, pairs):
        scores = [batch.inputs["x"] @ parameters["weight"] for _, batch in pairs]
        return [torch.stack([score, torch.zeros_like(score)], dim=1) for score in scores]

    batches = [[batch_of(numbers(x)[:, None])] for x in inputs]
    problem = problem_of(*([slope] for slope in slopes), weight=(1,))
    return replace(problem, batches=batches, forward=forward)


def test_the_information_of_a_logistic_slope_is_x_squared_times_p_times_1_minus_p():
    """An undecided input counts in full: code that sums before it squares finds nothing."""
    problem = switch([1.0, -2.0, 0.5], slopes=(0.7,))
    expected = sum(x**2 * math.exp(0.7 * x) / (1 + math.exp(0.7 * x)) ** 2 for x in (1, -2, 0.5))
    found = fisher_diagonal(problem, problem.vectors.expert("task0"), 0)
    near(found, numbers([expected / 3]))
    problem = switch([3.0], slopes=(0.0,))
    near(fisher_diagonal(problem, numbers([0]), 0), numbers([9 / 4]))


def test_the_information_is_the_spread_of_the_logits_slopes_under_the_models_own_answers():
    """diag of J^T (diag p - p p^T) J, mean over inputs, with J from forward definitions at once."""
    problem = linear_problem(num_tasks=2)
    layout, flat = problem.vectors.layout, problem.vectors.expert("task1")
    total = torch.zeros_like(flat)
    for batch in problem.batches[1]:

        def logits(vector, batch=batch):
            return problem.forward(layout.unflatten(vector), [(1, batch)])[0]

        p = logits(flat).softmax(-1)  # [B, V]
        slopes = jacrev(logits)(flat)  # [B, V, N]
        spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        total += torch.einsum("bvn,bvw,bwn->n", slopes, spread, slopes)
    near(fisher_diagonal(problem, flat, 1), total / 15)
    regrouped = [batch_of(part) for part in inputs_of(problem, 1).split([7, 4, 4])]
    other = replace(problem, batches=[problem.batches[0], regrouped])
    near(fisher_diagonal(other, flat, 1), total / 15)


def test_positions_of_an_answer_share_the_weight_of_their_input():
    """A language model's rows: each position is asked by itself, rows count alike."""
    answer = torch.tensor([[False, True, True], [True, False, False]])
    tokens = numbers([[9.0, 1.0, 2.0], [3.0, 9.0, 9.0]])

    def forward(parameters, pairs):
        scores = [parameters["weight"] * batch.inputs["x"][batch.answer] for _, batch in pairs]
        return [torch.stack([score, 0 * score], dim=1) for score in scores]

    batches = [[Batch({"x": tokens}, numbers([0.25, 0.25, 0.5]), answer)]]
    problem = replace(switch([0.0], slopes=(0.0,)), batches=batches, forward=forward)
    rows = list(examples(problem.batches[0]))
    assert [row.weight.tolist() for row in rows] == [[0.25, 0.25], [0.5]]
    assert [int(row.answer.sum()) for row in rows] == [2, 1]
    found = fisher_diagonal(problem, numbers([0]), 0)
    near(found, numbers([(0.25 * 1 + 0.25 * 4 + 0.5 * 9) / 4]))


def test_parameters_that_the_answers_do_not_depend_on_have_no_information():
    problem = switch([1.0], slopes=(0.7,))
    vectors = TaskVectors(layout_of(idle=(2,), weight=(1,)), ("a",), normal(3), normal(1, 3))
    problem = replace(problem, vectors=vectors)
    found = fisher_diagonal(problem, vectors.expert("a"), 0)
    assert found[:2].tolist() == [0, 0] and found[2] > 0


# --- Fisher merging
def corners() -> MergeProblem:
    """Two experts, (1, 0) and (0, 1), around a base at (5, 5)."""
    base = numbers([5.0, 5.0])
    rows = torch.eye(2, dtype=torch.float64) - base
    vectors = TaskVectors(layout_of(weight=(2,)), ("a", "b"), base, rows)
    return replace(switch([1.0], [1.0], slopes=(0.0, 0.0)), vectors=vectors)


@every_method
def test_no_more_inputs_are_read_than_asked_for(method):
    problem = linear_problem(batches=4)
    fewer = replace(problem, batches=[[every[0], every[3]] for every in problem.batches])
    near(method(problem, inputs=10, **QUIET), method(fewer, **QUIET), 0)


@pytest.mark.parametrize(
    ("information", "options", "expected"),
    [
        ([[3, 1], [1, 1]], {"normalise": False}, [3 / 4, 1 / 2]),
        # (3, 4) / 5 against (0, 2) / 2; the zero is raised to the floor
        ([[3, 4], [0, 2]], {"floor": 1e-12}, [1.0, 1 / 1.8]),
        ([[3000, 4000], [0, 2]], {"floor": 1e-12}, [1.0, 1 / 1.8]),  # lengths are divided out
        # (3, 4) / 5 against (0.5, 2) / 2: the zero is raised before it is divided
        ([[3, 4], [0, 2]], {"floor": 0.5}, [0.6 / (0.6 + 0.25), 1 / 1.8]),
        ([[1e-9, 3e-9], [2e-8, 0]], {"normalise": False}, [0.5, 0.5]),  # all below the floor
        ([[0, 0], [0, 0]], {}, [0.5, 0.5]),
    ],
)
def test_experts_are_weighed_parameter_by_parameter(monkeypatch, information, options, expected):
    given = [numbers(row) for row in information]
    monkeypatch.setattr(statistical, "fisher_diagonal", lambda problem, flat, task: given[task])
    near(fisher(corners(), **options, **QUIET), numbers(expected))


def test_the_fisher_merge_is_the_weighted_mean_of_the_experts(problem):
    experts = [problem.vectors.expert(task) for task in problem.vectors.tasks]
    weights = []
    for task, flat in enumerate(experts):
        information = fisher_diagonal(problem, flat, task)
        weights.append(information.clamp(min=1e-6) / information.norm())
    expected = sum(w * flat for w, flat in zip(weights, experts, strict=True)) / sum(weights)
    near(fisher(problem, **QUIET), expected)


# --- RegMean
def layer(*deltas: torch.Tensor, inputs: list[torch.Tensor]) -> MergeProblem:
    """One linear layer without bias, experts that differ by `deltas`, and each task's inputs."""
    width, features = deltas[0].shape
    model = nn.Sequential(nn.Linear(features, width, bias=False)).double()
    base = {"0.weight": normal(width, features, seed=50)}
    experts = {f"task{n}": {"0.weight": base["0.weight"] + d} for n, d in enumerate(deltas)}
    batches = [[batch_of(part) for part in x.split(4)] for x in inputs]
    return module_problem(model, experts, batches, base=base)


def weights(problem: MergeProblem, flat: torch.Tensor) -> torch.Tensor:
    return problem.vectors.layout.unflatten(flat)["0.weight"]


def experts_of(problem: MergeProblem) -> list[torch.Tensor]:
    return [weights(problem, problem.vectors.expert(task)) for task in problem.vectors.tasks]


def test_regmean_is_the_least_squares_fit_of_the_experts_outputs():
    """All tasks' rows in one system, each task's divided by the root of its number of rows."""
    xs = [normal(count, 5, seed=count) for count in (8, 20)]
    problem = layer(normal(3, 5, seed=1), normal(3, 5, seed=2), inputs=xs)
    rows = torch.cat([x / len(x) ** 0.5 for x in xs])
    pairs = zip(xs, experts_of(problem), strict=True)
    targets = torch.cat([x @ w.T / len(x) ** 0.5 for x, w in pairs])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    near(weights(problem, regmean(problem, off_diagonal=1.0, **QUIET)), expected, 1e-6)


def test_regmean_of_correlated_columns_as_worked_out_by_hand():
    """G_1 = [[1, a], [a, 1]] from x = (1, 1) and G_2 = I; with D_1 = (1, 0) and D_2 = 0
    the change is (1, a) (G_1 + I)^-1 = (2 - a^2, a) / (4 - a^2).
    """
    xs = [torch.ones(1, 2).double(), 2**0.5 * torch.eye(2, dtype=torch.float64)]
    deltas = numbers([[1.0, 0.0]]), torch.zeros(1, 2).double()
    problem, a = layer(*deltas, inputs=xs), 0.5
    found = regmean(problem, off_diagonal=a, **QUIET) - problem.vectors.base
    near(found, numbers([2 - a**2, a]) / (4 - a**2), 1e-7)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.95, 1.0])
def test_regmean_averages_what_reads_the_same_inputs_in_all_tasks_or_nothing(off_diagonal):
    deltas, options = (normal(3, 4, seed=1), normal(3, 4, seed=2)), {"off_diagonal": off_diagonal}
    for scale in (0.0, 1.0):
        problem = layer(*deltas, inputs=[scale * normal(9, 4)] * 2)
        near(regmean(problem, **options, **QUIET), average(problem), 1e-7)
    xs = [normal(9, 4, seed=n) * torch.tensor([1.0, 1.0, 0.0, 1.0]) for n in range(2)]
    problem = layer(*deltas, inputs=xs)
    merges = regmean(problem, **options, **QUIET), average(problem)
    found, mean = (weights(problem, flat) for flat in merges)
    near(found[:, 2], mean[:, 2], 1e-7)
    assert (found - mean).abs().max() > 0.01


def test_where_the_inputs_leave_a_choice_weights_are_those_nearest_to_the_average():
    """Features 0 and 1 are always equal, so that only the sum of their weights shows."""
    xs = [normal(9, 4, seed=n)[:, [0, 0, 1, 2]] for n in range(2)]
    problem = layer(normal(3, 4, seed=1), normal(3, 4, seed=2), inputs=xs)
    found = weights(problem, regmean(problem, off_diagonal=1.0, **QUIET))
    mean = weights(problem, average(problem))
    near(found[:, 0] - found[:, 1], mean[:, 0] - mean[:, 1], 1e-6)
    assert (found[:, 0] - mean[:, 0]).abs().max() > 0.01


@pytest.mark.parametrize("method", [regmean, regmean_plus_plus])
def test_biases_are_averaged(method, problem):
    found = problem.vectors.layout.unflatten(method(problem, **QUIET))
    expected = problem.vectors.layout.unflatten(average(problem))
    for name in found:
        if name.endswith("bias"):
            near(found[name], expected[name])
        else:
            assert (found[name] - expected[name]).abs().max() > 1e-3


def test_a_layer_reads_what_the_expert_itself_puts_before_it(problem):
    """The last layer by loops over tokens, in every expert's own activations."""
    name, sums = "encoder.layer.1.dense.weight", [0, 0]
    for task, expert in enumerate(problem.vectors.tasks):
        flat, seen = problem.vectors.expert(expert), []
        visit_layer_inputs(problem, flat, task, lambda n, x, seen=seen: seen.append((n, x)))
        tokens = torch.cat([x for n, x in seen if n == name])
        gram = sum(torch.outer(token, token) for token in tokens) / len(tokens)
        gram = torch.where(torch.eye(6).bool(), gram, 0.95 * gram)
        weight = problem.vectors.layout.unflatten(flat)[name]
        sums = [sums[0] + gram, sums[1] + weight @ gram]
    expected = sums[1] @ torch.linalg.inv(sums[0])
    found = problem.vectors.layout.unflatten(regmean(problem, **QUIET))[name]
    near(found, expected, 1e-6)


# --- RegMean++
def test_regmean_plus_plus_in_one_block_is_regmean(problem):
    expected = regmean(problem, **QUIET)
    near(regmean_plus_plus(problem, grouping="task", **QUIET), expected, 0)
    one = problem.vectors.layout.unflatten(expected)
    other = problem.vectors.layout.unflatten(regmean_plus_plus(problem, **QUIET))
    near(one[FIRST], other[FIRST], 0)  # by blocks, the first reads the same inputs


def test_regmean_plus_plus_reads_what_the_merged_blocks_put_out():
    """Block by block, with the linear model's own arithmetic in place of hooks."""
    problem = linear_problem(num_tasks=2)
    unflatten, task_names = problem.vectors.layout.unflatten, problem.vectors.tasks
    experts = [unflatten(problem.vectors.expert(task)) for task in task_names]
    xs, expected = [inputs_of(problem, task) for task in range(2)], []
    for name in (FIRST, "encoder.layer.0.dense.weight", "encoder.layer.1.dense.weight"):
        grams = [x.T @ x / len(x) for x in xs]
        grams = [0.95 * gram + 0.05 * torch.diag(gram.diagonal()) for gram in grams]
        moment = sum(e[name] @ gram for e, gram in zip(experts, grams, strict=True))
        expected.append(torch.linalg.solve(sum(grams), moment.T).T)
        shift = name.replace("weight", "bias")
        bias = (experts[0][shift] + experts[1][shift]) / 2 if shift in experts[0] else 0
        xs = [x @ expected[-1].T + bias for x in xs]
    found = unflatten(regmean_plus_plus(problem, **QUIET))
    for weight, name in zip(expected, (n for n in found if n.endswith("weight")), strict=True):
        near(found[name], weight, 1e-6)


def test_logits_that_are_not_finite_are_refused_with_task_and_input(problem):
    second = problem.batches[1][1]
    second.inputs["x"][2] = math.inf  # the eighth input of the second task
    with pytest.raises(ValueError, match="of 'task1' gives logits .* at input 7; check"):
        fisher(problem, **QUIET)


@every_method
def test_merged_transformers_answer_more_like_their_experts_than_the_average(toy_problem, method):
    found = mean_divergence(toy_problem, method(toy_problem, inputs=8, **QUIET))
    assert found < mean_divergence(toy_problem, average(toy_problem))
