"""Classification heads: one per task, not merged, stored beside the merged weights."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from divmerge_core.checkpoints.safetensors_io import StoredModel

MEAN = "mean"
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")  # names of H in config.json


@dataclass(frozen=True)
class Head:
    """The head of one task; it is not merged.

    labels: V names in the order of the logits. architecture: `mean` for a linear head on the mean
    of the last layer over tokens that are not padding (tensors weight [V, H] and bias [V]);
    otherwise a transformers class such as `BertForSequenceClassification`, with all tensors of it
    that the merged model lacks or that are not merged, under their full names (for example
    classifier.weight, bert.pooler.dense.weight).
    """

    tensors: Mapping[str, Tensor]
    labels: tuple[str, ...]
    architecture: str = MEAN

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def validate_head(task: str, head: Head, base: StoredModel) -> None:
    """Raise ValueError for a bad file name or labels, and for a `mean` head of another shape."""
    if not re.fullmatch(r"[\w-][\w.-]*", task):
        raise ValueError(
            f"task {task!r} cannot name a file; use letters, digits, dashes, underscores and dots"
        )
    if len(head.labels) < 2 or len(set(head.labels)) < len(head.labels):
        raise ValueError(f"head {task!r} needs two or more distinct labels, got {head.labels}")
    width = next((base.config[key] for key in WIDTHS if key in base.config), None)
    wanted = {"weight": (len(head.labels), width), "bias": (len(head.labels),)}
    if head.architecture == MEAN and head.shapes != wanted:
        raise ValueError(f"head {task!r} must hold {wanted}, got {head.shapes}")


def save_head(path: Path, head: Head) -> None:
    """Write a head's tensors, with its labels and architecture in the file's metadata."""
    facts = {"format": "pt", "labels": json.dumps(head.labels), "architecture": head.architecture}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in head.tensors.items()}
    save_file(tensors, path, metadata=facts)


def load_head(folder: str | os.PathLike, task: str) -> Head:
    """A task's head from a merged model's folder. Raises ValueError where there is none."""
    path = Path(folder) / "heads" / f"{task}.safetensors"
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none"
        raise ValueError(f"{folder} has no head for {task!r}; it has {have}")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = file.metadata()
    return Head(tensors, tuple(json.loads(facts["labels"])), facts["architecture"])
