"""Methods: identities, cases by hand, and an optimum that DivMerge must find."""

import inspect
from dataclasses import replace

import pytest
import torch
from helpers import fewer, layout_of, linear_problem, naive_loss, naive_merge
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES, entropy, js
from divmerge_core.merging.coefficients import GROUPINGS
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import METHODS, options_of, parse
from divmerge_core.methods.adaptive import adamerging
from divmerge_core.methods.arithmetic import average, task_arithmetic, ties
from divmerge_core.methods.divmerge import divmerge, limit

QUICK = {"epochs": 1, "progress": False}


def by_hand(*deltas: list[float], base: float = 10.0) -> MergeProblem:
    """A problem of one tensor of five numbers, without inputs."""
    rows = torch.tensor(deltas, dtype=torch.float32)
    names = tuple(f"task{n}" for n in range(len(rows)))
    vectors = TaskVectors(layout_of(weight=(5,)), names, torch.full((5,), base), rows)
    return MergeProblem(vectors, [[] for _ in names], lambda parameters, pairs: [])


def mean_over_tasks(problem: MergeProblem, flat: torch.Tensor, objective) -> float:
    """The objective of a merged model, summed over tasks, over all inputs."""
    total = 0.0
    for number, (task, batches) in enumerate(
        zip(problem.vectors.tasks, problem.batches, strict=True)
    ):
        expert = problem.vectors.expert(task)
        for batch in batches:
            rows = objective(
                problem.logits(expert, number, batch), problem.logits(flat, number, batch)
            )
            total += (batch.weight @ rows).item() / len(batches)
    return total


# --- sums of task vectors -------------------------------------------------------------------------


def test_the_average_is_the_mean_of_the_experts(problem):
    experts = [problem.vectors.expert(task) for task in problem.vectors.tasks]
    assert_close(average(problem), torch.stack(experts).mean(0))


def test_the_average_is_task_arithmetic_at_one_over_the_number_of_tasks(problem):
    assert_close(average(problem), task_arithmetic(problem, scale=1 / 3))


def test_task_arithmetic_adds_the_scaled_sum():
    problem = by_hand([1, 2, 3, 4, 5], [1, 0, -3, 0, 1])
    assert task_arithmetic(problem, scale=0.5).tolist() == [11, 11, 10, 12, 13]


def test_task_arithmetic_at_zero_is_the_base(problem):
    assert_close(task_arithmetic(problem, scale=0.0), problem.vectors.base, rtol=0, atol=0)


@pytest.mark.parametrize("method", [average, lambda p: task_arithmetic(p, scale=1.0)])
def test_one_expert_alone_is_that_expert(method):
    problem = linear_problem(num_tasks=1)
    assert_close(method(problem), problem.vectors.expert("task0"))


# --- ties -----------------------------------------------------------------------------------------


def test_ties_trims_elects_and_averages_as_worked_out_by_hand():
    """keep=0.6 keeps three of five entries of each task vector.

    trimmed:  [ 5, -4,  3, 0,  0]    sums: 5 - 6 = -1, -4 + 7 = 3, 3, 0 - 5 = -5, 0
              [-6,  7,  0, -5, 0]    the negative wins at 0, the positive at 1
    mean of the entries of the elected sign: -6, 7, 3, -5, 0.
    """
    problem = by_hand([5, -4, 3, 2, 1], [-6, 7, 1, -5, 2])
    assert ties(problem, keep=0.6).tolist() == [4, 17, 13, 5, 10]
    assert ties(problem, keep=0.6, scale=2.0).tolist() == [-2, 24, 16, 0, 10]


def test_ties_averages_over_the_tasks_that_agree_alone():
    """At 0 two of three are positive: (2 + 4) / 2, not (2 + 4 - 1) / 3."""
    problem = by_hand([2, 1, 1, 1, 1], [4, 1, 1, 1, 1], [-1, 1, 1, 1, 4])
    assert ties(problem, keep=1.0).tolist() == [13, 11, 11, 11, 12]


def test_ties_of_agreeing_signs_untrimmed_is_the_average():
    problem = by_hand([1, -2, 3, -4, 5], [3, -1, 2, -8, 1])
    assert_close(ties(problem, keep=1.0), average(problem))


def test_ties_keeps_the_largest_entries_of_one_expert():
    assert ties(by_hand([5, -4, 3, 2, 1]), keep=0.4).tolist() == [15, 6, 10, 10, 10]
    assert ties(by_hand([5, -4, 3, 2, 1]), keep=1.0).tolist() == [15, 6, 13, 12, 11]


def test_ties_keeps_at_least_one_entry():
    assert ties(by_hand([5, -4, 3, 2, 1]), keep=0.01).tolist() == [15, 10, 10, 10, 10]


def test_opposite_signs_of_one_size_cancel():
    assert ties(by_hand([1, 2, 3, 4, 5], [-1, -2, -3, -4, -5]), keep=1.0).tolist() == [10] * 5


@pytest.mark.parametrize("keep", [0.0, -0.2, 1.5, float("nan")])
def test_ties_refuses_a_share_that_is_none(problem, keep):
    with pytest.raises(ValueError, match=rf"keep must be in \(0, 1\], got {keep}; 0.2 keeps"):
        ties(problem, keep=keep)


# --- divmerge -------------------------------------------------------------------------------------


def disentangled(features: int = 4, classes: int = 3) -> MergeProblem:
    """Each task reads features of its own, and its expert changes only what belongs to them.

    The logits are W x, and task t's inputs are zero outside its block of x: so the merge with every
    coefficient at 1 answers exactly as every expert does.
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
        batches.append([Batch({"x": inputs}, torch.full((32,), 1 / 32))])

    def forward(parameters, pairs):
        return [batch.inputs["x"] @ parameters["weight"].T for _, batch in pairs]

    vectors = TaskVectors(layout, ("left", "right"), base.flatten(), deltas.flatten(1))
    return MergeProblem(vectors, batches, forward)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("init", [None, 1.5])
def test_divmerge_finds_the_merge_that_loses_nothing(divergence, init):
    problem, seen = disentangled(), []
    merged = divmerge(
        problem,
        divergence=divergence,
        init=init,
        epochs=60,
        lr=3e-2,
        callback=seen.append,
        progress=False,
    )
    assert_close(seen[-1].coeffs, torch.ones(2, 1), rtol=0, atol=0.05)
    assert mean_over_tasks(problem, merged, js) < 1e-4
    assert mean_over_tasks(problem, average(problem), js) > 1e-2


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_divmerge_gets_closer_to_the_experts_than_where_it_starts(problem, grouping):
    merged = divmerge(problem, grouping=grouping, epochs=20, progress=False)
    start = mean_over_tasks(problem, average(problem), js)
    assert mean_over_tasks(problem, merged, js) < start


def test_divmerge_starts_at_one_over_the_number_of_tasks_or_where_it_is_told(problem):
    for init, expected in ((None, 1 / 3), (0.5, 0.5)):
        seen = []
        divmerge(problem, init=init, callback=seen.append, **QUICK)
        assert_close(seen[0].coeffs, torch.full((3, 1), expected))


def test_a_first_clamped_step_is_adams_step_brought_back_to_0_and_1(problem):
    """Adam's first step has the length lr in every coefficient, so 0.95 + 0.1 ends at 1."""
    ends = {}
    for link in ("identity", "clamp"):
        seen = []
        options = {"grouping": "layer", "init": 0.95, "lr": 0.1, "inputs": 1, **QUICK}
        divmerge(problem, link=link, callback=seen.append, **options)
        ends[link] = seen[-1].coeffs
    assert_close(ends["clamp"], ends["identity"].clamp(0, 1), rtol=0, atol=0)
    assert ends["identity"].max() > 1.04 and ends["identity"].min() < 0.86


def test_later_clamped_steps_are_those_of_a_clamp_in_the_forward_pass(problem):
    """The public loop: Adam on free numbers, autograd through clamp and merge.

    Some numbers leave [0, 1]; the gradient there is 0, and what Adam remembers drives them on.
    """
    single, seen = fewer(problem, 1), []
    options = {"grouping": "layer", "init": 0.9, "lr": 0.1, "epochs": 8, "progress": False}
    divmerge(single, link="clamp", callback=seen.append, **options)
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


def test_one_expert_alone_stays_itself_under_divmerge():
    problem = linear_problem(num_tasks=1)
    merged = divmerge(problem, epochs=2, progress=False)
    assert mean_over_tasks(problem, merged, js) < 1e-6


def test_divmerges_defaults_are_the_papers():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(divmerge).parameters.items()
    }
    assert defaults["divergence"] == "js" and defaults["link"] == "identity"
    assert defaults["epochs"] == 4 and defaults["lr"] == 1e-2
    assert defaults["init"] is None and defaults["inputs"] is None


@pytest.mark.parametrize(("grouping", "expected"), [("task", 200), ("layer", 400)])
def test_as_many_inputs_are_taken_as_in_the_paper(grouping, expected):
    problem = linear_problem(num_tasks=2, batches=120, rows=4)
    kept = limit(problem, None, grouping)
    assert [sum(b.weight.shape[0] for b in batches) for batches in kept.batches] == [expected] * 2


def test_fewer_inputs_are_drawn_evenly_from_first_to_last():
    problem = linear_problem(num_tasks=2, batches=11, rows=4)
    kept = limit(problem, 10, "task")  # three batches of four hold ten inputs
    for batches, every in zip(kept.batches, problem.batches, strict=True):
        assert [id(batch) for batch in batches] == [id(every[n]) for n in (0, 5, 10)]


def test_where_there_are_fewer_inputs_than_asked_for_all_are_taken(problem):
    kept = limit(problem, 1000, "task")
    assert [len(batches) for batches in kept.batches] == [3, 3, 3]


@pytest.mark.parametrize("inputs", [0, -1])
def test_no_inputs_at_all_is_refused(problem, inputs):
    with pytest.raises(
        ValueError, match=f"inputs must be 1 or more per task, got {inputs}; the paper"
    ):
        divmerge(problem, inputs=inputs, **QUICK)


# --- adamerging -----------------------------------------------------------------------------------


def test_adamerging_lowers_the_entropy(problem):
    def of_merged(expert, merged):
        return entropy(merged)

    start = task_arithmetic(problem, scale=0.3)
    merged = adamerging(problem, epochs=20, lr=1e-2, progress=False)
    assert mean_over_tasks(problem, merged, of_merged) < mean_over_tasks(problem, start, of_merged)


def test_adamerging_is_divmerge_with_another_objective(problem, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "entropy", lambda expert, merged: entropy(merged))
    options = {"grouping": "block", "init": 0.3, "lr": 1e-2, "epochs": 3, "progress": False}
    as_divmerge = divmerge(problem, divergence="entropy", **options)
    assert_close(adamerging(problem, **options), as_divmerge, rtol=0, atol=0)


def test_adamerging_asks_no_expert():
    """It is the same merge when the experts' answers mean nothing."""
    problem = linear_problem(num_tasks=2)

    def forward(parameters, pairs):
        logits = problem.forward(parameters, pairs)
        return logits if parameters["embeddings.weight"].requires_grad else [0 * x for x in logits]

    blind = MergeProblem(problem.vectors, problem.batches, forward)
    assert_close(adamerging(blind, **QUICK), adamerging(problem, **QUICK), rtol=0, atol=0)


# --- names ----------------------------------------------------------------------------------------


def test_a_method_with_a_grouping_is_written_with_a_slash():
    assert parse("divmerge/block") == ("divmerge", {"grouping": "block"})
    assert parse("adamerging/layer") == ("adamerging", {"grouping": "layer"})
    assert parse("ties") == ("ties", {})


def test_options_are_the_arguments_after_the_problem():
    assert options_of("average") == ()
    assert options_of("ties") == ("keep", "scale", "coeffs", "trim", "weights", "combine")


NEEDS = ("nothing", "unlabelled inputs", "validation labels", "a validation score")
COSTS = ("weights", "inputs", "gradients", "training")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_states_its_facts_and_searches_options_that_it_takes(name):
    facts = METHODS.facts[name]
    assert facts["source"] and isinstance(facts["symmetric"], bool)
    assert facts["needs"].split(",")[0] in NEEDS and facts["cost"] in COSTS
    for candidate in facts["search"]:
        assert set(candidate) <= set(options_of(name))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("divmrge", "unknown method 'divmrge'; choose one of: .*did you mean 'divmerge'"),
        ("divmrge/task", "unknown method 'divmrge'"),
        ("divmerge/blok", "unknown grouping 'blok'; choose one of: task, block, layer"),
        ("ties/block", "method 'ties' has no grouping, so 'ties/block' means nothing; say 'ties'"),
    ],
)
def test_a_method_that_does_not_exist_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "jss"}, "unknown divergence 'jss'; choose one of: .*mean 'js'"),
        ({"grouping": "head"}, "unknown grouping 'head'; choose one of: task, block, layer"),
        ({"link": "relu"}, "unknown link 'relu'; choose one of: identity, sigmoid, softmax"),
        ({"link": "softmax", "init": 0.5}, "link 'softmax' cannot start at 0.5"),
        ({"epochs": 0}, "epochs must be 1 or more"),
    ],
)
def test_divmerge_refuses_what_it_does_not_know(problem, options, message):
    with pytest.raises(ValueError, match=message):
        divmerge(problem, **{"progress": False, **options})


def test_ties_keeps_its_share_where_magnitudes_are_equal(problem):
    level = problem.vectors.map(torch.ones_like)
    merged = ties(replace(problem, vectors=level), keep=0.5)
    assert_close(merged, problem.vectors.base + 1)
