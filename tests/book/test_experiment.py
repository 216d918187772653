"""Experiments: experts that fit together become one problem, with labelled rows kept apart."""

from dataclasses import replace

import pytest
from divmerge_book.data.tasks import SUITES
from divmerge_book.evaluation.experiment import SIZES, make_problem, prepare, task_names
from divmerge_book.evaluation.metrics import predict
from helpers import COUNTS, MARKERS, toy_task
from torch.testing import assert_close


def accuracy(experiment, flat, task: int) -> float:
    split = experiment.test[task]
    return (predict(experiment.problem, flat, task, split) == split.gold).double().mean().item()


def inputs(experiment) -> list[int]:
    """The number of unlabelled inputs of every task."""
    return [sum(len(batch.weight) for batch in every) for every in experiment.problem.batches]


@pytest.fixture
def experiment(toys):
    return prepare("toy", size="toy")


def test_an_experiment_holds_base_experts_problem_and_splits(experiment, toys):
    assert [expert.task for expert in experiment.experts] == list(toys)
    assert experiment.problem.vectors.tasks == toys
    for split, splits in (("validation", experiment.validation), ("test", experiment.test)):
        assert [len(split.gold) for split in splits] == [COUNTS[split]] * 2
    assert inputs(experiment) == [COUNTS["merge"]] * 2


def test_the_merge_at_coefficient_1_answers_as_the_expert(experiment, experts):
    """Base plus task vector through the merge's forward pass, against the expert's own weights."""
    vectors = experiment.problem.vectors
    for number, expert in enumerate(experts):
        merged = vectors.base + vectors.deltas[number]
        own = vectors.layout.flatten(expert.state)
        assert_close(merged, own, rtol=0, atol=1e-6)
        assert accuracy(experiment, merged, number) == accuracy(experiment, own, number) > 0.8
        assert accuracy(experiment, own, number) > accuracy(experiment, vectors.base, number)


def test_a_split_keeps_labels_in_the_order_of_its_batches(experiment):
    for split, task in zip(experiment.test, MARKERS, strict=True):
        rows = toy_task(task).load("test")
        text = dict(zip(rows["text"], rows["label"], strict=True))
        decode = experiment.base.tokenizer.batch_decode
        found = [decode(b.inputs["input_ids"], skip_special_tokens=True) for b in split.batches]
        assert [text[one] for few in found for one in few] == split.gold.tolist()


def test_row_counts_are_limits(toys):
    size = replace(SIZES["toy"], merge_rows=10, validation_rows=7, test_rows=1000)
    experiment = prepare("toy", size=size)
    assert inputs(experiment) == [10, 10]
    assert [len(split.gold) for split in experiment.validation] == [7, 7]
    assert [len(split.gold) for split in experiment.test] == [COUNTS["test"]] * 2
    assert experiment.digest != prepare("toy", size="toy").digest


def test_a_part_of_an_experiment_answers_as_the_whole(experiment):
    part = experiment.select(["place"])
    flat = experiment.problem.vectors.expert("place")
    assert accuracy(part, flat, 0) == accuracy(experiment, flat, 1)
    assert [expert.task for expert in part.experts] == ["place"]
    assert part.digest != experiment.digest


def test_one_expert_alone_is_a_problem(tiny, experts, toys):
    problem = make_problem(tiny, experts[:1], max_length=12)
    assert problem.vectors.deltas.shape[0] == 1


def test_tasks_are_merged_in_the_order_asked_for(toys):
    assert task_names("toy", ["place", "mood"]) == ["place", "mood"]
    assert task_names("toy", None) == list(toys)


def test_the_sizes_are_three_and_full_measures_three_seeds():
    assert list(SIZES) == ["smoke", "default", "full"]
    assert len(SIZES["full"].seeds) >= 3
    assert SIZES["smoke"].encoder == "bert_tiny"


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_a_recipe_at_every_size_and_small_tasks_twice_the_epochs(suite):
    for size in SIZES.values():
        assert all(size.recipe_for(suite, task).epochs >= 1 for task in SUITES[suite].tasks)
    epochs = [SIZES["full"].recipe_for("glue_encoder", task).epochs for task in ("rte", "mnli")]
    assert epochs == [6, 3]
