"""Encoders: how they are loaded, how text becomes batches, and that padding changes nothing."""

import json
import shutil
from functools import partial

import datasets
import pytest
import torch
import transformers
from divmerge_book.models import encoders
from helpers import WORDS, sentences
from safetensors.torch import load_file, save_file
from torch.testing import assert_close


@pytest.fixture
def rows() -> datasets.Dataset:
    chosen = sentences("mood", 20)
    return datasets.Dataset.from_dict({"text": [text for text, *_ in chosen]})


def test_an_encoder_is_loaded_from_a_folder_as_the_hub_keeps_it(tiny, tiny_folder):
    assert tiny.name == str(tiny_folder) and not tiny.encoder.training
    stored = load_file(tiny_folder / "model.safetensors")
    assert tiny.state.keys() <= stored.keys() and not any("pooler" in name for name in tiny.state)
    assert {tensor.dtype for tensor in tiny.state.values()} == {torch.float32}
    assert_close(tiny.state, {name: stored[name] for name in tiny.state}, rtol=0, atol=0)


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_changed_weight_or_word_changes_the_digest(tiny, tiny_folder, tmp_path):
    weight, word = (shutil.copytree(tiny_folder, tmp_path / name) for name in ("weight", "word"))
    change_weights(weight, lambda weights: weights["embeddings.LayerNorm.bias"].add_(1e-3))
    tokenizer = json.loads((word / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["film"], vocabulary["song"] = vocabulary["song"], vocabulary["film"]
    (word / "tokenizer.json").write_text(json.dumps(tokenizer))
    digests = {encoders.load_base(str(changed)).digest for changed in (weight, word, tiny_folder)}
    assert len(digests) == 3 and tiny.digest in digests


SHAPE = {
    **{"vocab_size": len(WORDS), "max_position_embeddings": 32, "pad_token_id": 0},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    **{"embedding_size": 16, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2},
}


def saved(folder, kind: str) -> str:
    """A tiny random model of some kind, with a tokenizer of BERT's that fills up on the left."""
    standard = transformers.AutoConfig.for_model(kind)
    config = type(standard)(**{k: v for k, v in SHAPE.items() if hasattr(standard, k)})
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    words = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=words, padding_side="left").save_pretrained(folder)
    return str(folder)


KINDS = "distilbert roberta electra albert deberta-v2 mpnet modernbert xlm eurobert layoutlm"


@pytest.mark.parametrize("kind", KINDS.split())
def test_every_kind_of_encoder_is_loaded_and_padding_changes_nothing(kind, tmp_path, rows):
    base = encoders.load_base(saved(tmp_path, kind))
    (batch, *_), _ = encoders.make_batches(rows, base, batch_size=len(rows))
    together = encoders.pooled(base.encoder, base.state, batch.inputs)
    for number in range(0, len(rows), 4):
        length = int(batch.inputs["attention_mask"][number].sum())
        inputs = {key: own[number : number + 1, :length] for key, own in batch.inputs.items()}
        alone = encoders.pooled(base.encoder, base.state, inputs)[0]
        assert_close(together[number], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "is a T5Model, which gives no hidden states for texts alone"),
        ("convbert", "is a ConvBertModel, whose features of a text change with its padding"),
        ("fnet", "is a FNetModel, which gives no hidden states for texts alone"),
    ],
)
def test_a_model_that_encodes_no_texts_is_refused_by_name(kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        encoders.load_base(saved(tmp_path, kind))


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_folder, tmp_path):
    name = "encoder.layer.1.output.dense.weight"
    folder = shutil.copytree(tiny_folder, tmp_path / "part")
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=rf"lacks weights for \['{name}'"):
        encoders.load_base(str(folder))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "tpu:0"])
def test_a_missing_device_is_refused_with_those_there(device):
    with pytest.raises(ValueError, match=f"no device '{device}' here; this machine has cpu"):
        encoders.check_device(device)


def test_auto_is_what_the_hardware_has(monkeypatch):
    assert encoders.check_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert encoders.check_device("auto") == torch.device("cpu")
    assert encoders.resolve("auto", torch.device("cpu")) in ("float32", "bfloat16")
    assert encoders.resolve("float32", torch.device("cpu")) == "float32"
    emulated = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    assert encoders.resolve("auto", torch.device("cuda")) == "float32"
    with pytest.raises(ValueError, match="must be auto, float32 or bfloat16, got 'float16'"):
        encoders.resolve("float16", torch.device("cpu"))
    assert list(encoders.ENCODERS) == ["minilm", "bert_tiny"]


def test_batches_hold_every_row_once_shortest_first(tiny, rows):
    batches, order = encoders.make_batches(rows, tiny, batch_size=6)
    assert sorted(order.tolist()) == list(range(20))
    assert [batch.weight.shape[0] for batch in batches] == [6, 6, 6, 2]
    decode = partial(tiny.tokenizer.batch_decode, skip_special_tokens=True)
    decoded = [text for batch in batches for text in decode(batch.inputs["input_ids"])]
    assert decoded == [rows["text"][number] for number in order.tolist()]
    lengths = [n for batch in batches for n in batch.inputs["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths)


def test_weights_of_a_batch_are_a_mean_and_long_texts_are_cut(tiny, rows):
    for batch in encoders.make_batches(rows, tiny, batch_size=6)[0]:
        assert batch.weight.sum().item() == pytest.approx(1)
        assert batch.weight.unique().numel() == 1
    (batch,), _ = encoders.make_batches(rows, tiny, batch_size=20, max_length=5)
    assert batch.inputs["input_ids"].shape == (20, 5)


def test_pairs_differ_by_their_token_types(tiny):
    rows = datasets.Dataset.from_dict({"text": ["the film"], "pair": ["a song"]})
    batch = encoders.make_batches(rows, tiny, batch_size=1)[0][0]
    words = tiny.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0].tolist())
    assert words == ["[CLS]", "the", "film", "[SEP]", "a", "song", "[SEP]"]
    assert batch.inputs["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("count", [1, 5])
def test_several_batches_at_once_are_answered_as_one_by_one(toy_problem, count):
    flat = toy_problem.vectors.base + toy_problem.vectors.deltas.mean(0)
    every = [(t, b) for t, batches in enumerate(toy_problem.batches) for b in batches]
    pairs = [every[(3 * n) % len(every)] for n in range(count)]  # tasks and lengths mixed
    joint = toy_problem.forward(toy_problem.vectors.layout.unflatten(flat), pairs)
    for logits, (task, batch) in zip(joint, pairs, strict=True):
        assert_close(logits, toy_problem.logits(flat, task, batch), rtol=0, atol=1e-5)


def test_the_forward_pass_is_pure(tiny, experts, toy_problem):
    """It uses the parameters that it is given, and leaves the encoder's own alone."""
    before = {name: tensor.clone() for name, tensor in tiny.state.items()}
    batch = toy_problem.batches[0][0]
    base, expert = toy_problem.vectors.base, toy_problem.vectors.expert("mood")
    first, other, again = (toy_problem.logits(flat, 0, batch) for flat in (base, expert, base))
    assert (first - other).abs().max() > 0.1
    assert_close(again, first, rtol=0, atol=0)
    assert_close(tiny.state, before, rtol=0, atol=0)


def test_half_precision_changes_answers_little_and_gives_float32(tiny, experts, toy_problem):
    forward = encoders.classifier_forward(tiny, [e.head for e in experts], precision="bfloat16")
    parameters = toy_problem.vectors.layout.unflatten(toy_problem.vectors.expert("mood"))
    pairs = [(0, toy_problem.batches[0][0])]
    coarse, fine = forward(parameters, pairs)[0], toy_problem.forward(parameters, pairs)[0]
    assert coarse.dtype == torch.float32
    assert_close(coarse, fine, rtol=0.05, atol=0.1)
