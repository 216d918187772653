"""mergekit, given the configuration beside a merged model, makes the same weights."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from divmerge_book.models.merged import write
from divmerge_book.models.mergekit_merge import merge_config
from safetensors.torch import load_file
from torch.testing import assert_close

from divmerge_core.checkpoints import MergeRecord
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.task_vectors import Layout

pytest.importorskip("mergekit")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own

TASKS = ("mood", "place")
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
DEEP = {"num_hidden_layers": 12, "num_attention_heads": 2}  # layer.1 and layer.11
KINDS = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL, **DEEP)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=12, n_head=2, n_positions=16),
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, **DEEP, num_key_value_heads=2),
    ),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**SMALL, **DEEP, num_key_value_heads=2, tie_word_embeddings=True),
    ),
}


def save(kind, config, folder: Path, seed: int, *, near=None):
    """A random model, or noise on another, as transformers saves it."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if near is not None:
                origin = near.get(name, parameter)
                parameter.copy_(origin + 0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def record_of(folder: Path, grouping: str) -> MergeRecord:
    """Random coefficients, one of them negative, for the models in a folder."""
    base = StoredModel.at(folder / "base")
    layout = Layout(
        tuple(base.core(name) for name in base.tensors),
        tuple(tensor.shape for tensor in base.tensors.values()),
    )
    groups, _ = groups_of(layout, grouping)
    coeffs = torch.rand(2, len(groups), generator=torch.Generator().manual_seed(3))
    coeffs[1, 0] = -0.3
    experts = {task: folder / task for task in TASKS}
    method = f"divmerge/{grouping}"
    return MergeRecord(method, TASKS, folder / "base", experts, {}, coeffs, groups, grouping)


def run(recipe: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that mergekit writes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    options = MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True)
    run_merge(config, str(folder), options)
    files = list(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(folder: Path, found: dict[str, torch.Tensor]) -> int:
    """Compare all tensors of our folder with mergekit's; how many there are."""
    ours = StoredModel.at(folder)
    theirs = {ours.core(name): tensor for name, tensor in found.items()}
    for name, tensor in ours.tensors.items():
        given = theirs[ours.core(name)].flatten()
        assert_close(given, tensor.mapped(), rtol=1e-5, atol=1e-5, msg=name)
    return len(ours.tensors)


every_grouping = pytest.mark.parametrize("grouping", ["task", "block", "layer"])


def save_all(folder: Path, name: str) -> dict[str, torch.Tensor]:
    kind, config = KINDS[name]
    base = save(kind, config, folder / "base", 0)
    for number, task in enumerate(TASKS, start=1):
        save(kind, config, folder / task, number, near=base)
    return base


@every_grouping
@pytest.mark.parametrize("name", KINDS)
def test_mergekit_makes_the_same_weights(tmp_path, name, grouping):
    save_all(tmp_path, name)
    folder = write(tmp_path / "ours", record_of(tmp_path, grouping), progress=False)
    found = run(folder / "mergekit_config.yml", tmp_path / "theirs")
    assert same(folder, found) == len(StoredModel.at(tmp_path / "base").tensors) > 20


@every_grouping
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_heads_of_different_sizes_are_left_out(tmp_path, name, grouping):
    near, config = save_all(tmp_path, name), KINDS[name][1]
    classifier = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    unset = dict.fromkeys(("id2label", "label2id", "architectures"))
    for number, task in enumerate(TASKS, start=2):
        own = type(config)(**{**config.to_dict(), **unset, "num_labels": number})
        shutil.rmtree(tmp_path / task)
        save(classifier, own, tmp_path / task, number, near=near)
    base = StoredModel.at(tmp_path / "base")
    names = [base.core(name) for name in base.tensors if name.startswith(base.prefix)]
    folder = write(tmp_path / "ours", record_of(tmp_path, grouping), names=names, progress=False)
    found = run(folder / "mergekit_config.yml", tmp_path / "theirs")
    assert same(folder, found) == len(base.tensors) > len(names)
    assert not [name for name in found if "classifier" in name or "score" in name]


def test_bfloat16_is_written_by_both(tmp_path):
    save_all(tmp_path, "llama")
    record = record_of(tmp_path, "block")
    folder = write(tmp_path / "ours", record, dtype="bfloat16", progress=False)
    found = run(folder / "mergekit_config.yml", tmp_path / "theirs")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in StoredModel.at(folder).tensors.items():
        # the sums are rounded in another order: by one step of bfloat16 at most
        assert_close(found[name].flatten(), tensor.mapped(), rtol=2**-7, atol=1e-5)


DEEPER = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.3}]  # by name, and over layers
OWN = {  # method -> parameters of both models, and of all
    "linear": ({"weight": 1.0}, {"weight": [0.2, 0.9]}, {}),
    "task_arithmetic": ({"weight": 0.4}, {"weight": DEEPER}, {"lambda": 0.8}),
    "ties": ({"weight": 0.4, "density": 0.37}, {"weight": DEEPER, "density": 1.0}, {}),
    "dare_ties": ({"weight": 0.4}, {"weight": 0.3}, {"density": 1.0}),
    "dare_linear": ({"weight": 0.4}, {"weight": 0.3}, {"density": 1.0, "normalize": True}),
    "slerp": ({}, {}, {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.4}]}),
}
OWN["ties, as long as before"] = ({"weight": 0.4}, {"weight": 1}, {"density": 0.5, "rescale": True})


@pytest.mark.parametrize("case", OWN)
def test_its_own_files_are_merged_as_it_merges_them(tmp_path, case):
    """DARE where it drops nothing: what is drawn differs."""
    save_all(tmp_path, "llama")
    *each, common = OWN[case]
    method = case.partition(",")[0]
    models = [
        {"model": str(tmp_path / task), **({"parameters": own} if own else {})}
        for task, own in zip(TASKS, each, strict=True)
    ]
    facts = {"merge_method": method, "models": models, "dtype": "float32"}
    if method != "linear":
        facts["base_model"] = str(tmp_path / (TASKS[1] if method == "slerp" else "base"))
    recipe = tmp_path / "config.yml"
    recipe.write_text(yaml.safe_dump({**facts, **({"parameters": common} if common else {})}))
    folder = merge_config(recipe, tmp_path / "ours")
    assert same(folder, run(recipe, tmp_path / "theirs")) > 20
