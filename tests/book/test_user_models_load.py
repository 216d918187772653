"""Users' experts merged: the identity of every family, heads, adapters, damaged weights."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import local_files
import pytest
import torch
import transformers
from divmerge_book.models.encoders import classifier_forward
from divmerge_book.models.finetuning import load_expert
from divmerge_book.user_models import check, load, read
from divmerge_book.user_models.folders import adapter_tensors
from divmerge_book.user_models.headers import check_headers
from divmerge_book.user_models.streaming import heads_on_disk
from helpers import MARKERS, WORDS
from language_toys import family_config
from local_files import LABELS, changed, describe, make_expert, make_project, refused, toy_rows
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from divmerge_core import METHODS
from divmerge_core.checkpoints.safetensors_io import StoredModel

QUERY = "bert.encoder.layer.0.attention.self.query"


# Toy experts move further than fine-tuning does.
pytestmark = pytest.mark.filterwarnings("ignore:task .* the task vector is:UserWarning")


@pytest.fixture(scope="module")
def family(project, tmp_path_factory):
    """Kind -> a description of two random experts of this family; only to be read."""
    made = {"bert": project}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_project(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


# --- merging is merging ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", local_files.KINDS)
def test_an_expert_at_coefficient_1_is_its_own_pipeline(family, kind):
    project = family(kind)
    bench = load(check(read(project)))
    texts = [row["text"] for row in toy_rows("place")["test"]]
    expert = str(project.parent / "experts/place")
    own = transformers.pipeline("text-classification", model=expert, top_k=None)
    wanted = [{one["label"]: one["score"] for one in found} for found in own(texts)]
    flat = bench.problem.vectors.expert("place")
    logits = [bench.problem.logits(flat, 1, batch) for batch in bench.test[1].batches]
    lengths = torch.tensor([len(ids) for ids in bench.base.tokenizer(texts).input_ids])
    order = lengths.argsort(stable=True).tolist()
    wanted = [[wanted[number][label] for label in LABELS["place"]] for number in order]
    assert_close(torch.cat(logits).softmax(-1), torch.tensor(wanted), rtol=0, atol=1e-5)
    if kind == "distilbert":  # it takes no token types, though BERT's tokenizer would give them
        assert set(bench.test[0].batches[0].inputs) == {"input_ids", "attention_mask"}
    if kind == "bart":  # encoder and decoder read one embedding: a change of it reaches both
        names = bench.problem.vectors.layout.names
        assert [n for n in names if "embed_tokens" in n or "shared" in n] == ["shared.weight"]
        model = bench.problem.module
        assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight


def test_what_the_base_has_is_merged_and_the_rest_is_the_head(bench, project, tmp_path):
    base = load_file(project.parent / "base/model.safetensors")
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    head = {"classifier.weight", "classifier.bias"}
    assert set(bench.problem.vectors.layout.names) == set(base)
    assert [set(expert.head) for expert in bench.experts] == [pooler | head] * 2
    project = make_project(tmp_path)  # of a base with a pooler, which is merged then
    transformers.AutoModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    bench = load(check(read(project)))
    assert "pooler.dense.weight" in bench.problem.vectors.layout.names
    assert set(bench.experts[0].head) == head


def test_the_average_is_the_mean_of_the_checkpoints(bench, project):
    merged = bench.problem.vectors.layout.unflatten(METHODS["average"](bench.problem))
    states = [load_file(project.parent / f"experts/{n}/model.safetensors") for n in MARKERS]
    for name, tensor in merged.items():
        mean = sum(state[f"bert.{name}"] for state in states) / len(states)
        assert_close(tensor, mean, rtol=0, atol=1e-6)


def test_gradients_reach_every_merged_tensor(bench):
    vectors = bench.problem.vectors
    flat = vectors.expert("mood").requires_grad_()
    batch = bench.problem.batches[0][0]
    bench.problem.logits(flat, 0, batch).square().sum().backward()
    reached = vectors.layout.unflatten(flat.grad)
    assert [name for name, part in reached.items() if not part.abs().sum() > 0] == []


def test_precision_is_of_the_forward_pass_and_of_the_digest(plan, bench):
    half, batch = load(plan, precision="bfloat16"), bench.test[0].batches[0]
    flat = bench.problem.vectors.expert("mood")
    one, other = bench.problem.logits(flat, 0, batch), half.problem.logits(flat, 0, batch)
    assert other.dtype == torch.float32 and half.digest != bench.digest
    assert_close(one, other, rtol=0.05, atol=0.05)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["albert", "deberta-v2", "opt"])
def test_a_bare_encoders_names_are_whole(tmp_path, kind):
    """Its blocks and a table that is no token table may begin alike: `encoder.`."""
    model = transformers.AutoModel.from_config(family_config(kind, vocab_size=40))
    model.save_pretrained(tmp_path)
    assert set(StoredModel.at(tmp_path).cores) == {name for name, _ in model.named_parameters()}


def test_families_that_are_renamed_while_loaded(tmp_path):
    """Every tensor that is not made of others must be there; a classifier has all by its names."""
    sizes = {"num_experts": 2, "moe_intermediate_size": 16, "head_dim": 16}
    config = family_config("qwen3_moe", vocab_size=40, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert check_headers("it", tmp_path, model) == []
    with pytest.raises(ValueError, match="of such families .qwen3_moe. only language models"):
        check_headers("it", tmp_path, model.model)
    own = load_file(file := tmp_path / "model.safetensors")
    del own["model.norm.weight"]
    save_file(own, file, {"format": "pt"})
    with pytest.raises(ValueError, match="it lacks 1 tensors .*norm.weight"):
        check_headers("it", tmp_path, model)


def test_buffers_of_any_kind_are_left_out(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(family_config("gpt2", vocab_size=40))
    model.save_pretrained(tmp_path)
    own = load_file(file := tmp_path / "model.safetensors")
    save_file(own | {"transformer.h.0.attn.bias": torch.ones(4, 4).bool()}, file, {"format": "pt"})
    (note,) = check_headers("it", tmp_path, model)
    assert "1 tensors left out" in note


def test_a_pooler_of_the_base_is_no_part_of_an_adapters_expert():
    own = SimpleNamespace(apply=dict)
    source = SimpleNamespace(adapter=own, prefix="roberta.", shapes={"table": (1,)})
    state = {"table": torch.ones(1), "pooler.dense.bias": torch.ones(1)}
    assert list(adapter_tensors(source, None, state)) == ["roberta.table"]


# --- folders that are damaged, or not whole -------------------------------------------------------
def stored(folder: Path, change) -> None:
    """Put what `change` makes of a model's tensors in their place."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoiled(project: Path, folder: Path, spoil) -> Path:
    """The project with another first expert, on whose folder `spoil` has acted."""

    def build(target: Path) -> None:
        make_expert(target, project.parent / "base", LABELS["mood"])
        spoil(target)

    return local_files.lone(project, folder, "spoiled", build)


def other_base(project: Path, folder: Path, change) -> Path:
    """The project with the base's stored tensors changed; experts have all theirs."""
    base = local_files.make_base(folder / "base")
    stored(base, change)
    return local_files.with_fields(project, base=str(base))


def without(start: str):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(start)}


def with_nan(name: str):
    return lambda tensors: tensors | {name: torch.full_like(tensors[name], float("nan"))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan("classifier.bias"), "classifier.bias holds NaN"),
        (with_nan(f"{QUERY}.weight"), f"{QUERY.removeprefix('bert.')}.weight holds NaN"),
    ],
)
def test_an_expert_without_all_its_numbers_is_refused(project, tmp_path, change, message):
    path = spoiled(project, tmp_path, lambda folder: stored(folder, change))
    with pytest.raises(ValueError, match=message):
        load(check(read(path)))
    if "classifier" in message:  # merged from disk to disk, it is its task's head
        with pytest.raises(ValueError, match=message):
            heads_on_disk(check(read(path)))


def test_an_expert_of_another_base_or_none_is_noted(project, tmp_path):
    base = load_file(project.parent / "base" / "model.safetensors")
    for change, message in (
        (lambda own: {n: torch.randn(t.shape) for n, t in own.items()}, "is this the base that"),
        (lambda own: own | {f"bert.{n}": t for n, t in base.items()}, "is the base itself"),
    ):
        path = spoiled(project, tmp_path / message, lambda folder, c=change: stored(folder, c))
        with pytest.warns(UserWarning, match=f"'mood': .*{message}"):
            load(check(read(path)))


@pytest.mark.parametrize("part", [QUERY.removeprefix("bert.") + ".weight", "encoder.layer.1."])
def test_a_base_that_lacks_tensors_is_refused_by_name(project, tmp_path, part):
    refused(other_base(project, tmp_path, without(part)), "base", "tensors of its model", part)


@pytest.mark.parametrize("before", ["_orig_mod.", "module._orig_mod."])
def test_the_wrapper_of_a_saved_model_is_taken_off_and_said(project, bench, tmp_path, before):
    def wrapped(own: dict) -> dict:
        return {f"{before}{name}": tensor for name, tensor in own.items()}

    path = other_base(project, tmp_path, wrapped)
    path = spoiled(path, tmp_path, partial(stored, change=wrapped))
    plan = check(read(path))
    assert sum(f"all names begin with '{before}'" in note for note in plan.notes) == 2
    found, wanted = load(plan).problem.vectors, bench.problem.vectors
    assert torch.equal(found.base, wanted.base) and torch.equal(found.deltas, wanted.deltas)
    lora, _ = with_adapter(project, tmp_path)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    plain = load(check(read(lora))).problem.vectors.deltas
    save_file(wrapped(load_file(file)), file)
    assert torch.equal(load(check(read(lora))).problem.vectors.deltas, plain)


def rewritten(folder: Path, **fields) -> None:
    """config.json with other fields, as if edited by hand."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_else_stands_in_an_experts_folder_is_looked_at(project, tmp_path):
    """Another tool's manifest; a head's field of the configuration; a plain vocabulary."""
    shutil.copytree(project.parent, tmp_path / "all")
    path, expert = tmp_path / "all" / project.name, tmp_path / "all" / "experts" / "mood"
    (expert / "manifest.json").write_text('{"version": 3}')
    assert check(read(path)).experts[0].kind == "transformers"
    rewritten(tmp_path / "all" / "base", classifier_pooling="cls")
    rewritten(expert, classifier_pooling="mean")
    refused(path, "classifier_pooling = 'mean'", "set it in the base's config.json too")
    rewritten(expert, classifier_pooling="cls")
    words = sorted(transformers.AutoTokenizer.from_pretrained(expert).get_vocab())
    for file in expert.glob("tokenizer*"):
        file.unlink()
    (expert / "vocab.txt").write_text("\n".join(words))
    refused(path, "of its expert and token 2 of the base")


def begun(folder: Path, word: str) -> None:
    """config.json that begins otherwise."""
    file = folder / "config.json"
    file.write_text(file.read_text().replace("{", word, 1))


@pytest.mark.parametrize("names", [{"0": 0, "1": 1}, {"0": "label_0", "1": "LABEL_1"}, None])
def test_outputs_with_numbers_for_names_take_the_descriptions(project, tmp_path, names):
    path = spoiled(project, tmp_path, partial(rewritten, id2label=names, num_labels=2))
    plan = check(read(changed(path, 0, labels=LABELS["mood"])))
    assert list(plan.experts[0].labels) == LABELS["mood"]


def test_equal_tensors_of_blocks_are_not_tied_though_they_have_a_row_per_token(tmp_path):
    names = ("wte.weight", "lm_head.weight", "h.0.bias", "h.1.bias")
    save_file({name: torch.zeros(9) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    assert set(StoredModel.at(tmp_path).tensors) == set(names) - {"lm_head.weight"}


def test_what_a_base_has_beside_its_encoder_is_left_out_and_said(project, tmp_path):
    more = {f"cls.{n}": torch.ones(9) for n in range(4)}
    (note,) = check(read(other_base(project, tmp_path, lambda t: t | more))).notes
    assert "4 tensors left out; its model lacks them: cls.0, cls.1, cls.2, ..." in note


def twice(folder: Path) -> None:
    kept = (folder / "model.safetensors").read_bytes()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").write_bytes(kept)


def adapter_too(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(text)


def renamed(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def unlinked(folder: Path, name: str = "model.safetensors") -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")


def shardless(folder: Path, name: str) -> None:
    twice(folder)
    (folder / "model.safetensors").unlink()
    next(folder.glob(name)).unlink()


def in_bytes(tensors: dict) -> dict:
    return {n: t.to(torch.int8) if t.ndim == 2 else t for n, t in tensors.items()}


def nested(folder: Path) -> None:
    (folder / "checkpoint-9").mkdir()
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(folder / "checkpoint-9" / file.name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (twice, "holds both model.safetensors and model.safetensors.ind"),
        (adapter_too, "holds an adapter .* and whole weights"),
        (pointer, "is no whole safetensors file but a Git-LFS pointer"),
        (partial(renamed, name="model.safetensors.incomplete"), "the download did not end; fetch"),
        (partial(renamed, name="pytorch_model.bin"), "lacks model.safetensors .but pytorch_model"),
        (partial(renamed, name="model.fp16.safetensors"), "lacks .* .but model.fp16.safetensors"),
        (unlinked, "model.safetensors is a link to nothing: its cache was emptied"),
        (
            partial(unlinked, name="tokenizer.json"),
            "tokenizer.json is a link to nothing: its cache",
        ),
        (partial(shardless, name="model-00002*"), "00001-of-.*: the download did not end; fetch"),
        (partial(shardless, name="*.index.json"), "00001-of-.*: the download did not end; fetch"),
        (partial(stored, change=in_bytes), "is stored as torch.int8, so the weights are quantised"),
        (nested, "holds no expert: .*did you mean .*checkpoint-9"),
        (partial(stored, change=without("classifier.weight")), "lacks 1 .*classifier.weight"),
        (partial(stored, change=without(QUERY)), "lacks 2 tensors of its model"),
        (
            partial(stored, change=lambda own: own | {"classifier.out.weight": torch.ones(2, 32)}),
            "classifier.out.weight.*it has another head",
        ),
        (
            partial(rewritten, id2label={"0": "a", "1": "b", "2": "c"}),
            r"weights disagree: classifier.bias is \[2\], not \[3\]",
        ),
        (partial(rewritten, quantization_config={"quant_method": "bitsandbytes"}), "is quantised"),
        (partial(rewritten, auto_map={"AutoModel": "own.Model"}), "code of its own .AutoModel"),
        (
            partial(rewritten, architectures=["MyBertForSequenceClassification"]),
            "is a MyBertFor.* is BertForSequenceClassification; only its own classes",
        ),
        (partial(rewritten, id2label={"1": "a", "2": "b"}), r"numbers the outputs \[1, 2\]; they"),
        (partial(rewritten, id2label={"0": "a", "2": "b"}), r"numbers the outputs \[0, 2\]; they"),
        (partial(rewritten, id2label={"0": "a", "1": "a"}), "distinct and not empty; give labels"),
        (partial(rewritten, id2label={"0": "a", "1": ""}), "distinct and not empty; give labels"),
        (partial(rewritten, id2label=["a", "b"]), "it maps the outputs' numbers to names, such as"),
        (partial(rewritten, id2label={"0": None, "1": "b"}), "'0': None.*it maps the"),
        (partial(rewritten, id2label={"a": 0}), "it maps the outputs' numbers to names, such as"),
        (
            partial(rewritten, label2id={"negative": 1, "positive": 0}),
            "label2id {'negative': 1, 'positive': 0}; correct the one",
        ),
        (partial(rewritten, architectures="Bert"), "config.json: architectures is no list"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object .it holds"),
        (partial(begun, word="{ // mine"), "config.json is no JSON object .*line 1 column 3"),
        (
            lambda folder: (folder / "generation_config.json").write_text("{"),
            "generation_config.json is no JSON object",
        ),
        (partial(begun, word="\ufeff{"), "config.json is no JSON object .Unexpected UTF-8 BOM"),
        (partial(rewritten, hidden_size="32"), "'hidden_size' expected int, got str"),
    ],
)
def test_an_expert_with_two_sources_of_weights_or_none_or_not_what_its_folder_says_is_refused(
    project, tmp_path, spoil, message
):
    with pytest.raises(ValueError, match=message):
        check(read(spoiled(project, tmp_path, spoil)))


def test_a_base_whose_config_is_a_link_to_nothing_is_named(project, tmp_path):
    path = other_base(project, tmp_path, dict)
    unlinked(tmp_path / "base", "config.json")
    with pytest.raises(ValueError, match="base/config.json is a link to nothing"):
        check(read(path))


def test_what_lies_beside_the_weights_does_not_count_as_weights(project, tmp_path):
    def beside(folder: Path) -> None:
        save_file({"x": torch.ones(2)}, folder / "optimizer.safetensors")

    found = load(check(read(spoiled(project, tmp_path, beside))))
    files = found.experts[0].manifest["files"]
    assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]


# --- LoRA adapters --------------------------------------------------------------------------------
def with_adapter(project: Path, folder: Path, shapes=None, saved=None, **settings):
    """The project with an adapter as the first expert; its description and factors."""
    saved = local_files.pooler_and_head(2) if saved is None else saved
    factors = local_files.make_adapter(
        folder / "lora", shapes or {QUERY: (32, 32)}, saved=saved, **settings
    )
    return changed(project, 0, expert=str(folder / "lora"), labels=LABELS["mood"]), factors


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({}, 6 / 3),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"alpha_pattern": {"self.query": 9}}, 9 / 3),
        ({"alpha_pattern": {"uery": 9}}, 6 / 3),
        ({"r": 99, "rank_pattern": {"query": 3}}, 6 / 3),
        ({"r": None}, 6 / 3),  # the factors have it
    ],
)
def test_an_adapter_is_w_plus_scale_b_a(project, tmp_path, settings, scale):
    path, factors = with_adapter(project, tmp_path, **settings)
    bench = load(check(read(path)))
    vectors = bench.problem.vectors
    deltas = vectors.layout.unflatten(vectors.deltas[0])
    left, right = factors[QUERY]
    name = f"{QUERY.removeprefix('bert.')}.weight"
    assert_close(deltas[name], scale * left @ right, rtol=1e-5, atol=1e-6)
    assert [key for key, part in deltas.items() if part.abs().sum() > 0] == [name]
    for key, tensor in local_files.pooler_and_head(2).items():
        assert torch.equal(bench.experts[0].head[key], tensor)


def test_an_adapter_of_gpt2_is_transposed(family, tmp_path):
    """GPT-2's matrices are [in, out]; embeddings have factors of their own names."""
    project = family("gpt2")
    matrix = "transformer.h.0.attn.c_attn"
    head = {"score.weight": torch.randn(2, 32)}
    path, factors = with_adapter(project, tmp_path, {matrix: (96, 32)}, head, fan_in_fan_out=True)
    weights = load_file(tmp_path / "lora/adapter_model.safetensors")
    place = torch.randn(3, len(WORDS)), torch.randn(32, 3)
    weights |= {"base_model.model.transformer.wte.lora_embedding_A": place[0]}
    weights |= {"base_model.model.transformer.wte.lora_embedding_B": place[1]}
    save_file(weights, tmp_path / "lora/adapter_model.safetensors")
    vectors = load(check(read(path))).problem.vectors
    deltas = vectors.layout.unflatten(vectors.deltas[0])
    left, right = factors[matrix]
    assert_close(deltas["h.0.attn.c_attn.weight"], 2 * (left @ right).T, rtol=1e-5, atol=1e-5)
    assert_close(deltas["wte.weight"], 2 * (place[1] @ place[0]).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"use_dora": True}, ["use_dora=True", "merge_and_unload"]),
        ({"peft_type": "IA3"}, ["'IA3'", "LORA"]),
        ({"bias": "all"}, ["bias='all'"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights='pissa'"]),
        ({"use_novelty": True}, ["use_novelty=True"]),
        ({"saved": {}}, ["no classification head", "SEQ_CLS"]),
        ({"r": 99}, ["r is 99", "rank 3"]),
        ({"lora_alpha": "6"}, ["lora_alpha is '6'", "correct the file"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha is nan", "correct the file"]),
        ({"alpha_pattern": ["query"]}, ["alpha_pattern maps no modules to numbers: ['query']"]),
        ({"rank_pattern": {"*": 3}}, ["rank_pattern maps no modules to numbers"]),
        ({"shapes": {QUERY: (32, 16)}}, ["[32, 32]", "another model"]),
        ({"shapes": {"bert.encoder.layer.9.x": (32, 32)}}, ["layer.9", "another model"]),
        ({"saved": local_files.pooler_and_head(3)}, ["3 outputs", "the shape of its saved head"]),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(project, tmp_path, settings, words):
    path, _ = with_adapter(project, tmp_path, **settings)
    refused(path, *words)


def test_an_adapter_in_a_pickle_of_tensors_is_read_and_one_that_runs_code_is_not(project, tmp_path):
    path, _ = with_adapter(project, tmp_path)
    wanted = load(check(read(path))).problem.vectors.deltas[0].clone()
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, file.with_suffix(".bin"))
    assert torch.equal(load(check(read(path))).problem.vectors.deltas[0], wanted)
    torch.save({**tensors, "run": Path}, file.with_suffix(".bin"))
    refused(path, "no whole file of tensors alone")


def test_links_umlauts_spaces_and_every_float_are_read(project, tmp_path):
    folder, blobs = tmp_path / "häns els" / "snapshots" / "a b", tmp_path / "blobs"
    make_expert(folder, project.parent / "base", LABELS["mood"])
    stored(folder, lambda own: {name: tensor.double() for name, tensor in own.items()})
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    bench = load(check(read(changed(project, 0, expert=str(folder)))))
    assert "float32" in str(bench.problem.vectors.base.dtype)


def test_a_random_pooler_that_was_not_saved_is_refused(project, tmp_path):
    head = {
        name: t
        for name, t in local_files.pooler_and_head(2).items()
        if name.startswith("classifier")
    }
    path, _ = with_adapter(project, tmp_path, saved=head)
    refused(path, "both lack", "bert.pooler", "modules_to_save")


def test_an_adapter_that_names_another_base_is_noted(project, tmp_path):
    named = {"hub/bert-large": 1, "somewhere/base": 0, None: 0, "/home/their/own": 1}
    for name, notes in named.items():
        path, _ = with_adapter(project, tmp_path, base_model_name_or_path=name)
        plan = check(read(path))
        found = re.findall("trained on '(?:hub/bert-large|own)'", "\n".join(plan.notes))
        assert len(found) == notes
        assert not any(str(tmp_path) in note for note in plan.portable["notes"])


# --- this package's own experts -------------------------------------------------------------------
@pytest.fixture
def own(tiny_folder, shared_cache, experts, tmp_path) -> Path:
    """The toy experts that this package trained, described from their folders."""
    entries = []
    for expert in experts:
        kept = (shared_cache / "experts").glob(f"{expert.task}-*")
        (folder,) = (path for path in kept if load_expert(path).manifest == expert.manifest)
        entry = {"name": expert.task, "expert": str(folder)}
        for split, rows in toy_rows(expert.task).items():
            path = local_files.write_rows(tmp_path / f"{expert.task}-{split}.csv", rows)
            entry[split] = str(path)
        entries.append(entry)
    return describe(tmp_path / "own.yaml", entries, base=str(tiny_folder))


def test_this_packages_own_experts_answer_as_ever(own, experts, tiny):
    bench = load(check(read(own)))
    forward = classifier_forward(tiny, [expert.head for expert in experts])
    for number, expert in enumerate(experts):
        batch = bench.test[number].batches[0]
        wanted = forward(expert.state, [(number, batch)])[0]
        flat = bench.problem.vectors.expert(expert.task)
        assert_close(bench.problem.logits(flat, number, batch), wanted, rtol=0, atol=1e-5)


def test_kinds_of_experts_mix(own, tiny_folder, tmp_path):
    make_expert(tmp_path / "mood", tiny_folder, LABELS["mood"])
    bench = load(check(read(changed(own, 0, expert="mood"))))
    assert [expert.manifest["kind"] for expert in bench.experts] == ["transformers", "package"]


def test_this_packages_expert_of_another_base_is_refused(own, tmp_path):
    def shifted(tensors: dict) -> dict:
        name = "embeddings.word_embeddings.weight"
        return tensors | {name: tensors[name] + 1}

    with pytest.raises(ValueError, match="other weights or vocabulary"):
        load(check(read(other_base(own, tmp_path / "other", shifted))))
