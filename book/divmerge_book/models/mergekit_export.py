"""The same merge as a configuration for mergekit, where it has one."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
import yaml
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from divmerge_core.checkpoints.model_card import MergeRecord, group_numbers
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.checkpoints.tensor_sources import Source, deviation, streamed

EXACT = 1e-5  # largest deviation of merged tensors in memory, relative to the largest weight


class NoRecipe(Exception):
    """mergekit cannot reproduce this merge; the message says why."""


def mergekit_recipe(
    record: MergeRecord, source: Source, dtype: torch.dtype | None
) -> tuple[str, str]:
    """A mergekit configuration (YAML) and an empty text, or an empty text and why there is none.

    Tensors that are not merged get the weight 0, which keeps the base's. Merged tensors in memory
    are compared with what the record's coefficients give from the folders. mergekit's
    task_arithmetic with normalize: false and lambda: 1 is theta_0 + sum_t weight_t
    (theta_t - theta_0), the merge of DivMerge Eq. 3, and a weight may depend on the tensor: the
    first filter that occurs anywhere in its name decides.
    """
    try:
        text = configuration(record, source, dtype)
    except NoRecipe as reason:
        return "", str(reason)
    if source.in_memory:
        gap = deviation(source, streamed(source.base, record, source.cores))
        if gap > EXACT:
            return "", (
                "the coefficients, applied to the experts' folders, give weights that differ from "
                f"these by {gap:.2g} of the largest weight"
            )
    return text, ""


def configuration(record: MergeRecord, source: Source, dtype: torch.dtype | None) -> str:
    """The YAML. Raises NoRecipe where mergekit cannot reproduce the merge."""
    base, merged, experts = source.base, source.cores, readable(record)
    configs = [config_of(model.folder) for model in (base, *experts)]
    kind = architecture(configs)
    config = copy.deepcopy(configs[0])
    config.is_decoder = True  # some classes warn without it; names are the same
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    prefix = f"{model.base_model_prefix}."
    ties = (model._tied_weights_keys or {}) if config.tie_word_embeddings else {}
    on_disk = [name for name in model.state_dict() if name not in ties]
    validate_names(kind, on_disk, prefix, merged, [base, *experts])
    names = [name.removeprefix(prefix) for name in on_disk]
    renamed = any(config.architectures != [kind] for config in configs)
    columns = dict(zip(merged, group_numbers(record, merged), strict=True))

    def reference(folder: Path) -> object:
        plain = {"model": {"path": str(folder.resolve())}}
        return plain | ({"override_architecture": kind} if renamed else {})

    def weight(row: torch.Tensor) -> object:
        values = {name: float(row[columns[name]]) if name in columns else 0.0 for name in names}
        for tie, of in ties.items():
            if of.removeprefix(prefix) in values:
                values[tie.removeprefix(prefix)] = values[of.removeprefix(prefix)]
        return setting(values, prefix)

    kept = {tensor.dtype for tensor in base.tensors.values() if tensor.dtype.is_floating_point}
    out = dtype or (kept.pop() if len(kept) == 1 else torch.float32)
    facts = {
        "merge_method": "task_arithmetic",
        "base_model": reference(record.base),
        "models": [
            {"model": reference(expert.folder), "parameters": {"weight": weight(row)}}
            for expert, row in zip(experts, record.coeffs, strict=True)
        ],
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float32",
        "out_dtype": str(out).removeprefix("torch."),
    }
    return yaml.safe_dump(facts, sort_keys=False, width=200)


def readable(record: MergeRecord) -> list[StoredModel]:
    """The experts, in the order of tasks, if mergekit can read them and the merge is a sum."""
    if record.coeffs is None:
        raise NoRecipe(f"{record.method} is not a sum of task vectors with coefficients")
    if set(record.experts) != set(record.tasks):
        raise NoRecipe("the experts are not all given as folders")
    folders = [Path(record.experts[task]).resolve() for task in record.tasks]
    if len({*folders, record.base.resolve()}) <= len(folders):
        raise NoRecipe("base and experts are not all different folders")
    for folder in folders:
        if (folder / "adapter_config.json").is_file():
            raise NoRecipe(
                f"{folder.name} is an adapter, which was multiplied out before the merge"
            )
        if not (folder / "config.json").is_file():
            raise NoRecipe(f"{folder.name} has no config.json, so mergekit cannot read it")
    try:
        return [StoredModel.at(folder) for folder in folders]
    except ValueError as error:
        raise NoRecipe(str(error)) from error


def config_of(folder: Path) -> transformers.PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise NoRecipe(f"transformers does not know the model in {folder.name}") from error


def architecture(configs: Sequence[transformers.PretrainedConfig]) -> str:
    """The transformers class that mergekit is to read all of them as: heads are left out.

    A language model as what it is; an encoder as the language model of its family, of which
    mergekit takes what is there (its own definition of BertModel fails, as of 0.1.5).
    """
    names = {(config.architectures or [""])[0] for config in configs}
    kinds = {MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) for config in configs}
    if len(kinds) > 1 or None in kinds:
        raise NoRecipe(f"mergekit has no common kind for {', '.join(sorted(names))}")
    return kinds.pop().__name__


def validate_names(
    kind: str,
    names: Sequence[str],
    prefix: str,
    merged: Sequence[str],
    models: Sequence[StoredModel],
) -> None:
    """Raise NoRecipe where mergekit would miss a tensor of the encoder, or a merged one.

    names: the tensors of the class `kind`; models: base and experts.
    """
    for stored in models:
        if stored.early:
            raise NoRecipe(
                f"mergekit does not know the early names in {stored.folder.name}, such as "
                "LayerNorm.gamma; load it and save_pretrained it once"
            )
        inside = [name for name in names if name.startswith(prefix) or name in merged]
        missing = [name for name in inside if name not in stored.tensors]
        base = models[0].tensors
        strange = [name for name in names if name in stored.tensors and name not in base]
        if missing or strange:
            raise NoRecipe(
                f"mergekit reads all folders as {kind}, and {stored.folder.name} "
                + (f"lacks {missing[0]}" if missing else f"has {strange[0]}, the base has not")
            )
    left = sorted(set(merged) - {name.removeprefix(prefix) for name in names})
    if left:
        raise NoRecipe(f"mergekit reads all folders as {kind}, which leaves out {left[0]}")


# --- filters --------------------------------------------------------------------------------------


def setting(values: Mapping[str, float], prefix: str) -> object:
    """mergekit's weight for tensors by name: one number, or filters and at the end 0 for the rest.

    A filter is a group's common beginning where that matches nothing else, and otherwise every
    name. The longest come first, so that no filter hides one that contains it.
    """
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    for filters in (beginnings(values), values):
        ordered = dict(sorted(filters.items(), key=lambda pair: -len(pair[0])))
        if matches(ordered, values, prefix):
            break
    return [{"filter": name, "value": value} for name, value in ordered.items()] + [{"value": 0.0}]


def beginnings(values: Mapping[str, float]) -> dict[str, float]:
    """The shortest dotted beginnings under which all tensors have one value -> that value."""
    found = {}
    for name, value in values.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            start = ".".join(parts[:depth]) + "."
            if all(v == value for n, v in values.items() if n.startswith(start)):
                found[start] = value
                break
        else:
            found[name] = value
    return found


def matches(filters: Mapping[str, float], values: Mapping[str, float], prefix: str) -> bool:
    """Whether the first filter that occurs in a name gives its value, for every name; else 0."""

    def found(name: str) -> float:
        return next((value for part, value in filters.items() if part in name), 0.0)

    return all(found(before + n) == v for n, v in values.items() for before in ("", prefix))
