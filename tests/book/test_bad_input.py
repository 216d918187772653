"""Bad input: refused before expensive work; the message names value, choices and cure."""

import errno
import os
import shutil
from dataclasses import replace

import pytest
import torch
from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation import benchmark, cache, experiment, hyperparameter_search
from divmerge_book.evaluation.benchmark import compare
from divmerge_book.evaluation.experiment import make_problem, prepare
from divmerge_book.models import finetuning as training
from divmerge_book.models.encoders import load_base
from divmerge_book.models.finetuning import Expert, fine_tune
from helpers import TINY_RECIPE, linear_problem, refuse, task_of, toy_splits, toy_task

from divmerge_core import storage
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.problem import Batch, Diverged, MergeProblem

MOOD = ("negative", "positive")


def forbid(*args, **options):
    pytest.fail("expensive work before the input was checked")


@pytest.fixture
def idle(toys, cache, monkeypatch):
    """The toy suite, where no training and no merging may happen."""
    monkeypatch.setattr(training, "train", forbid)
    monkeypatch.setattr(hyperparameter_search, "run_method", forbid)


# --- names and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "toys"}, "unknown suite 'toys'; choose one of: .*did you mean 'toy'"),
        ({"size": "tiny"}, "unknown size 'tiny'; choose one of: smoke, default, full"),
        ({"tasks": ["mood", "plaec"]}, "unknown task 'plaec'; choose one of: .*mean 'place'"),
        ({"tasks": ["mood", "sms"]}, "'toy' merges two or more distinct tasks of mood, place; got"),
        ({"tasks": ["mood"]}, r"two or more distinct tasks of mood, place; got \['mood'\]"),
        ({"tasks": ["mood", "mood"]}, r"two or more distinct tasks of .*; got \['mood', 'mood'\]"),
        ({"subsets": [["mood"]]}, r"two or more distinct tasks of mood, place; got \['mood'\]"),
        ({"methods": ["divmrge/task"]}, "unknown method 'divmrge'; .*did you mean 'divmerge'"),
        ({"methods": ["divmerge/blok"]}, "unknown grouping 'blok'; choose one of: task, block"),
        (
            {"methods": ["ties/block"]},
            "'ties' has no grouping, so 'ties/block' means .*; say 'ties'",
        ),
        ({"methods": []}, r"one method and one seed or more, got \[\]"),
        ({"seeds": [0, 0]}, r"give every seed once; \[0\] came more than once in \[0, 0\]"),
        ({"methods": ["ties", "ties"]}, r"give every method once; \['ties'\] came more than once"),
        ({"device": "cuda:99"}, "no device 'cuda:99' here"),
        ({"seeds": []}, r"one method and one seed or more, got .* and \[\]"),
        ({"divergence": "jss"}, "unknown divergence 'jss'; choose one of: .*mean 'js'"),
        ({"link": "relu"}, "unknown link 'relu'; choose one of: identity, sigmoid, softmax"),
        ({"steps": 3}, r"no such options \['steps'\]; these methods take \['divergence', .*'lr'"),
        ({"grouping": "layer"}, r"no such options \['grouping'\].* as in 'divmerge/block'"),
        ({"seed": 3}, r"no such options \['seed'\]"),
        ({"device": "cuda:99"}, "no device 'cuda:99' here; this machine has cpu"),
        (
            {"encoder": "./no/where"},
            "(?s)cannot load encoder .*choose one of minilm, bert_tiny, or",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_unknown_is_refused_with_the_choices(idle, options, message):
    arguments = {"suite": "toy", "size": "toy", "methods": ["divmerge/task"], **options}
    with pytest.raises(ValueError, match=message):
        compare(arguments.pop("suite"), **arguments)


# --- experts that do not fit together -------------------------------------------------------------


def changed(expert: Expert, **tensors) -> Expert:
    """The expert with other tensors under some names, written with __ for each dot."""
    given = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return replace(expert, state={**expert.state, **given})


def test_an_expert_of_another_base_is_refused(tiny, tiny_folder, experts, toys, tmp_path):
    other = load_base(str(tiny_folder))
    with torch.no_grad():
        other.encoder.embeddings.LayerNorm.bias[0] += 1
    other.encoder.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    recipe = replace(TINY_RECIPE, rows=8, epochs=1)
    stranger = fine_tune(
        load_base(str(tmp_path / "other")), toy_task("mood"), recipe, progress=False
    )
    with pytest.raises(
        ValueError,
        match="'mood' was trained from '.*other' with other weights .*; load its own base",
    ):
        make_problem(tiny, [stranger, experts[1]])


def numberless(value: float):
    return lambda expert: changed(expert, embeddings__LayerNorm__bias=torch.full((32,), value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: replace(e, manifest={**e.manifest, "answers": ["no", "yes"]}),
            r"answers \['no', 'yes'\], the task \['negative', 'positive'\]; train it on",
        ),
        (
            lambda e: changed(e, embeddings__word_embeddings__weight=torch.zeros(99, 32)),
            r"shape \(99, 32\), the base has .* one architecture and voc",
        ),
        *(
            (numberless(value), "'mood': embeddings.LayerNorm.bias holds NaN or inf; the chec")
            for value in (float("nan"), float("inf"), -float("inf"))
        ),
        (
            lambda e: replace(e, task="moods"),
            "unknown task 'moods'; choose one of: .*did you mean 'mood'",
        ),
        (lambda e: replace(e, task="place"), None),  # the same task twice
    ],
)
def test_an_expert_that_does_not_fit_is_refused(tiny, experts, toys, change, message):
    with pytest.raises(ValueError, match=message):
        make_problem(tiny, [change(experts[0]), experts[1]])


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "merge", "test"])
def test_a_suite_with_an_empty_or_one_class_split_is_refused_before_training(
    idle, monkeypatch, split
):
    single = [row for row in toy_splits("mood")["train"] if row[2] == "positive"]
    for rows in ([], single if split == "train" else []):
        task = task_of(toy_splits("mood") | {split: rows}, answers=MOOD, name="mood")
        monkeypatch.setitem(TASKS, "mood", task)
        message = f"task mood: its {split} split of {len(rows)} rows is empty .*more rows"
        with pytest.raises(ValueError, match=message):
            prepare("toy", size="toy")


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2), (3, 6), (3, 1)])
def test_a_coefficient_array_of_the_wrong_shape_is_refused(shape):
    vectors = linear_problem().vectors
    segments = Coefficients(vectors.layout, 3, grouping="layer").segments
    with pytest.raises(
        ValueError, match=r"\[T, G\] = \[3, 5\], one per task and group, got \[3, \d\]"
    ):
        grouped_merge(vectors.base, vectors.deltas, torch.zeros(shape), segments)


def test_a_gradient_of_another_model_is_refused():
    small, large = linear_problem().vectors, linear_problem(features=7).vectors
    segments = Coefficients(small.layout, 3).segments
    with pytest.raises(
        ValueError,
        match="segments end at .*, deltas have .* columns, .*; make all of them from one",
    ):
        grouped_inner(large.base, large.deltas, segments)


def test_extreme_weights_that_give_no_distribution_are_reported():
    problem = linear_problem(num_tasks=2)

    def forward(parameters, pairs):
        return [logits * float("inf") for logits in problem.forward(parameters, pairs)]

    broken = MergeProblem(problem.vectors, problem.batches, forward)
    with pytest.raises(ValueError, match="define no distribution; check the model's weights"):
        benchmark.METHODS["divmerge"](broken, progress=False)


def test_a_step_onto_undefined_logits_is_a_divergence():
    """A step of 1e30 overflows: the merged model's logits are NaN."""
    with pytest.raises(Diverged, match="at step 1 logits hold NaN.*; or lower lr"):
        benchmark.METHODS["divmerge"](
            linear_problem(num_tasks=2, dtype=torch.float32), lr=1e30, progress=False
        )


def test_inputs_for_another_number_of_tasks_are_refused():
    problem = linear_problem(num_tasks=2)
    batch = Batch({"x": torch.zeros(1, 6)}, torch.ones(1))
    with pytest.raises(
        ValueError, match="2 tasks but inputs for 3; give one sequence of batches per"
    ):
        MergeProblem(problem.vectors, [[batch]] * 3, problem.forward)


# --- the cache ------------------------------------------------------------------------------------


def test_a_cache_that_became_read_only_is_refused_before_merging(toys, tmp_path, monkeypatch):
    shutil.copytree(
        storage.cache_dir(), tmp_path / "cache", ignore=shutil.ignore_patterns("results")
    )
    monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FileLock", refuse)
    monkeypatch.setattr(hyperparameter_search, "run_method", forbid)
    with pytest.raises(ValueError, match="Read-only file system; set DIVMERGE_CACHE to a writable"):
        compare("toy", size="toy", methods=["divmerge/task"])


def test_a_full_cache_is_a_clear_error_and_leaves_no_result(toys, tmp_path, monkeypatch):
    shutil.copytree(
        storage.cache_dir(), tmp_path / "cache", ignore=shutil.ignore_patterns("results")
    )
    monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / "cache"))

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "dump_json", full)
    with pytest.raises(
        ValueError, match="No space left on device; set DIVMERGE_CACHE .* few GB free"
    ):
        compare("toy", size="toy", methods=["average"])
    assert not list((tmp_path / "cache").glob("results/*"))


def test_the_checks_come_before_the_experts(idle, monkeypatch):
    """`prepare` checks suite, tasks, size and device before it loads the encoder."""
    monkeypatch.setattr(experiment, "load_base", forbid)
    for options in ({"suite": "to"}, {"size": "huge"}, {"tasks": ["mood"]}, {"device": "cuda:99"}):
        arguments = {"suite": "toy", "size": "toy", **options}
        with pytest.raises(ValueError):
            prepare(arguments.pop("suite"), **arguments)
