"""Folders with a base or an expert: what they hold and whether they fit, before weights are read.

An expert is a transformers checkpoint for sequence classification (`transformers`), a PEFT folder
with plain LoRA (`adapter`), or an expert that this package trained (`package`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from divmerge_book.models.merged import base_folder
from divmerge_book.user_models.adapters import (
    CONFIG,
    Adapter,
    adapter_of,
    num_labels,
    read_config,
    shapes_in,
)
from divmerge_book.user_models.description import TaskFiles
from divmerge_core.checkpoints.safetensors_io import INDEX, SINGLE, StoredModel
from divmerge_core.checkpoints.save import input_files

# What decides a model's computation, by transformers' common names; unknown ones are not compared.
DECIDING = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("num_key_value_heads", "intermediate_size", "max_position_embeddings", "type_vocab_size"),
    *("hidden_act", "activation", "activation_function", "layer_norm_eps", "layer_norm_epsilon"),
    *("rms_norm_eps", "head_dim", "rope_theta", "rope_parameters", "sliding_window"),
    *("position_embedding_type", "relative_attention", "pos_att_type", "is_decoder"),
)
MARKER = 977  # a number of labels that no tensor has as its size by chance
UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class BaseFolder:
    """A base, described but not loaded. shapes: of the encoder's parameters, by name."""

    name: str
    folder: Path
    config: transformers.PretrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """An expert that fits its base, described but not loaded.

    model: the classifier without weights (on the meta device); None for this package's own, whose
    head is linear on the mean of the last layer. labels: its answers, in the order of its outputs.
    """

    task: TaskFiles
    kind: str
    labels: tuple[str, ...]
    model: nn.Module | None = None
    adapter: Adapter | None = None

    @property
    def prefix(self) -> str:
        """What stands before the encoder's names in the classifier."""
        return "" if self.model is None else self.model.base_model_prefix + "."

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the encoder's parameters, by the base's names."""
        if self.model is None:
            found = shapes_in(self.task.expert / "model.safetensors")
            part = "encoder."
        else:
            found = {name: tuple(t.shape) for name, t in self.model.named_parameters()}
            part = self.prefix
        return {n.removeprefix(part): shape for n, shape in found.items() if n.startswith(part)}

    @property
    def weights(self) -> list[Path]:
        """The files that hold its weights. Raises ValueError as `weight_files` does."""
        return input_files(self.task.expert)


def config_of(folder: Path) -> transformers.PretrainedConfig:
    """The configuration in a folder. Raises ValueError where transformers does not know it."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: its configuration is not one that transformers knows: {error}"
        ) from error


def bare(kind: type, config: transformers.PretrainedConfig) -> nn.Module:
    """A model of this configuration without weights."""
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(
            f"no {kind.__name__} for model type {config.model_type!r}: {error}"
        ) from error


def tokenizer_of(folder: Path) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer in a folder; None where it has none."""
    if not any(
        (folder / f"{n}.json").is_file() for n in ("tokenizer", "tokenizer_config", "vocab")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


def fetched(name: str) -> Path:
    """The folder of a packaged or cached base; else its files are fetched from the hub.

    Raises ValueError where there is none.
    """
    try:
        return base_folder(name)
    except ValueError as error:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise
        try:
            wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        except Exception as cause:  # the client raises many kinds: no network, no such name
            raise ValueError(f"{error}; the hub could not be reached ({cause!r:.200})") from cause


def open_base(name: str, beside: Path) -> BaseFolder:
    """A base by folder (relative ones start at `beside`), packaged name or hub name."""
    local = beside / Path(name).expanduser()
    folder = base_folder(str(local)) if local.is_dir() else fetched(name)
    config, tokenizer = config_of(folder), tokenizer_of(folder)
    StoredModel.at(folder)  # its headers alone
    if tokenizer is None:
        raise ValueError(f"base {folder} has no tokenizer; save the base's own beside its weights")
    encoder = bare(AutoModel, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.named_parameters()}
    return BaseFolder(name, folder, config, tokenizer, shapes)


def kind_of(folder: Path) -> str:
    """What sort of expert a folder holds. Raises ValueError for a folder that holds none."""
    if not folder.is_dir():
        raise ValueError(f"there is no expert folder {folder}")
    if (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise ValueError(
            f"{folder} holds an adapter ({CONFIG}) and whole weights ({SINGLE} or its index); "
            "remove the one that is not the expert"
        )
    for name, kind in ((CONFIG, "adapter"), ("manifest.json", "package")):
        if (folder / name).is_file():
            return kind
    if (folder / "config.json").is_file():
        return "transformers"
    raise ValueError(
        f"{folder} holds no expert: it needs config.json (transformers), {CONFIG} (PEFT) or "
        "manifest.json (this package)"
    )


def resolve_labels(task: TaskFiles, own: Sequence[str], where: str) -> tuple[str, ...]:
    """The labels of a task, from its description or else the expert's own.

    Where neither names them they are the class numbers 0, 1, ... Raises ValueError where both name
    them and differ, in number, in words or in order.
    """
    named = not all(UNNAMED.fullmatch(label) for label in own)
    if task.labels is None:
        return tuple(own) if named else tuple(str(n) for n in range(len(own)))
    if len(task.labels) != len(own) or (named and tuple(own) != task.labels):
        order = " in another order" if sorted(own) == sorted(task.labels) else ""
        raise ValueError(
            f"task {task.name!r}: labels {list(task.labels)}, but the expert's head has "
            f"{len(own)} outputs{order}: {list(own)} ({where}); give the labels in the order of "
            "the outputs"
        )
    return task.labels


def check_architecture(source: Source, base: BaseFolder) -> Source:
    """The expert itself. Raises ValueError where its encoder is not of the base's architecture."""
    who, config = f"expert {source.task.expert}", getattr(source.model, "config", None)
    for field in DECIDING if config is not None else ():
        own, wanted = getattr(config, field, None), getattr(base.config, field, None)
        if own is not None and wanted is not None and own != wanted:
            raise ValueError(
                f"{who} has {field} = {own!r}, the base {base.name!r} has {wanted!r}; merging "
                "needs experts fine-tuned from this very base"
            )
    shapes = source.shapes
    extra = sorted(set(shapes) - set(base.shapes))
    short = sorted(n for n in set(base.shapes) - set(shapes) if re.search(r"\.\d+\.", n))
    if extra or short:
        raise ValueError(
            f"{who} and the base {base.name!r} differ in tensors: extra {extra[:3]}, missing "
            f"{short[:3]}; merging needs one architecture"
        )
    for name, shape in shapes.items():
        if shape != base.shapes[name]:
            raise ValueError(
                f"{who}: {name} has shape {list(shape)}, the base {list(base.shapes[name])}; "
                "merging needs experts of one architecture and vocabulary"
            )
    return source


def of_transformers(task: TaskFiles, base: BaseFolder) -> Source:
    config = config_of(task.expert)
    heads = [n for n in config.architectures or () if not n.endswith("ForSequenceClassification")]
    if heads or config.problem_type in ("regression", "multi_label_classification"):
        raise ValueError(
            f"expert {task.expert} is {', '.join(heads) or config.problem_type}; only "
            "single-label sequence classification can be merged here"
        )
    own = [config.id2label[n] for n in range(config.num_labels)]
    labels = resolve_labels(task, own, "id2label in config.json")
    model = bare(AutoModelForSequenceClassification, config)
    return Source(task, "transformers", labels, model)


def of_adapter(task: TaskFiles, base: BaseFolder) -> Source:
    read_config(task.expert)

    def built(count: int) -> nn.Module:
        config = config_of(base.folder)
        config.num_labels = count
        return bare(AutoModelForSequenceClassification, config)

    count = num_labels(task.expert, built(MARKER), MARKER)
    labels = resolve_labels(
        task, [f"LABEL_{n}" for n in range(count)], "the shape of its saved head"
    )
    model = built(count)
    return Source(task, "adapter", labels, model, adapter_of(task.expert, model))


def of_package(task: TaskFiles, base: BaseFolder) -> Source:
    path = task.expert / "manifest.json"
    try:
        own = json.loads(path.read_text("utf-8"))["answers"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is no manifest of an expert of this package: {error!r}"
        ) from error
    return Source(task, "package", resolve_labels(task, own, "answers in manifest.json"))


KINDS = {"transformers": of_transformers, "adapter": of_adapter, "package": of_package}


def open_expert(task: TaskFiles, base: BaseFolder) -> Source:
    """A task's expert, checked against the base by its configuration and the shapes of its tensors.

    Raises ValueError, saying what differs, for a folder of no known kind, another architecture or
    kind of head, adapters that are more than plain LoRA, and labels that are not the head's.
    """
    found = KINDS[kind_of(task.expert)](task, base)
    if found.adapter is None:
        StoredModel.at(task.expert)  # its headers alone
    if len(found.labels) < 2 or len(found.labels) > 36:
        raise ValueError(f"task {task.name!r} has {len(found.labels)} labels; it may have 2 to 36")
    return check_architecture(found, base)
