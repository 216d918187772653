"""mergekit's own YAML, for the methods that both have: read and checked."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from divmerge_book.data.schema import Fields, Text, read_file
from divmerge_core.checkpoints import MergeRecord
from divmerge_core.checkpoints.safetensors_io import StoredModel, read_config
from divmerge_core.checkpoints.save import float_dtype
from divmerge_core.checkpoints.tensor_sources import tensors_of

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
LAYER = re.compile(r"\.(\d+)\.")
SUM = {"weight", "normalize", "lambda", "int8_mask", "density", "rescale"}
SHARES = {"density", "t", "normalize", "rescale", "int8_mask"}  # in [0, 1]; false is 0
# method -> parameters that it takes, and mergekit's defaults of normalize and rescale.
KNOWN: dict[str, tuple[set[str], bool, bool]] = {
    "linear": ({"weight", "normalize"}, True, False),
    "slerp": ({"t"}, False, False),
    "task_arithmetic": (SUM, False, False),
    "ties": (SUM, True, False),
    "dare_linear": (SUM, False, True),
    "dare_ties": (SUM, False, True),
}


class Model(Fields):
    """One input; layer_range stands in slices only."""

    model: Any
    parameters: dict[str, Any] = {}
    layer_range: list[int] | None = None


class Slice(Fields):
    sources: list[Model]
    parameters: dict[str, Any] = {}


class Config(Fields):
    """The fields that are read here."""

    merge_method: str
    models: list[Model] | None = None
    slices: list[Slice] | None = None
    base_model: Any = None
    parameters: dict[str, Any] = {}
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A configuration whose folders fit: record names base and experts, settings their parameters.

    settings: one mapping per expert, then those of all. names: the tensors that are merged.
    """

    method: str
    record: MergeRecord
    settings: Sequence[Mapping[str, Any]]
    names: Sequence[str]

    @cached_property
    def last(self) -> int:
        """The number of the last layer."""
        return max((int(found[1]) for n in self.names if (found := LAYER.search(n))), default=0)

    def value(self, parameter: str, name: str, model: int = -1, default: Any = None) -> Any:
        """A parameter of a model (-1: of all) at one tensor.

        Raises ValueError where it has neither a value nor a default, or one out of range.
        """
        layer = LAYER.search(name)
        depth = int(layer[1]) / self.last if layer and self.last else float(bool(layer))
        for scope in dict.fromkeys((model, -1)):
            given = self.settings[scope].get(parameter)
            try:
                if (found := at(given, name, depth)) is None:
                    continue
                right = math.isfinite(float(found))
                right &= parameter not in SHARES or 0 <= float(found) <= 1
            except (TypeError, ValueError):
                right = False
            if not right:
                allowed = "in [0, 1]" if parameter in SHARES else "a finite number"
                raise ValueError(
                    f"{self.method}: {parameter} must be {allowed}, got {given} for {name}"
                )
            return found
        if default is None:
            raise ValueError(
                f"{self.method} needs a {parameter} for {name}; give it to every model"
            )
        return default


def at(setting: Any, name: str, depth: float) -> Any:
    """A setting at a tensor: a value, a list over depth 0 to 1, or the first filter that fits."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if any(isinstance(one, Mapping) for one in setting):
        for one in setting:
            if one.get("filter") in (None, "*") or str(one["filter"]) in name:
                return at(one.get("value"), name, depth)
        return None
    place = depth * (len(setting) - 1)
    low = int(place)
    high = min(low + 1, len(setting) - 1)
    return setting[low] + (place - low) * (setting[high] - setting[low])


def plain(data: Any) -> Any:
    """What YAML reads in a tree of texts."""
    if isinstance(data, Mapping):
        return {name: plain(value) for name, value in data.items()}
    if isinstance(data, list):
        return [plain(one) for one in data]
    return data.value if isinstance(data, Text) else data


def folder_of(model: Any, beside: Path) -> Path:
    """A model's folder: from here, from the file's folder, or from the hub (NAME@REVISION).

    Raises ValueError for adapters, and for what is neither there nor on the hub.
    """
    model = plain(model)
    if isinstance(model, Mapping):
        if model.get("lora"):
            raise ValueError(
                f"{model}: adapters are not read here; merge them into their base first"
            )
        model = model.get("model", model)
        model = model.get("path") if isinstance(model, Mapping) else model
    for place in (Path(str(model)).expanduser(), beside / str(model)):
        if place.is_dir():
            return place.resolve()
    name, _, revision = str(model).partition("@")
    if "+" in name:
        raise ValueError(f"{model}: adapters are not read here; merge them into their base first")
    try:
        given = {"revision": revision or None, "allow_patterns": FILES}
        found = huggingface_hub.snapshot_download(name, **given)
    except Exception as error:  # the client raises many kinds: no network, no such name
        raise ValueError(
            f"{model!r} is no folder here or in {beside}, and the hub gave none ({error!r:.200})"
        ) from error
    return Path(found)


def inputs_of(config: Config, path: Path) -> list[Model]:
    """The models; those of slices where there is one slice of all layers."""
    if (config.models is None) == (config.slices is None):
        raise ValueError(f"{path}: give models, or one slice; `modules` are not read here")
    if config.models is not None:
        return config.models
    one = config.slices[0]
    for source in one.sources:
        layers = read_config(folder_of(source.model, path.parent)).get("num_hidden_layers")
        if len(config.slices) > 1 or source.layer_range != [0, layers]:
            raise ValueError(
                f"{path}: slices are read where there is one, of all layers: [0, {layers}]; layers "
                "are not stacked here"
            )
    given = one.parameters
    return [Model(model=s.model, parameters={**given, **s.parameters}) for s in one.sources]


def read_recipe(path: str | os.PathLike) -> tuple[Recipe, torch.dtype | None]:
    """The merge that a file of mergekit's describes, and its dtype on disk (None: the base's).

    Of the weights only headers are read. Raises ValueError, naming it, for what is not read here,
    for folders that do not fit together, and for parameters that are missing.
    """
    path = Path(path).expanduser()
    config = read_file(path, Config, "mergekit configuration")
    method, (taken, *_) = config.merge_method, KNOWN.get(config.merge_method, (set(),))
    if not taken:
        raise ValueError(f"{path}: merge_method {method!r} is not one of {', '.join(KNOWN)}")
    if config.tokenizer_source not in (None, "base"):
        raise ValueError(f"{path}: tokenizer_source {config.tokenizer_source!r}: only base is read")
    models = inputs_of(config, path)
    common = plain(config.parameters)
    for given in (common, *(model.parameters for model in models)):
        if strange := sorted(set(given) - taken):
            raise ValueError(
                f"{path}: {method} takes {', '.join(sorted(taken))}; got {', '.join(strange)}"
            )
    folders = [folder_of(model.model, path.parent) for model in models]
    settings = [plain(model.parameters) for model in models]
    base = folder_of(config.base_model, path.parent) if config.base_model else None
    if (base is None) != (method == "linear"):
        need = "has no base_model" if base else "needs a base_model"
        raise ValueError(f"{path}: {method} {need}")
    if method == "slerp":
        folders = [base, *(folder for folder in folders if folder != base)]
        if len(folders) != 2:
            raise ValueError(f"{path}: slerp takes base_model and one other model, got {folders}")
        common |= {"t": [s["t"] for s in settings if "t" in s][0]} if "t" not in common else {}
        settings = [{}, {}]
    elif method != "linear":
        settings = [s for s, folder in zip(settings, folders, strict=True) if folder != base]
        folders = [folder for folder in folders if folder != base]
    if len(folders) < 1 + (method in ("linear", "slerp")):
        raise ValueError(f"{path}: {method} needs more models")
    names = named(folders)
    record = MergeRecord(
        method=method,
        tasks=names,
        base=base or folders[0],
        experts=dict(zip(names, folders, strict=True)),
        options={**common, **{f"of {n}": s for n, s in zip(names, settings, strict=True) if s}},
    )
    tensors = [name for name, *_ in tensors_of(StoredModel.at(record.base), record, None)]
    recipe = Recipe(method, record, [*settings, common], tensors)
    needed = "t" if method == "slerp" else "weight"
    for name in tensors:  # all that is missing or out of range is refused now
        for model, parameter in product(range(len(names)), sorted(taken)):
            recipe.value(parameter, name, model, None if parameter == needed else 1.0)
    return recipe, float_dtype(config.out_dtype or config.dtype)


def named(folders: Sequence[Path]) -> tuple[str, ...]:
    """A name for every folder: its own, with a number where it is not the only one."""
    names = [folder.name for folder in folders]
    every = enumerate(names, 1)
    return tuple(name if names.count(name) == 1 else f"{name}-{n}" for n, name in every)
