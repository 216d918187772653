"""Folders with a base or an expert: what they hold and whether they fit; their weights on demand.

An expert is a transformers checkpoint for sequence classification (`transformers`), a PEFT folder
with plain LoRA (`adapter`), or an expert that this package trained (`package`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from divmerge_book.models.encoders import load_base
from divmerge_book.models.finetuning import load_expert
from divmerge_book.models.language.models import quiet_transformers
from divmerge_book.models.merged import base_folder
from divmerge_book.models.mergekit_folders import DECIDING, HEAD
from divmerge_book.user_models import adapters, headers
from divmerge_book.user_models.description import TaskFiles
from divmerge_book.user_models.headers import check_config, check_folder, check_headers, positions
from divmerge_book.user_models.hub import fetched
from divmerge_book.user_models.labels import names_in, num_labels, resolve_labels
from divmerge_core.checkpoints.safetensors_io import INDEX, SINGLE, StoredModel, pools

MARKER = 977  # a number of labels that no tensor has as its size by chance
REFUSALS = (
    *(OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
OFFLINE = {"trust_remote_code": False}  # no code of a checkpoint's own is run


@dataclass(frozen=True)
class BaseFolder:
    """A base, described but not loaded.

    shapes: of the encoder's parameters, by name. positions: tokens that it reads at most, or None.
    notes: remarks that are no errors. table: name of the parameter with a row per token.
    """

    name: str
    folder: Path
    config: transformers.PretrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    shapes: dict[str, tuple[int, ...]]
    positions: int | None = None
    notes: tuple[str, ...] = ()
    table: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What an adapter may call it."""
        return (self.name, self.folder.name, getattr(self.config, "_name_or_path", ""))


@dataclass(frozen=True)
class Source:
    """An expert that fits its base, described but not loaded.

    kind: a name in MARKS. model: the classifier without weights (on the meta device); None for this
    package's own, whose head is linear on the mean of the last layer. labels: its answers, in the
    order of its outputs. notes: remarks that are no errors.
    """

    task: TaskFiles
    kind: str
    labels: tuple[str, ...]
    model: nn.Module | None = None
    adapter: adapters.Adapter | None = None
    notes: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What stands before the encoder's names in the classifier."""
        return "" if self.model is None else f"{self.model.base_model_prefix}."

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the encoder's parameters, by the base's names."""
        if self.model is None:
            found, part = adapters.shapes_in(self.task.expert / SINGLE), "encoder."
        else:
            found, part = shapes_of(self.model), self.prefix
        return {n.removeprefix(part): shape for n, shape in found.items() if n.startswith(part)}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Raise ValueError, beginning with these words, for what transformers refuses to read."""
    try:
        yield
    except REFUSALS as error:
        raise ValueError(f"{what}: {error}") from error


def config_of(folder: Path) -> transformers.PretrainedConfig:
    """The configuration in a folder."""
    check_folder(folder)
    if (folder / adapters.CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds an adapter; give the model it was trained on as base")
    with refusing(f"{folder}: its configuration is not one that transformers knows"):
        return AutoConfig.from_pretrained(folder, **OFFLINE)


def bare_model(kind: type, config: transformers.PretrainedConfig) -> nn.Module:
    """A model of this configuration on the meta device."""
    with refusing(f"no {kind.__name__} for model type {config.model_type!r}"), torch.device("meta"):
        return kind.from_config(config, **OFFLINE)


def read_model(kind: type, folder: Path) -> tuple[nn.Module, set[str]]:
    """A model in float32, and the names that its checkpoint lacks."""
    quiet_transformers()
    options = {"dtype": torch.float32, "output_loading_info": True, **OFFLINE}
    mapping = {f"^{re.escape(before)}": ""} if (before := headers.wrapper_in(folder)) else {}
    options |= {"key_mapping": mapping} if mapping else {}
    with refusing(f"{folder}: its weights cannot be loaded"):
        model, info = kind.from_pretrained(folder, **options)
    if mapping:  # else save_pretrained writes the wrapper's names again
        renamed = (one for one in model._weight_conversions if one.source_patterns != [*mapping])
        model._weight_conversions = list(renamed)
    return model.eval().requires_grad_(False), set(info["missing_keys"])


def tokenizer_of(folder: Path) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer in a folder; None where it has none."""
    if not any(any(folder.glob(name)) for name in ("tokenizer*.json", "vocab.*", "*.model")):
        return None
    try:
        found = AutoTokenizer.from_pretrained(folder, **OFFLINE)
        words = len(set(found.get_vocab()) - set(found.all_special_tokens))
    except Exception as error:  # the library in Rust raises no subclass
        what = "its tokenizer cannot be loaded (*.model needs the package sentencepiece)"
        raise ValueError(f"{folder}: {what}: {error}") from error
    if words < 2:  # of a vocabulary that is not there; T5's has a blank then
        raise ValueError(f"{folder}: its tokenizer has no words; save it with its vocabulary")
    return found


def open_base(name: str, beside: Path) -> BaseFolder:
    """A base by folder (relative ones start at `beside`), packaged name or hub name."""
    local = beside / Path(name).expanduser()
    check_folder(local)
    folder = base_folder(str(local)) if local.is_dir() else fetched(name)
    config, tokenizer = config_of(folder), tokenizer_of(folder)
    if tokenizer is None:
        raise ValueError(f"base {folder} has no tokenizer; save the base's own beside its weights")
    check_config(f"base {folder}", config)
    model = bare_model(AutoModel, config)
    notes = check_headers(f"base {folder}", folder, model, pools)
    limit, shapes = positions(model), shapes_of(model)
    with refusing(f"base {folder}: a {config.model_type} has no table of token embeddings"):
        words = model.get_input_embeddings().weight
    table = next(name for name, tensor in model.named_parameters() if tensor is words)
    return BaseFolder(name, folder, config, tokenizer, shapes, limit, tuple(notes), table)


def open_checkpoint(task: TaskFiles, base: BaseFolder) -> Source:
    config = config_of(task.expert)
    who, named = f"expert {task.expert}", config.architectures or ()
    check_config(who, config)
    heads = [name for name in named if not name.endswith("ForSequenceClassification")]
    if heads or config.problem_type in ("regression", "multi_label_classification"):
        raise ValueError(
            f"{who} is {', '.join(heads) or config.problem_type}; only single-label sequence "
            "classification can be merged here (language models: write kind: language)"
        )
    where = f"{task.expert / 'config.json'}: id2label"
    own = names_in(config.id2label, where, config.label2id)
    labels = resolve_labels(task, own, "id2label in config.json")
    model = bare_model(AutoModelForSequenceClassification, config)
    if named and type(model).__name__ not in named:
        raise ValueError(
            f"{who} is a {', '.join(named)}, and transformers' class for {config.model_type!r} is "
            f"{type(model).__name__}; only its own classes can be merged"
        )
    return Source(task, "transformers", labels, model)


def checkpoint_tensors(source: Source, base: BaseFolder, state: Mapping) -> dict[str, Tensor]:
    model, _ = read_model(AutoModelForSequenceClassification, source.task.expert)
    return dict(model.named_parameters())


def open_adapter(task: TaskFiles, base: BaseFolder) -> Source:
    adapters.read_config(task.expert)
    found = adapters.shapes_in(adapters.weights_of(task.expert))
    saved = [s for key, s in found.items() if adapters.plain_name(key).endswith(base.table)]

    def built(count: int) -> nn.Module:
        config = config_of(base.folder)
        config.num_labels = count
        config.vocab_size = saved[0][0] if saved else config.vocab_size  # a table saved whole
        return bare_model(AutoModelForSequenceClassification, config)

    count = num_labels(task.expert, built(MARKER), MARKER)
    unnamed = [f"LABEL_{n}" for n in range(count)]
    labels, model = resolve_labels(task, unnamed, "the shape of its saved head"), built(count)
    return Source(task, "adapter", labels, model, adapters.adapter_of(task.expert, model))


def adapter_tensors(source: Source, base: BaseFolder, state: Mapping) -> dict[str, Tensor]:
    own = {n: tensor for n, tensor in state.items() if n in source.shapes}  # not the base's pooler
    return source.adapter.apply({source.prefix + n: tensor for n, tensor in own.items()})


def open_package(task: TaskFiles, base: BaseFolder) -> Source:
    path = task.expert / "manifest.json"
    with refusing(f"{path} is no manifest of an expert of this package"):
        own = json.loads(path.read_text("utf-8"))["answers"]
    return Source(task, "package", resolve_labels(task, own, "answers in manifest.json"))


def package_tensors(source: Source, base: BaseFolder, state: Mapping) -> dict[str, Tensor]:
    expert = load_expert(source.task.expert)
    if expert.manifest["base"] != load_base(str(base.folder)).digest:
        raise ValueError(
            f"expert {source.task.expert} was trained from {expert.manifest['encoder']!r} with "
            f"other weights or vocabulary than the base {base.name!r}"
        )
    return {**expert.state, **{f"head.{name}": tensor for name, tensor in expert.head.items()}}


# The file that marks a folder of each kind, in the order in which they are looked for.
MARKS = {"adapter": adapters.CONFIG, "transformers": "config.json", "package": "manifest.json"}
OPEN = {"adapter": open_adapter, "package": open_package, "transformers": open_checkpoint}
# (source, base, the base's tensors) -> all tensors of an expert, by its classifier's names.
TENSORS = dict(zip(MARKS, (adapter_tensors, checkpoint_tensors, package_tensors), strict=True))


def kind_in(folder: Path) -> str:
    """Which kind of expert a folder holds. Raises ValueError for none, and for two."""
    check_folder(folder)
    kind = next((kind for kind, mark in MARKS.items() if (folder / mark).is_file()), None)
    if kind is None:
        inner = {path.parent for path in folder.glob("*/*") if path.name in MARKS.values()}
        last = max(inner, key=lambda path: (len(path.name), path.name), default=None)
        bare, marks = "; a file: give its folder" * folder.is_file(), ", ".join(MARKS.values())
        hint = f"; did you mean {last}?" if last else bare
        raise ValueError(f"{folder} holds no expert: it needs one of {marks}{hint}")
    if kind == "adapter" and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise ValueError(
            f"{folder} holds an adapter ({adapters.CONFIG}) and whole weights ({SINGLE} or its "
            "index); remove the one that is not the expert"
        )
    return kind


def open_expert(task: TaskFiles, base: BaseFolder) -> Source:
    """A task's expert, checked against the base by its configuration and the shapes of its tensors.

    Raises ValueError, saying what differs, for a folder of no known kind, another architecture or
    kind of head, adapters that are more than plain LoRA, and labels that are not the head's.
    """
    kind, folder = kind_in(task.expert), task.expert
    source = OPEN[kind](task, base)
    if kind == "package":
        StoredModel.at(folder)  # its headers alone
    if len(source.labels) < 2:
        raise ValueError(f"task {task.name!r} has the label {source.labels} alone; it needs two")
    check_architecture(source, base)
    who, notes = f"expert {folder}", []
    if kind == "transformers":
        notes = check_headers(who, folder, source.model)
    elif kind == "adapter":
        held = [source.prefix + name for name in StoredModel.at(base.folder).cores]
        notes = adapters.check_base(folder, source.adapter, source.model, held, base.names)
    return replace(source, notes=tuple(notes))


def check_architecture(source: Source, base: BaseFolder) -> None:
    """Raise ValueError where the expert's encoder is not of the base's architecture."""
    who, config = f"expert {source.task.expert}", getattr(source.model, "config", None)
    for field in (*DECIDING, *HEAD):
        own, wanted = (getattr(one, field, None) for one in (config, base.config))
        if None not in (own, wanted) and own != wanted and field != "vocab_size":
            cure = "set it in the base's config.json too, beside which heads are written"
            cure = cure if field in HEAD else "merging needs experts fine-tuned from this very base"
            raise ValueError(
                f"{who} has {field} = {own!r}, the base {base.name!r} has {wanted!r}; {cure}"
            )
    own, wanted = source.shapes, base.shapes
    names = {*own, *(name for name in wanted if re.search(r"\.\d+\.", name))}
    if base.table in own:  # tables may differ in rows
        own = own | {base.table: (wanted[base.table][0], *own[base.table][1:])}
    if wrong := sorted(name for name in names if own.get(name) != wanted.get(name)):
        shown = ", ".join(f"{n} ({own.get(n)}, base {wanted.get(n)})" for n in wrong[:3])
        raise ValueError(
            f"{who} and the base {base.name!r} differ in {len(wrong)} tensors: {shown}; merging "
            "needs experts of one architecture and vocabulary"
        )
