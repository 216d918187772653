"""LoRA experts of language models, written by hand in PEFT's layout: what PEFT would merge."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from divmerge_book.user_models import check, load, read
from language_files import make_language_project
from local_files import changed, make_adapter, refused
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:task .* the task vector is:UserWarning")
QUERY, VALUE = (f"model.layers.{n}.self_attn.{m}_proj" for n, m in ((0, "q"), (1, "v")))
SHAPES = {QUERY: (32, 32), VALUE: (16, 32)}
TABLE, HEAD = "model.embed_tokens", "lm_head"


def lora(project: Path, shapes=SHAPES, **settings) -> tuple[Path, dict]:
    """The project with an adapter in the place of its first expert, and the adapter's factors."""
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **settings}
    factors = make_adapter(project.parent / "lora", shapes, **options)
    return changed(project, 0, expert="lora"), factors


def vector(path: Path) -> dict[str, torch.Tensor]:
    """The first expert's task vector, by name."""
    vectors = load(check(read(path))).problem.vectors
    return vectors.layout.unflatten(vectors.deltas[0])


def edit(path: Path, change) -> None:
    file = path.parent / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_language_project(tmp_path_factory.mktemp("tied"), validation=None, test=None)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    from language_toys import save_model

    folder = tmp_path_factory.mktemp("untied")
    base = save_model(folder / "base", "qwen2", tied=False)
    return make_language_project(folder, base=base, validation=None, test=None)


@pytest.mark.parametrize(
    "settings, scales",
    [
        ({}, (2.0, 2.0)),  # alpha 6 over rank 3
        ({"use_rslora": True}, (6 / math.sqrt(3), 6 / math.sqrt(3))),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 9}}, (3.0, 2.0)),
        ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 1.5}}, (2.0, 0.5)),
    ],
)
def test_task_vectors_are_the_scaled_products(tied, cache, settings, scales):
    path, factors = lora(tied, **settings)
    found = vector(path)
    for name, scale in zip(SHAPES, scales, strict=True):
        left, right = factors[name]
        assert_close(found.pop(f"{name}.weight"), scale * left @ right, rtol=0, atol=1e-6)
    assert not any(tensor.any() for tensor in found.values())


def test_tables_and_matrices_saved_whole_take_the_bases_place(untied, cache):
    whole = {f"{name}.weight": torch.randn(316, 32) for name in (TABLE, HEAD)}
    path, _ = lora(untied, saved=whole, modules_to_save=["embed_tokens", "lm_head"])
    base = transformers.AutoModelForCausalLM.from_pretrained(untied.parent / "base").state_dict()
    found = vector(path)
    for name, tensor in whole.items():
        assert_close(base[name] + found[name], tensor, rtol=0, atol=1e-6)


def test_factors_of_embeddings_lie_the_other_way(untied, cache):
    path, _ = lora(untied)
    left, right = torch.randn(32, 3), torch.randn(3, 316)
    before = "base_model.model.model.embed_tokens.lora_embedding"
    edit(path, lambda tensors: {**tensors, f"{before}_A": right, f"{before}_B": left})
    assert_close(vector(path)[f"{TABLE}.weight"], 2 * (left @ right).T, rtol=0, atol=1e-5)


def test_resized_tables_of_a_tied_base_are_one(tied, cache):
    whole = torch.randn(320, 32)
    path, _ = lora(tied, saved={f"{TABLE}.weight": whole, f"{HEAD}.weight": whole.clone()})
    plan = check(read(path))
    assert plan.tokens.rows == 320
    vectors = load(plan).problem.vectors
    found = vectors.layout.unflatten(vectors.expert("mood"))
    assert_close(found[f"{TABLE}.weight"], whole, rtol=0, atol=1e-5)
    edit(path, lambda tensors: {k: t + ("lm_head" in k) for k, t in tensors.items()})
    with pytest.raises(ValueError, match="tied in the base, and were trained apart"):
        load(check(read(path)))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"task_type": "SEQ_CLS"}, ["task_type SEQ_CLS", "CAUSAL_LM"]),
        ({"use_dora": True}, ["use_dora=True is more than plain LoRA"]),
        ({"modules_to_save": ["score", "lm_head"]}, ["names 'lm_head', and it holds nothing of"]),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices=[3]"]),
        ({"shapes": {"model.layers.7.x": (32, 32)}}, ["layers.7", "another model"]),
        ({"shapes": {"model.layers.0.mlp.experts.0.w1": (8, 32)}}, ["or on experts that are one"]),
        ({"shapes": {QUERY: (32, 16)}}, ["[32, 32]", "another model"]),
        ({"shapes": {HEAD: (316, 32)}}, ["factors for lm_head.weight, which is tied"]),
    ],
)
def test_what_cannot_be_one_task_vector_is_refused(tied, settings, words):
    path, _ = lora(tied, **settings)
    refused(path, *words)


def test_a_table_trained_apart_from_its_head_is_refused(tied):
    saved = {f"{TABLE}.weight": torch.randn(316, 32)}
    path, _ = lora(tied, saved=saved, modules_to_save=["embed_tokens"])
    refused(path, "was trained apart", "ensure_weight_tying")
    path, _ = lora(tied, saved=saved, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert check(read(path)).experts[0].kind == "adapter"


def test_half_an_adapter_is_refused(tied):
    path, _ = lora(tied)
    edit(path, lambda own: {n: t for n, t in own.items() if n != min(n for n in own if "_B" in n)})
    refused(path, "lora_A without its lora_B")
    path, _ = lora(tied)
    edit(path, lambda own: {n: t.to(torch.int8) for n, t in own.items()})
    refused(path, "is torch.int8, so it is quantised")
    file = tied.parent / "lora" / "adapter_model.safetensors"
    file.rename(file.with_suffix(".incomplete"))
    refused(path, "has no adapter_model.safetensors", "the download did not end")
    (tied.parent / "lora" / "adapter_config.json").write_text("3")
    refused(path, "adapter_config.json is no JSON")
