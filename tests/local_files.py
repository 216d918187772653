"""What the tests of users' models share: small bases, experts and rows, as files."""

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
import yaml
from divmerge_book.user_models import check, load, merge_and_score, read, write_merged
from helpers import MARKERS, WORDS, sentences
from safetensors.torch import save_file

LABELS = {name: list(dict.fromkeys(marks.values())) for name, marks in MARKERS.items()}
ROWS = {"merge": 12, "validation": 16, "test": 20}
SIZES = {"vocab_size": len(WORDS), "max_position_embeddings": 32}
PAD = {"pad_token_id": 0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


ENCODER = {**SIZES, **SMALL, "intermediate_size": 64}
KINDS = {  # family -> configuration class and a tiny model's sizes
    "bert": ("BertConfig", ENCODER),
    "roberta": ("RobertaConfig", {**ENCODER, "max_position_embeddings": 34, **PAD}),
    "deberta": ("DebertaV2Config", ENCODER),
    "distilbert": (
        "DistilBertConfig",
        {**SIZES, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    ),
    "gpt2": (
        "GPT2Config",
        {**PAD, "vocab_size": len(WORDS), "n_positions": 32, "n_embd": 32, "n_layer": 2}
        | {"n_head": 2, "bos_token_id": 3, "eos_token_id": 3},
    ),
    "qwen2": ("Qwen2Config", {**ENCODER, **PAD, "num_key_value_heads": 2, "vocab_size": 128}),
    "bart": (
        "BartConfig",
        {**SIZES, **PAD, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": 3}
        | {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "bos_token_id": 2}
        | {"decoder_start_token_id": 3},
    ),
    "t5": (
        "T5Config",
        {**PAD, "vocab_size": len(WORDS), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
        | {"num_heads": 4, "eos_token_id": 3, "decoder_start_token_id": 0},
    ),
}


def config(kind: str, **changes) -> transformers.PretrainedConfig:
    name, sizes = KINDS[kind]
    return getattr(transformers, name)(**{**sizes, **changes})


def tokenizer(kind: str = "bert", *, vocabulary: Sequence[str] = WORDS):
    """A tokenizer of whole words: BERT's own, or a plain one for the other families."""
    numbered = {word: number for number, word in enumerate(vocabulary)}
    if kind == "bert":
        return transformers.BertTokenizer(vocab=numbered)
    if kind == "qwen2":  # transformers reads every tokenizer of this family as pairs of bytes
        core = tokenizers.Tokenizer(tokenizers.models.BPE())
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = {"special_tokens": ["[PAD]"], "show_progress": False}
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, **special)
        core.train_from_iterator([" ".join(vocabulary)] * 5, trainer)
        found = json.loads(core.to_str())["model"]
        merges = [tuple(pair) for pair in found["merges"]]
        return transformers.Qwen2Tokenizer(vocab=found["vocab"], merges=merges, pad_token="[PAD]")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbered, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def seeded(seed: int, build, *arguments):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(*arguments)


def make_base(folder: Path, kind: str = "bert", **changes) -> Path:
    """A random base with its tokenizer, saved as the hub keeps them; BERT without a pooler."""
    transformers.utils.logging.disable_progress_bar()
    options = {"add_pooling_layer": False} if kind == "bert" else {}
    build = transformers.AutoModel.from_config
    model = seeded(0, lambda: build(config(kind, **changes), **options))
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def make_expert(folder: Path, base: Path, labels: Sequence[str], *, seed: int = 1, scale=0.02):
    """The base with noise on every weight and a random head, saved by transformers."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    named = dict(enumerate(labels))
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    settings = {"id2label": named, "label2id": {label: n for n, label in named.items()}}
    model = seeded(seed, lambda: load(base, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer(model.config.model_type).save_pretrained(folder)
    return model.eval()


def pooler_and_head(outputs: int) -> dict[str, torch.Tensor]:
    """What a BERT classifier's adapter saves whole."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"bert.pooler.dense.weight": (32, 32), "bert.pooler.dense.bias": (32,)}
    sizes |= {"classifier.weight": (outputs, 32), "classifier.bias": (outputs,)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def make_adapter(folder: Path, shapes: dict, *, saved: dict | None = None, rank: int = 3, **config):
    """A PEFT folder by hand: factors for matrices (name -> [M, K]), and tensors saved whole."""
    generator, tensors, factors = torch.Generator().manual_seed(7), {}, {}
    for name, (rows, columns) in shapes.items():
        right = 0.3 * torch.randn(rank, columns, generator=generator)
        left = 0.3 * torch.randn(rows, rank, generator=generator)
        factors[name] = (left, right)
        tensors[f"base_model.model.{name}.lora_A.weight"] = right
        tensors[f"base_model.model.{name}.lora_B.weight"] = left
    for name, tensor in (saved or {}).items():
        tensors[f"base_model.model.{name}"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": rank, "lora_alpha": 6}
    plain |= {"bias": "none", "use_rslora": False, "fan_in_fan_out": False, "use_dora": False}
    plain |= {"lora_dropout": 0.1, "megatron_core": "megatron.core", "target_modules": ["query"]}
    plain |= {"init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return factors


def toy_rows(name: str) -> dict[str, list[dict]]:
    """Distinct labelled sentences of a toy task, by split."""
    rows = iter(sentences(name, sum(ROWS.values())))
    return {
        split: [{"text": text, "label": label} for text, _, label in (next(rows) for _ in range(n))]
        for split, n in ROWS.items()
    }


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """Rows in the format that the path's ending names; a folder without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="," if path.suffix == ".csv" else "\t", index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(list(rows)).save_to_disk(str(path))
    return path


def make_project(folder: Path, kind: str = "bert", *, ending: str = ".csv", **task_fields) -> Path:
    """A base, two experts of toy tasks, their rows, and the description of it all."""
    base = make_base(folder / "base", kind)
    tasks = []
    for seed, name in enumerate(MARKERS, 1):
        make_expert(folder / "experts" / name, base, LABELS[name], seed=seed)
        entry = {"name": name, "expert": f"experts/{name}", **task_fields}
        for split, rows in toy_rows(name).items():
            write_rows(folder / "data" / f"{name}-{split}{ending}", rows)
            entry[split] = f"data/{name}-{split}{ending}"
        tasks.append(entry)
    return describe(folder / "models.yaml", tasks)


def describe(path: Path, tasks: Sequence[dict], **fields) -> Path:
    """A description file, in YAML or JSON as its ending says."""
    whole = {"base": "base", "max_length": 16, "tasks": list(tasks), **fields}
    write = json.dumps if path.suffix == ".json" else yaml.safe_dump
    path.write_text(write(whole), encoding="utf-8")
    return path


def changed(path: Path, task: int, **fields) -> Path:
    """The description with other fields in one of its tasks; None takes a field out."""
    whole = yaml.safe_load(path.read_text())
    whole["tasks"][task] |= fields
    whole["tasks"][task] = {k: v for k, v in whole["tasks"][task].items() if v is not None}
    new = path.with_name(f"changed-{path.name}")
    new.write_text(yaml.safe_dump(whole))
    return new


def with_fields(path: Path, **fields) -> Path:
    """The description with other fields beside its tasks."""
    new = path.with_name(f"with-{path.name}")
    new.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))
    return new


def configured(folder: Path, **changes) -> None:
    """Other fields in a folder's config.json; None takes one out."""
    path = folder / "config.json"
    whole = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))


def averaged(project: Path, folder: Path) -> tuple:
    """Plan, experiment and scores of the average of what a file describes, and its folder."""
    plan = check(read(project))
    bench = load(plan)
    found = merge_and_score(bench, ["average"], budget=1, progress=False)
    return plan, bench, found, write_merged(plan, bench, found, "average", folder)


def refused(path: Path, *words: str) -> None:
    """Reading and checking raises a ValueError that holds all these words."""
    with pytest.raises(ValueError) as caught:
        check(read(path))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def lone(project: Path, folder: Path, name: str, build) -> Path:
    """The project with the first task's expert replaced by what `build(folder)` puts on disk."""
    build(folder / name)
    return changed(project, 0, expert=str(folder / name))
