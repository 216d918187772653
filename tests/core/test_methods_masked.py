"""Methods that mask or weigh every entry: Breadcrumbs, consensus, PCB and EMR."""

import math

import numpy as np
import pytest
import torch
from comparisons import change
from helpers import problem_of
from torch.testing import assert_close

from divmerge_core.methods.arithmetic import largest, task_arithmetic
from divmerge_core.methods.competition import pcb
from divmerge_core.methods.masked import breadcrumbs, consensus, emr, tall_masks


# --- breadcrumbs
def test_breadcrumbs_keep_what_follows_the_largest_within_tensors_or_rows():
    problem = problem_of([1, -10, 2, 9, -3, 8, 4, 7, 5, 6], base=1.0)
    merged = breadcrumbs(problem, keep=0.3, remove=0.2, scale=1.0)
    assert change(problem, merged).tolist() == [0, 0, 0, 0, 0, 8, 0, 7, 0, 6]
    problem = problem_of([1, 2, 3, 4, 50, 60, 70, 80], matrix=(2, 4))
    options = {"keep": 0.25, "remove": 0.25, "scale": 1.0}
    assert breadcrumbs(problem, **options).tolist() == [0, 0, 0, 0, 50, 60, 0, 0]
    assert breadcrumbs(problem, per="row", **options).tolist() == [0, 0, 3, 0, 0, 0, 70, 0]
    one = problem_of([3, 1, 2, 4], bias=(3,), scalar=())  # one axis or none is one row
    assert torch.equal(breadcrumbs(one, per="row", **options), breadcrumbs(one, **options))
    small = problem_of([5, 2, 3], one=(1,), two=(2,), none=(0,))  # each keeps an entry
    assert breadcrumbs(small, keep=0.1, remove=0.9, scale=1.0).tolist() == [5, 2, 0]


def test_breadcrumbs_that_remove_no_outliers_trim_as_ties_does(problem):
    expected = problem.vectors.base.clone()
    for row in problem.vectors.deltas:
        for start, stop in problem.vectors.layout.bounds:
            expected[start:stop] += 0.5 * largest(row[start:stop], 0.3)
    assert_close(breadcrumbs(problem, keep=0.3, remove=0.0, scale=0.5), expected)


# --- consensus
SHARED = ([3, 1, 0, -1], [1, 1, 0, 1])  # the sum is 4, 2, 0, 0


def test_a_task_can_use_what_is_near_enough_to_its_own():
    """At 1/2: 3 > 1/2 and 1 > 1/2; of the second task 1 < 3/2 and 1 > 1/2; -1 and 1: 1 > 1/2."""
    masks = tall_masks(torch.tensor(SHARED, dtype=torch.float64), 0.5)
    assert masks.tolist() == [[True, True, False, True], [False, True, False, True]]


def test_consensus_keeps_what_enough_tasks_can_use():
    problem = problem_of(*SHARED, base=1.0)
    options = {"threshold": 0.5, "scale": 0.5}
    merges = [consensus(problem, agree=agree, **options) for agree in range(4)]
    kept = [change(problem, merged).tolist() for merged in merges]
    assert kept == [[2, 1, 0, 0], [2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_identical_experts_agree_on_every_entry_below_one_over_the_others():
    problem = problem_of([1, -2, 3], [1, -2, 3], [1, -2, 3])
    assert_close(consensus(problem, agree=0), task_arithmetic(problem, scale=0.3))
    one = problem.select(["task0"])  # alone, it shares nothing
    assert_close(consensus(one), one.vectors.base)
    assert_close(consensus(problem, threshold=0.49), task_arithmetic(problem, scale=0.3))
    assert_close(consensus(problem, threshold=0.51), problem.vectors.base)


# --- parameter competition
def slow_pcb(deltas, ratio, scale, clip, inter):
    """With sorted lists and loops over entries."""
    num_tasks, size = deltas.shape
    kept, share = np.zeros_like(deltas), np.zeros_like(deltas)
    for t, row in enumerate(deltas):
        ranked = sorted(abs(row))
        cut = int(clip * size)
        low, high = ranked[cut], ranked[size - 1 - cut]
        for n, entry in enumerate(row):
            kept[t, n] = math.copysign(min(max(abs(entry), low), high), entry)
            share[t, n] = (abs(kept[t, n]) - low) / (high - low)
    weight = np.zeros_like(deltas)
    for t in range(num_tasks):
        score = []
        for n in range(size):
            signed = np.sign(deltas[:, n]) * share[:, n]
            accord = (
                sum(math.tanh(signed[t] * other) for other in signed)
                if inter == "pairwise"
                else math.tanh(deltas[t, n] * sum(deltas[:, n]))
            )
            score.append(math.exp(num_tasks * share[t, n] ** 2) * accord)
        floor = sorted(score, reverse=True)[round(ratio * size)]
        weight[t] = [max(s - floor, 0) / (max(score) - floor) for s in score]
    total = [
        (weight[:, n] @ kept[:, n] / weight[:, n].sum()) if weight[:, n].any() else 0.0
        for n in range(size)
    ]
    return scale * np.array(total)


@pytest.mark.parametrize("inter", ["pairwise", "total"])
@pytest.mark.parametrize(("ratio", "clip"), [(0.1, 0.01), (0.3, 0.1), (0.5, 0.0)])
def test_parameter_competition_is_what_loops_over_entries_give(problem, inter, ratio, clip):
    options = {"ratio": ratio, "scale": 0.9, "clip": clip, "inter": inter}
    expected = torch.from_numpy(slow_pcb(problem.vectors.deltas.numpy(), **options))
    assert_close(change(problem, pcb(problem, **options)), expected)


@pytest.mark.parametrize("count", [1, 3])
def test_identical_experts_are_as_one_whose_largest_entries_are_kept_and_scaled(count):
    problem = problem_of(*[[1, -10, 2, 9, -3, 8, 4, 7, 5, 6]] * count)
    merged = pcb(problem, ratio=0.3, scale=2.0, clip=0.0)
    assert_close(merged, merged.new_tensor([0, -20, 0, 18, 0, 16, 0, 0, 0, 0]))


def test_opposed_task_vectors_win_nothing_and_a_single_parameter_does_not_compete():
    problem = problem_of([1, 2, 3, 4], [-1, -2, -3, -4], base=1.0)
    for inter in ("pairwise", "total"):
        assert_close(pcb(problem, ratio=0.5, inter=inter), problem.vectors.base)
    assert pcb(problem_of([3.0], base=2.0)).tolist() == [2]


# --- elect, mask, rescale
def test_every_task_sees_the_elected_entries_of_its_own_sign():
    """The sum is 4, -1, 0, 5; plus is elected where it is positive, and minus at zero.

    Elected sizes 3, 4, 2, 4. Task 0 sees 3, 0, 0, 4 and is 3 + 3 + 2 + 4 = 12 long: scale 12/7.
    Task 1 sees 3, -4, -2, 4 and is 1 + 4 + 2 + 1 = 8 long: scale 8/13.
    """
    problem = problem_of([3, 3, 2, 4], [1, -4, -2, 1])
    merged = emr(problem)
    assert merged.unified.tolist() == [3, -4, -2, 4]
    assert_close(merged.parameters(0), torch.tensor([3, 0, 0, 4]).double() * 12 / 7)
    assert_close(merged.parameters(1), torch.tensor([3, -4, -2, 4]).double() * 8 / 13)


@pytest.mark.parametrize("norm", ["total", "tensor"])
@pytest.mark.parametrize(
    "deltas",
    [([1, -2, 3],), ([1, -2, 3], [1, -2, 3]), ([1, -2, 0, 0], [0, 0, 3, -4])],
    ids=["one", "identical", "different entries"],
)
def test_experts_that_do_not_conflict_are_themselves(deltas, norm):
    problem = problem_of(*deltas, base=0.5)
    for task, name in enumerate(problem.vectors.tasks):
        found = emr(problem, norm=norm).parameters(task)
        assert_close(found, problem.vectors.expert(name))


def test_every_model_is_as_far_from_the_base_as_its_expert(problem):
    merged = emr(problem)
    for task, row in enumerate(problem.vectors.deltas):
        found = change(problem, merged.parameters(task))
        assert_close(found.abs().sum(), row.abs().sum(), rtol=1e-12, atol=1e-12)
        assert (found * row >= 0).all()


def test_the_authors_norm_counts_a_bias_as_much_as_a_matrix():
    """Means 2 + 1 over those seen, (2 + 0 + 2 + 2) / 4 + 1: the entry of the other sign is lost."""
    problem = problem_of([2, 2, 2, 2, 1], [0, -3, 0, 0, 0], matrix=(2, 2), bias=(1,))
    assert_close(emr(problem, norm="tensor").scales[0].item(), 3 / 2.5)
    assert_close(emr(problem).scales[0].item(), 9 / 7)


def test_a_task_that_sees_nothing_is_the_base():
    problem = problem_of([2.0], [-3.0], base=2.0)
    assert emr(problem).parameters(0).tolist() == [2]
    assert emr(problem).scales.tolist() == [1, 1]
    # three tasks: the larger entry, of the sign that lost, does not set the size
    assert emr(problem_of([3.0], [-2.0], [-2.0])).unified.tolist() == [-2]


def test_emr_stores_two_vectors_a_bit_per_mask_entry_and_a_number_per_task():
    """Three tasks of five float64 numbers: base 40, vector 40, 15 bits in 2 bytes, scales 24."""
    assert emr(problem_of(*[[1, -2, 3, 4, 5]] * 3)).nbytes == 40 + 40 + 2 + 24
    assert emr(problem_of([1, -2, 3, 4], [1, 2, 3, 4])).nbytes == 32 + 32 + 1 + 16
