"""Write a merged model with its heads, coefficients and card: a whole folder or none."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from divmerge_core.checkpoints import tensor_sources
from divmerge_core.checkpoints.heads import MEAN, Head, save_head, validate_head
from divmerge_core.checkpoints.model_card import MergeRecord, card, coefficients_json, group_numbers
from divmerge_core.checkpoints.safetensors_io import INDEX, SINGLE, StoredModel, weight_files
from divmerge_core.checkpoints.shards import write_shards
from divmerge_core.checkpoints.tensor_sources import MergedTensors, Rule, in_memory, streamed
from divmerge_core.storage import fresh_folder, sha256

# (record, merged tensors, dtype) -> text of mergekit_config.yml and "", or "" and why there is none
Recipe = Callable[[MergeRecord, MergedTensors, torch.dtype | None], tuple[str, str]]
SHARD_BYTES = 10**9
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BESIDE = (  # what a base's folder has besides its weights and its config
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.spm", "*.codes", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja"),
    *("chat_template.json", "generation_config.json", "*processor_config.json", "*.py"),
    *("LICENSE*", "NOTICE*"),
)
MODEL = (  # names in a folder of a merged model, which may be replaced
    *("config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin", "README.md", "tasks"),
    *("heads", "coefficients.json", "mergekit_config.yml", "additional_chat_templates", *BESIDE),
)


def write(
    folder: str | os.PathLike,
    record: MergeRecord,
    *,
    merged: Mapping[str, Tensor] | None = None,
    names: Sequence[str] | None = None,
    rule: Rule | None = None,
    heads: Mapping[str, Head] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    recipe: Recipe | None = None,
    complete: Callable[[Path], str] | None = None,
    shell: Path | None = None,
    progress: bool = True,
) -> Path:
    """Write a merged model in the hub's layout, the whole folder or nothing; returns the folder.

    merged: the merged tensors by name, such as `layout.unflatten(flat)`, with or without the prefix
    that the base has on disk (`bert.`). None: computed from record.base and record.experts while
    they are written, for models larger than memory, by record.coeffs or by a `rule`. names: which
    tensors are then merged, named alike; None takes all floating ones of the base that experts
    have. Others of the base are copied, but for those that `heads` hold instead; tied weights are
    written once. complete: adds a whole model per head, and says so for the card. shell: a folder
    like record.base with longer tables, to be filled by `merged`.

    dtype: float32, bfloat16 or float16 of all floating tensors; None keeps the base's, tensor by
    tensor. A shard has at most max_shard_bytes of tensors, or one tensor. Memory is bounded by a
    few tensors: each thread of PyTorch's merges one. recipe: makes mergekit_config.yml. A killed
    process leaves no part of the folder under its name; the next write removes what it left.

    Raises ValueError, before anything is written, for a folder that exists and is not empty
    (overwrite replaces a model, and nothing but a model), parts that do not fit together, an
    unknown dtype, a shard size below 1, a disk without room; and, leaving nothing, for merged
    numbers that are not finite.
    """
    folder = Path(folder).expanduser().resolve()
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be 1 or more, got {max_shard_bytes}")
    kind = float_dtype(dtype)
    inputs = [record.base, *record.experts.values()]
    validate_target(folder, inputs, overwrite)
    base, source = sources_of(record, merged, names, rule, shell)
    plan, heads = tensor_sources.planned(source, kind), heads or {}
    if strange := sorted(set(heads) - set(record.tasks)):
        raise ValueError(f"heads for {', '.join(strange)}, which are none of the record's tasks")
    for task, head in heads.items():
        validate_head(task, head, base)
    instead = {base.core(n) for h in heads.values() if h.architecture != MEAN for n in h.tensors}
    plan, every = [t for t in plan if base.core(t.name) not in instead], len(plan)
    text, reason = recipe(record, source, kind) if recipe else ("", "none was asked for")
    total = sum(tensor.nbytes for tensor in plan)
    require_space(folder, total * (1 + len(heads) if complete else 1))
    with fresh_folder(folder) as new, ThreadPoolExecutor(1) as beside:
        validate_target(folder, inputs, overwrite)  # another run may have made it meanwhile
        digests = beside.submit(hashes_of, record)
        bar = tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=not progress)
        with bar:
            hashes = write_shards(new, plan, max_bytes=max_shard_bytes, wrote=bar.update)
        copy_beside(base, new, kind, bare=len(plan) < every)
        hashes |= save_heads(new, heads)
        (new / "coefficients.json").write_text(coefficients_json(record), encoding="utf-8")
        if text:
            (new / "mergekit_config.yml").write_text(text, encoding="utf-8")
        ready = complete(new) if complete else ""
        content = card(record, base, heads, hashes, digests.result(), reason=reason, ready=ready)
        (new / "README.md").write_text(content, encoding="utf-8")
    return folder


def sources_of(
    record: MergeRecord,
    merged: Mapping[str, Tensor] | None,
    names: Sequence[str] | None,
    rule: Rule | None,
    shell: Path | None,
) -> tuple[StoredModel, MergedTensors]:
    """The base and the merged tensors. Raises ValueError where they do not fit together."""
    base = StoredModel.at(shell or record.base)
    if base.config is None:
        raise ValueError(f"{record.base} holds no config.json; give a base in the hub's layout")
    source = streamed(base, record, names, rule) if merged is None else in_memory(base, merged)
    if record.coeffs is not None:
        group_numbers(record, source.cores)
    return base, source


def float_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of floating tensors, by value or by name; None keeps the base's."""
    if dtype is not None and dtype not in {**FLOATS, **{kind: kind for kind in FLOATS.values()}}:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)} or None, got {dtype!r}")
    return FLOATS.get(dtype, dtype)


def validate_target(folder: Path, inputs: Iterable[str | os.PathLike], overwrite: bool) -> None:
    """Raise ValueError where writing to the folder would destroy what it should not."""
    for path in (Path(name).resolve() for name in inputs):
        if folder.is_relative_to(path) or path.is_relative_to(folder):
            raise ValueError(f"output {folder} is, holds or lies in {path}; name another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; name a new folder")
    held = sorted(path.name for path in folder.glob("*"))
    if held and not overwrite:
        raise ValueError(
            f"output {folder} exists and is not empty; name a new folder, or say overwrite=True "
            "(--overwrite of the command) to replace the model in it"
        )
    others = [name for name in held if not any(fnmatch(name, known) for known in MODEL)]
    if others or held and "config.json" not in held:
        what = f"{', '.join(others)}, no part of a model" if others else "no model"
        raise ValueError(f"output {folder} holds {what}; name another folder, or move what is held")


def hashes_of(record: MergeRecord) -> dict[str, str]:
    """SHA-256 of the weights that went in: `base/FILE` and `TASK/FILE` -> hash."""
    folders, once = {"base": record.base, **record.experts}, cache(sha256)  # the base may be one
    return {
        f"{name}/{file.name}": once(file)
        for name, folder in folders.items()
        for file in input_files(folder)
    }


def input_files(folder: Path) -> list[Path]:
    """A folder's weights, an adapter's or a model's; raises ValueError where there are none."""
    adapter = (folder / "adapter_config.json").is_file()
    found = sorted(folder.glob("adapter_model.*" if adapter else "pytorch_model*.bin"))
    whole = any((folder / name).is_file() for name in (SINGLE, INDEX))
    return found if found and (adapter or not whole) else weight_files(folder)


def require_space(folder: Path, nbytes: int) -> None:
    """Raise ValueError where the disk has less than nbytes free."""
    parent = next(path for path in folder.parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise ValueError(
            f"{folder} needs {nbytes / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB free; make "
            "room, take another disk, or a narrower dtype"
        )


def copy_beside(base: StoredModel, new: Path, dtype: torch.dtype | None, *, bare: bool) -> None:
    """Copy config (of this dtype; of no head, where it was left out), tokenizer and licence."""
    for pattern in BESIDE:
        for file in base.folder.glob(pattern):
            if file.is_file():
                place = new / file.relative_to(base.folder)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)
    config = dict(base.config)
    for name in ("architectures", "num_labels", "id2label", "label2id") if bare else ():
        config.pop(name, None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_heads(folder: Path, heads: Mapping[str, Head]) -> dict[str, str]:
    """Write heads/TASK.safetensors: file name -> its SHA-256."""
    if heads:
        (folder / "heads").mkdir()
    for task, head in heads.items():
        save_head(folder / "heads" / f"{task}.safetensors", head)
    names = [f"heads/{task}.safetensors" for task in heads]
    return {name: sha256(folder / name) for name in names}
