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
from comparisons import naive_loss, naive_merge
from helpers import INF, NAN, QUIET, batch_of, fewer, frozen, linear_problem, problem_of, refuses
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES, entropy, js, objective
from divmerge_core.kernels.expert_cache import log_softmax
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging import fit, merged_model
from divmerge_core.merging.coefficients import GROUPINGS, Coefficients, groups_of
from divmerge_core.merging.fit import OPTIMIZERS, Step, fit_coefficients
from divmerge_core.merging.fit_checkpoint import code_of, digest
from divmerge_core.merging.merged_model import GRADIENTS, MergedModel, expert_logits, moved_tensors
from divmerge_core.merging.problem import Batch, Diverged, MergeProblem
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.methods import METHODS

OBJECTIVES = {**DIVERGENCES, "entropy": lambda expert, merged: entropy(merged)}


def coefficients_of(problem: MergeProblem, **options) -> Coefficients:
    return Coefficients(problem.vectors.layout, len(problem.vectors.tasks), **options)


def fitted(
    problem: MergeProblem, objective=js, *, start: Coefficients | None = None, links=None, **options
) -> tuple[torch.Tensor, Coefficients, list[Step]]:
    """The merged parameters, the coefficients, and the steps seen, each with a merge of its own."""
    coefficients, steps = start or coefficients_of(problem, **links or {}), []

    def callback(step: Step) -> None:
        now = step.flat.clone()
        steps.append(replace(step, merged=lambda: now))

    options = {"callback": callback, **QUIET, **options}
    return fit_coefficients(problem, coefficients, objective, **options), coefficients, steps


def losses_of(problem: MergeProblem, objective=js, **options) -> list[float]:
    return [step.loss for step in fitted(problem, objective, **options)[2][:-1]]


def merged_with(problem: MergeProblem, coeffs: torch.Tensor, coefficients) -> torch.Tensor:
    vectors = problem.vectors
    return grouped_merge(vectors.base, vectors.deltas, coeffs, coefficients.segments)


def naive_gradient(problem: MergeProblem, start: Coefficients, objective, grouping: str):
    """dL/d(free parameters) by autograd through a dictionary of tensors."""
    _, numbers = groups_of(problem.vectors.layout, grouping)
    loss = naive_loss(problem, naive_merge(problem, start(), numbers), objective)
    return torch.autograd.grad(loss, start.raw)[0]


def core_gradient(problem: MergeProblem, objective, **links):
    """The same as the loop's live buffers give it, from one step."""
    start = coefficients_of(problem, **links)
    _, coefficients, _ = fitted(fewer(problem, 1), objective, start=copy.deepcopy(start), epochs=1)
    return start, coefficients.raw.grad


# --- the gradient

CASES = [(name, "block", "identity") for name in OBJECTIVES]
CASES += [("js", grouping, "identity") for grouping in GROUPINGS if grouping != "block"]
CASES += [("js", "block", link) for link in ("sigmoid", "softmax")]


@pytest.mark.parametrize(("objective", "grouping", "link"), CASES)
def test_the_gradient_is_autograds_through_the_naive_merge(problem, objective, grouping, link):
    start, found = core_gradient(problem, OBJECTIVES[objective], grouping=grouping, link=link)
    expected = naive_gradient(problem, start, OBJECTIVES[objective], grouping)
    assert expected.abs().max() > 1e-4
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_gradient_is_autograds_on_a_transformer_too(toy_problem):
    start, found = core_gradient(toy_problem, js, grouping="layer")
    expected = naive_gradient(fewer(toy_problem, 1), start, js, "layer")
    assert (found - expected).norm() < 1e-5 * expected.norm()


# --- the loop
@pytest.mark.parametrize(
    ("optimizer", "epochs", "grouping", "link"),
    [
        ("adam", 8, "task", "identity"),
        ("adam", 8, "block", "sigmoid"),
        ("adam", 8, "layer", "softmax"),
        ("lbfgs", 8, "block", "sigmoid"),
        ("lbfgs", 8, "block", "softmax"),
    ],
)
def test_the_loss_falls_and_links_keep_their_promise(problem, optimizer, epochs, grouping, link):
    options = {"optimizer": optimizer, "epochs": epochs, "lr": 0.03}
    _, coefficients, steps = fitted(problem, links={"grouping": grouping, "link": link}, **options)
    losses = [step.loss for step in steps[:-1]]
    if optimizer == "adam":
        epoch = len(problem.batches[0])
        assert sum(losses[-epoch:]) < 0.95 * sum(losses[:epoch])
    else:
        assert min(losses) < 0.95 * losses[0]
    assert link == "identity" or 0 < coefficients().min() <= coefficients().max() < 1


def test_nothing_is_lost_by_one_expert_alone_or_against_ones_own_answers(problem):
    """Targets stand in for the experts; the experts' own, given as targets, change nothing."""
    assert max(losses_of(linear_problem(num_tasks=1), epochs=2)) < 1e-9
    coefficients = coefficients_of(problem, init=0.4)
    merged = merged_with(problem, coefficients(), coefficients).detach()
    own = [[problem.logits(merged, t, b) for b in bs] for t, bs in enumerate(problem.batches)]
    assert max(losses_of(problem, start=coefficients, targets=own, epochs=1)) < 1e-9
    assert_close(coefficients(), torch.full((3, 1), 0.4))
    ends = [fitted(problem, targets=given)[0] for given in (None, expert_logits(problem))]
    assert torch.equal(*ends)


def test_the_callback_sees_every_step_and_the_end_which_is_the_merge_that_is_returned(problem):
    before = copy.deepcopy((problem.vectors, problem.batches))
    merged, coefficients, seen = fitted(problem, links={"grouping": "block"}, epochs=2)
    assert [step.number for step in seen] == list(range(7))
    assert [step.loss is None for step in seen] == [False] * 6 + [True]
    assert_close(seen[0].coeffs, torch.full((3, 3), 1 / 3))
    assert torch.equal(seen[-1].coeffs, coefficients()) and torch.equal(seen[-1].flat, merged)
    for step in seen:
        assert torch.equal(step.flat, merged_with(problem, step.coeffs, coefficients))
    assert not torch.allclose(coefficients(), torch.tensor(1 / 3))
    assert digest(before) == digest((problem.vectors, problem.batches))
    assert problem.vectors.base.grad is None and not problem.vectors.deltas.requires_grad


def test_the_objective_sees_the_expert_first_and_the_mean_is_weighted():
    """Three rows that weigh 1/2, 1/2 and 0: the third is as if it were not there."""
    problem = linear_problem(num_tasks=1, batches=1, rows=3)
    weight = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    batch, seen = replace(problem.batches[0][0], weight=weight), []
    weighted = replace(problem, batches=[[batch]])

    def objective(expert, merged):
        seen.append((expert, merged.detach().clone()))
        return (merged - expert).square().sum(-1)

    losses = losses_of(weighted, objective, links={"init": 0.5}, epochs=1)
    (expert, merged), vectors = seen[0], weighted.vectors
    assert_close(expert, weighted.logits(vectors.expert("task0"), 0, batch))
    assert_close(merged, weighted.logits(vectors.base + 0.5 * vectors.deltas[0], 0, batch))
    rows = (merged - expert).square().sum(-1)
    assert_close(losses[0], (0.5 * (rows[0] + rows[1])).item())


def test_the_same_seed_gives_the_same_fit_and_another_order_another(problem):
    one, again, other = (
        fitted(problem, links={"grouping": "layer"}, seed=seed, epochs=2)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_epoch_reads_each_batch_once_and_experts_are_asked_once(problem, optimizer):
    asked, read = Counter(), Counter()

    def forward(parameters, pairs):
        if next(iter(parameters.values())).requires_grad:
            read.update(id(batch) for _, batch in pairs)
        else:
            asked.update(id(batch) for _, batch in pairs)
        return problem.forward(parameters, pairs)

    losses_of(replace(problem, forward=forward), optimizer=optimizer, epochs=5)
    assert len(read) == len(asked) == 9
    assert set(read.values()) == {5} and set(asked.values()) == {1}


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_the_loss_on_all_inputs_is_each_tasks_mean_over_its_batches(problem, gradients):
    """Value and gradient, with three, two and one batches; and no step leaves a rest."""
    some = replace(problem, batches=[every[: 3 - n] for n, every in enumerate(problem.batches)])
    coefficients, targets = coefficients_of(some, grouping="block"), expert_logits(some)
    _, numbers = groups_of(some.vectors.layout, "block")
    coeffs = coefficients().detach().double().requires_grad_()
    merged, expected = naive_merge(some, coeffs, numbers), 0
    for task, batches in enumerate(some.batches):
        for number, batch in enumerate(batches):
            logits = some.forward(merged, [(task, batch)])[0]
            expected = expected + batch.weight @ js(targets[task][number], logits) / len(batches)
    (slope,) = torch.autograd.grad(expected, coeffs)
    live = MergedModel.of(some, some.vectors, coefficients, js, targets, gradients)
    live.merge()
    for _ in range(2):
        assert live.backward_all() == pytest.approx(expected.item(), rel=1e-6)
        assert_close(live.collect().double(), slope, rtol=1e-5, atol=1e-8)
    assert not live.collect().any()


def test_tensors_that_no_expert_moved_take_no_gradient(problem):
    """A backward pass ends above them, and the coefficients are the same."""
    still, vectors = frozen(problem, slice(1)), problem.vectors
    assert moved_tensors(still.vectors) == [False, True, True, True, True]
    for gradients in GRADIENTS:
        found = fitted(still, links={"grouping": "layer"}, epochs=1, gradients=gradients)[1]()
        assert (found[:, 0] == 1 / 3).all() and (found[:, 1:] != 1 / 3).all()
    assert all(moved_tensors(vectors.map(torch.zeros_like)))


@pytest.mark.parametrize("counts", [[4], [3, 3], [5, 2, 1], [6, 2]])
def test_every_epoch_visits_every_batch_equally_often_in_one_order_for_all_tasks(counts):
    """A task with a third as many batches takes each of them three times."""
    steps, longest = merged_model.schedule(counts, 3, torch.Generator().manual_seed(0)), max(counts)
    assert len(steps) == 3 * longest
    for epoch in range(3):
        for task, count in enumerate(counts):
            taken = Counter(step[task] for step in steps[epoch * longest : (epoch + 1) * longest])
            assert set(taken) == set(range(count))
            assert longest % count or set(taken.values()) == {longest // count}
    if counts == [3, 3]:
        assert all(first == second for first, second in steps)
    assert longest < 4 or steps[:longest] != steps[longest : 2 * longest]


# --- other optimizers
def test_lbfgs_keeps_the_best_point_which_is_lower_than_adams_and_with_more_coefficients(problem):
    ends, runs = [], (("adam", 25, "layer"), ("lbfgs", 12, "layer"), ("lbfgs", 12, "task"))
    for name, epochs, grouping in runs:
        options = {"optimizer": name, "epochs": epochs}
        merged, coefficients, steps = fitted(problem, links={"grouping": grouping}, **options)
        rest = (coefficients, js, expert_logits(problem), "stream")
        model = MergedModel.of(problem, problem.vectors, *rest)
        model.merge()
        ends.append(model.backward_all())
        if name == "lbfgs":
            best = min(steps[:-1], key=lambda step: step.loss)
            assert torch.equal(coefficients(), best.coeffs) and torch.equal(merged, best.flat)
    assert ends[1] < ends[0] and ends[1] <= ends[2]


def one_weight(answer) -> MergeProblem:
    """A model of one number, 0 in the base and 1 in the expert, whose logits are `answer` of it."""
    problem = problem_of([1.0], w=(1,))

    def forward(parameters, pairs):
        return [answer(parameters["w"][None]) for _ in pairs]

    return replace(problem, batches=[[batch_of(torch.zeros(1, 1).double())] * 3], forward=forward)


def test_step_k_of_n_annealed_has_the_size_lr_times_one_minus_k_over_n():
    """Under a gradient that never changes, Adam's steps are its step sizes."""
    options = {"optimizer": "annealed_adam", "epochs": 2, "links": {"init": 0.0}}
    *_, seen = fitted(one_weight(lambda w: w), lambda expert, merged: -merged.sum(-1), **options)
    steps = [after.coeffs.item() - before.coeffs.item() for before, after in pairwise(seen)]
    assert steps == pytest.approx([0.01 * (1 - k / 6) for k in range(6)], rel=1e-4)


@pytest.mark.parametrize("method", ["divmerge", "adamerging", "adamerging++"])
def test_methods_hand_their_optimizer_on(problem, method):
    found, expected = (
        METHODS[method](problem, grouping="task", epochs=6, optimizer=name, **QUIET)
        for name in ("lbfgs", "adam")
    )
    assert torch.isfinite(found).all() and not torch.equal(found, expected)


def test_a_line_search_goes_on_where_float32_would_overflow():
    """Chi squared grows so fast that fourth powers of its gradient do; the fit still falls."""
    options = {"optimizer": "lbfgs", "epochs": 12, "links": {"grouping": "layer"}}
    losses = losses_of(linear_problem(scale=3.0), DIVERGENCES["chi_squared"], **options)
    assert all(map(math.isfinite, losses)) and min(losses) < losses[0]


def walled(wall: float, value: float) -> MergeProblem:
    """Logits that are the weight below a wall, and undefined beyond it."""
    return one_weight(lambda w: w if w.item() < wall else w * value)


def held(expert, merged):
    """5 (coefficient - 1)^2; undefined logits are refused as every divergence refuses them."""
    log_softmax(merged)
    return 5 * (merged - 1).square().sum(-1)


LBFGS = {"optimizer": "lbfgs", "epochs": 30}


@pytest.mark.parametrize("value", [INF, NAN])
def test_the_minimum_is_found_beside_points_without_a_value(value):
    problem, asked = walled(1.1, value), []

    def forward(parameters, pairs):
        asked.append(parameters["w"].item())
        return problem.forward(parameters, pairs)

    noted = replace(problem, forward=forward)
    coefficients = fitted(noted, held, links={"init": 0.2}, **LBFGS)[1]
    assert max(asked[1:]) > 1.1, "no trial point lay beyond the wall"
    assert_close(coefficients(), torch.ones(1, 1), rtol=1e-3, atol=1e-3)


# --- what is refused
def test_no_possible_step_is_reported_with_advice_that_fits():
    """All but the start is beyond the wall, or the start as well."""
    alone = one_weight(lambda w: w if w.item() == 0 else w * NAN)
    with pytest.raises(Diverged, match=r"none of 8 steps .*\(init\), .*'adam'") as error:
        fitted(alone, held, links={"init": 0.0}, **{**LBFGS, "epochs": 9})
    assert "lower lr" not in str(error.value)
    with pytest.raises(Diverged, match=r"loss is nan at step 0, .*; start elsewhere \(init\)"):
        fitted(walled(-1.0, NAN), held, links={"init": 0.0}, **LBFGS)


def broken(expert, merged):
    """0, with a slope that is NaN: its step leads where no later step would look."""
    return torch.sqrt(0 * merged.sum(-1))


NOWHERE = "loss is None at step 1, the largest coefficient nan"
DIVERGING = [
    (js, {"lr": 2e3, "epochs": 1}, r"at step \d, the largest coefficient .*e\+03; lower lr"),
    (js, {"lr": 2e3, "epochs": 2}, r"at step \d, the largest coefficient .*e\+03; lower lr"),
    (
        lambda expert, merged: merged.sum(-1) * INF,
        {},
        r"the loss is -?(inf|nan) at step 0, the largest.*lower lr \(now 0.01\)",
    ),
    (broken, {"epochs": 1}, NOWHERE),
    (broken, {"epochs": 1, "optimizer": "annealed_adam"}, NOWHERE),
]


@pytest.mark.parametrize(("objective", "options", "message"), DIVERGING)
def test_a_fit_that_runs_away_is_reported_with_its_step(problem, objective, options, message):
    with pytest.raises(Diverged, match=message):
        fitted(problem if objective is js else fewer(problem, 1), objective, **options)


def cut(targets: list, where: str) -> list:
    if where == "task":
        return targets[:2]
    targets[1] = targets[1][:2] if where == "batch" else [x[:4] for x in targets[1]]
    return targets


RANGES = [{"epochs": 0}, *({"lr": lr} for lr in (0.0, -1.0, NAN, INF))]


def test_a_task_without_inputs_values_out_of_range_and_targets_that_do_not_fit_are_refused(problem):
    bare = replace(problem, batches=[problem.batches[0], [], []])
    with refuses(r"needs unlabelled inputs .*none for \['task1', 'task2'\]"):
        fitted(bare)
    for options in RANGES:
        with refuses("epochs must be 1 or more and lr above 0 and finite, got"):
            fitted(problem, **options)
    for where in ("task", "batch", "rows"):
        with refuses(r"targets must hold logits \[A, V\] for every task"):
            fitted(problem, targets=cut(expert_logits(problem), where))


# --- a fit that is killed
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
    options = {"optimizer": optimizer, "epochs": 4, "lr": 0.05, "links": {"grouping": "block"}}
    _, whole, _ = fitted(problem, **options)
    options |= {"checkpoint": tmp_path / "fit.pt", "callback": None}
    for passes in (17, 15):  # twice it is stopped; the third time it comes to its end
        with pytest.raises(KeyboardInterrupt):
            fitted(stopping(problem, passes), **options)
    merged, again, _ = fitted(problem, **options)
    assert torch.equal(again.raw, whole.raw)
    asked = stopping(problem, 3)  # the base, once a task: whether the model is the same
    found = fitted(asked, targets=expert_logits(problem), **options)[0]
    assert torch.equal(found, merged)


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


def with_vectors(given: dict, name: str, change) -> dict:
    problem, vectors = given["problem"], given["problem"].vectors
    changed = replace(vectors, **{name: change(getattr(vectors, name))})
    return {"problem": replace(problem, vectors=changed)}


def renamed(layout: Layout) -> Layout:
    """A last tensor that the model takes for another shape: it has as many numbers."""
    return Layout(layout.names, (*layout.shapes[:-1], (1, *layout.shapes[-1])))


def with_batch(given: dict, **changes) -> dict:
    """The last batch of the last task, changed."""
    *others, (*rest, last) = given["problem"].batches
    changed = {name: change(getattr(last, name)) for name, change in changes.items()}
    batches = [*others, [*rest, replace(last, **changed)]]
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
    "vectors, layout": ("layout", lambda g: with_vectors(g, "layout", renamed)),
    "vectors, tasks": ("tasks", lambda g: with_vectors(g, "tasks", lambda tasks: ("a", "b", "c"))),
    "vectors, base": ("base, model", lambda g: with_vectors(g, "base", nudged)),
    "vectors, deltas": ("task vectors", lambda g: with_vectors(g, "deltas", nudged)),
    "problem, forward": ("model", with_forward),
    "batch, inputs": ("inputs", lambda g: with_batch(g, inputs=lambda x: {"x": nudged(x["x"])})),
    "batch, weight": ("inputs", lambda g: with_batch(g, weight=nudged)),
    "batch, answer": ("inputs", lambda g: with_batch(g, answer=lambda _: torch.ones(5, 1).bool())),
    "batch, expert": ("inputs", lambda g: with_batch(g, expert=lambda _: torch.zeros(5, 4))),
}


def kept(path, given: dict) -> torch.Tensor:
    given = {"links": given["coefficients"], "checkpoint": path, "callback": None, **given}
    problem, _, objective = (given.pop(name) for name in ("problem", "coefficients", "objective"))
    return fitted(problem, objective, **given)[0]


@pytest.fixture(scope="module")
def kept_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "fit.pt"
    kept(path, kept_fit())
    return path


def test_the_same_fit_made_anew_finds_its_checkpoint(kept_path, monkeypatch):
    assert torch.equal(kept(kept_path, kept_fit()), kept(None, kept_fit()))
    with refuses("a fit with other epochs, lr; delete it"):
        kept(kept_path, {**kept_fit(), "epochs": 2, "lr": 0.5})
    monkeypatch.setattr(fit, "package_digest", lambda: "other")
    with refuses("other code; delete it"):
        kept(kept_path, kept_fit())


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_a_fit_tells_its_checkpoint(kept_path, change):
    """Any one of them changed, the checkpoint is refused by the names of what differs."""
    names, make = CHANGES[change]
    given = kept_fit()
    with refuses(f"by a fit with other {names}; delete it or give"):
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


def test_an_edited_module_or_helper_of_ones_own_tells_its_functions_apart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for text in ("def loss(p, q): return q", "def loss(p, q): return 2 * q"):
        (tmp_path / "losses_of_my_own.py").write_text(text)
        sys.modules.pop("losses_of_my_own", None)
        importlib.invalidate_caches()
        found.add(code_of(importlib.import_module("losses_of_my_own").loss))
    for scale, helper in ((2, "q + SCALE"), (3, "q + SCALE"), (2, "q * SCALE")):
        scope = {"__name__": "__main__"}
        loss = "def loss(p, q): return [helper(q) for _ in (1,)][0]"
        exec(f"SCALE = {scale}\ndef helper(q): return {helper}\n{loss}", scope)
        found.add(code_of(scope["loss"]))
    assert len(found) == 5


@pytest.mark.parametrize("content", [b"", b"no fit", {"weights": torch.zeros(2)}])
def test_other_files_and_objectives_that_cannot_be_told_are_refused(problem, tmp_path, content):
    path, lock = tmp_path / "fit.pt", threading.Lock()
    with refuses("cannot tell .* from other functions .*or no checkpoint"):
        fitted(problem, lambda p, q: js(p, q) if lock else 0, checkpoint=path)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with refuses("fit.pt holds no fit that was stopped; delete it or give"):
        fitted(problem, checkpoint=path)


@pytest.mark.parametrize("storage", ["int8", "streamed", "bfloat16"])
def test_every_store_has_a_digest_of_its_content(storage):
    problems = [linear_problem(dtype=torch.float32, seed=seed) for seed in (0, 0, 1)]
    found = [digest(one.vectors.stored_as(storage).deltas) for one in problems]
    assert found[0] == found[1] != found[2]
    with pytest.raises(TypeError, match="object has no digest"):
        digest(object())
