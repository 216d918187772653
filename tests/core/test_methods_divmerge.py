"""DivMerge: an optimum that it must find, its steps, and the inputs that it takes."""

import inspect
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from comparisons import mean_divergence, naive_loss, naive_merge
from helpers import QUIET, batch_of, fewer, layout_of, linear_problem, refuses
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES, js
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.arithmetic import average
from divmerge_core.methods.divmerge import divmerge, limit


def disentangled(features: int = 4, classes: int = 3) -> MergeProblem:
    """Each task reads features of its own, and its expert changes only what belongs to them.

    The logits are W x: the merge with every coefficient at 1 answers exactly as every expert does.
    """
    generator = torch.Generator().manual_seed(0)
    layout = layout_of(weight=(classes, 2 * features))
    base = 0.1 * torch.randn(classes, 2 * features, generator=generator)
    deltas, batches = torch.zeros(2, classes, 2 * features), []
    for task in range(2):
        own = slice(task * features, (task + 1) * features)
        deltas[task, :, own] = torch.randn(classes, features, generator=generator)
        inputs = torch.zeros(32, 2 * features)
        inputs[:, own] = torch.randn(32, features, generator=generator)
        batches.append([batch_of(inputs)])

    def forward(parameters, pairs):
        return [batch.inputs["x"] @ parameters["weight"].T for _, batch in pairs]

    vectors = TaskVectors(layout, ("left", "right"), base.flatten(), deltas.flatten(1))
    return MergeProblem(vectors, batches, forward)


@pytest.mark.parametrize(("divergence", "init"), list(zip(DIVERGENCES, cycle([None, 1.5]))))
def test_divmerge_finds_the_merge_that_loses_nothing(divergence, init):
    problem, seen = disentangled(), []
    options = {"divergence": divergence, "init": init, "epochs": 60, "lr": 3e-2}
    merged = divmerge(problem, callback=seen.append, **options, **QUIET)
    start = torch.full((2, 1), 0.5 if init is None else init)  # 1/T
    assert_close(seen[0].coeffs, start)
    assert_close(seen[-1].coeffs, torch.ones(2, 1), rtol=0, atol=0.05)
    assert mean_divergence(problem, merged) < 1e-4
    assert mean_divergence(problem, average(problem)) > 1e-2


@pytest.mark.parametrize(("spec", "temperature"), [("kl", 1.0), ("js", 3.0), ("skew_js:0.2", 1.0)])
def test_the_loss_lowered_is_the_divergence_asked_for_at_a_temperature(problem, spec, temperature):
    seen, options = [], {"divergence": spec, "temperature": temperature, "epochs": 1}
    divmerge(fewer(problem, 1), callback=seen.append, **options, **QUIET)
    name, _, beta = spec.partition(":")
    given = {"beta": float(beta)} if beta else {}

    def tempered(expert, merged):
        return DIVERGENCES[name](expert / temperature, merged / temperature, **given)

    start = naive_merge(problem, seen[0].coeffs, [0] * 5)
    assert seen[0].loss == pytest.approx(naive_loss(problem, start, tempered).item(), rel=1e-6)


def test_clamped_steps_are_those_of_a_clamp_in_the_forward_pass(problem):
    """The public loop: Adam on free numbers, autograd through clamp and merge.

    Some numbers leave [0, 1]; the gradient there is 0, and what Adam remembers drives them on.
    """
    single, seen = fewer(problem, 1), []
    options = {"grouping": "layer", "init": 0.9, "lr": 0.1, "epochs": 8}
    divmerge(single, link="clamp", callback=seen.append, **options, **QUIET)
    raw = torch.full((3, 5), 0.9, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=0.1)
    for step in seen[:-1]:
        assert_close(step.coeffs, raw.detach().clamp(0, 1), rtol=1e-4, atol=1e-5)
        merged = naive_merge(single, raw.clamp(0, 1), range(5))
        adam.zero_grad()
        naive_loss(single, merged, js).backward()
        adam.step()
    assert_close(seen[-1].coeffs, raw.detach().clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert ((raw > 1.05) | (raw < -0.05)).any() and ((raw > 0) & (raw < 1)).any()


def test_divmerge_has_the_papers_defaults_hands_on_its_seed_and_resumes(problem, tmp_path):
    defaults = {n: p.default for n, p in inspect.signature(divmerge).parameters.items()}
    expected = {"divergence": "js", "link": "identity", "epochs": 4, "lr": 1e-2}
    assert defaults | expected | {"init": None, "inputs": None} == defaults
    path = tmp_path / "fit.pt"
    one, again, other = (
        divmerge(problem, seed=seed, checkpoint=kept, **QUIET)
        for seed, kept in ((0, path), (0, None), (1, None))
    )
    assert path.is_file() and torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("inputs", "grouping", "kept"),
    [
        (None, "task", 50),  # the paper's 200 inputs
        (None, "layer", 100),  # and 400
        (10, "task", 3),  # three batches of four hold ten
        (1000, "task", 120),
    ],
)
def test_inputs_are_whole_batches_taken_evenly_from_first_to_last(inputs, grouping, kept):
    problem = linear_problem(num_tasks=2, batches=120, rows=4)
    few = limit(problem, inputs, grouping)
    for batches, every in zip(few.batches, problem.batches, strict=True):
        numbers = [[id(b) for b in every].index(id(batch)) for batch in batches]
        assert numbers == torch.linspace(0, 119, kept).round().int().tolist()
    with refuses("inputs must be 1 or more per task, got 0"):
        limit(problem, 0, grouping)


def test_inputs_are_counted_in_rows_also_where_a_row_has_several_answers():
    """A language model's batch of 2 rows and 6 answer positions counts 2."""
    words = torch.zeros(2, 5, dtype=torch.long)
    batch = Batch({"input_ids": words}, torch.full((6,), 1 / 6), words > -1)
    kept = limit(replace(linear_problem(num_tasks=1), batches=[[batch] * 8]), 5, "task")
    assert len(kept.batches[0]) == 3  # 6 rows, the fewest that hold 5
