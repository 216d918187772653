"""What every registered method, grouping and link promises: a new entry is tested as it is."""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from helpers import fewer, linear_problem, merge, specs, square, toy
from torch.testing import assert_close

from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import GROUPINGS, LINKS, Coefficients, groups_of
from divmerge_core.merging.problem import Diverged, MergeProblem, Predictor
from divmerge_core.methods import METHODS, options_of, parse
from divmerge_core.methods.arithmetic import task_arithmetic

every_method = pytest.mark.parametrize("spec", specs())  # with every grouping
every_name = pytest.mark.parametrize("spec", METHODS)  # where the grouping is immaterial
every_grouping = pytest.mark.parametrize("grouping", GROUPINGS)
every_link = pytest.mark.parametrize("link", LINKS)


def facts(spec: str) -> dict:
    return METHODS.facts[parse(spec)[0]]


def those(promise: Callable[[dict], bool], among: Iterable[str] = METHODS):
    """The methods whose facts make a promise: all others are not asked to keep it."""
    return pytest.mark.parametrize("spec", [spec for spec in among if promise(facts(spec))])


def merges(known: dict) -> bool:
    return known.get("returns") != "predictor"


def scored(known: dict) -> bool:
    return known["needs"] == "a validation score"


def answers(problem: MergeProblem, merged) -> list[torch.Tensor]:
    """Logits of a merged vector, or of a predictor, on every input."""
    with torch.no_grad():
        return [
            problem.logits_of(merged, task, batch)
            for task, batches in enumerate(problem.batches)
            for batch in batches
        ]


def parts(problem: MergeProblem, merged) -> list[torch.Tensor]:
    """What two results are compared by: the vector, or a predictor's answers."""
    return [merged] if isinstance(merged, torch.Tensor) else answers(problem, merged)


# --- methods --------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(
    ("num_tasks", "dtype"), [(1, torch.float32), (2, torch.float64), (3, torch.float32)]
)
def test_the_result_is_finite_in_the_bases_precision_and_of_the_kind_that_is_said(
    spec, num_tasks, dtype
):
    problem = toy(spec, num_tasks=num_tasks, dtype=dtype)
    merged = merge(problem, spec)
    if facts(spec).get("returns") == "predictor":
        assert isinstance(merged, Predictor) and not isinstance(merged, torch.Tensor)
    else:
        assert merged.shape == problem.vectors.base.shape
    for part in parts(problem, merged):
        assert part.dtype == dtype
        assert torch.isfinite(part).all()
        assert not part.requires_grad


@every_name
def test_the_problem_is_untouched(spec):
    problem = toy(spec)
    before = copy.deepcopy(problem.vectors), copy.deepcopy(problem.batches)
    module = copy.deepcopy(problem.module.state_dict())
    merged = merge(problem, spec)
    answers(problem, merged)
    if isinstance(merged, torch.Tensor):
        merged.fill_(float("nan"))  # the result shares no memory with the problem
    assert torch.equal(problem.vectors.base, before[0].base)
    assert torch.equal(problem.vectors.deltas, before[0].deltas)
    for every, old in zip(problem.batches, before[1], strict=True):
        for batch, old_batch in zip(every, old, strict=True):
            assert torch.equal(batch.inputs["x"], old_batch.inputs["x"])
            assert torch.equal(batch.weight, old_batch.weight)
    assert all(torch.equal(problem.module.state_dict()[k], v) for k, v in module.items())
    assert not any(layer._forward_pre_hooks for layer in problem.module.modules())


@every_name
def test_the_same_seed_gives_the_same_result_whatever_was_drawn_before(spec):
    problem = toy(spec)
    first = parts(problem, merge(problem, spec))
    torch.manual_seed(123)
    torch.rand(7)
    again = parts(problem, merge(toy(spec), spec))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@every_name
def test_the_global_random_numbers_are_left_alone(spec):
    problem = toy(spec)
    before = torch.get_rng_state()
    merge(problem, spec)
    assert torch.equal(before, torch.get_rng_state())


@every_method
def test_zero_task_vectors_give_back_the_base(spec):
    problem = toy(spec)
    still = replace(problem, vectors=problem.vectors.map(torch.zeros_like))
    found, expected = merge(still, spec), problem.vectors.base
    for one, other in zip(parts(still, found), parts(still, expected), strict=False):
        if isinstance(found, torch.Tensor):
            assert_close(one, other, rtol=0, atol=1e-12)
    for one, other in zip(answers(still, found), answers(still, expected), strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@those(merges, specs())
def test_parameters_that_no_expert_changed_stay_as_they_were(spec):
    problem = toy(spec)
    start, stop = problem.vectors.layout.bounds[1]

    def freeze(deltas):
        deltas = deltas.clone()
        deltas[:, start:stop] = 0
        return deltas

    partly = replace(problem, vectors=problem.vectors.map(freeze))
    merged = merge(partly, spec)
    assert_close(merged[start:stop], problem.vectors.base[start:stop], rtol=0, atol=1e-9)


@those(lambda known: known["symmetric"], specs())
def test_the_order_of_tasks_is_immaterial_where_the_method_says_so(spec):
    problem = toy(spec)
    tasks = list(problem.vectors.tasks)
    turned = problem.select([tasks[-1], *tasks[:-1]])
    one, other = merge(turned, spec), merge(problem, spec)
    if isinstance(one, torch.Tensor):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
        return
    with torch.no_grad():
        for place, task in enumerate(turned.vectors.tasks):
            for batch in turned.batches[place]:
                expected = other.logits(tasks.index(task), batch)
                assert_close(one.logits(place, batch), expected, rtol=1e-4, atol=1e-5)


def never(parameters, pairs):
    raise AssertionError("a forward pass was made")


@every_name
def test_unlabelled_inputs_are_asked_for_by_name_before_it_starts_or_not_needed(spec):
    bare, name = fewer(toy(spec), 0), re.escape(parse(spec)[0])
    if facts(spec)["needs"].startswith("unlabelled inputs"):
        with pytest.raises(ValueError, match=f"^{name} needs unlabelled inputs of every task; no"):
            merge(replace(bare, forward=never), spec)
    elif facts(spec)["needs"] != "a validation score":
        assert all(torch.isfinite(part).all() for part in parts(bare, merge(bare, spec)))


@those(scored)
def test_a_score_is_asked_for_by_name_before_it_starts(spec):
    with pytest.raises(ValueError, match=f"^{parse(spec)[0]} needs a validation score: give"):
        merge(replace(toy(spec), forward=never), spec, score=None)


@every_name
def test_without_its_network_a_method_merges_or_says_by_name_that_it_looks_inside(spec):
    try:
        merge(replace(toy(spec), module=None), spec)
    except ValueError as error:
        assert str(error).startswith(f"{parse(spec)[0]} looks inside the model: give MergeProblem")


@those(lambda known: "calls" not in known, [n for n in METHODS if "lr" in options_of(n)])
def test_a_fit_that_runs_away_stops_with_its_name_step_and_cause(spec):
    """Where a score is called, steps move a policy and no parameter."""
    with pytest.raises(Diverged, match=r"step \d.* lower lr \(now 1000000.0\)"):
        merge(toy(spec), spec, lr=1e6)


def stays_between(known: dict) -> bool:
    return merges(known) and known.get("between", True) and known.get("exactly", 1) == 1


@those(stays_between, specs())
def test_one_expert_alone_gives_a_point_between_base_and_expert(spec):
    """With T = 1 the expert itself loses nothing; a method may say that it leaves the box."""
    problem = linear_problem(num_tasks=1)
    share = (merge(problem, spec) - problem.vectors.base) / problem.vectors.deltas[0]
    assert share.min() > -0.05 and share.max() < 1.05


@those(lambda known: "exactly" in known)
def test_another_number_of_experts_than_it_takes_is_refused_by_name(spec):
    with pytest.raises(ValueError, match=f"{parse(spec)[0]}.*exactly {facts(spec)['exactly']}"):
        merge(linear_problem(num_tasks=facts(spec)["exactly"] + 1), spec)


@those(lambda known: "linear" in known)
def test_a_linear_option_multiplies_the_change(spec):
    problem, option = toy(spec), facts(spec)["linear"]
    base = problem.vectors.base
    once, twice = (merge(problem, spec, **{option: scale}) - base for scale in (0.7, 1.4))
    assert_close(2 * once, twice, rtol=1e-9, atol=1e-12)
    assert once.any()


# With one coefficient per task where it takes a grouping: others have more to draw.
@those(lambda known: "calls" in known, [s for s in specs() if s.endswith("/task") or "/" not in s])
def test_the_score_is_called_as_often_as_is_said(spec):
    problem, counted = toy(spec), []
    per_step = facts(spec)["calls"](len(problem.vectors.tasks))

    def score(merged):
        counted.append(1)
        return square(problem, merged)

    merge(problem, spec, score=score, steps=2)
    few = len(counted)
    counted.clear()
    merge(problem, spec, score=score, steps=5)
    assert len(counted) - few == 3 * per_step


@every_name
def test_what_is_stored_is_said(spec):
    problem = toy(spec)
    merged = merge(problem, spec)
    assert merged.nbytes >= problem.vectors.base.nbytes / 2


# --- groupings and links --------------------------------------------------------------------------


@every_grouping
def test_every_tensor_is_in_one_group_and_every_group_has_a_tensor(grouping):
    layout = linear_problem().vectors.layout
    names, numbers = groups_of(layout, grouping)
    assert len(numbers) == len(layout.names)
    assert set(numbers) == set(range(len(names)))
    assert len(set(names)) == len(names)


@every_grouping
def test_the_groups_tile_the_vector(grouping):
    layout = linear_problem().vectors.layout
    rows = Coefficients(layout, 2, grouping=grouping).segments.rows
    assert rows[0][0] == 0 and rows[-1][1] == layout.size
    assert all(before[1] == after[0] for before, after in zip(rows, rows[1:], strict=False))


@every_grouping
def test_equal_coefficients_give_task_arithmetic(grouping):
    problem = linear_problem()
    coefficients = Coefficients(problem.vectors.layout, 3, grouping=grouping, init=0.4)
    vectors = problem.vectors
    merged = grouped_merge(vectors.base, vectors.deltas, coefficients(), coefficients.segments)
    assert_close(merged, task_arithmetic(problem, scale=0.4), rtol=1e-6, atol=1e-6)


@every_grouping
def test_one_expert_at_coefficient_1_is_that_expert(grouping):
    vectors = linear_problem(num_tasks=1).vectors
    coefficients = Coefficients(vectors.layout, 1, grouping=grouping, init=1.0)
    merged = grouped_merge(vectors.base, vectors.deltas, coefficients(), coefficients.segments)
    assert_close(merged, vectors.expert("task0"), rtol=0, atol=0)


@every_grouping
def test_one_coefficient_changes_its_group_alone(grouping):
    vectors = linear_problem(num_tasks=2).vectors
    coefficients = Coefficients(vectors.layout, 2, grouping=grouping, init=0.0)
    chosen = coefficients().detach().clone()
    chosen[1, -1] = 1.0
    merged = grouped_merge(vectors.base, vectors.deltas, chosen, coefficients.segments)
    _, numbers = groups_of(vectors.layout, grouping)
    for (start, stop), number in zip(vectors.layout.bounds, numbers, strict=True):
        source = vectors.expert("task1") if number == chosen.shape[1] - 1 else vectors.base
        assert torch.equal(merged[start:stop], source[start:stop])


@every_link
@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_every_link_reaches_its_initial_value(link, num_tasks):
    layout = linear_problem().vectors.layout
    coefficients = Coefficients(layout, num_tasks, grouping="layer", link=link)
    assert_close(coefficients(), torch.full((num_tasks, 5), 1 / num_tasks))


@every_link
def test_a_links_inverse_gives_back_the_coefficients(link):
    """Wherever they are at 1/T in every task: the value that all links can take."""
    wanted = torch.full((4, 2), 0.25, dtype=torch.float64)
    assert_close(LINKS[link](LINKS.facts[link]["inverse"](wanted)), wanted)


@every_link
def test_a_links_gradient_is_that_of_finite_differences(link):
    """At numbers where no link has a corner."""
    raw = torch.tensor([[0.3], [0.8], [0.55]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LINKS[link], raw)


@every_link
def test_every_link_lets_gradients_through(link):
    coefficients = Coefficients(linear_problem().vectors.layout, 3, link=link)
    slope = torch.tensor([[1.0], [2.0], [-1.0]])
    (coefficients() * slope).sum().backward()
    assert coefficients.raw.grad.abs().min() > 1e-3
