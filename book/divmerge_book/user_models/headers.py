"""What the headers of a folder's weights say, held to its configuration; no weight is read."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from divmerge_core.checkpoints.safetensors_io import (
    StoredModel,
    read_config,
    spare,
    stored,
    weight_files,
    wrapper,
)

# What decides a model's computation, by transformers' common names; unknown ones are not compared.
GENERATION = "generation_config.json"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GENERATING = ("ForCausalLM", "ForConditionalGeneration")  # ends of names of language models
LEFT_OUT = ("lm_head.", "cls.")  # what an encoder keeps of its pre-training


def positions(model: nn.Module) -> int | None:
    """How many tokens a model has positions for; RoBERTa's begin after its padding token's."""
    for name, part in model.named_modules():
        if re.search(r"(position_embeddings|embed_positions)$", name) and hasattr(part, "weight"):
            if getattr(part, "padding_idx", None) is not None:
                return part.weight.shape[0] - part.padding_idx - 1
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    return limit if limit > 0 else None  # XLNet, which has no table of positions, says -1


def wrapper_in(folder: Path) -> str:
    """What a wrapper of the model put before all names in a folder's files, or nothing."""
    return wrapper([name for file in weight_files(folder) for name in stored(file)])


def check_folder(folder: Path) -> None:
    """Raise ValueError for links to nothing, and for settings that are edited amiss."""
    read = (path for path in folder.glob("*") if path.suffix in (".json", ".txt", ".model"))
    if lost := [path for path in read if not path.exists()]:
        raise ValueError(
            f"{lost[0]} is a link to nothing: its cache was emptied or moved; fetch it again"
        )
    file = folder / "config.json"
    config = read_config(folder) if file.is_file() else {}
    if (folder / GENERATION).is_file():
        read_config(folder, GENERATION)
    if not isinstance(config.get("architectures") or [], list):
        raise ValueError(f"{file}: architectures is no list; write it in [ ]")
    named = config.get("id2label") or {}
    words = isinstance(named, dict) and not {*map(type, named.values())} & {type(None), list, dict}
    if not words or not all(map(str.isdecimal, named)):
        raise ValueError(
            f"{file}: id2label is {named!r}; it maps the outputs' numbers to names, such as "
            '{"0": "no", "1": "yes"}'
        )


def check_config(who: str, config: PretrainedConfig) -> None:
    """Raise ValueError for quantised weights and for a model with code of its own."""
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{who} is quantised; give the weights that it was made from, in float32 or bfloat16"
        )
    if code := getattr(config, "auto_map", None):
        raise ValueError(
            f"{who} brings code of its own ({', '.join(map(str, code))} in auto_map of "
            "config.json), which is not run here; only transformers' own classes can be merged"
        )


def check_headers(
    who: str, folder: Path, model: nn.Module, lacks: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Notes on tensors in a folder's files that the model (on the meta device) has not.

    lacks: which tensors the files may lack. Raises ValueError, naming them, for tensors that are
    missing, have another shape than the configuration says, or make the head another one.
    """
    disk, notes = StoredModel.at(folder), []
    if before := wrapper_in(folder):
        notes = [f"{who}: all names begin with {before!r}, which a wrapper of the model put there"]
    kinds = (model.config.model_type, type(model).__name__)
    changes = [one for kind in kinds for one in get_checkpoint_conversion_mapping(kind) or ()]
    made = [re.split(r"[*^$\\]+", name) for one in changes for name in one.target_patterns]
    prefix = f"{model.base_model_prefix}."
    # Weights of another dtype need scales from elsewhere.
    weights = {n: t for n, t in disk.tensors.items() if n.endswith((".weight", ".bias"))}
    weights = {name: tensor for name, tensor in weights.items() if not spare(name)}
    if packed := sorted(n for n, t in weights.items() if t.dtype not in FLOATS):
        raise ValueError(
            f"{who}: {packed[0]} is stored as {disk.tensors[packed[0]].dtype}, so the weights "
            "are quantised; give those that they were made from, in float32 or bfloat16"
        )
    have = {disk.core(name): tensor.shape for name, tensor in disk.tensors.items()}
    wanted: dict[int, list[str]] = {}  # tied ones by all their names
    for name, tensor in model.named_parameters(remove_duplicate=False):
        wanted.setdefault(id(tensor), []).append(name.removeprefix(prefix))
    shapes = {n.removeprefix(prefix): tuple(t.shape) for n, t in model.named_parameters()}
    lost = [names[0] for names in wanted.values() if not have.keys() & set(names)]
    renamed = {n for n in lost if any(all(part in f".{n}" for part in parts) for parts in made)}
    if renamed and not type(model).__name__.endswith(GENERATING):
        raise ValueError(
            f"{who}: transformers makes {min(renamed)} and others of tensors with other names; of "
            f"such families ({model.config.model_type}) only language models can be merged"
        )
    lost = [name for name in lost if name not in renamed]
    if lost := sorted(name for name in lost if not lacks(name)):
        raise ValueError(
            f"{who} lacks {len(lost)} tensors of its model, such as {lost[:3]}; save the whole "
            "model again, with its head where it has one"
        )
    if wrong := sorted(n for n in shapes if n in have and have[n] != shapes[n]):
        shown = ", ".join(f"{n} is {list(have[n])}, not {list(shapes[n])}" for n in wrong[:3])
        raise ValueError(
            f"{who}: config.json and the weights disagree: {shown}; was config.json edited (number "
            "of labels, vocabulary)? Save both again"
        )
    if renamed:
        return notes
    known = {name.removeprefix(prefix) for name in model.state_dict()}
    more = {name: shape for name, shape in have.items() if name not in known}
    return notes + others(who, type(model).__name__, more)


def tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are tied to another one -> that one's name."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in every if first[parameter] != name}


def refuse_lost(path: Path, modules: Iterable[str], model: nn.Module, saved: set[str]) -> None:
    """Raise ValueError for a module that an adapter trained whole and did not save."""
    every, first = model.named_parameters(remove_duplicate=False), tied(model)
    every = [(f".{name}", first.get(name, name)) for name, _ in every]
    for module in modules:
        own = {name for said, name in every if f".{module}." in said}
        if own and not own & saved:
            raise ValueError(
                f"{path}: its modules_to_save names {module!r}, and it holds nothing of that; "
                "save the adapter again, or take the module out of adapter_config.json"
            )


def others(who: str, kind: str, more: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A note on tensors that are left out. Raises ValueError where an answer may depend on them."""
    strange = sorted(name for name in more if not (spare(name) or name.startswith(LEFT_OUT)))
    if strange and kind.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{who} holds {strange[:3]}, which transformers' {kind} does not have: it has another "
            "head and would answer differently; only transformers' own classifiers can be merged"
        )
    shown = ", ".join(sorted(more)[:3]) + ", ..." * (len(more) > 3)
    return [f"{who}: {len(more)} tensors left out; its model lacks them: {shown}"] if more else []
