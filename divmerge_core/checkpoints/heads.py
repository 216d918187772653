"""What answers for one task on top of the merged encoder: kept beside it, joined to it again."""

import json
import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from divmerge_book.models.encoders import pooled
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from divmerge_core.checkpoints.safetensors_io import StoredModel

MEAN = "mean"


@dataclass(frozen=True)
class Head:
    """What answers for one task on top of the merged encoder; it is not merged.

    labels: the V answers in the order of the logits. architecture: `mean` for this package's own
    heads (tensors weight [V, H] and bias [V], applied to the mean of the last layer over the tokens
    that are not padding); otherwise a transformers class such as `BertForSequenceClassification`,
    with all tensors of it that the merged model lacks or that are not merged, under their full
    names (for example classifier.weight, bert.pooler.dense.weight).
    """

    tensors: Mapping[str, Tensor]
    labels: tuple[str, ...]
    architecture: str = MEAN


def labelled(labels: tuple[str, ...]) -> dict[str, object]:
    """What a config says about labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def check_head(task: str, head: Head, base: StoredModel, written: Set[str]) -> None:
    """Raise ValueError unless the head fits the model whose tensors `written` names.

    written: names as the bare encoder has them.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", task):
        raise ValueError(
            f"task {task!r} cannot name a file; use letters, digits, dashes, underscores and dots"
        )
    if len(head.labels) < 2 or len(set(head.labels)) < len(head.labels):
        raise ValueError(f"head {task!r} needs two or more distinct labels, got {head.labels}")
    shapes = {name: tuple(tensor.shape) for name, tensor in head.tensors.items()}
    if head.architecture == MEAN:
        wanted = {
            "weight": (len(head.labels), base.config.hidden_size),
            "bias": (len(head.labels),),
        }
        if shapes != wanted:
            raise ValueError(f"head {task!r} must hold {wanted}, got {shapes}")
        return
    kind = getattr(transformers, head.architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"head {task!r}: transformers has no class {head.architecture!r}")
    config = transformers.AutoConfig.from_pretrained(base.folder, **labelled(head.labels))
    with torch.device("meta"):
        model = kind(config)
    whole = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name, shape in shapes.items() if whole.get(name) != shape]
    lacking = {base.core(name) for name in whole} - written - {base.core(n) for n in shapes}
    if wrong or lacking:
        raise ValueError(
            f"head {task!r} does not make the merged model a {head.architecture} of "
            f"{len(head.labels)} labels: it lacks {sorted(lacking)[:5]}, and "
            f"{[(name, shapes[name], whole.get(name)) for name in wrong[:3]]} (name, given, "
            "wanted) do not fit"
        )


def save_head(path: Path, head: Head) -> None:
    """One head's tensors, with its labels and architecture in the file's metadata."""
    facts = {"format": "pt", "labels": json.dumps(head.labels), "architecture": head.architecture}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in head.tensors.items()}
    save_file(tensors, path, metadata=facts)


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
    folder = Path(folder)
    path = folder / "heads" / f"{task}.safetensors"
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none"
        raise ValueError(f"{folder} has no head for {task!r}; it has {have}")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = file.metadata()
    labels = tuple(json.loads(facts["labels"]))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if facts["architecture"] == MEAN:
        encoder = transformers.AutoModel.from_pretrained(folder)
        return MeanClassifier(encoder, tensors, labels).eval()
    kind = getattr(transformers, facts["architecture"])
    model = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **labelled(labels))
    model.load_state_dict(tensors, strict=False)  # the rest is the merged model's
    return model.eval()
