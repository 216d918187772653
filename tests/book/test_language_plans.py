"""The suite and size of a machine, and the memory and time that they need at least."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from divmerge_book.evaluation.sizes import LANGUAGE_SIZES
from divmerge_book.findings import planning as find
from divmerge_book.models import encoders
from divmerge_book.planning import language_plans, presets
from divmerge_book.planning.gpu_specs import ACCELERATORS


@pytest.fixture
def gpu(monkeypatch):
    """Simulates a GPU with so much memory, with or without bfloat16 and the hub."""

    def simulate(memory: float, bfloat16: bool = True, hub: bool = True):
        place, card = torch.device("cuda"), SimpleNamespace(name="a card", total_memory=memory)
        for module in (encoders, presets):
            monkeypatch.setattr(module, "check_device", lambda device: place)
        monkeypatch.setattr(presets, "reachable", lambda name: hub)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: card)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)

    return simulate


def test_without_a_gpu_the_packaged_model_is_used():
    chosen = presets.preset("auto", "smoke", "cpu")
    assert (chosen.suite, chosen.device) == ("embedded_lm", "cpu")
    assert chosen.size == chosen.label == "smoke"
    assert "suite embedded_lm: no GPU" in chosen.why


def test_a_large_gpu_takes_glue_as_it_is(gpu):
    gpu(40e9)
    chosen = presets.preset("auto", "full", "auto")
    assert (chosen.suite, chosen.size, chosen.device) == ("glue", "full", "cuda")
    assert chosen.label == "full"
    assert encoders.device_line("auto") == "cuda, a card, 40 GB, matrix products in bfloat16"


@pytest.mark.parametrize(("memory", "reason"), [(16e9, "16 GB"), (32e9, "no bfloat16")])
def test_a_small_or_old_gpu_takes_a_smaller_preset_and_says_so(gpu, memory, reason):
    gpu(memory, bfloat16=False)
    chosen = presets.preset("auto", "default", "auto")
    assert chosen.size == presets.smaller(LANGUAGE_SIZES["glue/default"])
    assert chosen.label == "default, smaller" and f"a smaller preset: {reason}" in chosen.why


def test_without_the_hub_a_gpu_takes_the_packaged_model(gpu):
    gpu(80e9, hub=False)
    chosen = presets.preset("auto", "default", "auto")
    assert chosen.suite == "embedded_lm" and "nor reachable on the hub" in chosen.why


def test_smaller_never_grows_and_names_no_precision():
    for name in ("smoke", "default", "full"):
        size = LANGUAGE_SIZES[f"glue/{name}"]
        less = presets.smaller(size)
        assert less.recipe.rows <= (size.recipe.rows or less.recipe.rows)
        assert less.merge_rows <= size.merge_rows and less.recipe.epochs <= size.recipe.epochs
        assert (less.precision, less.recipe.precision, less.storage) == ("auto", "auto", "int8")


def test_unknown_suites_and_sizes_are_answered_with_the_choices():
    with pytest.raises(KeyError, match="glue/default"):
        presets.preset("glue", "enormous", "cpu")
    with pytest.raises(ValueError, match="answered in classes"):
        presets.preset("embedded", "smoke", "cpu")


def test_a_cached_model_is_there_without_a_network_and_an_unknown_one_is_not(monkeypatch):
    monkeypatch.setattr(presets, "try_to_load_from_cache", lambda name, file: "/somewhere/it")
    assert presets.reachable("some/model")
    monkeypatch.setattr(presets, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(presets.HfApi, "model_info", lambda *_, **__: 1 / 0)
    assert not presets.reachable("some/model")


SHAPE = {"num_tasks": 7, "tokens": 64, "answers": 3}
DEFAULT = LANGUAGE_SIZES["glue/default"]


def test_plans_follow_the_preset_of_the_gpu():
    table = language_plans.suite_forecast(DEFAULT, ["t4", "a100_40", "h100"], rows=6000, **SHAPE)
    assert table.preset.tolist() == ["smaller", "as it is", "as it is"]
    assert table.precision.tolist() == ["float32", "bfloat16", "bfloat16"]
    assert language_plans.size_on(DEFAULT, ACCELERATORS["t4"]).storage == "int8"
    slow, fast = table["experts and fit, s"][1:]
    assert fast < slow and table["fit, GB"][1:].nunique() == 1, "a better GPU is never slower"


def test_the_table_of_memory_adds_up_to_the_plans():
    shape = {**SHAPE, "model": language_plans.qwen()}
    table = language_plans.memory_table(DEFAULT, ["t4", "h100"], **shape)
    for key in ("t4", "h100"):
        plans = language_plans.memory_plans(DEFAULT, key, **shape)
        totals = [table.loc[ACCELERATORS[key].name, part].sum() for part in ("fine-tuning", "fit")]
        assert totals == pytest.approx([plan.total / 1e9 for plan in plans])
    assert all("loaded base" in str(plan) for plan in plans)


def test_fine_tuning_takes_as_long_as_its_steps():
    model, gpu = language_plans.qwen(), ACCELERATORS["h100"]
    assert model.parameters == 494_032_768 and model.vocabulary == 151_936 and model.tied
    once, thrice = (
        replace(DEFAULT, recipe=replace(DEFAULT.recipe, rows=320, epochs=epochs, batch_size=32))
        for epochs in (1, 3)
    )
    one = language_plans.training_seconds(model, once, gpu, 64, 3, 9999)
    three = language_plans.training_seconds(model, thrice, gpu, 64, 3, 9999)
    assert three == pytest.approx(3 * one)
    assert one > 10 * 28 * model.parameters / gpu.bandwidth  # AdamW's traffic alone, in ten steps


def test_the_summary_of_plans_has_their_gigabytes_and_who_holds_them():
    _, fit = language_plans.memory_plans(DEFAULT, "t4", model=language_plans.qwen(), **SHAPE)
    table = language_plans.suite_forecast(DEFAULT, ["t4", "h100"], rows=6000, **SHAPE)
    said = find.summary(fit, table, "cpu")
    assert f"holds {fit.total / 1e9:.1f} GB" in said and "ran on cpu" in said
    assert ", ".join(table.index[table.fits]).split(", ")[-1] in said
