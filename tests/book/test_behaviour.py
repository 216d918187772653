"""What merging does to answers, confidence and layers: by hand, by identity, by slow reference."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from divmerge_book.evaluation.experiment import prepare
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.interference import behaviour
from divmerge_book.interference.behaviour import DISTANCES, all_logits, barrier, cka, hsic, shift
from helpers import linear_problem, normal
from torch.testing import assert_close

from divmerge_core import Batch, MergeProblem, TaskVectors


def error_of(problem: MergeProblem, coefficients: list[float], distance: str = "js") -> float:
    """The disentanglement error on the merge inputs; labels do not count."""
    splits = [LabelledSplit(batches, torch.zeros(0).long()) for batches in problem.batches]
    return behaviour.disentanglement_error(problem, splits, coefficients, distance=distance)


def test_disagreement_margin_and_confidence_by_hand():
    p, q = torch.tensor([[2.0, 0, 0], [0, 2, 0]]), torch.tensor([[1.0, 0, 0], [0, 0, 2]])
    assert behaviour.disagreement(p, q).tolist() == [0, 1]
    logits = torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]]).log()
    assert_close(behaviour.margin(logits), torch.tensor([0.2, 0.0]))
    assert_close(behaviour.confidence(logits), torch.tensor([0.5, 1 / 3]))


def test_the_js_from_an_expert_is_that_of_its_answers(problem):
    for task, name in enumerate(problem.vectors.tasks):
        batches, expert = problem.batches[task], problem.vectors.expert(name)
        base = problem.vectors.base
        logits = [all_logits(problem, some, task, batches) for some in (expert, base)]
        found = behaviour.js_from_expert(problem, base, task, batches)
        assert found == pytest.approx(DISTANCES["js"](*logits).mean().item())
        assert abs(behaviour.js_from_expert(problem, expert, task, batches)) < 1e-12


@pytest.mark.parametrize("distance", DISTANCES)
def test_on_an_axis_the_error_is_what_one_vector_changes_for_the_other_task(distance):
    problem = linear_problem(num_tasks=2, scale=1.0)
    base, moved = (
        all_logits(problem, problem.vectors.merge([a, 0]), 1, problem.batches[1])
        for a in (0.0, 0.7)
    )
    found = error_of(problem, [0.7, 0.0], distance)
    assert found == pytest.approx(DISTANCES[distance](base, moved).mean().item()) and found > 0
    assert abs(error_of(problem, [0, 0], distance)) < 1e-12, "where nothing is added"


def features_apart() -> MergeProblem:
    """Task vectors that act on features which only their own task's inputs have."""
    base, experts, batches = {"w": normal(3, 4)}, {}, []
    for number, name in enumerate("ab"):
        mine = slice(2 * number, 2 * number + 2)
        change, x = normal(3, 4).mul(0), normal(8, 4).mul(0)
        change[:, mine], x[:, mine] = normal(3, 2, seed=number), normal(8, 2, seed=9 + number)
        experts[name] = {"w": base["w"] + change}
        batches.append([Batch({"x": x}, torch.full((8,), 1 / 8, dtype=torch.float64))])

    def forward(parameters, pairs):
        return [batch.inputs["x"] @ parameters["w"].T for _, batch in pairs]

    return MergeProblem(TaskVectors.from_states(base, experts), batches, forward)


def test_tasks_on_features_of_their_own_are_disentangled_everywhere():
    problem = features_apart()
    for coefficients in ([1.0, 1.0], [0.3, -2.0], [3.0, 0.5]):
        assert error_of(problem, coefficients) < 1e-15
    swapped = replace(problem, batches=problem.batches[::-1])
    assert error_of(swapped, [1, 1]) > 0.01, "unless their inputs are swapped"


def test_the_disentanglement_error_asks_for_a_coefficient_per_task_and_a_known_distance():
    for wrong in ([[1.0]], [[1.0, 1.0], "angle"]):
        with pytest.raises(ValueError, match="2 tasks need"):
            error_of(linear_problem(num_tasks=2), *wrong)


AT = torch.linspace(0, 1, 11, dtype=torch.float64)


@pytest.mark.parametrize(
    ("losses", "mean", "chord"),
    [
        ([1.0, 5.0, 3.0], 3, 3),  # 5 - (1 + 3) / 2, and the chord's middle is 2
        ([0.0, 0, 4, 0], 4, 4),
        ([0.0, 1.0, 2.0], 1, 0),  # a slope
        ((3 * (AT - 0.2) ** 2 + AT).tolist(), None, 0),  # convex
        (((AT - 0.5) ** 2).tolist(), 0, 0),
    ],
)
def test_barriers_by_hand(losses, mean, chord):
    assert mean is None or barrier(losses) == pytest.approx(mean)
    assert barrier(losses, reference="chord") == pytest.approx(chord)


def test_a_barrier_asks_for_two_ends_and_a_known_reference():
    for losses, reference in (([1.0], "mean"), ([1.0, 2.0], "median")):
        with pytest.raises(ValueError, match="two points or more and mean or chord"):
            barrier(losses, reference=reference)


def test_cka_is_one_for_a_representation_turned_scaled_and_moved():
    x = normal(20, 6)
    turn, _ = torch.linalg.qr(normal(6, 6, seed=1))
    assert_close([cka(x, x), cka(x, 3 * x @ turn + 5)], [1.0, 1.0])
    assert cka(x, x * torch.tensor([10.0, 1, 1, 1, 1, 1])) < 0.95, "no turn"


def test_cka_of_independent_representations_is_near_zero_even_with_many_dimensions():
    found = [cka(normal(30, 200, seed=n), normal(30, 200, seed=100 + n)) for n in range(20)]
    assert abs(sum(found) / 20) < 0.02


def test_the_dependence_is_the_mean_over_all_ordered_quadruples():
    x, y = (normal(6, 3, seed=n) for n in (0, 1))
    k, m = x @ x.T, y @ y.T
    slow = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(6), 4)]
    assert_close(hsic(k, m), torch.stack(slow).mean())


def test_constants_and_too_few_rows_say_nothing():
    assert cka(torch.ones(5, 2), normal(5, 2)) == 0
    for x, y in ((normal(3, 2), normal(3, 2)), (normal(5, 2), normal(6, 2))):
        with pytest.raises(ValueError, match="4 or more"):
            cka(x, y)
    with pytest.raises(ValueError, match="does not vary"):
        shift(torch.ones(4, 2), normal(4, 2).float())


def test_a_common_move_is_all_common_and_unseen_by_cka_and_one_that_cancels_is_not():
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # distance 1 from their mean
    moved = x + torch.tensor([3.0, 4.0])
    found = [shift(x, moved), behaviour.common_share(x, moved), cka(x, moved)]
    assert_close(found, [5.0, 1.0, 1.0])
    assert_close(shift(x, 2 * x), 1.0)
    assert behaviour.common_share(x, 2 * x) == shift(x, x) == behaviour.common_share(x, x) == 0


def test_the_last_hidden_state_is_what_the_head_reads_and_needs_an_encoder(toys):
    bench = prepare("toy", size="toy")
    problem, flat = bench.problem, bench.problem.vectors.merge([0.6, 0.3])
    states = behaviour.hidden_states(problem, flat, bench.test[1])
    head = bench.experts[1].head
    assert states.shape[:2] == (3, len(bench.test[1].gold))  # embeddings and two layers
    logits = states[-1] @ head["weight"].T + head["bias"]
    assert_close(logits, all_logits(problem, flat, 1, bench.test[1].batches), rtol=1e-4, atol=1e-5)
    problem = linear_problem(num_tasks=2)
    split = LabelledSplit(problem.batches[0], torch.zeros(15).long())
    with pytest.raises(ValueError, match="transformers encoder"):
        behaviour.hidden_states(problem, problem.vectors.base, split)
