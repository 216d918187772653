"""Experts: they learn, are kept under all that determines them, and are refused once damaged."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from divmerge_book.models import finetuning as module
from divmerge_book.models.encoders import load_base, make_batches, pooled
from divmerge_book.models.finetuning import data_digest, fine_tune, load_expert
from helpers import COUNTS, MARKERS, TINY_RECIPE, refuse, toy_splits, toy_task
from safetensors.torch import load_file
from torch.testing import assert_close

from divmerge_core import storage

FAST = replace(TINY_RECIPE, rows=16, epochs=1)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The tasks that were really trained on, in order."""
    names, train = [], module.train

    def counted(base, task, *rest, **options):
        names.append(task.name)
        return train(base, task, *rest, **options)

    monkeypatch.setattr(module, "train", counted)
    return names


def tune(base, name="mood", recipe=FAST, **options):
    return fine_tune(base, toy_task(name), recipe, progress=False, **options)


def accuracy_of(expert, base, split: str) -> float:
    """Share of right answers of encoder and head, worked out without the rest of the package."""
    rows = toy_task(expert.task).load(split)
    batches, order = make_batches(rows, base, batch_size=16, max_length=12)
    features = torch.cat([pooled(base.encoder, expert.state, b.inputs) for b in batches])
    answers = (features @ expert.head["weight"].T + expert.head["bias"]).argmax(1)
    return (answers == torch.tensor(rows["label"])[order]).float().mean().item()


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(MARKERS)))
def test_an_expert_beats_the_majority_by_far(tiny, experts, toys, number):
    answers = [answer for *_, answer in toy_splits(toys[number])["test"]]
    majority = max(map(answers.count, answers)) / len(answers)
    assert accuracy_of(experts[number], tiny, "test") > majority + 0.2


def test_an_expert_has_the_bases_tensors_and_a_head_of_its_own(tiny, experts):
    for expert, answers in zip(experts, (2, 3), strict=True):
        assert {name: value.shape for name, value in expert.state.items()} == {
            name: value.shape for name, value in tiny.state.items()
        }
        assert expert.head["weight"].shape == (answers, 32)
        assert expert.head["bias"].shape == (answers,)


def test_training_leaves_the_base_as_it_was(tiny_folder, cache):
    base = load_base(str(tiny_folder))
    before = {name: tensor.clone() for name, tensor in base.state.items()}
    expert = tune(base)
    assert_close(base.state, before, rtol=0, atol=0)
    assert not base.encoder.training
    assert all(parameter.grad is None for parameter in base.encoder.parameters())
    moved = sum((expert.state[name] - value).abs().sum() for name, value in before.items())
    assert moved > 0


def test_the_same_seed_trains_the_same_expert(tiny, tmp_path, monkeypatch):
    found = []
    for folder in ("one", "two"):
        monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / folder))
        found.append(tune(tiny))
    assert_close(found[0].state, found[1].state, rtol=0, atol=0)
    assert_close(found[0].head, found[1].head, rtol=0, atol=0)


# --- the cache ------------------------------------------------------------------------------------


def test_an_expert_is_trained_once(tiny, cache, trained):
    first, second = tune(tiny), tune(tiny)
    assert trained == ["mood"]
    assert_close(first.state, second.state, rtol=0, atol=0)
    assert first.manifest == second.manifest


def test_what_comes_back_is_what_was_trained(tiny, cache, monkeypatch):
    made, train = [], module.train
    monkeypatch.setattr(module, "train", lambda *a, **k: made.append(train(*a, **k)) or made[-1])
    expert = tune(tiny)
    assert_close(dict(expert.state), made[0][0], rtol=0, atol=0)
    assert_close(dict(expert.head), made[0][1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 2},
        {"lr": 2e-2},
        {"rows": 17},
        {"batch_size": 8},
        {"max_length": 6},
        {"warmup": 0.2},
        {"weight_decay": 0.0},
    ],
)
def test_another_recipe_is_another_expert(tiny, cache, trained, changed):
    first, second = tune(tiny), tune(tiny, recipe=replace(FAST, **changed))
    assert trained == ["mood", "mood"]
    assert first.manifest["recipe"] != second.manifest["recipe"]


def test_another_seed_task_or_text_is_another_expert(tiny, cache, trained):
    tune(tiny)
    tune(tiny, seed=1)
    tune(tiny, "place")
    fine_tune(tiny, toy_task("mood", seed=1), FAST, progress=False)
    assert trained == ["mood", "mood", "place", "mood"]
    assert len(list((cache / "experts").iterdir())) == 4


def test_another_base_is_another_expert(tiny, tiny_folder, tmp_path, cache, trained):
    other = load_base(str(tiny_folder))
    with torch.no_grad():
        other.encoder.embeddings.LayerNorm.bias[0] += 1
    other.encoder.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    tune(tiny)
    tune(load_base(str(tmp_path / "other")))
    assert trained == ["mood", "mood"]


def test_an_expert_says_what_determined_it(tiny, cache):
    expert = tune(tiny, seed=3)
    assert expert.task == expert.manifest["task"] == "mood"
    assert expert.manifest["answers"] == ["negative", "positive"]
    assert expert.manifest["base"] == tiny.digest
    assert expert.manifest["rows"] == 16 and expert.manifest["seed"] == 3
    assert expert.manifest["torch"] == torch.__version__
    assert expert.manifest["recipe"]["precision"] == "float32"


def test_all_rows_are_used_where_the_recipe_names_no_number(tiny, experts):
    assert [expert.manifest["rows"] for expert in experts] == [COUNTS["train"]] * 2


def test_rows_have_a_digest_of_their_content_and_order(cache):
    rows = toy_task("mood").load("train")
    assert data_digest(rows) == data_digest(rows.select(range(len(rows))))
    assert data_digest(rows) != data_digest(rows.select(range(len(rows) - 1)))
    assert data_digest(rows) != data_digest(rows.select(reversed(range(len(rows)))))


# --- damage, interruption, a cache that cannot be written -----------------------------------------


@pytest.fixture
def saved(tiny, cache):
    """The folder of a finished expert."""
    tune(tiny)
    return next((cache / "experts").iterdir())


def test_an_expert_is_safetensors_and_a_readable_manifest(saved):
    assert {path.name for path in saved.iterdir()} == {"manifest.json", "model.safetensors"}
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["model.safetensors"] == storage.sha256(saved / "model.safetensors")
    tensors = load_file(saved / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"encoder", "head"}


def test_damaged_weights_are_refused(saved, tiny):
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(
        ValueError, match="safetensors is missing or damaged; delete .* train it again"
    ):
        tune(tiny)


def test_missing_weights_are_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors is missing or damaged"):
        load_expert(saved)


def test_a_folder_without_a_manifest_is_no_expert(saved, tiny, trained):
    (saved / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no expert: manifest.json is missing"):
        load_expert(saved)
    tune(tiny)  # it is trained again in its place
    assert trained == ["mood"] and load_expert(saved).task == "mood"


def test_interrupted_training_leaves_nothing(tiny, cache, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(tiny)
    assert not list(cache.glob("experts/*"))
    assert not tiny.encoder.training
    assert tune(tiny).task == "mood"


def test_an_interrupted_save_leaves_nothing(tiny, cache, monkeypatch, trained):
    def interrupted(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(tiny)
    assert not list(cache.glob("experts/*"))
    tune(tiny)
    assert trained == ["mood", "mood"]


def test_a_read_only_cache_is_refused_before_training(tiny, cache, monkeypatch, trained):
    toy_task("mood").load("train")
    monkeypatch.setattr(storage, "FileLock", refuse)
    with pytest.raises(ValueError, match="Read-only file system; set DIVMERGE_CACHE to a writable"):
        tune(tiny)
    assert trained == []


def test_a_disk_that_fills_up_while_saving_is_a_clear_error(tiny, cache, monkeypatch):
    def full(tensors, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        ValueError, match="No space left on device; set DIVMERGE_CACHE .* few GB free"
    ):
        tune(tiny)
    assert not list(cache.glob("experts/*"))


def test_an_expert_moves_with_its_folder(saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    assert load_expert(tmp_path / "elsewhere").task == "mood"
