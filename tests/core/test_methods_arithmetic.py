"""Sums of task vectors: variants of TIES, DARE, and layer scaling over any rule."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import layout_of, linear_problem
from torch.testing import assert_close

import divmerge_core.methods.masked
import divmerge_core.methods.spherical  # noqa: F401  (they register)
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import METHODS, options_of
from divmerge_core.methods.arithmetic import average, dare, task_arithmetic, ties
from divmerge_core.methods.depthwise import depths, lines
from divmerge_core.methods.divmerge import divmerge

FAMILY = (
    *("average", "task_arithmetic", "ties", "dare", "lines", "slerp", "multi_slerp", "model_stock"),
    *("breadcrumbs", "consensus", "pcb", "emr"),
)


def problem_of(*deltas: list[float], base: float | list[float] = 0.0, **shapes) -> MergeProblem:
    """A problem with these task vectors, in float64 and without inputs; one tensor unless told."""
    rows = torch.tensor(deltas, dtype=torch.float64)
    layout = layout_of(**(shapes or {"weight": (rows.shape[1],)}))
    start = torch.tensor(base, dtype=torch.float64).expand(layout.size).clone()
    names = tuple(f"task{number}" for number in range(len(rows)))
    vectors = TaskVectors(layout, names, start, rows)
    return MergeProblem(vectors, [[] for _ in names], lambda parameters, pairs: [])


def change(problem: MergeProblem, merged: torch.Tensor) -> torch.Tensor:
    return merged - problem.vectors.base


# --- ties -----------------------------------------------------------------------------------------


def slow_ties(problem, keep, coeffs, trim, weights, combine):
    """Entry by entry, with sorted lists."""
    rows = [row.tolist() for row in problem.vectors.deltas]
    size = len(rows[0])
    for row in rows:
        for start, stop in [(0, size)] if trim == "global" else problem.vectors.layout.bounds:
            ranked = sorted(range(start, stop), key=lambda n: -abs(row[n]))  # noqa: B023
            for n in ranked[max(1, round(keep * (stop - start))) :]:
                row[n] = 0.0
    merged = []
    for column in zip(*rows, strict=True):
        heard = coeffs if weights == "before" else [1.0] * len(column)
        vote = sum(voice * entry for voice, entry in zip(heard, column, strict=True))
        agreeing = [t for t, entry in enumerate(column) if entry * vote > 0]
        total = sum(coeffs[t] * column[t] for t in agreeing)
        merged.append(
            total / sum(heard[t] for t in agreeing) if agreeing and combine == "mean" else total
        )
    return problem.vectors.base + torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize(
    ("trim", "weights", "combine"),
    [*itertools.product(("global", "tensor"), ("before", "after"), ("mean", "sum"))],
)
def test_ties_is_what_a_loop_over_entries_gives(problem, trim, weights, combine):
    coeffs = [1.0, 0.5, 2.0]
    options = {"trim": trim, "weights": weights, "combine": combine}
    found = ties(problem, keep=0.4, coeffs=coeffs, **options)
    assert_close(found, slow_ties(problem, 0.4, coeffs, **options))


def test_a_tensor_of_small_entries_is_trimmed_away_globally_and_keeps_its_share_by_tensor():
    problem = problem_of([9, 8, 7, 6, 0.4, 0.3, 0.2, 0.1], large=(4,), small=(2, 2))
    assert change(problem, ties(problem, keep=0.5)).tolist() == [9, 8, 7, 6, 0, 0, 0, 0]
    by_tensor = change(problem, ties(problem, keep=0.5, trim="tensor"))
    assert_close(by_tensor, by_tensor.new_tensor([9, 8, 0, 0, 0.4, 0.3, 0, 0]))


def test_a_tensor_without_entries_is_no_obstacle():
    problem = problem_of([3, 1], weight=(2,), none=(0, 4))
    assert ties(problem, keep=0.5, trim="tensor").tolist() == [3, 0]


def test_weights_before_the_election_can_turn_its_sign():
    problem = problem_of([3.0], [-2.0])
    assert ties(problem, keep=1.0, coeffs=[1, 2], weights="before").tolist() == [-2]
    assert ties(problem, keep=1.0, coeffs=[1, 2], weights="after").tolist() == [3]


def test_weights_before_divide_by_their_sum_and_after_by_the_number():
    problem = problem_of([3.0], [3.0])
    assert ties(problem, keep=1.0, coeffs=[1, 3], weights="before").tolist() == [3]
    assert ties(problem, keep=1.0, coeffs=[1, 3], weights="after").tolist() == [6]


@pytest.mark.parametrize("weights", ["before", "after"])
def test_weights_of_one_are_no_weights(problem, weights):
    assert_close(ties(problem, coeffs=[1, 1, 1], weights=weights), ties(problem), rtol=0, atol=0)


def test_the_untrimmed_sum_of_agreeing_signs_is_task_arithmetic(problem):
    same = problem_of([1, -2, 3], [3, -1, 2])
    found = ties(same, keep=1.0, combine="sum", scale=0.4)
    assert_close(found, task_arithmetic(same, scale=0.4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trim": "row"}, "trim must be one of global, tensor; got 'row'"),
        ({"weights": "both"}, "weights must be one of before, after; got 'both'"),
        ({"combine": "max"}, "combine must be one of mean, sum; got 'max'"),
        ({"coeffs": [1, 2]}, r"one positive, finite weight for each of 3 tasks, got \[1, 2\]"),
        ({"coeffs": [1, 2, 0]}, "one positive, finite weight for each of 3 tasks"),
        ({"coeffs": [1, 2, float("nan")]}, "one positive, finite weight for each of 3 tasks"),
    ],
)
def test_ties_refuses_what_it_does_not_know(problem, options, message):
    with pytest.raises(ValueError, match=message):
        ties(problem, **options)


# --- dare -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", ["expected", "l1", "none"])
def test_dare_that_drops_nothing_is_the_method_after_it(problem, rescale):
    options = {"drop": 0.0, "rescale": rescale, "scale": 0.7}
    assert_close(dare(problem, **options), task_arithmetic(problem, scale=0.7))
    assert_close(dare(problem, then="ties", **options), ties(problem, scale=0.7))


def test_dare_drops_an_entry_or_scales_it_up():
    problem = linear_problem(num_tasks=1, features=20)
    share = change(problem, dare(problem, drop=0.75, scale=1.0)) / problem.vectors.deltas[0]
    dropped = share.abs() < 1e-6
    assert_close(share[~dropped], torch.full_like(share[~dropped], 4.0))
    assert 0.70 < dropped.double().mean() < 0.80


def test_dare_without_rescaling_leaves_survivors_as_they_are():
    problem = problem_of([1.0] * 50)
    merged = dare(problem, drop=0.5, scale=1.0, rescale="none")
    assert set(merged.tolist()) == {0.0, 1.0}


def test_dare_expects_the_task_vectors_themselves():
    """The mean of 200 draws, within five deviations: an entry's variance is x^2 p / (1 - p)."""
    problem = problem_of([1, -2, 3, 0.5], [2, 1, -1, 0.0])
    draws = [dare(problem, drop=0.5, scale=1.0, seed=seed) for seed in range(200)]
    spread = problem.vectors.deltas.square().sum(dim=0).div(200).sqrt()
    off = torch.stack(draws).mean(dim=0) - task_arithmetic(problem, scale=1.0)
    assert (off.abs() < 5 * spread).all()


def test_dare_draws_for_every_task_anew():
    problem = problem_of([1.0] * 50, [1.0] * 50)
    merged = dare(problem, drop=0.5, scale=1.0)
    assert set(merged.tolist()) == {0.0, 2.0, 4.0}


def test_dare_draws_otherwise_with_another_seed(problem):
    assert not torch.equal(dare(problem, seed=0), dare(problem, seed=1))


def test_dare_can_keep_the_l1_norm_of_every_tensor():
    problem = linear_problem(num_tasks=1)
    merged = dare(problem, drop=0.3, scale=1.0, rescale="l1")
    for start, stop in problem.vectors.layout.bounds:
        found = change(problem, merged)[start:stop].abs().sum()
        assert_close(found, problem.vectors.deltas[0, start:stop].abs().sum())


def test_a_tensor_that_dare_drops_entirely_is_the_bases():
    problem = problem_of([1.0], base=2.0)
    merged = [dare(problem, drop=0.9, rescale="l1", seed=seed).item() for seed in range(20)]
    assert 2.0 in merged and all(value in (2.0, 2.3) for value in merged)


def test_dare_then_ties_is_ties_on_the_thinned_task_vectors(problem):
    generator = torch.Generator().manual_seed(3)
    deltas = problem.vectors.deltas
    stays = torch.stack([torch.rand(len(row), generator=generator) >= 0.5 for row in deltas])
    thin = problem_of(*(deltas * stays * 2).tolist(), base=problem.vectors.base.tolist())
    found = dare(problem, drop=0.5, then="ties", keep=0.3, scale=0.8, seed=3)
    assert_close(found, ties(thin, keep=0.3, scale=0.8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 1.0}, r"drop must be in \[0, 1\), got 1.0; 0.9 keeps a tenth"),
        ({"drop": -0.1}, r"drop must be in \[0, 1\), got -0.1"),
        ({"drop": float("nan")}, r"drop must be in \[0, 1\), got nan"),
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ({"then": "average"}, "then must be one of task_arithmetic, ties; got 'average'"),
        ({"rescale": "l2"}, "rescale must be one of expected, l1, none; got 'l2'"),
    ],
)
def test_dare_refuses_what_it_does_not_know(problem, options, message):
    with pytest.raises(ValueError, match=message):
        dare(problem, **options)


# --- layer scaling --------------------------------------------------------------------------------


def blocks(*deltas: list[float]) -> MergeProblem:
    """One number each: embedding, blocks 0, 1 and 2, and a norm after them."""
    names = ("embedding.weight", "layer.0.w", "layer.1.w", "layer.2.w", "norm.weight")
    return problem_of(*deltas, **{name: (1,) for name in names})


def test_layer_scaling_grows_linearly_from_the_first_block_to_the_last():
    """Task arithmetic's alpha is 1/2; the sum of task vectors is 2, 4, 6, 8, 10."""
    problem = blocks([1, 1, 1, 1, 1], [1, 3, 5, 7, 9])
    merged = lines(problem, beta=0.4)
    assert_close(merged, merged.new_tensor([2 * 0.5, 4 * 0.5, 6 * 0.7, 8 * 0.9, 10 * 0.5]))


def test_alpha_can_be_given():
    problem = blocks([1.0] * 5)
    merged = lines(problem, alpha=0.2, beta=0.8)
    assert_close(merged, merged.new_tensor([0.2, 0.2, 0.6, 1.0, 0.2]))


def test_without_growth_layer_scaling_over_task_arithmetic_is_the_average(problem):
    assert_close(lines(problem, beta=0.0), average(problem))


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties"])
def test_at_alpha_1_and_without_growth_the_rule_itself_is_left(problem, rule):
    methods = {"task_arithmetic": task_arithmetic, "ties": ties}
    found = lines(problem, rule=rule, options={"scale": 0.7}, alpha=1.0, beta=0.0)
    assert_close(found, methods[rule](problem, scale=0.7))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_first_blocks_are_as_long_as_the_averages_whatever_the_rules_scale(problem, scale):
    found = change(problem, lines(problem, rule="ties", options={"scale": scale}, beta=0.0))
    assert_close(found.abs().sum(), problem.vectors.deltas.mean(dim=0).abs().sum())


def test_a_rule_that_changes_nothing_leaves_the_base(problem):
    assert_close(lines(problem, options={"scale": 0.0}), problem.vectors.base, rtol=0, atol=0)


def test_a_rule_that_learns_gets_its_options(problem):
    """At alpha 1 and beta 0 it is the rule's own merge; other options give another one."""
    options = {"epochs": 1, "init": 0.7, "lr": 0.05, "progress": False}
    found = lines(problem, rule="divmerge", options=options, alpha=1.0, beta=0.0)
    assert_close(found, divmerge(problem, **options))
    assert (found - divmerge(problem, epochs=1, progress=False)).abs().max() > 0.01


def test_depth_is_counted_within_each_stack():
    encoder = ("shared.weight", "encoder.block.0.w", "encoder.block.4.w")
    decoder = ("decoder.block.0.w", "decoder.block.1.w", "decoder.block.2.w")
    others = ("0.up.w", "h.7.mlp.3.w", "final.bias")
    layout = layout_of(**{name: (1,) for name in (*encoder, *decoder, *others)})
    assert depths(layout) == [0, 0, 1, 0, 0.5, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "task_aritmetic"}, "unknown method 'task_aritmetic'.*mean 'task_arithmetic'"),
        ({"rule": "lines"}, "rule must be another method that returns parameters, got 'lines'"),
        ({"rule": "emr"}, "rule must be another method that returns parameters, got 'emr'"),
        ({"beta": math.nan}, "beta must be finite, got nan; 1.0 adds the merge as it is"),
        ({"alpha": math.inf}, "alpha must be finite, got inf"),
    ],
)
def test_layer_scaling_refuses_rules_and_numbers_that_it_cannot_scale_by(problem, options, message):
    with pytest.raises(ValueError, match=message):
        lines(problem, **options)


def test_a_model_without_blocks_has_no_depth():
    with pytest.raises(ValueError, match="no tensor's name has a block number.*'encoder.layer.0"):
        lines(problem_of([1.0, 2.0]))


# --- the family -----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", FAMILY)
def test_task_vectors_may_be_stored_in_less_memory(name, storage):
    problem = linear_problem(num_tasks=2, dtype=torch.float32)
    stored = problem.vectors.stored_as(storage)
    found = METHODS[name](replace(problem, vectors=stored))
    wide = METHODS[name](replace(problem, vectors=stored.map(lambda deltas: deltas)))
    if METHODS.facts[name].get("returns") == "predictor":
        found, wide = found.parameters(1), wide.parameters(1)
    assert found.dtype == torch.float32
    assert_close(found, wide)


@pytest.mark.parametrize("name", [n for n in FAMILY if "scale" in options_of(n)])
@pytest.mark.parametrize("scale", [math.nan, -math.inf])
def test_a_scale_that_is_no_number_is_refused(problem, name, scale):
    with pytest.raises(ValueError, match=f"scale must be finite, got {scale}; 1.0 adds the merge"):
        METHODS[name](problem, scale=scale)
