"""A merged language model on disk, as transformers saves one: weights, tokens, settings, card."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.report import Report
from divmerge_book.models.language.models import vocabulary_digest
from divmerge_book.models.mergekit_export import mergekit_recipe
from divmerge_book.user_models.folders import read_model, tokenizer_of
from divmerge_book.user_models.language import kind_of, table_rows
from divmerge_book.user_models.plan import Plan
from divmerge_book.user_models.result import task_scores
from divmerge_core.checkpoints import MergeRecord
from divmerge_core.checkpoints.model_card import card, coefficients_json
from divmerge_core.checkpoints.safetensors_io import StoredModel, read_config, weight_files
from divmerge_core.checkpoints.save import (
    SHARD_BYTES,
    float_dtype,
    hashes_of,
    require_space,
    validate_target,
)
from divmerge_core.checkpoints.tensor_sources import finite, in_memory
from divmerge_core.storage import dump_json, fresh_folder, sha256

TOKENS = (  # files of a tokenizer; templates of several names are written anew
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.spm", "*.codes", "*.tiktoken", "chat_template.jinja"),
    "additional_chat_templates/*.jinja",
)


def language_facts(plan: Plan, bench: Experiment, place: int) -> dict[str, object]:
    """What a card says of one expert: how it is scored, its own tokens, and its answers."""
    source, counts = plan.experts[place], bench.experts[place].manifest["counts"]
    shown = {"score": source.score, "own tokens": ", ".join(plan.tokens.added(place)) or "none"}
    return shown | {"answers": {key: counts[key] for key in counts if key != "prompts"}}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most numbers in a model's files."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in StoredModel.at(folder).tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=sizes.get)


def merged_model(
    plan: Plan, bench: Experiment, flat: Float[Tensor, " N"], dtype: torch.dtype
) -> PreTrainedModel:
    """The base's model with the merged numbers in this dtype, and the tokens that end its answers.

    Raises ValueError for numbers that are not finite in this dtype.
    """
    model = copy.deepcopy(bench.base.model).cpu()
    if plan.tokens.rows > table_rows(model):
        model.resize_token_embeddings(plan.tokens.rows, mean_resizing=False)
    named = dict(model.named_parameters())
    for name, tensor in bench.problem.vectors.layout.unflatten(flat.cpu()).items():
        named[name].data = finite(name, tensor, dtype)
    stops, words = plan.tokens.stops, plan.tokens.tokenizer
    model.config.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
    if words.pad_token_id is not None:
        model.config.pad_token_id = words.pad_token_id
    model.generation_config = GenerationConfig()  # the base's own is written as it is
    return model.to(dtype)


def save_tokenizer(new: Path, plan: Plan) -> None:
    """The tokenizer's files as a base or an expert has them, where it is theirs; else new ones."""
    written, folders = plan.tokens.tokenizer, [source.task.expert for source in plan.experts]
    for file in (file for pattern in TOKENS for file in new.glob(pattern) if file.is_file()):
        file.unlink()  # of the base, as it was copied
    for folder in () if isinstance(written.chat_template, dict) else (plan.base.folder, *folders):
        own = tokenizer_of(folder)
        if own and all(facts(own) == facts(written) for facts in (vocabulary_digest, settings_of)):
            for file in (file for pattern in TOKENS for file in folder.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, new / file.name)
            return
    written.save_pretrained(new)


def settings_of(tokenizer: PreTrainedTokenizerBase) -> tuple:
    return tokenizer.chat_template, tokenizer.pad_token, tokenizer.bos_token


def save_parts(new: Path, model: PreTrainedModel, plan: Plan, shard: int) -> None:
    """Weights, configuration, tokenizer with chat templates, generation settings and licence."""
    model.save_pretrained(new, max_shard_size=shard)
    if read_config(plan.base.folder).get("tie_word_embeddings") is False:  # T5's class forgets it
        dump_json(new / "config.json", read_config(new) | {"tie_word_embeddings": False})
    save_tokenizer(new, plan)
    save_generation(new, plan, model.config.to_dict())
    for pattern in ("LICENSE*", "NOTICE*"):
        for file in filter(Path.is_file, plan.base.folder.glob(pattern)):
            shutil.copyfile(file, new / file.name)


def save_generation(new: Path, plan: Plan, config: Mapping[str, object]) -> None:
    """The base's generation settings, or those that are there, with the config's last tokens."""
    name = "generation_config.json"
    own = [path for path in (plan.base.folder / name, new / name) if path.is_file()]
    settings = json.loads(own[0].read_text("utf-8")) if own else {}
    for key in ("eos_token_id", "pad_token_id"):
        settings |= {key: config[key]} if config.get(key) is not None else {}
    dump_json(new / name, settings)


def recipe(plan: Plan, record: MergeRecord, merged: dict, dtype: torch.dtype) -> tuple[str, str]:
    """A mergekit configuration of the same merge, or why there is none."""
    if plan.tokens.owners:
        return "", "experts have tokens of their own, whose rows are not merged"
    base = StoredModel.at(record.base)
    record = replace(record, groups=tuple(map(base.core, record.groups)))
    try:
        return mergekit_recipe(record, in_memory(base, merged), dtype)
    except ValueError as error:
        why = str(error).replace(str(record.base), record.base.name)
        return "", f"tensors on disk are not those that are merged ({why})"


def write_language(
    folder: str | os.PathLike,
    record: MergeRecord,
    plan: Plan,
    bench: Experiment,
    flat: Float[Tensor, " N"],
    *,
    rescored: Callable[[Tensor], Report | None],
    overwrite: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a merged language model in the hub's layout, the whole folder or nothing.

    rescored: the report with a vector's scores in the merge's place; the card holds those of the
    file that was written, read again. dtype: None is the base's. Raises ValueError as
    `checkpoints.write`.
    """
    folder = Path(folder).expanduser().resolve()
    read = [record.base, *record.experts.values()]
    validate_target(folder, read, overwrite)
    kind, layout = float_dtype(dtype) or stored_dtype(record.base), bench.problem.vectors.layout
    require_space(folder, layout.size * kind.itemsize)
    inputs, text, reason = hashes_of(record), *recipe(plan, record, layout.unflatten(flat), kind)
    with fresh_folder(folder) as new:
        validate_target(folder, read, overwrite)  # another run may have made it meanwhile
        save_parts(new, merged_model(plan, bench, flat, kind), plan, max_shard_bytes)
        again, _ = read_model(kind_of(plan.base.config), new)
        read = layout.flatten(dict(again.named_parameters()), f"{folder}").to(flat.device)
        if not torch.equal(read, flat.to(kind).to(read.dtype)):
            raise RuntimeError(f"{folder}: what was written is not what was merged")
        scores = task_scores(rescored(read), record.method).to_dict("records")
        record = replace(record, scores=scores)
        (new / "coefficients.json").write_text(coefficients_json(record), encoding="utf-8")
        if text:
            (new / "mergekit_config.yml").write_text(text, encoding="utf-8")
        hashes = {file.name: sha256(file) for file in weight_files(new)}
        content = card(record, StoredModel.at(new), {}, hashes, inputs, reason=reason)
        (new / "README.md").write_text(content, encoding="utf-8")
    return folder
