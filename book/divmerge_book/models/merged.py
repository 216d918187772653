"""Merged models on disk, written and loaded with transformers."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from divmerge_book.models.encoders import ENCODERS, pooled, quiet_transformers
from divmerge_book.models.mergekit_export import mergekit_recipe
from divmerge_core import checkpoints
from divmerge_core.checkpoints import Head, MergeRecord
from divmerge_core.checkpoints.heads import MEAN, load_head, validate_head
from divmerge_core.checkpoints.safetensors_io import StoredModel, weight_files


def base_folder(name: str) -> Path:
    """The folder of an encoder by the name that load_base takes: packaged, local, or hub (cached).

    Raises ValueError where it holds no config.json or no safetensors.
    """
    if name in ENCODERS:
        return ENCODERS[name]()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            found = transformers.utils.cached_file(name, "config.json", local_files_only=True)
        except OSError as error:
            raise ValueError(
                f"{name!r} is no folder, no packaged encoder ({', '.join(ENCODERS)}) and no hub "
                "model in the cache; load it once with load_base"
            ) from error
        folder = Path(found).parent
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give a folder in the hub's layout")
    weight_files(folder)
    return folder


def write(
    folder: str | os.PathLike,
    record: MergeRecord,
    *,
    heads: Mapping[str, Head] | None = None,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    written: Callable[[Path], None] = lambda folder: None,
    **options: object,
) -> Path:
    """`divmerge_core.checkpoints.write`, with a mergekit configuration and heads of transformers.

    written: called with the folder as soon as weights and heads are there. tokenizer: where given,
    `tasks/TASK` holds a whole model with this tokenizer for every task whose head is one of
    transformers'. Raises ValueError, before anything is written, where a head does not complete its
    architecture.
    """
    if record.base.is_dir():
        for task, head in (heads or {}).items():
            if head.architecture != MEAN:
                validate_architecture(task, head, StoredModel.at(record.base))
    whole = [task for task, head in (heads or {}).items() if head.architecture != MEAN]

    def complete(new: Path) -> str:
        written(new)
        return save_whole(new, whole, tokenizer) if tokenizer is not None and whole else ""

    why = "its tables of tokens are not the base's, and mergekit merges no rows apart"
    options["complete"] = complete
    options["recipe"] = (lambda *_: ("", why)) if options.get("shell") else mergekit_recipe
    return checkpoints.write(folder, record, heads=heads, **options)


def save_whole(
    folder: Path, tasks: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase
) -> str:
    """Write a model per task with its head, labels and tokenizer below a merged folder.

    Returns Markdown that says how to load them.
    """
    for task in tasks:
        model = load_with_head(folder, task)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder / "tasks" / task)
        tokenizer.save_pretrained(folder / "tasks" / task)
    return (
        f"Whole models, with head, labels and tokenizer, for {', '.join(tasks)}: "
        f'`AutoModelForSequenceClassification.from_pretrained("tasks/{tasks[0]}")`. Each repeats '
        "the merged weights, so that it can be copied alone."
    )


def labelled(labels: tuple[str, ...]) -> dict[str, object]:
    """What a config says about labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def validate_architecture(task: str, head: Head, base: StoredModel) -> None:
    """Raise ValueError unless base and head together are a model of the head's architecture."""
    validate_head(task, head, base)
    kind = getattr(transformers, head.architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"head {task!r}: transformers has no class {head.architecture!r}")
    config = transformers.AutoConfig.from_pretrained(base.folder, **labelled(head.labels))
    with torch.device("meta"):
        model = kind(config)
    prefix = f"{model.base_model_prefix}."
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    again -= {name for name, _ in model.named_parameters()}  # other names of tied tensors
    whole = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in again}
    wrong = [name for name, shape in head.shapes.items() if whole.get(name) != shape]
    given = {name.removeprefix(prefix) for name in (*base.tensors, *head.tensors)}
    lacking = {name.removeprefix(prefix) for name in whole} - given
    if wrong or lacking:
        raise ValueError(
            f"head {task!r} does not make the merged model a {head.architecture} of "
            f"{len(head.labels)} labels: it lacks {sorted(lacking)[:5]}, and "
            f"{[(name, head.shapes[name], whole.get(name)) for name in wrong[:3]]} (name, given, "
            "wanted) do not fit"
        )


class MeanClassifier(nn.Module):
    """An encoder and a linear head on the mean of its last layer: `model(**inputs).logits`."""

    def __init__(self, encoder: nn.Module, head: Mapping[str, Tensor], labels: tuple[str, ...]):
        super().__init__()
        self.encoder = encoder
        self.weight, self.bias = nn.Parameter(head["weight"]), nn.Parameter(head["bias"])
        self.config = encoder.config
        self.config.update(labelled(labels))

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        features = pooled(self.encoder, dict(self.encoder.named_parameters()), inputs)
        return SequenceClassifierOutput(
            logits=features.to(self.weight.dtype) @ self.weight.T + self.bias
        )


def load_with_head(folder: str | os.PathLike, task: str) -> nn.Module:
    """The merged model with one task's head, in evaluation mode: `model(**inputs).logits` [B, V].

    Its config has the labels (`model.config.id2label`). Raises ValueError for a task without a
    head, listing those that have one.
    """
    head = load_head(folder, task)
    quiet_transformers()
    if head.architecture == MEAN:
        encoder = transformers.AutoModel.from_pretrained(folder)
        return MeanClassifier(encoder, head.tensors, head.labels).eval()
    kind = getattr(transformers, head.architecture)
    model = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **labelled(head.labels))
    model.load_state_dict(head.tensors, strict=False)  # the rest is the merged model's
    return model.eval()
