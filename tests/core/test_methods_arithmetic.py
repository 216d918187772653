"""Sums of task vectors: variants of TIES, DARE, and layer scaling over any rule."""

import itertools

import pytest
import torch
from comparisons import change
from helpers import QUIET, layout_of, linear_problem, problem_of, refuses
from torch.testing import assert_close

from divmerge_core.methods.arithmetic import average, dare, task_arithmetic, ties
from divmerge_core.methods.depthwise import depths, lines
from divmerge_core.methods.divmerge import divmerge


def test_the_average_and_task_arithmetic_by_hand():
    problem = problem_of([1, 2, 3, 4, 5], [1, 0, -3, 0, 1], base=10.0)
    assert average(problem).tolist() == [11, 11, 10, 12, 13]
    assert task_arithmetic(problem, scale=0.25).tolist() == [10.5, 10.5, 10, 11, 11.5]
    assert task_arithmetic(problem, scale=0.0).tolist() == [10] * 5


@pytest.mark.parametrize(
    ("deltas", "keep", "expected"),
    [
        # trimmed:  [ 5, -4,  3, 0,  0]    sums: 5 - 6 = -1, -4 + 7 = 3, 3, 0 - 5 = -5, 0
        #           [-6,  7,  0, -5, 0]    the negative wins at 0, the positive at 1
        (([5, -4, 3, 2, 1], [-6, 7, 1, -5, 2]), 0.6, [4, 17, 13, 5, 10]),
        # at 0 two of three are positive: (2 + 4) / 2, not (2 + 4 - 1) / 3
        (([2, 1, 1, 1, 1], [4, 1, 1, 1, 1], [-1, 1, 1, 1, 4]), 1.0, [13, 11, 11, 11, 12]),
        (([1, 2, 3, 4, 5], [-1, -2, -3, -4, -5]), 1.0, [10] * 5),  # opposite entries cancel
        (([5, -4, 3, 2, 1],), 0.4, [15, 6, 10, 10, 10]),
        (([5, -4, 3, 2, 1],), 0.01, [15, 10, 10, 10, 10]),  # one entry at least
        (([1, 1, 1, 1, 1],), 0.5, [11] * 5),  # equal entries all stay
    ],
)
def test_ties_trims_elects_and_averages_as_worked_out_by_hand(deltas, keep, expected):
    assert ties(problem_of(*deltas, base=10.0), keep=keep).tolist() == expected


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
        votes = coeffs if weights == "before" else [1.0] * len(column)
        total_vote = sum(vote * entry for vote, entry in zip(votes, column, strict=True))
        agreeing = [t for t, entry in enumerate(column) if entry * total_vote > 0]
        total = sum(coeffs[t] * column[t] for t in agreeing)
        mean = total / sum(votes[t] for t in agreeing) if agreeing else 0.0
        merged.append(mean if combine == "mean" else total)
    return problem.vectors.base + torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize(
    ("trim", "weights", "combine"),
    [*itertools.product(("global", "tensor"), ("before", "after"), ("mean", "sum"))],
)
def test_ties_is_what_a_loop_over_entries_gives(problem, trim, weights, combine):
    options = {"coeffs": [1.0, 0.5, 2.0], "trim": trim, "weights": weights, "combine": combine}
    assert_close(ties(problem, keep=0.4, **options), slow_ties(problem, 0.4, **options))


def test_a_tensor_of_small_entries_is_trimmed_away_globally_and_keeps_its_share_by_tensor():
    shapes = {"large": (4,), "small": (2, 2), "none": (0, 4)}
    problem = problem_of([9, 8, 7, 6, 0.4, 0.3, 0.2, 0.1], **shapes)
    assert change(problem, ties(problem, keep=0.5)).tolist() == [9, 8, 7, 6, 0, 0, 0, 0]
    by_tensor = change(problem, ties(problem, keep=0.5, trim="tensor"))
    assert_close(by_tensor, by_tensor.new_tensor([9, 8, 0, 0, 0.4, 0.3, 0, 0]))


# --- dare
@pytest.mark.parametrize("rescale", ["expected", "l1", "none"])
def test_dare_that_drops_nothing_is_the_method_after_it(problem, rescale):
    options = {"drop": 0.0, "rescale": rescale, "scale": 0.7}
    assert_close(dare(problem, **options), task_arithmetic(problem, scale=0.7))
    assert_close(dare(problem, then="ties", **options), ties(problem, scale=0.7))


@pytest.mark.parametrize(("rescale", "kept"), [("expected", 4.0), ("none", 1.0)])
def test_dare_drops_entries_of_every_task_anew_and_scales_up_the_rest(rescale, kept):
    problem = problem_of([1.0] * 200, [1.0] * 200)
    merged = dare(problem, drop=0.75, scale=1.0, rescale=rescale)
    assert set(merged.tolist()) == {0.0, kept, 2 * kept}
    assert 0.70 < (1 - merged / kept / 2).mean() < 0.80


def test_dare_can_keep_the_l1_norm_of_every_tensor_but_of_one_that_it_drops_entirely():
    problem = linear_problem(num_tasks=1)
    found = change(problem, dare(problem, drop=0.3, scale=1.0, rescale="l1"))
    for start, stop in problem.vectors.layout.bounds:
        expected = problem.vectors.deltas[0, start:stop].abs().sum()
        assert_close(found[start:stop].abs().sum(), expected)
    one = problem_of([1.0], base=2.0)
    merged = [dare(one, drop=0.9, rescale="l1", seed=seed).item() for seed in range(20)]
    assert 2.0 in merged and all(value in (2.0, 2.3) for value in merged)


def test_dare_then_ties_is_ties_on_the_thinned_task_vectors(problem):
    generator, deltas = torch.Generator().manual_seed(3), problem.vectors.deltas
    stays = torch.stack([torch.rand(len(row), generator=generator) >= 0.5 for row in deltas])
    thin = problem_of(*(deltas * stays * 2).tolist(), base=problem.vectors.base.tolist())
    found = dare(problem, drop=0.5, then="ties", keep=0.3, scale=0.8, seed=3)
    assert_close(found, ties(thin, keep=0.3, scale=0.8))


# --- layer scaling
def blocks(*deltas: list[float]):
    """One number each: embedding, blocks 0, 1 and 2, and a norm after them."""
    names = ("embedding.weight", "layer.0.w", "layer.1.w", "layer.2.w", "norm.weight")
    return problem_of(*deltas, **{name: (1,) for name in names})


def test_layer_scaling_grows_linearly_and_without_growth_the_rule_itself_is_left(problem):
    """Task arithmetic's alpha is 1/2; the sum of task vectors is 2, 4, 6, 8, 10."""
    merged = lines(blocks([1, 1, 1, 1, 1], [1, 3, 5, 7, 9]), beta=0.4)
    assert_close(merged, merged.new_tensor([2 * 0.5, 4 * 0.5, 6 * 0.7, 8 * 0.9, 10 * 0.5]))
    merged = lines(blocks([1.0] * 5), alpha=0.2, beta=0.8)
    assert_close(merged, merged.new_tensor([0.2, 0.2, 0.6, 1.0, 0.2]))
    found = lines(problem, rule="ties", options={"scale": 0.7}, alpha=1.0, beta=0.0)
    assert_close(found, ties(problem, scale=0.7))
    assert_close(lines(problem, beta=0.0), average(problem))  # alpha is 1/T
    assert torch.equal(lines(problem, options={"scale": 0.0}), problem.vectors.base)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_first_blocks_are_as_long_as_the_averages_whatever_the_rules_scale(problem, scale):
    found = change(problem, lines(problem, rule="ties", options={"scale": scale}, beta=0.0))
    assert_close(found.abs().sum(), problem.vectors.deltas.mean(dim=0).abs().sum())


def test_a_rule_that_learns_gets_its_options(problem):
    """At alpha 1 and beta 0 it is the rule's own merge; other options give another one."""
    options = {"epochs": 1, "init": 0.7, "lr": 0.05, **QUIET}
    found = lines(problem, rule="divmerge", options=options, alpha=1.0, beta=0.0)
    assert_close(found, divmerge(problem, **options))
    assert (found - divmerge(problem, epochs=1, **QUIET)).abs().max() > 0.01


def test_depth_is_counted_within_each_stack_and_a_model_without_blocks_has_none():
    encoder = ("shared.weight", "encoder.block.0.w", "encoder.block.4.w")
    decoder = ("decoder.block.0.w", "decoder.block.1.w", "decoder.block.2.w")
    others = ("0.up.w", "h.7.mlp.3.w", "final.bias")
    layout = layout_of(**{name: (1,) for name in (*encoder, *decoder, *others)})
    assert depths(layout) == [0, 0, 1, 0, 0.5, 1, 0, 1, 0]
    with refuses("no tensor's name has a block number.*'encoder.layer.0"):
        lines(problem_of([1.0, 2.0]))
