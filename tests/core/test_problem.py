"""A problem: its parts answer as the whole does, and it holds no labels."""

import pytest
from torch.testing import assert_close

from divmerge_core.merging.problem import MergeProblem


def test_a_part_of_a_problem_answers_as_the_whole(problem):
    part = problem.select(["task2", "task0"])
    assert part.vectors.tasks == ("task2", "task0")
    batch = problem.batches[2][0]
    assert part.batches[0][0] is batch
    flat = problem.vectors.base + 0.1
    assert_close(part.logits(flat, 0, batch), problem.logits(flat, 2, batch))


def test_a_part_keeps_every_tasks_own_head(toy_problem):
    flat = toy_problem.vectors.expert("place")
    batch = toy_problem.batches[1][0]
    alone = toy_problem.select(["place"])
    assert alone.logits(flat, 0, batch).shape[1] == 3
    assert_close(alone.logits(flat, 0, batch), toy_problem.logits(flat, 1, batch))


def test_a_problem_holds_no_labels(toy_problem):
    for batches in toy_problem.batches:
        for batch in batches:
            assert set(batch.inputs) == {"input_ids", "token_type_ids", "attention_mask"}
            assert batch.answer is None


def test_inputs_for_every_task_are_asked_for(problem):
    with pytest.raises(
        ValueError, match="3 tasks but inputs for 2; give one sequence of batches per"
    ):
        MergeProblem(problem.vectors, problem.batches[:2], problem.forward)
