"""The folders that a file of mergekit's names: found, named, and of one kind."""

import filecmp
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from divmerge_book.data.schema import at_home, typed
from divmerge_core.checkpoints.safetensors_io import StoredModel, read_config, spare
from divmerge_core.checkpoints.save import BESIDE, FLOATS, input_files

WIDE = (torch.float64, *FLOATS.values())
MODEL = {"model", "path", "revision", "lora", "override_architecture"}  # the last changes nothing
DECIDING = (  # fields of a configuration that decide what weights answer
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("num_key_value_heads", "intermediate_size", "max_position_embeddings", "type_vocab_size"),
    *("hidden_act", "activation", "activation_function", "layer_norm_eps", "layer_norm_epsilon"),
    *("rms_norm_eps", "head_dim", "rope_theta", "rope_parameters", "sliding_window"),
    *("position_embedding_type", "relative_attention", "pos_att_type", "is_decoder"),
    *("hidden_activation", "feed_forward_proj", "layer_types", "num_experts_per_tok"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
)
HEAD = (  # what classifiers read of a configuration on the way from the encoder to their outputs
    *("classifier_pooling", "classifier_activation", "pooler_hidden_act"),
    *("summary_type", "summary_activation", "summary_use_proj"),
)
FILES = ["*.json", "*.safetensors", "*.txt", *BESIDE]


def folder_of(model: Any, beside: Path) -> Path:
    """A model's folder: from here, from the file's folder, or from the hub (NAME@REVISION).

    Raises ValueError for adapters, and for what is no whole model or neither there nor on the hub.
    """
    found = place_of(model, beside)
    if not (found / "config.json").is_file():
        raise ValueError(
            f"{found} holds no config.json; give a whole model in the hub's layout, and an adapter "
            "merged into its base"
        )
    return found


def place_of(model: Any, beside: Path) -> Path:
    """The folder that `folder_of` looks at."""
    model, revision = typed(model), None
    if isinstance(model, Mapping):
        inner = model.get("model")
        facts = {**model, **inner} if isinstance(inner, Mapping) else {"path": inner, **model}
        if facts.get("lora"):
            raise ValueError(
                f"{model}: adapters are not read here; merge them into their base first"
            )
        if not facts.get("path") or set(facts) - MODEL:
            raise ValueError(f"{model}: a model has a path and at most a revision")
        model, revision = facts["path"], facts.get("revision")
    for place in (at_home(Path(str(model))), beside / str(model)):
        if place.is_dir():
            return place.resolve()
    name, _, after = str(model).partition("@")
    if "+" in name:
        raise ValueError(f"{model}: adapters are not read here; merge them into their base first")
    try:
        given = {"revision": after or revision, "allow_patterns": FILES}
        found = huggingface_hub.snapshot_download(name, **given)
    except Exception as error:  # the client raises many kinds: no network, no such name
        raise ValueError(
            f"{model!r} is no folder here or in {beside}, and the hub gave none ({error!r:.200})"
        ) from error
    return Path(found)


def named(folders: Sequence[Path]) -> tuple[str, ...]:
    """A name for every folder: its own, or with a number where two have the same."""
    names = [hub_name(folder).rpartition("/")[2] for folder in folders]
    alone = len(set(names)) == len(names)
    return tuple(name if alone else f"{name}-{n}" for n, name in enumerate(names, 1))


def hub_name(folder: Path) -> str:
    """A folder's name; in the hub's cache, where that is a revision, the model's on the hub."""
    if folder.parent.name != "snapshots":
        return folder.name
    return folder.parents[1].name.removeprefix("models--").replace("--", "/")


def require_whole(models: Sequence[StoredModel]) -> None:
    """Raise ValueError for quantised weights."""
    for model in models:
        for name, tensor in model.tensors.items():
            if name.endswith(("weight", "bias")) and not spare(name) and tensor.dtype not in WIDE:
                raise ValueError(
                    f"{model.folder}: {name} is stored as {tensor.dtype}, so it is quantised; give "
                    "the weights that it was made from, in float32, float16 or bfloat16"
                )


def require_one_kind(base: StoredModel, others: Sequence[StoredModel], *, tokens: bool) -> None:
    """Raise ValueError where models differ in their heads or, asked for, in their tokens."""
    for one, other in [pair for m in others for pair in ((base, m), (m, base))]:
        heads = {name for name in other.cores if not spare(name)} - other.encoder
        if lost := sorted(heads - set(one.cores)):
            raise ValueError(
                f"{one.folder} lacks {', '.join(lost[:3])}, which {other.folder} holds; all are "
                "merged: give models of one architecture, with embeddings tied in all or in none"
            )
    for other in others if tokens else ():
        if not tokens_agree(base.folder, other.folder):
            raise ValueError(
                f"{base.folder} and {other.folder} number their tokens otherwise, and tokens are "
                "not matched here; without tokenizer_source rows are merged by their number"
            )


def copies(one: Path, other: Path) -> bool:
    """Whether two folders hold equal files of weights, which are read up to where they differ."""
    if not (one.is_dir() and other.is_dir()):
        return False
    first, second = input_files(one), input_files(other)
    equal = (filecmp.cmp(*pair, shallow=False) for pair in zip(first, second, strict=False))
    return len(first) == len(second) and all(equal)


def other_fields(one: Path, other: Path) -> dict[str, tuple]:
    """Outputs and fields of DECIDING that two folders' configurations give otherwise, both values.

    A field that one leaves out counts as equal, and so do the numbers of tokens and of positions.
    """
    own, theirs = (read_config(folder) for folder in (one, other))
    fields = {"id2label", *DECIDING} - {"vocab_size", "max_position_embeddings"}
    both = own.keys() & theirs.keys() & fields
    return {f: (own[f], theirs[f]) for f in sorted(both) if own[f] != theirs[f]}


def tokens_agree(one: Path, other: Path) -> bool:
    """Whether two tokenizers number alike, by the first file that both folders have."""
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"):
        if all((folder / name).is_file() for folder in (one, other)):
            return tokens_of(one / name) == tokens_of(other / name)
    return True


def tokens_of(file: Path) -> object:
    """What a tokenizer's file says of tokens and their numbers."""
    if file.name != "tokenizer.json":
        return file.read_bytes()
    facts = json.loads(file.read_text("utf-8"))
    added = [(token["id"], token["content"]) for token in facts.get("added_tokens", ())]
    return facts.get("model", {}).get("vocab"), added
