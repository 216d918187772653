"""What merging does to answers, confidence and layers: by hand, by identity, by slow reference."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from divmerge_book.evaluation.experiment import prepare
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.interference.behaviour import (
    all_logits,
    barrier,
    confidence,
    disagreement,
    disentanglement_error,
    margin,
)
from divmerge_book.interference.representation import (
    cka,
    common_share,
    hidden_states,
    hsic,
    shift,
)
from helpers import linear_problem
from torch.testing import assert_close

from divmerge_core.divergences import js
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exams_of(problem: MergeProblem) -> list[LabelledSplit]:
    """The merge inputs as exams; which answers are right does not count here."""
    return [
        LabelledSplit(batches, torch.zeros(sum(len(b.weight) for b in batches), dtype=torch.long))
        for batches in problem.batches
    ]


# --- weight disentanglement -----------------------------------------------------------------------


def test_disagreement_is_one_where_the_likeliest_answers_differ():
    p, q = torch.tensor([[2.0, 0, 0], [0, 2, 0]]), torch.tensor([[1.0, 0, 0], [0, 0, 2]])
    assert disagreement(p, q).tolist() == [0, 1]


@pytest.mark.parametrize("distance", ["disagreement", "js"])
def test_the_disentanglement_error_is_zero_where_nothing_is_added(distance):
    problem = linear_problem(num_tasks=2)
    found = disentanglement_error(problem, exams_of(problem), [0, 0], distance=distance)
    assert abs(found) < 1e-12


@pytest.mark.parametrize("distance", ["disagreement", "js"])
def test_on_an_axis_the_error_is_what_one_vector_changes_for_the_other_task(distance):
    problem = linear_problem(num_tasks=2, scale=1.0)
    exams, vectors = exams_of(problem), problem.vectors
    base, moved = (
        all_logits(problem, vectors.merge([a, 0]), 1, exams[1].batches) for a in (0.0, 0.7)
    )
    expected = {"disagreement": disagreement, "js": js}[distance](base, moved).mean()
    found = disentanglement_error(problem, exams, [0.7, 0.0], distance=distance)
    assert_close(found, expected.item(), rtol=1e-9, atol=1e-12)
    assert found > 0


def features_apart() -> MergeProblem:
    """Task vectors that act on features which only their own task's inputs have."""
    base, experts = {"w": draws(3, 4)}, {}
    for number, name in enumerate("ab"):
        change = torch.zeros(3, 4, dtype=torch.float64)
        change[:, 2 * number : 2 * number + 2] = draws(3, 2, seed=number)
        experts[name] = {"w": base["w"] + change}
    batches = []
    for number in range(2):
        x = torch.zeros(8, 4, dtype=torch.float64)
        x[:, 2 * number : 2 * number + 2] = draws(8, 2, seed=9 + number)
        batches.append([Batch({"x": x}, torch.full((8,), 1 / 8, dtype=torch.float64))])

    def forward(parameters, pairs):
        return [batch.inputs["x"] @ parameters["w"].T for _, batch in pairs]

    return MergeProblem(TaskVectors.from_states(base, experts), batches, forward)


@pytest.mark.parametrize("coefficients", [[1.0, 1.0], [0.3, -2.0], [3.0, 0.5]])
def test_tasks_on_features_of_their_own_are_disentangled_everywhere(coefficients):
    problem = features_apart()
    assert disentanglement_error(problem, exams_of(problem), coefficients, distance="js") < 1e-15


def test_swapping_the_inputs_of_disentangled_tasks_entangles_them():
    problem = features_apart()
    swapped = replace(problem, batches=problem.batches[::-1])
    assert disentanglement_error(swapped, exams_of(swapped), [1, 1], distance="js") > 0.01


def test_the_disentanglement_error_asks_for_a_coefficient_per_task_and_a_known_distance():
    problem = linear_problem(num_tasks=2)
    for wrong in ({"coefficients": [1.0]}, {"coefficients": [1.0, 1.0], "distance": "angle"}):
        with pytest.raises(ValueError, match="2 tasks need"):
            disentanglement_error(problem, exams_of(problem), **wrong)


# --- barriers -------------------------------------------------------------------------------------


def test_the_barrier_of_a_hump_by_hand():
    assert barrier([1.0, 5.0, 3.0]) == 3  # 5 - (1 + 3) / 2
    assert barrier([1.0, 5.0, 3.0], reference="chord") == 3  # the chord's middle is 2
    assert barrier([0.0, 0, 4, 0], reference="chord") == 4


def test_a_slope_has_half_its_height_as_barrier_but_none_above_its_chord():
    assert barrier([0.0, 1.0, 2.0]) == 1
    assert barrier([0.0, 1.0, 2.0], reference="chord") == 0


def test_a_convex_quadratic_has_no_barrier_above_its_chord():
    at = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert barrier((3 * (at - 0.2) ** 2 + at).tolist(), reference="chord") == 0


def test_a_quadratic_with_equal_ends_has_no_barrier_by_either_reference():
    at = torch.linspace(0, 1, 11, dtype=torch.float64)
    values = ((at - 0.5) ** 2).tolist()
    assert_close([barrier(values), barrier(values, reference="chord")], [0.0, 0.0])


def test_a_barrier_asks_for_two_ends_and_a_known_reference():
    for losses, reference in (([1.0], "mean"), ([1.0, 2.0], "median")):
        with pytest.raises(ValueError, match="two points or more and mean or chord"):
            barrier(losses, reference=reference)


# --- confidence ----------------------------------------------------------------------------


def test_margin_and_confidence_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]]).log()
    assert_close(margin(logits), torch.tensor([0.2, 0.0]))
    assert_close(confidence(logits), torch.tensor([0.5, 1 / 3]))


# --- layers ---------------------------------------------------------------------------------------


def test_cka_is_one_for_a_representation_turned_scaled_and_moved():
    x = draws(20, 6)
    turn, _ = torch.linalg.qr(draws(6, 6, seed=1))
    assert_close(cka(x, x), 1.0)
    assert_close(cka(x, 3 * x @ turn + 5), 1.0)


def test_cka_sees_a_change_that_is_no_turn():
    x = draws(30, 4)
    assert cka(x, x * torch.tensor([10.0, 1, 1, 1])) < 0.95


def test_cka_of_independent_representations_is_near_zero_even_with_many_dimensions():
    found = [cka(draws(30, 200, seed=n), draws(30, 200, seed=100 + n)) for n in range(20)]
    assert abs(sum(found) / 20) < 0.02


def test_the_dependence_is_the_mean_over_all_ordered_quadruples():
    x, y = (draws(6, 3, seed=n) for n in (0, 1))
    k, m = x @ x.T, y @ y.T
    slow = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(6), 4)]
    assert_close(hsic(k, m), torch.stack(slow).mean())


def test_cka_of_a_constant_is_zero_and_too_few_rows_are_refused():
    assert cka(torch.ones(5, 2), draws(5, 2)) == 0
    for x, y in ((draws(3, 2), draws(3, 2)), (draws(5, 2), draws(6, 2))):
        with pytest.raises(ValueError, match="4 or more"):
            cka(x, y)


def test_a_common_move_is_all_common_and_unseen_by_cka():
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # distance 1 from their mean
    moved = x + torch.tensor([3.0, 4.0])
    assert_close(shift(x, moved), 5.0)
    assert_close(common_share(x, moved), 1.0)
    assert_close(cka(x, moved), 1.0)


def test_a_move_that_cancels_over_inputs_is_not_common():
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert_close(shift(x, 2 * x), 1.0)
    assert common_share(x, 2 * x) == 0
    assert shift(x, x) == 0 and common_share(x, x) == 0


def test_the_shift_needs_inputs_that_differ():
    with pytest.raises(ValueError, match="does not vary"):
        shift(torch.ones(4, 2), draws(4, 2).float())


def test_the_last_hidden_state_is_what_the_head_reads(toys):
    bench = prepare("toy", size="toy")
    problem, flat = bench.problem, bench.problem.vectors.merge([0.6, 0.3])
    states = hidden_states(problem, flat, bench.test[1])
    head = bench.experts[1].head
    assert states.shape[:2] == (3, len(bench.test[1].gold))  # embeddings and two layers
    logits = states[-1] @ head["weight"].T + head["bias"]
    assert_close(logits, all_logits(problem, flat, 1, bench.test[1].batches), rtol=1e-4, atol=1e-5)


def test_hidden_states_need_an_encoder():
    problem = linear_problem(num_tasks=2)
    with pytest.raises(ValueError, match="transformers encoder"):
        hidden_states(problem, problem.vectors.base, exams_of(problem)[0])
