"""mergekit's own YAML, for the methods that both have: read and checked."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch

from divmerge_book.data.schema import Fields, read_file, typed
from divmerge_book.models import mergekit_folders
from divmerge_core.checkpoints import MergeRecord
from divmerge_core.checkpoints.safetensors_io import StoredModel, read_config
from divmerge_core.checkpoints.save import float_dtype
from divmerge_core.checkpoints.tensor_sources import tensors_of

LAYER = re.compile(r"\.(\d+)\.")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # in configs
FLAGS, SHARES = {"normalize", "rescale", "int8_mask"}, {"density", "t"}  # shares are in [0, 1]
PARTS = {"weight", "density"}
SUM = {"normalize", "lambda", "int8_mask"}  # int8_mask saves memory and changes no number
# method -> parameters of a model, those of all, and mergekit's defaults of normalize and rescale.
KNOWN: dict[str, tuple[set[str], set[str], bool, bool]] = {
    "linear": ({"weight"}, {"normalize"}, True, False),
    "slerp": (set(), {"t"}, False, False),
    "task_arithmetic": ({"weight"}, SUM, False, False),
    "ties": (PARTS, SUM | {"rescale"}, True, False),
    "dare_linear": (PARTS, SUM | {"rescale"}, False, True),
    "dare_ties": (PARTS, SUM | {"rescale"}, False, True),
}


class Model(Fields):
    model: Any
    parameters: dict[str, Any] = {}


class Source(Model):
    layer_range: list[int]


class Slice(Fields):
    sources: list[Source]
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

    settings: of every expert. common: of all, the first that has a value decides. names: the
    tensors that are merged.
    """

    method: str
    record: MergeRecord
    settings: Sequence[Mapping[str, Any]]
    common: Sequence[Mapping[str, Any]]
    names: Sequence[str]

    @cached_property
    def last(self) -> dict[str, int]:
        """What stands before layers' numbers in names -> the number of the last one."""
        found = filter(None, map(LAYER.search, self.names))
        pairs = sorted((one.string[: one.start()], int(one[1])) for one in found)
        return dict(pairs)  # the largest of a name comes last

    def value(self, parameter: str, name: str, model: int = -1, default: Any = None) -> Any:
        """A parameter of a model (-1: of all) at one tensor.

        Raises ValueError where it has neither a value nor a default, or one out of range.
        """
        layer = LAYER.search(name)
        last = self.last[name[: layer.start()]] if layer else 0
        depth = int(layer[1]) / last if last else float(bool(layer))
        for scope in [*self.settings[model : model + 1], *self.common]:
            given = scope.get(parameter)
            try:
                if (found := at(given, name, depth)) is None:
                    continue
                right = found in (0, 1) if parameter in FLAGS else math.isfinite(float(found))
                right &= parameter not in SHARES or 0 <= float(found) <= 1
            except (TypeError, ValueError):
                right = False
            if not right:
                allowed = "in [0, 1]" if parameter in SHARES else "a finite number"
                allowed = "true or false" if parameter in FLAGS else allowed
                listed = "; a list has such entries, or filters and values"
                raise ValueError(
                    f"{self.method}: {parameter} must be {allowed}, got {given} for {name}"
                    + listed * isinstance(given, list | Mapping)
                )
            return found
        if default is None:
            raise ValueError(
                f"{self.method} needs a {parameter} for {name}; give it to every model"
            )
        return default


def at(setting: Any, name: str, depth: float) -> Any:
    """A setting at a tensor: a value, a list over depth 0 to 1, or the first filter that fits.

    None where there is none. Raises ValueError or TypeError for what is no setting.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not setting:
        return None
    if any(isinstance(one, Mapping) for one in setting):
        for one in setting:
            right = isinstance(one, Mapping) and {"value"} <= set(one) <= {"filter", "value"}
            if not right or not isinstance(one.get("filter", "*"), str):
                raise ValueError("a filter is a text and has a value, and no other field")
            if one.get("filter", "*") == "*" or one["filter"] in name:
                return at(one["value"], name, depth)
        return None
    place = depth * (len(setting) - 1)
    low = int(place)
    if isinstance(setting[low], bool):  # flags have nothing between them
        return setting[low]
    start, end = (float(setting[n]) for n in (low, min(low + 1, len(setting) - 1)))
    return (1 - (place - low)) * start + (place - low) * end


def inputs_of(config: Config, path: Path) -> tuple[Sequence[Model], dict[str, Any]]:
    """The models, or those of slices where there is one slice of all layers, and its parameters."""
    if config.models is not None and config.slices is None:
        return config.models, {}
    if config.models is not None or not config.slices:
        raise ValueError(f"{path}: give models, or one slice; `modules` are not read here")
    one = config.slices[0]
    for source in one.sources:
        found = read_config(mergekit_folders.folder_of(source.model, path.parent))
        layers = next((found[name] for name in LAYERS if name in found), "their number")
        if len(config.slices) > 1 or source.layer_range != [0, layers]:
            raise ValueError(
                f"{path}: slices are read where there is one, of all layers: [0, {layers}]; layers "
                "are not stacked here"
            )
    return one.sources, typed(one.parameters)


def read_recipe(path: str | os.PathLike) -> tuple[Recipe, torch.dtype | None]:
    """The merge that a file of mergekit's describes, and its dtype on disk (None: the base's).

    Where the file names none and an expert's is wider than the base's it is the widest of all. Of
    the weights only headers are read. Raises ValueError, naming it, for what is not read here,
    for folders that do not fit together, and for parameters that are missing.
    """
    path = Path(path).expanduser()
    config = read_file(path, Config, "mergekit configuration")
    method = config.merge_method
    if method not in KNOWN:
        raise ValueError(f"{path}: merge_method {method!r} is not one of {', '.join(KNOWN)}")
    if config.tokenizer_source not in (None, "base"):
        raise ValueError(f"{path}: tokenizer_source {config.tokenizer_source!r}: only base is read")
    (models, of_slice), (own, shared, *_) = inputs_of(config, path), KNOWN[method]
    common = [of_slice, typed(config.parameters)]
    for given in common:
        require_known(given, own | shared, f"{path}: {method} takes")
    for model in models:
        require_known(model.parameters, own, f"{path}: for one model {method} takes")
    folders = [mergekit_folders.folder_of(model.model, path.parent) for model in models]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"{path}: {twice[0]} stands twice; give it once, with one weight")
    settings = [typed(model.parameters) for model in models]
    base = mergekit_folders.folder_of(config.base_model, path.parent) if config.base_model else None
    if (base is None) != (method == "linear"):
        need = "has no base_model; leave it out" if base else "needs a base_model"
        raise ValueError(f"{path}: {method} {need}")
    if method == "slerp":
        folders = [base, *(folder for folder in folders if folder != base)]
        if len(folders) != 2:
            raise ValueError(f"{path}: slerp takes base_model and one other model, got {folders}")
        settings = [{}, {}]
    elif method != "linear":
        settings = [s for s, folder in zip(settings, folders, strict=True) if folder != base]
        folders = [folder for folder in folders if folder != base]
    if len(folders) < 1 + (method in ("linear", "slerp")):
        raise ValueError(f"{path}: {method} needs more models")
    names = mergekit_folders.named(folders)
    record = MergeRecord(
        method=method,
        tasks=names,
        base=base or folders[0],
        base_name=mergekit_folders.hub_name(base or folders[0]),
        experts=dict(zip(names, folders, strict=True)),
        options={**common[1], **of_slice}
        | {f"of {n}": s for n, s in zip(names, settings, strict=True) if s},
        opened={name: StoredModel.at(folder) for name, folder in zip(names, folders, strict=True)},
    )
    first, others = StoredModel.at(record.base), list(record.opened.values())
    mergekit_folders.require_whole([first, *others])
    mergekit_folders.require_one_kind(first, others, tokens=config.tokenizer_source is not None)
    tensors = tensors_of(first, record, None)
    recipe = Recipe(method, record, settings, common, [name for name, *_ in tensors])
    needed = "t" if method == "slerp" else "weight"
    for name in recipe.names:  # all that is missing or out of range is refused now
        for model, parameter in product(range(len(names)), sorted(own | shared)):
            recipe.value(parameter, name, model, None if parameter == needed else 1.0)
        if method == "linear" and recipe.value("normalize", name, default=True):
            if abs(sum(float(recipe.value("weight", name, n)) for n in range(len(names)))) < 1e-8:
                raise ValueError(f"linear: the weights sum to 0 for {name}; give others")
    inner, outer = float_dtype(config.dtype), float_dtype(config.out_dtype)
    dtype = outer or inner
    pairs = [(base.dtype, expert.dtype) for _, base, experts in tensors for expert in experts]
    if dtype is None and any(torch.promote_types(*pair) != pair[0] for pair in pairs):
        dtype = float_dtype(reduce(torch.promote_types, chain.from_iterable(pairs)))
    return recipe, dtype


def require_known(given: Mapping[str, Any], allowed: set[str], takes: str) -> None:
    """Raise ValueError for parameters that have no effect."""
    if strange := sorted(set(given) - allowed):
        raise ValueError(
            f"{takes} {', '.join(sorted(allowed)) or 'none'}; got {', '.join(strange)}"
        )
