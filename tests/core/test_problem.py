"""A problem: its parts answer as the whole does, and it holds no labels."""

from helpers import refuses
from torch.testing import assert_close

from divmerge_core.merging.problem import MergeProblem


def test_a_part_of_a_problem_answers_as_the_whole_with_every_tasks_own_head(problem, toy_problem):
    for whole, tasks in ((problem, ("task2", "task0")), (toy_problem, ("place",))):
        part = whole.select(list(tasks))
        number = whole.vectors.tasks.index(tasks[0])
        batch, flat = whole.batches[number][0], whole.vectors.base + 0.1
        assert part.vectors.tasks == tasks and part.batches[0][0] is batch
        assert_close(part.logits(flat, 0, batch), whole.logits(flat, number, batch))
    assert part.logits(flat, 0, batch).shape[1] == 3


def test_a_problem_holds_no_labels(toy_problem):
    for batches in toy_problem.batches:
        for batch in batches:
            assert set(batch.inputs) == {"input_ids", "token_type_ids", "attention_mask"}
            assert batch.answer is None


def test_inputs_for_every_task_are_asked_for(problem):
    with refuses("3 tasks but inputs for 2; give one sequence of batches per"):
        MergeProblem(problem.vectors, problem.batches[:2], problem.forward)
