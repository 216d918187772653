"""LoRA experts in PEFT's folders, read without PEFT: W + scale B A, and the modules saved whole."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from divmerge_book.user_models.headers import FLOATS, refuse_lost, tied
from divmerge_core.checkpoints.safetensors_io import Stored, StoredModel, instead, stored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# What changes no weight once training is over, and what we compute with.
SILENT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"),
    *("peft_version", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "qalora_group_size", "runtime_config"),
    *("eva_config", "ensure_weight_tying", "fan_in_fan_out", "modules_to_save"),
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
}
# Values that leave the base as it is, of fields for which more than "empty" does.
PLAIN = {"bias": ("none",)}
PLAIN["init_lora_weights"] = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MIXED = ", or on experts that are one tensor here: merge it by PEFT and give the whole model"
LORA = re.compile(r"\.lora_(?:embedding_)?([AB])(\.default)?(\.weight)?$")


@dataclass(frozen=True)
class Factors:
    """B A for one tensor of the model: keys in the file, scale, and whether (B A) is transposed."""

    left: str
    right: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """What an adapter's file does to a model: tensors with factors, and tensors it replaces.

    saved: key in the file -> tensor of the model, where tied ones have one name.
    """

    path: Path
    factors: Mapping[str, Factors]
    saved: Mapping[str, str]

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict with the saved tensors in place of others, and with W + scale B A.

        Raises ValueError for two saved tensors that are tied in the model and differ.
        """
        result, place, done = dict(state), next(iter(state.values())).device, {}
        own = tensors_in(self.path)
        for key, name in self.saved.items():
            result[name] = own[key].float().to(place)
            if not done.setdefault(name, result[name]).equal(result[name]):
                raise ValueError(
                    f"{self.path}: {key} and another tensor are tied in the base, and were trained "
                    "apart; merge the adapter into an untied base with PEFT and give the whole "
                    "model"
                )
        for name in self.factors:
            result[name] = self.added(name, result[name], own)
        return result

    def added(self, name: str, tensor: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """W + scale B A of one tensor; own: the file's tensors by key."""
        pair = self.factors[name]
        product = own[pair.left].float() @ own[pair.right].float()
        return tensor + pair.scale * (product.T if pair.transposed else product).to(tensor.device)

    def on(self, base: StoredModel) -> StoredModel:
        """The base on disk with this adapter on it, whose tensors are computed when they are read.

        Raises ValueError where only the model in memory shows what the adapter changes.
        """
        if self.path.name == PICKLE:
            raise ValueError(f"{self.path} is a pickle")
        parts, names = stored(self.path), [*self.saved.values(), *self.factors]
        places = {name: base.cores.get(base.core(name)) for name in names}
        if len(places) < len(names) or not all(places.values()):
            raise ValueError(f"{self.path} changes tensors that {base.folder} names otherwise")
        own = {places[name]: parts[key] for key, name in self.saved.items()}
        for name in self.factors:
            facts = vars(base.tensors[places[name]])
            own[places[name]] = Adapted(**facts, adapter=self, name=name, parts=parts)
        return replace(base, folder=self.path.parent, tensors={**base.tensors, **own})

    @property
    def rank(self) -> int:
        """The largest rank of its factors."""
        shapes = shapes_in(self.path)
        return max(shapes[pair.left][1] for pair in self.factors.values())

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> (B, A) of every tensor with factors, of which scale B A is B @ A."""
        own, found = tensors_in(self.path), {}
        for name, pair in self.factors.items():
            left, right = pair.scale * own[pair.left].float(), own[pair.right].float()
            found[name] = (right.T, left.T) if pair.transposed else (left, right)
        return found


@dataclass(frozen=True)
class Adapted(Stored):
    """A tensor of a base in a file, to which an adapter's scale B A is added when it is read."""

    adapter: Adapter
    name: str
    parts: Mapping[str, Stored]

    def mapped(self) -> Tensor:
        """Its numbers in a row, in float32."""
        pair = self.adapter.factors[self.name]
        own = {key: self.parts[key] for key in (pair.left, pair.right)}
        own = {key: one.mapped().view(one.shape) for key, one in own.items()}
        tensor = super().mapped().view(self.shape).float()
        return self.adapter.added(self.name, tensor, own).flatten()


def read_config(folder: Path) -> dict:
    """An adapter's configuration. Raises ValueError for all that is not plain LoRA, by name."""
    path = folder / CONFIG
    try:
        config = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(
            f"{path}: peft_type is {kind!r}, only LORA can be merged here; merge the adapter into "
            "its base with PEFT and give the checkpoint"
        )
    rest = {key: value for key, value in config.items() if key not in SILENT}
    special = {k: v for k, v in rest.items() if (v not in PLAIN[k] if k in PLAIN else v)}
    if special:
        named = ", ".join(f"{key}={value!r}" for key, value in special.items())
        raise ValueError(
            f"{path}: {named} is more than plain LoRA; merge the adapter into its base with PEFT "
            "(merge_and_unload) and give the checkpoint"
        )
    weights_of(folder)
    return config


def weights_of(folder: Path) -> Path:
    """An adapter's file: safetensors, or a pickle of tensors as PEFT saved them before 0.6."""
    for name in (WEIGHTS, PICKLE):
        if (folder / name).is_file():
            return folder / name
    found = instead([folder / WEIGHTS])
    raise ValueError(f"{folder} has no {WEIGHTS}{found}; save the adapter with save_pretrained")


def tensors_in(path: Path) -> Mapping[str, Tensor]:
    """The tensors of an adapter's file, which may be a pickle.

    Raises ValueError for a pickle of more than tensors, which could run code, or a damaged one.
    """
    if path.name != PICKLE:
        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor for name, tensor in found.items() if tensor.shape}
    except Exception as error:  # unpickling raises many kinds
        raise ValueError(
            f"{path} is no whole file of tensors alone ({type(error).__name__}); fetch it again, "
            "or save the adapter with safetensors"
        ) from error


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a file. Raises ValueError for quantised ones."""
    found = tensors_in(path) if path.name == PICKLE else stored(path)
    if packed := [f"{n} is {t.dtype}" for n, t in found.items() if t.dtype not in FLOATS]:
        raise ValueError(f"{path}: {packed[0]}, so it is quantised; give float32 or bfloat16")
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def plain_name(key: str) -> str:
    """A key of the adapter's file as the model names it."""
    key = re.sub(r"^(_orig_mod\.|module\.)+|(?<=\.)_orig_mod\.", "", key)  # of wrappers
    return re.sub(r"^base_model\.model\.|\.modules_to_save(\.default)?|\.base_layer", "", key)


def refuse_apart(path: Path, config: Mapping, first: Mapping[str, str], saved: set[str]) -> None:
    """Raise ValueError where training untied a tensor from another: one of the two alone is saved.

    PEFT does so for modules_to_save without ensure_weight_tying.
    """
    modules = () if config.get("ensure_weight_tying") else config.get("modules_to_save") or ()
    for pair in ({name, own} for name, own in first.items()):
        mine = [name for name in pair & saved if name.split(".")[-2] in modules]
        if mine and len(pair & saved) == 1:
            raise ValueError(
                f"{path}: {mine[0]} was trained apart from the tensor that it is tied to in this "
                "base; train with ensure_weight_tying, or give the merged model, untied"
            )


def adapter_of(folder: Path, model: nn.Module) -> Adapter:
    """How an adapter changes a model (which may be on the meta device: only shapes are looked at).

    The scale is alpha / r, or alpha / sqrt(r) with rsLoRA, with PEFT's patterns per module; r is
    the factors' own. Source: PEFT's LoRA, Hu et al. 2022. Raises ValueError for tensors that the
    model lacks and for shapes that do not fit.
    """
    config, path, modules = read_config(folder), weights_of(folder), dict(model.named_modules())
    found = {n: shape for n, shape in shapes_in(path).items() if ".original_module." not in n}
    shapes, first = {name: tuple(t.shape) for name, t in model.named_parameters()}, tied(model)
    names = {key: plain_name(key) for key in found if not LORA.search(key)}
    saved = {key: first.get(name, name) for key, name in names.items()}
    refuse_apart(path, config, first, set(names.values()))
    refuse_lost(path, config.get("modules_to_save") or (), model, set(saved.values()))
    for key, name in saved.items():
        if shapes.get(name) != found[key]:
            raise ValueError(
                f"{path}: holds {key} {list(found[key])}, the model's {name} has shape "
                f"{list(shapes.get(name, ()))}; give labels that fit, and the adapter's own base"
            )
    factors = {}
    for left in (key for key in found if (match := LORA.search(key)) and match[1] == "B"):
        right = re.sub(r"(\.lora_(?:embedding_)?)B", r"\1A", left)
        name = LORA.sub("", plain_name(left))
        if f"{name}.weight" in {*first, *first.values()}:
            raise ValueError(
                f"{path}: has factors for {name}.weight, which is tied to another tensor in this "
                "base; merge the adapter into an untied base with PEFT and give the whole model"
            )
        transposed = isinstance(modules.get(name), (Conv1D, nn.Embedding))
        one, other = found[left], found.get(right, ())
        product = (one[0], *other[1:])[:: -1 if transposed else 1]
        if len(one) != 2 or shapes.get(f"{name}.weight") != product or other[0] != one[1]:
            raise ValueError(
                f"{path}: factors {list(one)} and {list(other)} for {name}.weight, which has shape "
                f"{list(shapes.get(f'{name}.weight', ()))} in this base; the adapter was trained "
                f"on another model{MIXED * ('.experts.' in name)}"
            )
        scale = scale_of(config, name, one[1], path.parent / CONFIG)
        factors[f"{name}.weight"] = Factors(left, right, scale, transposed)
    if not 0 < len(factors) == sum(LORA.search(key) is not None for key in found) / 2:
        raise ValueError(
            f"{path}: holds no LoRA factors, or lora_A without its lora_B; fetch it again"
        )
    return Adapter(path, factors, saved)


def scale_of(config: Mapping, name: str, rank: int, where: Path) -> float:
    """What multiplies the B A of a module: alpha / r, or alpha / sqrt(r) with rsLoRA.

    Raises ValueError where the configuration's rank is not the factors', or alpha is no number.
    """

    def said(field: str, patterns: str, default: object) -> object:
        every = config.get(patterns) or {}
        try:
            own = (value for key, value in every.items() if re.match(rf"(.*\.)?({key})$", name))
            return next(own, config.get(field, default))
        except (AttributeError, re.error) as error:
            raise ValueError(f"{where}: {patterns} maps no modules to numbers: {every}") from error

    alpha, wanted = said("lora_alpha", "alpha_pattern", 8), said("r", "rank_pattern", rank)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or wanted not in (rank, None):
        raise ValueError(
            f"{where}: lora_alpha is {alpha!r} and r is {wanted!r} for {name}, whose factors have "
            f"rank {rank}; the scale of an adapter is made of both: correct the file"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_base(
    folder: Path, adapter: Adapter, model: nn.Module, held: Iterable[str], names: Sequence[str]
) -> list[str]:
    """A note where an adapter says that it was trained on a base of none of these names.

    held: the base's tensors, as the model names them. Raises ValueError for what nobody holds.
    """
    known = {*adapter.saved.values(), *held}
    if missing := [name for name, _ in model.named_parameters() if name not in known]:
        raise ValueError(
            f"adapter {folder} and the base {names[0]!r} both lack {missing[:3]}: it was drawn at "
            "random in training and not saved; train again with its module in modules_to_save"
        )
    said = str(read_config(folder).get("base_model_name_or_path") or "")
    said = Path(said).name if Path(said).is_absolute() else said  # else the trainer's disk is told
    if not said or Path(said).name.lower() in {Path(name).name.lower() for name in names}:
        return []
    return [f"adapter {folder} says that it was trained on {said!r}; the base is {names[0]!r}"]
