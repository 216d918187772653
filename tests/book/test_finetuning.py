"""Experts: they learn, are cached under all that determines them, and are refused once damaged."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from divmerge_book.models import finetuning as module
from divmerge_book.models.encoders import load_base, make_batches, pooled
from helpers import COUNTS, MARKERS, TINY_RECIPE, raising, toy_splits, toy_task
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
    return module.fine_tune(base, toy_task(name), recipe, progress=False, **options)


def same(one, other) -> None:
    assert_close(dict(one.state), dict(other.state), rtol=0, atol=0)
    assert_close(dict(one.head), dict(other.head), rtol=0, atol=0)


@pytest.mark.parametrize("number", range(len(MARKERS)))
def test_an_expert_has_the_bases_tensors_and_beats_the_majority_by_far(tiny, experts, toys, number):
    expert, task = experts[number], toy_task(toys[number])
    shapes = {name: value.shape for name, value in tiny.state.items()}
    assert {name: value.shape for name, value in expert.state.items()} == shapes
    assert expert.head["weight"].shape == (len(task.answers), 32)
    assert expert.manifest["rows"] == COUNTS["train"]  # all, as the recipe names no number
    rows = task.load("test")
    batches, order = make_batches(rows, tiny, batch_size=16, max_length=12)
    features = torch.cat([pooled(tiny.encoder, expert.state, b.inputs) for b in batches])
    predicted = (features @ expert.head["weight"].T + expert.head["bias"]).argmax(1)
    right = (predicted == torch.tensor(rows["label"])[order]).float().mean().item()
    answers = [answer for *_, answer in toy_splits(task.name)["test"]]
    assert right > max(map(answers.count, answers)) / len(answers) + 0.2


def test_training_leaves_the_base_as_it_was(tiny_folder, cache):
    base = load_base(str(tiny_folder))
    before = {name: tensor.clone() for name, tensor in base.state.items()}
    expert = tune(base)
    assert_close(base.state, before, rtol=0, atol=0)
    assert not base.encoder.training
    assert all(parameter.grad is None for parameter in base.encoder.parameters())
    assert sum((expert.state[name] - value).abs().sum() for name, value in before.items()) > 0


def test_the_step_size_rises_and_falls_to_zero():
    found = [module.rate(step, 10, 0.2) for step in range(11)]
    assert found == pytest.approx([0.5, 1, *(n / 8 for n in range(8, -1, -1))])


def test_an_expert_is_trained_once_and_reproducible(tiny, tmp_path, monkeypatch, trained):
    found = []
    for folder in ("one", "one", "two"):
        monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / folder))
        found.append(tune(tiny, seed=3))
    assert trained == ["mood", "mood"]
    same(found[0], found[1])
    same(found[0], found[2])
    manifest = found[0].manifest
    assert manifest == found[1].manifest and found[0].task == manifest["task"] == "mood"
    assert manifest["answers"] == ["negative", "positive"] and manifest["base"] == tiny.digest
    assert manifest["rows"] == 16 and manifest["seed"] == 3
    assert manifest["torch"] == torch.__version__
    assert manifest["recipe"]["precision"] == "float32"


def test_rows_have_a_digest_of_their_content_and_order(cache):
    rows = toy_task("mood").load("train")
    assert module.data_digest(rows) == module.data_digest(rows.select(range(len(rows))))
    assert module.data_digest(rows) != module.data_digest(rows.select(range(len(rows) - 1)))
    assert module.data_digest(rows) != module.data_digest(rows.select(reversed(range(len(rows)))))


@pytest.fixture
def saved(tiny, cache):
    """The folder of a saved expert."""
    tune(tiny)
    return next((cache / "experts").iterdir())


def test_an_expert_is_safetensors_and_a_readable_manifest_and_moves(saved, tmp_path):
    assert {path.name for path in saved.iterdir()} == {"manifest.json", "model.safetensors"}
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["model.safetensors"] == storage.sha256(saved / "model.safetensors")
    tensors = load_file(saved / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"encoder", "head"}
    shutil.move(saved, tmp_path / "elsewhere")
    assert module.load_expert(tmp_path / "elsewhere").task == "mood"


def test_damaged_or_missing_weights_are_refused(saved, tiny):
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    message = "safetensors is missing or damaged; delete .* train it again"
    with pytest.raises(ValueError, match=message):
        tune(tiny)
    file.unlink()
    with pytest.raises(ValueError, match=message):
        module.load_expert(saved)


def test_a_folder_without_a_manifest_is_no_expert_and_is_trained_again(saved, tiny, trained):
    (saved / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no expert: manifest.json is missing"):
        module.load_expert(saved)
    tune(tiny)
    assert trained == ["mood"] and module.load_expert(saved).task == "mood"


@pytest.mark.parametrize(("place", "name"), [(torch.optim.AdamW, "step"), (module, "save_file")])
def test_an_interrupted_training_or_save_leaves_nothing(tiny, cache, monkeypatch, place, name):
    with monkeypatch.context() as patch:
        patch.setattr(place, name, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            tune(tiny)
    assert not list(cache.glob("experts/*")) and not tiny.encoder.training
    assert tune(tiny).task == "mood"
