"""The same merge as a configuration for mergekit, where it has one."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import transformers
import yaml
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from divmerge_core.checkpoints.model_card import MergeRecord, group_numbers
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.checkpoints.tensor_sources import MergedTensors, streamed

EXACT = 1e-5  # largest deviation of merged tensors in memory, relative to the largest weight


class NoRecipe(Exception):
    """mergekit cannot reproduce this merge; the message says why."""


def mergekit_recipe(
    record: MergeRecord, source: MergedTensors, dtype: torch.dtype | None
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
        if source.in_memory:
            gap = deviation(source, streamed(source.base, record, source.cores))
            if gap > EXACT:
                raise NoRecipe(
                    "the coefficients, applied to the experts' folders, give weights that differ "
                    f"from these by {gap:.2g} of the largest weight"
                )
    except NoRecipe as reason:
        return "", str(reason)
    return text, ""


def deviation(source: MergedTensors, said: MergedTensors) -> float:
    """Largest difference of two merges, next to the largest weight.

    Infinite where they merge different tensors.
    """
    if set(source.numbers) != set(said.numbers):
        return float("inf")
    gap, size = 0.0, 0.0
    for name, numbers in source.numbers.items():
        if source.base.tensors[name].size:
            ours, theirs = numbers(torch.float64), said.numbers[name](torch.float64)
            gap = max(gap, (ours - theirs).abs().max().item())
            size = max(size, theirs.abs().max().item())
    return gap / size if gap else 0.0


def configuration(record: MergeRecord, source: MergedTensors, dtype: torch.dtype | None) -> str:
    """The YAML. Raises NoRecipe where mergekit cannot reproduce the merge."""
    base, merged, experts = source.base, source.cores, readable(record)
    config, kind, renamed = architecture([base, *experts])
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    prefix = f"{model.base_model_prefix}."
    ties = (model._tied_weights_keys or {}) if config.tie_word_embeddings else {}
    on_disk = [name for name in model.state_dict() if name not in ties]
    if found := next(mismatches(on_disk, [*ties], prefix, merged, [base, *experts]), None):
        raise NoRecipe(found.format(kind=kind))
    names = [name.removeprefix(prefix) for name in on_disk]
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
    found, folders = [], [Path(record.experts[task]).resolve() for task in record.tasks]
    if len({*folders, record.base.resolve()}) <= len(folders):
        raise NoRecipe("base and experts are not all different folders")
    for folder in folders:
        if (folder / "adapter_config.json").is_file():
            raise NoRecipe(f"{folder.name} is an adapter, multiplied out before the merge")
        if not (folder / "config.json").is_file():
            raise NoRecipe(f"{folder.name} has no config.json, so mergekit cannot read it")
        try:
            found.append(StoredModel.at(folder))
        except ValueError as error:  # its path is nothing for a card
            raise NoRecipe(str(error).replace(str(folder), folder.name)) from error
    return found


def architecture(models: Sequence[StoredModel]) -> tuple[transformers.PretrainedConfig, str, bool]:
    """The base's config, the transformers class that mergekit is to read all models as, without
    heads, and whether any config names another.

    A language model as what it is; an encoder as the language model of its family, of which
    mergekit takes what is there (its own definition of BertModel fails, as of 0.1.5).
    """
    configs = []
    for model in models:
        try:
            configs.append(AutoConfig.from_pretrained(model.folder))
        except (OSError, ValueError, KeyError) as error:
            raise NoRecipe(
                f"transformers does not know the model in {model.folder.name}"
            ) from error
    kinds = {MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) for config in configs}
    if len(kinds) > 1 or None in kinds:
        names = sorted({(config.architectures or [""])[0] for config in configs})
        raise NoRecipe(f"mergekit has no common kind for {', '.join(names)}")
    kind, config = kinds.pop().__name__, copy.deepcopy(configs[0])
    config.is_decoder = True  # some classes warn without it; names are the same
    return config, kind, any(config.architectures != [kind] for config in configs)


def mismatches(
    names: Sequence[str],
    ties: Sequence[str],
    prefix: str,
    merged: Sequence[str],
    models: Sequence[StoredModel],
) -> Iterator[str]:
    """Why mergekit would miss a tensor of the encoder, or a merged one.

    names: the tensors of the class that it reads all folders as, ties: and those that are tied to
    one of them; models: base and experts.
    """
    start = "mergekit reads all folders as {kind}, "
    inside = [name for name in names if name.startswith(prefix) or name in merged]
    for stored in models:
        folder = stored.folder.name
        if stored.early:
            yield (
                f"mergekit does not know the early names in {folder}, such as LayerNorm.gamma; "
                "load it and save_pretrained it once"
            )
        for name in inside:
            if name not in stored.tensors:
                yield start + f"and {folder} lacks {name}"
        for name in (*names, *ties):
            if name in stored.tensors and name not in models[0].tensors:
                yield start + f"and {folder} has {name}, the base has not"
    for name in sorted(set(merged) - {name.removeprefix(prefix) for name in names}):
        yield start + f"which leaves out {name}"


def setting(values: Mapping[str, float], prefix: str) -> object:
    """mergekit's weight for tensors by name: one number, or filters and at the end 0 for the rest.

    A filter is a group's common beginning where that matches nothing else, and otherwise every
    name. The longest come first, so that no filter hides one that contains it.
    """
    if len(set(values.values())) == 1:
        return next(iter(values.values()))

    def beginning(name: str) -> str:
        """The shortest dotted beginning under which all tensors have one value, or the name."""
        starts = (name[: n + 1] for n, letter in enumerate(name) if letter == ".")
        alike = (s for s in starts if len({values[n] for n in values if n.startswith(s)}) == 1)
        return next(alike, name)

    for filters in ({beginning(name): value for name, value in values.items()}, values):
        order = sorted(filters, key=len, reverse=True)
        listed = [{"filter": name, "value": filters[name]} for name in order]
        listed.append({"value": 0.0})
        found = {
            name: next(one["value"] for one in listed if one.get("filter", "") in name)
            for name in [before + name for name in values for before in ("", prefix)]
        }
        if all(found[name] == found[prefix + name] == value for name, value in values.items()):
            break
    return listed
