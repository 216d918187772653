"""Methods that return no single model: identities, references by loops, and bad input."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from comparisons import answers
from helpers import INF, batch_of, fewer, layout_of, linear_problem, module_problem, normal, refuses
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from divmerge_core.divergences import entropy
from divmerge_core.merging.problem import Batch, Diverged, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.arithmetic import task_arithmetic
from divmerge_core.methods.forward import over_tokens, rows
from divmerge_core.methods.fused import logits_fusion
from divmerge_core.methods.mixture import Router, compressed, mlps
from divmerge_core.methods.routed import twin, wemoe

QUICK = {"steps": 3, "progress": False}


@pytest.fixture
def bert(tiny):
    """Three random experts around a tiny BERT, with padded inputs and a head per task."""
    heads = normal(3, 4, 32).float()
    experts = {
        f"task{t}": {
            name: tensor + 0.1 * normal(*tensor.shape, seed=10 * t + n).float()
            for n, (name, tensor) in enumerate(tiny.state.items())
        }
        for t in range(3)
    }
    mask = (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()

    def batch(task: int) -> Batch:
        generator = torch.Generator().manual_seed(task)
        words = torch.randint(5, 20, (3, 7), generator=generator) * mask
        inputs = {"input_ids": words, "token_type_ids": 0 * words, "attention_mask": mask}
        return Batch(inputs, torch.full((3,), 1 / 3))

    def forward(parameters, pairs):
        found = []
        for task, given in pairs:
            out = functional_call(tiny.encoder, dict(parameters), (), dict(given.inputs))
            found.append(over_tokens(out.last_hidden_state, given) @ heads[task].T)
        return found

    vectors = TaskVectors.from_states(tiny.state, experts)
    return MergeProblem(vectors, [[batch(task)] for task in range(3)], forward, tiny.encoder)


# --- routers
def test_a_router_of_two_matrices_is_what_its_formula_says():
    generator = torch.Generator().manual_seed(0)
    router = Router(4, 3, layers=2, start=0.3, generator=generator, like=torch.zeros(1).double())
    assert [tuple(matrix.shape) for matrix in router.matrices] == [(4, 4), (3, 4)]
    hidden = torch.randn(5, 2, 4, dtype=torch.float64, generator=generator)
    (first, last), (inner, outer) = router.matrices, router.biases
    for row, expected in zip(hidden.flatten(0, 1), router(hidden).flatten(0, 1), strict=True):
        assert_close(last @ (first @ row + inner).clamp(min=0) + outer, expected)
    for layers in (0, 1, 2):  # a fresh one says about its start and has small matrices
        options = {"layers": layers, "start": 0.3, "generator": torch.Generator()}
        router = Router(64, 3, like=torch.zeros(1), **options)
        assert_close(router(torch.ones(2, 64)), torch.full((2, 3), 0.3), rtol=0, atol=0.4)
        assert_close(router.biases[-1].data, torch.full((3,), 0.3), rtol=0, atol=0)
        assert all(0.008 < matrix.std() < 0.012 for matrix in router.matrices)


# --- wemoe
def test_a_constant_router_gives_task_arithmetic(problem, bert):
    """Of an encoder, whose MLPs are its linear layers outside attention, and of other models."""
    exact, rough = {"rtol": 1e-12, "atol": 1e-12}, {"rtol": 1e-4, "atol": 1e-5}
    for given, bounds in ((problem, exact), (plain_problem(True), exact), (bert, rough)):
        merged = wemoe(given, scale=0.7, router_layers=0, steps=0, progress=False)
        expected = answers(given, task_arithmetic(given, scale=0.7))
        assert_close(answers(given, merged), expected, **bounds)
    names = ("intermediate.dense.weight", "output.dense.weight")
    blocks = [f"encoder.layer.{n}" for n in range(2)]
    assert mlps(bert) == {block: [f"{block}.{name}" for name in names] for block in blocks}
    assert list(mlps(plain_problem(True))) == ["body.layer.0", "body.layer.1"]  # without a bias
    with refuses("wemoe found no MLP to route: it needs nn.Linear layers"):
        wemoe(plain_problem(False), **QUICK)


def test_outside_the_mlps_stands_task_arithmetic_and_inside_them_the_base(bert):
    merged = wemoe(bert, scale=0.4, **QUICK)
    expected = bert.vectors.layout.unflatten(task_arithmetic(bert, scale=0.4))
    base = bert.vectors.layout.unflatten(bert.vectors.base)
    for name, tensor in bert.vectors.layout.unflatten(merged.flat).items():
        inside = "attention" not in name and "LayerNorm" not in name and "encoder" in name
        assert torch.equal(tensor, base[name] if inside else expected[name]), name


@pytest.mark.parametrize("layers", [1, 2])
def test_wemoe_is_the_merge_of_every_inputs_own_weights(problem, layers):
    """Reference: input by input, merging the weights of one block after the other."""
    merged = wemoe(problem, router_layers=layers, steps=20, lr=0.1, progress=False)
    named = problem.vectors.layout.unflatten(merged.flat)
    base = problem.vectors.layout.unflatten(problem.vectors.base)
    deltas = [problem.vectors.layout.unflatten(row) for row in problem.vectors.deltas]
    for batch, found in zip(problem.batches[0], answers(problem, merged), strict=False):
        for x, expected in zip(batch.inputs["x"], found, strict=True):
            h = named["embeddings.weight"] @ x
            for block in ("encoder.layer.0", "encoder.layer.1"):
                weights, parts = merged.routers[block](h), []
                for kind in ("weight", "bias"):
                    name = f"{block}.dense.{kind}"
                    shares = [w * d[name] for w, d in zip(weights, deltas, strict=True)]
                    parts.append(base[name] + sum(shares))
                h = parts[0] @ h + parts[1]
            assert_close(h, expected)


def test_an_input_is_answered_alike_in_any_batch_unless_weights_are_averaged(problem):
    merged = wemoe(problem, steps=20, lr=0.1, progress=False)
    one, two, _ = problem.batches[0]
    xs = one.inputs["x"], two.inputs["x"]
    there, back = (batch_of(torch.cat(both)) for both in (xs, xs[::-1]))
    alone, mean = (merged.answers(0, batch, reduce=True) for batch in (one, there))
    assert (mean[: len(alone)] - alone).abs().max() > 1e-3
    turned = merged.answers(0, back, reduce=True)
    assert_close(turned, mean.roll(len(two.weight), 0))  # yet order is immaterial
    both = merged.logits(0, there)
    assert_close(both, torch.cat([merged.logits(0, one), merged.logits(0, two)]))
    assert_close(merged.logits(0, back), both.roll(len(two.weight), 0))


def test_padding_changes_no_answer(bert):
    hidden, mask = torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = Batch({"attention_mask": mask}, torch.full((2,), 0.5))
    assert over_tokens(hidden, batch).tolist() == [[0.5], [4.0]]
    assert over_tokens(hidden[:, :1], Batch({}, batch.weight)).tolist() == [[0.0], [3.0]]
    batch = bert.batches[0][0]
    wider = {key: nn.functional.pad(value, (0, 4)) for key, value in batch.inputs.items()}
    for method in (wemoe, twin):
        merged = method(bert, steps=5, lr=0.05, progress=False)
        with torch.no_grad():
            found, expected = (merged.logits(0, b) for b in (replace(batch, inputs=wider), batch))
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


def routed_loss(problem: MergeProblem, merged, numbers: list[torch.Tensor]) -> torch.Tensor:
    """Entropy summed over tasks on their first batches, each with one set of weights per batch.

    numbers: matrix and bias of every block's router, in the blocks' order.
    """
    unflatten = problem.vectors.layout.unflatten
    named, base = unflatten(merged.flat), unflatten(problem.vectors.base)
    deltas = {n: torch.stack([unflatten(r)[n] for r in problem.vectors.deltas]) for n in base}
    total = 0
    for batches in problem.batches:
        h = batches[0].inputs["x"] @ named["embeddings.weight"].T
        for block, matrix, bias in zip(merged.mlps, numbers[::2], numbers[1::2], strict=True):
            shares = (h @ matrix.T + bias).mean(0)  # [T]
            weight, shift = (
                base[name] + torch.tensordot(shares, deltas[name], 1)
                for name in (f"{block}.dense.weight", f"{block}.dense.bias")
            )
            h = h @ weight.T + shift
        total = total + batches[0].weight @ entropy(h)
    return total


def test_wemoes_second_step_is_adams_on_weights_averaged_over_the_batch(problem):
    """The merge and its routers written out, with autograd through all of it."""
    problem = fewer(problem, 1)
    options = {"router_layers": 1, "lr": 1e-2, "progress": False}
    start, found = (wemoe(problem, steps=steps, **options) for steps in (0, 2))
    numbers = [
        part.detach().clone().requires_grad_()
        for router in start.routers.values()
        for part in (router.matrices[0], router.biases[0])
    ]
    optimizer = torch.optim.Adam(numbers, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        routed_loss(problem, start, numbers).backward()
        optimizer.step()
    parts = [p for r in found.routers.values() for p in (r.matrices[0], r.biases[0])]
    for part, expected in zip(parts, numbers, strict=True):
        assert_close(part, expected.detach(), rtol=0, atol=1e-9)


class Plain(nn.Module):
    """Blocks of one linear layer without a bias, or layers outside any block."""

    def __init__(self, numbered: bool):
        super().__init__()
        layers = [nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2)]
        self.body = nn.ModuleDict({"layer": nn.ModuleList(layers)} if numbered else {})
        self.fc1 = nn.Linear(3, 2, bias=False, dtype=torch.float64)

    def forward(self, x):
        for layer in self.body["layer"] if self.body else ():
            x = layer(x).tanh()
        return self.fc1(x)


def plain_problem(numbered: bool) -> MergeProblem:
    model = Plain(numbered)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    states = [{k: normal(*s, seed=n) for k, s in shapes.items()} for n in range(3)]
    batches = [[batch_of(normal(4, 3))]] * 2
    return module_problem(model, {"a": states[1], "b": states[2]}, batches, base=states[0])


# --- twin
def apart(problem: MergeProblem) -> MergeProblem:
    """The same problem with every task's inputs in a place of their own."""
    moved = [
        [Batch({"x": batch.inputs["x"] + 20 * torch.eye(6)[task]}, batch.weight) for batch in every]
        for task, every in enumerate(problem.batches)
    ]
    return replace(problem, batches=moved)


def test_twin_is_the_merge_of_every_inputs_own_weights(problem):
    """Reference: tensor by tensor in NumPy, one input at a time."""
    merged = twin(problem, scale=0.29, keep=0.5, steps=50, lr=1e-2, progress=False)
    base = problem.vectors.layout.unflatten(problem.vectors.base)
    deltas = [problem.vectors.layout.unflatten(row) for row in problem.vectors.deltas]
    batch = problem.batches[1][0]
    weights, expected = merged.weights(1, batch), merged.logits(1, batch)
    for row, chosen in enumerate(weights.tolist()):
        parameters = {}
        for name, tensor in base.items():
            shared = tensor.numpy() + 0.29 * sum(delta[name].numpy() for delta in deltas)
            parameters[name] = shared.copy()
            for weight, delta in zip(chosen, deltas, strict=True):
                rest = tensor.numpy() + delta[name].numpy() - shared
                if rest.ndim == 2:
                    rank = max(1, int(0.5 * min(rest.shape)))
                    values, vectors = np.linalg.eigh(rest.T @ rest)
                    top = vectors[:, np.argsort(values)[::-1][:rank]]
                    rest = rest @ top @ top.T
                parameters[name] += weight * rest
        tensors = {name: torch.from_numpy(value) for name, value in parameters.items()}
        found = functional_call(problem.module, tensors, batch.inputs["x"][row])
        assert_close(found, expected[row])


def test_with_inputs_that_tell_the_task_the_router_learns_it_and_twin_answers_as_experts(problem):
    told = apart(problem)
    merged = twin(told, keep=1.0, steps=300, lr=3e-2, progress=False)
    for task, batches in enumerate(told.batches):
        weights = merged.weights(task, batches[0])
        assert_close(weights.sum(1), torch.ones(len(weights), dtype=torch.float64))
        assert weights[:, task].min() > 0.9
        expert = problem.vectors.expert(problem.vectors.tasks[task])
        expected = problem.logits(expert, task, batches[0])
        assert_close(merged.logits(task, batches[0]), expected, rtol=0.05, atol=0.2)


def test_compression_is_the_best_of_its_rank_and_leaves_vectors_whole():
    layout = layout_of(matrix=(6, 4), bias=(5,), conv=(2, 2, 2))
    delta = torch.randn(layout.size, dtype=torch.float64, generator=torch.Generator())
    values = torch.linalg.svdvals(delta[:24].view(6, 4))
    for keep, rank in ((0.1, 1), (0.5, 2), (0.99, 3), (1.0, 4)):
        found = compressed(delta, layout, keep)
        assert torch.linalg.matrix_rank(found[:24].view(6, 4)) == rank
        assert_close((found - delta).norm(), values[rank:].norm(), rtol=1e-9, atol=1e-12)
        assert torch.equal(found[24:], delta[24:])
    assert not compressed(0 * delta, layout, 0.1).any()


def test_one_batch_becomes_batches_of_one_input():
    words, answer = torch.arange(6).view(2, 3), torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
    parts = list(rows(Batch({"input_ids": words}, torch.full((3,), 1 / 3), answer)))
    assert [part.inputs["input_ids"].tolist() for part in parts] == [[[0, 1, 2]], [[3, 4, 5]]]
    for part, count in zip(parts, (2, 1), strict=True):
        assert part.weight.tolist() == pytest.approx([1 / 3] * count)
    expected = [[[False, True, True]], [[False, False, True]]]
    assert [part.answer.tolist() for part in parts] == expected


# --- logits fusion
large_problem = partial(linear_problem, seed=7)


@pytest.mark.parametrize("weight", [None, 1.0])
def test_steering_the_small_base_itself_with_one_expert_gives_that_expert(weight):
    problem = linear_problem(num_tasks=1)
    merged, expert = logits_fusion(problem, weight=weight), problem.vectors.expert("task0")
    assert_close(answers(problem, merged), answers(problem, expert), rtol=0, atol=1e-12)
    assert_close(answers(problem, twin(problem, keep=1.0, **QUICK)), answers(problem, expert))


def test_experts_that_equal_their_base_leave_the_large_model_alone(problem):
    still = replace(problem, vectors=problem.vectors.map(torch.zeros_like))
    large = large_problem()
    for weight in (None, 1.0):
        merged = logits_fusion(still, large=large, weight=weight)
        for task, batches in enumerate(still.batches):
            expected = large.logits(large.vectors.base, task, batches[0])
            assert_close(merged.logits(task, batches[0]), expected, rtol=0, atol=0)


def test_a_fixed_weight_adds_the_shifts_of_all_experts(problem):
    large, batch = large_problem(), problem.batches[1][0]
    shift = -3 * problem.logits(problem.vectors.base, 1, batch)
    for task in problem.vectors.tasks:
        shift = shift + problem.logits(problem.vectors.expert(task), 1, batch)
    found = logits_fusion(problem, large=large, weight=0.7).logits(1, batch)
    assert_close(found, large.logits(large.vectors.base, 1, batch) + 0.7 * shift)


def kl_by_hand(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum())


def softmax_by_hand(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def test_every_answer_takes_the_expert_and_the_weight_that_move_it_as_far(problem):
    """Reference: loops over rows, experts and weights, on probabilities."""
    large, batch = large_problem(), problem.batches[0][0]
    experts = [problem.vectors.expert(task) for task in problem.vectors.tasks]
    small = problem.logits(problem.vectors.base, 0, batch).numpy()
    moved = [problem.logits(expert, 0, batch).numpy() for expert in experts]
    start = large.logits(large.vectors.base, 0, batch).numpy()
    found = logits_fusion(problem, large=large).logits(0, batch).numpy()
    chosen = set()
    for row in range(len(small)):
        p, q = softmax_by_hand(start[row]), softmax_by_hand(small[row])
        best = (np.inf, None, None)
        for t, expert in enumerate(moved):
            for weight in range(21):
                new = softmax_by_hand(start[row] + weight / 10 * (expert[row] - small[row]))
                miss = 0.0
                for other in moved:
                    aim = softmax_by_hand(other[row])
                    miss += (kl_by_hand(new, p) - kl_by_hand(aim, q)) ** 2
                    miss += (kl_by_hand(p, new) - kl_by_hand(q, aim)) ** 2
                best = min(best, (miss, t, weight))
        _, t, weight = best
        chosen.add((t, weight))
        expected = start[row] + weight / 10 * (moved[t][row] - small[row])
        np.testing.assert_allclose(found[row], expected, rtol=1e-9)
    assert len(chosen) > 1  # it is a choice of each answer's own


# --- bad input
def test_what_is_not_finite_stops_a_fit_with_the_step_and_the_cause_and_no_search(problem):
    """A last step too: finite logits whose gradient is not, that of a square root at 0."""
    broken = replace(problem, vectors=problem.vectors.map(lambda d: d * INF))
    for method in (wemoe, twin):
        said = f"{method.__name__}: NaN or inf at step 0; lower lr .* check the experts"
        with pytest.raises(Diverged, match=said):
            method(broken, **QUICK)

    def forward(parameters, pairs):
        return [x + (x - x.detach()).sqrt() for x in problem.forward(parameters, pairs)]

    with pytest.raises(Diverged, match="wemoe: a router's largest number is nan at step 0, above"):
        wemoe(replace(problem, forward=forward), steps=1, progress=False)
    steep = replace(problem, vectors=problem.vectors.map(lambda deltas: 300 * deltas))
    for logits in answers(steep, logits_fusion(steep, large=large_problem())):
        assert torch.isfinite(logits).all()


# --- bytes
def test_bytes_of_a_mixture_are_the_model_the_experts_mlps_and_the_routers():
    """Two blocks of one layer each, [6, 6] and [4, 6] with biases; routers 6 -> 6 -> 3."""
    merged = wemoe(linear_problem(dtype=torch.float32), **QUICK)
    model, mlp = 6 * 6 + (6 * 6 + 6) + (4 * 6 + 4), (6 * 6 + 6) + (4 * 6 + 4)
    assert merged.nbytes == (model + 3 * mlp + 2 * (6 * 6 + 6 + 3 * 6 + 3)) * 4
    merged = wemoe(plain_problem(True), router_layers=0, **QUICK)  # two layers [3, 3], no biases
    assert merged.nbytes == (2 * 9 + 2 * 3 + 2 * 2 * 9 + 2 * 2) * 8


@pytest.mark.parametrize(("keep", "ranks"), [(0.1, (1, 1, 1)), (0.5, (3, 3, 2)), (1.0, (6, 6, 4))])
def test_bytes_of_twins_count_low_rank_rests_as_factors_where_these_are_smaller(keep, ranks):
    """Matrices [6, 6], [6, 6] and [4, 6]: at half their rank both forms of the first are equal."""
    merged = twin(linear_problem(dtype=torch.float32), keep=keep, **QUICK)
    shapes = ((6, 6), (6, 6), (4, 6))
    rest = sum(min(m * k, r * (m + k)) for (m, k), r in zip(shapes, ranks, strict=True)) + 6 + 4
    model = 36 + 36 + 24 + 6 + 4
    router = 4 * 4 + 4 + 3 * 4 + 3 + 2 * 4  # features are the 4 outputs; their mean and spread
    assert merged.nbytes == (model + 3 * rest + router) * 4


def test_bytes_of_a_fusion_are_two_bases_and_the_small_experts():
    small, large = linear_problem(), large_problem(features=9)
    merged = logits_fusion(small, large=large)
    assert merged.nbytes == (small.vectors.base.numel() * 4 + large.vectors.base.numel()) * 8


def test_large_problems_that_do_not_fit_are_refused(problem):
    with refuses("large has .*'task0', 'task1'.*large.select"):
        logits_fusion(problem, large=large_problem(num_tasks=2))
    merged = logits_fusion(problem, large=large_problem(classes=5))
    with refuses(r"the large model gives \[5, 5\], the small one \[5, 4\]"):
        merged.logits(0, problem.batches[0][0])
