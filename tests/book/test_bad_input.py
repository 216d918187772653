"""Bad input: refused before expensive work; the message names value, choices and cure."""

import os
import shutil
from dataclasses import replace
from errno import ENOSPC, EROFS

import pytest
import torch
from divmerge_book import TASKS, fine_tune, load_base, make_problem, prepare
from divmerge_book.evaluation import cache, experiment, hyperparameter_search
from divmerge_book.evaluation.benchmark import compare, every_method, takes
from divmerge_book.models import finetuning as training
from divmerge_book.models.method_options import check_options
from helpers import TINY_RECIPE, forbid, linear_problem, raising, task_of, toy_splits, toy_task
from test_structure import CHECK, ROOT, code

from divmerge_core import METHODS, storage
from divmerge_core.merging.problem import Diverged
from divmerge_core.methods import parse


@pytest.fixture
def idle(toys, cache, monkeypatch):
    """The toy suite, where no training and no merging may happen."""
    monkeypatch.setattr(training, "train", forbid)
    monkeypatch.setattr(hyperparameter_search, "run_method", forbid)


UNKNOWN = [
    ({"suite": "toys"}, "unknown suite 'toys'; choose one of: .*did you mean 'toy'"),
    ({"size": "tiny"}, "unknown size 'tiny'; choose one of: smoke, default, full"),
    ({"tasks": ["mood", "plaec"]}, "unknown task 'plaec'; choose one of: .*mean 'place'"),
    ({"tasks": ["mood", "sms"]}, "'toy' merges two or more distinct tasks of mood, place; got"),
    ({"tasks": ["mood"]}, r"two or more distinct tasks of mood, place; got \['mood'\]"),
    ({"tasks": ["mood", "mood"]}, r"two or more distinct tasks of .*; got \['mood', 'mood'\]"),
    ({"subsets": [["mood"]]}, r"two or more distinct tasks of mood, place; got \['mood'\]"),
    (
        {"suite": "embedded", "tasks": ["trec", "movie"], "subsets": [["movie", "sms"]]},
        r"a subset has tasks out of trec, movie; got \[\('movie', 'sms'\)\]",
    ),
    ({"methods": ["divmrge/task"]}, "unknown method 'divmrge'; .*did you mean 'divmerge'"),
    ({"methods": []}, r"one method and one seed or more, got \[\]"),
    ({"methods": ["ties", "ties"]}, r"give every method once; \['ties'\] came more than once"),
    ({"seeds": []}, r"one method and one seed or more, got .* and \[\]"),
    ({"seeds": [0, 0]}, r"give every seed once; \[0\] came more than once in \[0, 0\]"),
    ({"budget": 0}, "budget must be 1 candidate or more, got 0"),
    ({"lr": -1.0}, "lr above 0 and finite, got 4 and -1.0"),
    ({"epochs": "many"}, "divmerge/task: epochs is 'many'; Input should be a valid integer"),
    ({"link": "softmax", "init": 0.3}, "softmax 1/T = 0.5"),
    ({"seeds": [-1]}, r"seeds are 0 or more and less than 2\*\*63, got \[-1\]"),
    ({"steps": 3}, r"no such options \['steps'\]; these methods take \['basis', .*'lr'.*\]$"),
    ({"grouping": "layer"}, r"no such options \['grouping'\].* as in 'divmerge/block'"),
    ({"seed": 3}, r"no such options \['seed'\]"),
    ({"device": "cuda:99"}, "no device 'cuda:99' here; this machine has cpu"),
    ({"encoder": "./no/where"}, "(?s)cannot load encoder .*choose one of minilm, bert_tiny, or"),
]


@pytest.mark.parametrize(("options", "message"), UNKNOWN)
def test_what_is_unknown_is_refused_with_the_choices(idle, options, message):
    arguments = {"suite": "toy", "size": "toy", "methods": ["divmerge/task"], **options}
    with pytest.raises(ValueError, match=message):
        compare(arguments.pop("suite"), **arguments)


@pytest.mark.parametrize(
    ("chapter", "given", "message"),
    [
        ("04_merge", {"methods": ["ties"]}, "a model is loaded"),
        ("06_baselines", {"size": "smoke", "counts": [2]}, r"from 2 to below 2, got \[2\]"),
        ("08_divergence_choice", {"seeds": [-1]}, "seeds are 0 or more and less than .*, got -1"),
        ("09_protocol", {"tasks": ["trec", "movie"]}, "merges three or more distinct tasks"),
        ("10_how_many_tasks", {"methods": ["slerp"]}, "slerp merges exactly 2 experts, here are"),
        ("10_how_many_tasks", {"methods": ["tie"]}, "unknown method 'tie'; .*mean 'ties'"),
        ("11_does_divergence_predict", {"models": 2}, "give 5 models or more, got 2"),
        ("12_interference", {"tasks": ["trec", "movie"]}, "merges three or more distinct tasks"),
        ("14_glue_on_a_gpu", {"size": "smoke", "methods": ["ties"]}, "a model is loaded"),
        ("15_language_model", {"methods": ["tie"]}, "unknown method 'tie'; .*mean 'ties'"),
        ("17_better_directions", {"bases": ["tsv:0"]}, "take a whole number of bands"),
    ],
)
def test_a_chapter_refuses_what_it_cannot_show_before_a_model(chapter, given, message, monkeypatch):
    for name in ("load_base", "load_language"):
        monkeypatch.setattr(experiment, name, raising(ValueError("a model is loaded")))
    first, _, check, *cells = code(ROOT / "notebooks" / f"{chapter}.ipynb")
    assert check.source == CHECK
    space = {"given": frozenset(given)}
    exec(first.source, space)
    space |= given
    with pytest.raises(ValueError, match=message):
        for cell in cells[1:]:  # not the box, which reads stored results
            exec(cell.source, space)


@pytest.mark.parametrize("spec", every_method())
def test_what_the_searches_try_is_in_range_before_a_model_is_there(spec):
    tasks = ["a", "b"] if takes(spec, 2) else ["a", "b", "c"]
    for options in ({}, *METHODS.facts[parse(spec)[0]]["search"]):
        check_options(spec, tasks, options)


def test_the_checks_come_before_the_experts(idle, monkeypatch):
    """`prepare` checks suite, tasks, size and device before it loads the encoder."""
    monkeypatch.setattr(experiment, "load_base", forbid)
    for options in ({"suite": "to"}, {"size": "huge"}, {"tasks": ["mood"]}, {"device": "cuda:99"}):
        arguments = {"suite": "toy", "size": "toy", **options}
        with pytest.raises(ValueError):
            prepare(arguments.pop("suite"), **arguments)


def test_an_expert_of_another_base_is_refused(tiny, tiny_folder, experts, toys, tmp_path):
    other = load_base(str(tiny_folder))
    with torch.no_grad():
        other.encoder.embeddings.LayerNorm.bias[0] += 1
    other.encoder.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    recipe, base = replace(TINY_RECIPE, rows=8, epochs=1), load_base(str(tmp_path / "other"))
    stranger = fine_tune(base, toy_task("mood"), recipe, progress=False)
    message = "'mood' was trained from '.*other' with other weights .*; load its own base"
    with pytest.raises(ValueError, match=message):
        make_problem(tiny, [stranger, experts[1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": ["no", "yes"]}, r"answers \['no', 'yes'\], the task \['negative', 'positive'"),
        ({"task": "moods"}, "unknown task 'moods'; choose one of: .*did you mean 'mood'"),
        ({"task": "place"}, None),  # the same task twice
    ],
)
def test_an_expert_that_does_not_fit_is_refused(tiny, experts, toys, changes, message):
    expert = experts[0]
    if "answers" in changes:
        changes = {"manifest": {**expert.manifest, **changes}}
    with pytest.raises(ValueError, match=message):
        make_problem(tiny, [replace(expert, **changes), experts[1]])


@pytest.mark.parametrize("split", ["train", "validation", "merge", "test"])
def test_an_empty_or_one_class_split_is_refused_before_training(idle, monkeypatch, split):
    single = [row for row in toy_splits("mood")["train"] if row[2] == "positive"]
    for rows in ([], single if split == "train" else []):
        given = toy_splits("mood") | {split: rows}
        task = task_of(given, answers=("negative", "positive"), name="mood")
        monkeypatch.setitem(TASKS, "mood", task)
        message = f"task mood: its {split} split of {len(rows)} rows is empty .*more rows"
        with pytest.raises(ValueError, match=message):
            prepare("toy", size="toy")


def test_a_step_onto_undefined_logits_is_a_divergence():
    """A step of 1e30 overflows: the merged model's logits are NaN."""
    problem = linear_problem(num_tasks=2, dtype=torch.float32)
    with pytest.raises(Diverged, match="at step 1 logits hold NaN.*; or lower lr"):
        METHODS["divmerge"](problem, lr=1e30, progress=False)


@pytest.mark.parametrize(
    ("place", "name", "error", "message"),
    [
        (storage, "FileLock", EROFS, "Read-only file system; set DIVMERGE_CACHE to a writable"),
        (cache, "dump_json", ENOSPC, "No space left on device; set DIVMERGE_CACHE .* few GB free"),
    ],
)
def test_a_cache_that_became_read_only_or_full_is_a_clear_error_and_leaves_no_result(
    toys, tmp_path, monkeypatch, place, name, error, message
):
    own, without = tmp_path / "cache", shutil.ignore_patterns("results")
    shutil.copytree(storage.cache_dir(), own, ignore=without)
    monkeypatch.setenv("DIVMERGE_CACHE", str(own))
    monkeypatch.setattr(place, name, raising(OSError(error, os.strerror(error))))
    if place is storage:
        monkeypatch.setattr(hyperparameter_search, "run_method", forbid)
    with pytest.raises(ValueError, match=message):
        compare("toy", size="toy", methods=["average"])
    assert not list(own.glob("results/*"))
