"""What every registered method, grouping and link promises: a new entry is tested as it is.

A claim about methods with groupings is tested at one grouping of each; claims take turns.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from comparisons import answers, merge, square, toy
from helpers import INF, NAN, fewer, frozen, linear_problem, refuses
from torch.testing import assert_close

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import GROUPINGS, LINKS, Coefficients, groups_of
from divmerge_core.merging.problem import Diverged, MergeProblem, Predictor
from divmerge_core.methods import METHODS, options_of, parse
from divmerge_core.methods.arithmetic import task_arithmetic

every_grouping = pytest.mark.parametrize("grouping", GROUPINGS)


def facts(spec: str) -> dict:
    return METHODS.facts[parse(spec)[0]]


def those(promise: Callable[[dict], bool] = lambda known: True, *, turn: int = 0):
    """The methods whose facts make a promise, each with the grouping whose turn it is."""
    grouping = list(GROUPINGS)[turn % len(GROUPINGS)]
    kept = [name for name in METHODS if promise(METHODS.facts[name])]
    specs = [f"{name}/{grouping}" if "grouping" in options_of(name) else name for name in kept]
    return pytest.mark.parametrize("spec", specs)


every_method = those()


def merges(known: dict) -> bool:
    return known.get("returns") != "predictor"


def scored(known: dict) -> bool:
    return known["needs"] == "a validation score"


def parts(problem: MergeProblem, merged) -> list[torch.Tensor]:
    """What two results are compared by: the vector, or a predictor's answers."""
    return [merged] if isinstance(merged, torch.Tensor) else answers(problem, merged)


def check_result(spec: str, problem: MergeProblem, merged) -> None:
    """Finite, in the base's precision, without a graph, and a predictor where that is said."""
    if merges(facts(spec)):
        assert merged.shape == problem.vectors.base.shape
    else:
        assert isinstance(merged, Predictor) and not isinstance(merged, torch.Tensor)
    for part in parts(problem, merged):
        assert part.dtype == problem.vectors.base.dtype
        assert torch.isfinite(part).all()
        assert not part.requires_grad


# --- methods
@dataclass(frozen=True)
class Run:
    """One merge: the problem and the global generator's state, before and after."""

    problem: MergeProblem
    merged: object
    found: list[torch.Tensor]  # its parts
    before: tuple
    states: tuple[torch.Tensor, torch.Tensor]


@cache
def run(spec: str) -> Run:
    """A merge of three tasks in float64, shared by several claims."""
    problem = toy(spec)
    module = copy.deepcopy(problem.module.state_dict())
    before = copy.deepcopy(problem.vectors), copy.deepcopy(problem.batches), module
    state = torch.get_rng_state()
    merged = merge(problem, spec)
    states = state, torch.get_rng_state()
    return Run(problem, merged, parts(problem, merged), before, states)


@every_method
def test_the_result_is_of_the_kind_that_is_said_and_shares_no_memory_with_the_problem(spec):
    ran = run(spec)
    check_result(spec, ran.problem, ran.merged)
    assert ran.merged.nbytes >= ran.problem.vectors.base.nbytes / 2
    vectors = ran.problem.vectors
    inputs = {t.untyped_storage().data_ptr() for t in (vectors.base, vectors.deltas)}
    if isinstance(ran.merged, torch.Tensor):
        assert ran.merged.untyped_storage().data_ptr() not in inputs


@those(turn=1)
def test_the_result_of_two_tasks_in_float32_is_finite_and_in_float32(spec):
    problem = toy(spec, num_tasks=2, dtype=torch.float32)
    check_result(spec, problem, merge(problem, spec))


@every_method
def test_the_problem_and_the_global_random_numbers_are_untouched(spec):
    ran = run(spec)
    problem, (vectors, batches, module) = ran.problem, ran.before
    assert torch.equal(problem.vectors.base, vectors.base)
    assert torch.equal(problem.vectors.deltas, vectors.deltas)
    for every, old in zip(problem.batches, batches, strict=True):
        for batch, old_batch in zip(every, old, strict=True):
            assert torch.equal(batch.inputs["x"], old_batch.inputs["x"])
            assert torch.equal(batch.weight, old_batch.weight)
    assert all(torch.equal(problem.module.state_dict()[k], v) for k, v in module.items())
    for layer in problem.module.modules():
        assert not layer._forward_pre_hooks and not layer._forward_hooks
    assert torch.equal(*ran.states)


@every_method
def test_the_same_seed_gives_the_same_result_whatever_was_drawn_before(spec):
    torch.manual_seed(123)
    problem = toy(spec)
    again = parts(problem, merge(problem, spec))
    assert all(torch.equal(one, other) for one, other in zip(run(spec).found, again, strict=True))


@those(turn=2)
def test_zero_task_vectors_give_back_the_base(spec):
    still = frozen(toy(spec, num_tasks=2), slice(None))
    found, expected = merge(still, spec), still.vectors.base
    if isinstance(found, torch.Tensor):
        assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(answers(still, found), answers(still, expected), strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@those(merges, turn=1)
def test_parameters_that_no_expert_changed_stay_as_they_were(spec):
    partly = frozen(toy(spec, num_tasks=2), slice(1, 2))
    place = slice(*partly.vectors.layout.bounds[1])
    merged = merge(partly, spec)
    assert_close(merged[place], partly.vectors.base[place], rtol=0, atol=1e-9)


@those(lambda known: known["symmetric"])
def test_the_order_of_tasks_is_immaterial_where_the_method_says_so(spec):
    problem, other = run(spec).problem, run(spec).merged
    tasks = list(problem.vectors.tasks)
    turned = problem.select([tasks[-1], *tasks[:-1]])
    one = merge(turned, spec)
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


@every_method
def test_what_a_method_needs_is_asked_for_by_name_before_it_starts_or_is_not_needed(spec):
    """Unlabelled inputs, a score, and the network: problems that lack one of these."""
    problem, name, needs = toy(spec), re.escape(parse(spec)[0]), facts(spec)["needs"]
    if needs.startswith("unlabelled inputs"):
        with refuses(f"^{name} needs unlabelled inputs of every task; no"):
            merge(replace(fewer(problem, 0), forward=never), spec)
    elif scored(facts(spec)):
        with refuses(f"^{name} needs a validation score: give"):
            merge(replace(problem, forward=never), spec, score=None)
    else:
        problem = fewer(problem, 0)
    bare = replace(problem, module=None)
    try:
        check_result(spec, bare, merge(bare, spec))
    except ValueError as error:
        assert str(error).startswith(f"{parse(spec)[0]} looks inside the model: give MergeProblem")


@pytest.mark.parametrize(
    "spec", [n for n in METHODS if "lr" in options_of(n) and "calls" not in METHODS.facts[n]]
)
def test_a_fit_that_runs_away_stops_with_its_name_step_and_cause(spec):
    """Where a score is called, steps move a policy and no parameter."""
    with pytest.raises(Diverged, match=r"step \d.* lower lr \(now 1000000.0\)"):
        merge(toy(spec), spec, lr=1e6)


@those(lambda known: known.get("exactly", 1) == 1, turn=2)
def test_one_expert_alone_gives_a_point_between_base_and_expert(spec):
    """With T = 1 the expert itself loses nothing; a method may say that it leaves the box."""
    problem = linear_problem(num_tasks=1)
    merged = merge(problem, spec)
    check_result(spec, problem, merged)
    if merges(facts(spec)) and facts(spec).get("between", True):
        share = (merged - problem.vectors.base) / problem.vectors.deltas[0]
        assert share.min() > -0.05 and share.max() < 1.05


@those(lambda known: "exactly" in known)
def test_another_number_of_experts_than_it_takes_is_refused_by_name(spec):
    with refuses(f"{parse(spec)[0]}.*exactly {facts(spec)['exactly']}"):
        merge(linear_problem(num_tasks=facts(spec)["exactly"] + 1), spec)


@those(lambda known: "linear" in known)
def test_a_linear_option_multiplies_the_change(spec):
    problem, option = toy(spec, num_tasks=2), facts(spec)["linear"]
    base = problem.vectors.base
    once, twice = (merge(problem, spec, **{option: scale}) - base for scale in (0.7, 1.4))
    assert_close(2 * once, twice, rtol=1e-9, atol=1e-12)
    assert once.any()


@those(lambda known: known["cost"] == "weights")
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_task_vectors_may_be_stored_in_less_memory(spec, storage):
    problem = toy(spec, num_tasks=2, dtype=torch.float32)
    stored = replace(problem, vectors=problem.vectors.stored_as(storage))
    wide = replace(problem, vectors=stored.vectors.map(lambda deltas: deltas))
    assert dense(wide.vectors.deltas).dtype == torch.float32
    found, expected = merge(stored, spec), merge(wide, spec)
    for one, other in zip(parts(stored, found), parts(wide, expected), strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other)


# With one coefficient per task where it takes a grouping: others have more to draw.
@those(lambda known: "calls" in known)
def test_the_score_is_called_as_often_as_is_said(spec):
    problem, counted = toy(spec, num_tasks=2), []
    per_step = facts(spec)["calls"](len(problem.vectors.tasks))

    def score(merged):
        counted.append(1)
        return square(problem, merged)

    merge(problem, spec, score=score, steps=2)
    few = len(counted)
    counted.clear()
    merge(problem, spec, score=score, steps=5)
    assert len(counted) - few == 3 * per_step


@those(scored)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_score_that_is_not_finite_is_refused(spec, value):
    name = parse(spec)[0]
    with refuses(f"{name}: score gave {value}; it must give finite"):
        merge(toy(spec), spec, score=lambda merged: value)


# --- options
FRACTIONS, CLOSED = (0.0, -0.2, 1.5, NAN), (-0.1, 1.1, NAN)
OUT_OF_RANGE = {
    **{"keep": FRACTIONS, "ratio": (0.0, 1.5), "size_base": (0.0, 1.1)},  # (0, 1]
    **{"share": CLOSED, "common": CLOSED, "off_diagonal": CLOSED, "t": CLOSED},  # [0, 1]
    **{"drop": (1.0, -0.1, NAN), "remove": (-0.1, 1.0, NAN), "start": (1.0, -0.1)},  # [0, 1)
    **{"scale": (NAN, -INF), "init": (NAN, INF), "alpha": (INF,), "beta": (NAN,)},
    **{"lr": (0.0, -1.0, NAN, INF), "floor": (0.0, NAN, INF), "sigma": (0.0, INF)},
    **{"weight": (NAN, INF)},
    **{"eta": (-1.0,), "power": (-1.0, NAN), "zeta": (-1.0, NAN), "threshold": (0.0, NAN, INF)},
    **{"inputs": (0, -1), "epochs": (0,), "rank": (0,), "batch_size": (0,), "children": (0,)},
    **{"steps": (-1,), "draw": (0,), "fraction": (0,), "agree": (-1,), "clip": (0.5, -0.1)},
    **{"router_layers": (3,), "grouping": ("blok",), "divergence": ("jss",), "link": ("relu",)},
    **{"trim": ("row",), "combine": ("max",), "then": ("average",), "rescale": ("l2",)},
    **{"per": ("column",), "inter": ("paper",), "norm": ("l2",), "origin": ("mean",)},
    **{"shared": ("left",), "scaling": ("task",), "units": ("clip",), "scope": ("all",)},
    **{"posterior": ("flat",), "rule": ("avrage",), "optimizer": ("sgd",)},
}


def refused(name: str, options: dict, message: str) -> None:
    """A method refuses these options before any forward pass or score."""
    problem = replace(toy(name), forward=never)
    with refuses(message):
        merge(problem, name, **options)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(n, o, v) for n in METHODS for o in options_of(n) for v in OUT_OF_RANGE.get(o, ())],
)
def test_an_option_out_of_range_is_refused_with_its_name_and_value(name, option, value):
    said = rf"({option}\b|unknown \w+) .*{re.escape(str(value))}"
    refused(name, {option: value}, said)


WEIGHTS = "one positive, finite weight for each of 3 tasks"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ties", {"weights": "both"}, "weights must be one of before, after; got 'both'"),
        ("ties", {"coeffs": [1, 2]}, rf"{WEIGHTS}, got \[1, 2\]"),
        ("ties", {"coeffs": [1, 2, 0]}, WEIGHTS),
        ("ties", {"coeffs": [1, 2, NAN]}, WEIGHTS),
        ("ties", {"coeffs": [1, 2, INF]}, WEIGHTS),
        ("multi_slerp", {"weights": [1, -1, 1]}, WEIGHTS),
        ("breadcrumbs", {"keep": 0.6, "remove": 0.5}, "got remove 0.5 and keep 0.6; 0.01 removes"),
        ("divmerge", {"link": "softmax", "init": 0.5}, "link 'softmax' reaches, got 0.5"),
        ("divmerge", {"divergence": "jss"}, "unknown divergence 'jss'; choose one of: .*mean 'js'"),
        ("lines", {"rule": "lines"}, "must be another method that returns parameters, got 'lines'"),
        ("lines", {"rule": "emr"}, "must be another method that returns parameters, got 'emr'"),
        ("esm_pp", {"layers": "query"}, "layers='query' matches none of embeddings.weight, .*all"),
        ("surgery", {"merge": "surgery"}, "one vector and asks for no score, got 'surgery'"),
        ("surgery", {"merge": "evolved_coefficients"}, "asks for no score, got 'evolved_coeff"),
        ("selection_policy", {"rule": "divmerge"}, "merge any number .* 'divmerge' does not"),
        ("selection_policy", {"rule": "slerp"}, "merge any number .* 'slerp' does not"),
        ("selection_policy", {"rule": "selection_policy"}, "'selection_policy' does not, 'average"),
        ("selection_policy", {"rule": "logits_fusion"}, "one vector.* 'logits_fusion' does not"),
    ],
)
def test_options_that_do_not_fit_together_or_the_problem_are_refused(name, options, message):
    refused(name, options, message)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("divmrge", "unknown method 'divmrge'; choose one of: .*did you mean 'divmerge'"),
        ("divmrge/task", "unknown method 'divmrge'"),
        ("divmerge/blok", "unknown grouping 'blok'; choose one of: task, block, layer"),
        ("divmerge/", "unknown grouping ''; choose one of"),
        ("ties/block", "method 'ties' has no grouping, so 'ties/block' means nothing; say 'ties'"),
    ],
)
def test_a_method_with_a_grouping_is_written_with_a_slash_and_others_are_refused(spec, message):
    assert parse("divmerge/block") == ("divmerge", {"grouping": "block"})
    assert parse("ties") == ("ties", {})
    assert options_of("ties") == ("keep", "scale", "coeffs", "trim", "weights", "combine")
    with refuses(message):
        parse(spec)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_states_its_facts_and_searches_options_that_it_takes(name):
    facts, needs = METHODS.facts[name], METHODS.facts[name]["needs"].split(",")[0]
    assert needs in ("nothing", "unlabelled inputs", "validation labels", "a validation score")
    assert facts["cost"] in ("weights", "inputs", "gradients", "training")
    assert facts["source"] and isinstance(facts["symmetric"], bool)
    assert all(set(candidate) <= set(options_of(name)) for candidate in facts["search"])


# --- groupings and links
@every_grouping
def test_every_tensor_is_in_one_group_and_the_groups_tile_the_vector(grouping):
    layout = linear_problem().vectors.layout
    names, numbers = groups_of(layout, grouping)
    assert len(numbers) == len(layout.names)
    assert set(numbers) == set(range(len(names)))
    assert len(set(names)) == len(names)
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
def test_one_coefficient_gives_its_group_the_expert_and_changes_no_other(grouping):
    vectors = linear_problem(num_tasks=2).vectors
    coefficients = Coefficients(vectors.layout, 2, grouping=grouping, init=0.0)
    chosen = coefficients().detach().clone()
    chosen[1, -1] = 1.0
    merged = grouped_merge(vectors.base, vectors.deltas, chosen, coefficients.segments)
    _, numbers = groups_of(vectors.layout, grouping)
    for (start, stop), number in zip(vectors.layout.bounds, numbers, strict=True):
        source = vectors.expert("task1") if number == chosen.shape[1] - 1 else vectors.base
        assert torch.equal(merged[start:stop], source[start:stop])


@pytest.mark.parametrize("link", LINKS)
def test_a_links_gradient_is_that_of_finite_differences_and_nowhere_zero(link):
    """At numbers where no link has a corner."""
    raw = torch.tensor([[0.3], [0.8], [0.55]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LINKS[link], raw)
    (LINKS[link](raw) * torch.tensor([[1.0], [2.0], [-1.0]])).sum().backward()
    assert raw.grad.abs().min() > 1e-3
