"""Users' language models merged from disk to disk, where no data is asked for or given."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from divmerge_book.models.mergekit_export import mergekit_recipe
from divmerge_book.models.streamed_methods import RULES, rule_of
from divmerge_book.user_models.language_save import save_generation, save_tokenizer
from divmerge_book.user_models.plan import Plan
from divmerge_core.checkpoints import MergeRecord, write
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.checkpoints.tensor_sources import tensors_of
from divmerge_core.methods import METHODS
from divmerge_core.storage import dump_json


def record_of(plan: Plan, method: str) -> MergeRecord:
    """The merge by a method's published options."""
    options = dict((METHODS.facts[method]["search"] or ({},))[0])
    record = MergeRecord(
        method=method,
        tasks=plan.tasks,
        base=plan.base.folder,
        experts={source.task.name: source.task.expert for source in plan.experts},
        options=options,
        base_name=plan.base.name,
        data={source.task.name: {"expert": source.kind} for source in plan.experts},
    )
    if method in ("average", "task_arithmetic"):
        weight = options.get("scale", 1 / len(plan.tasks))
        record = replace(record, coeffs=torch.full((len(plan.tasks), 1), weight))
    return record


def obstacle(plan: Plan, methods: Sequence[str]) -> str | None:
    """Why models are read into memory to be merged; None where they stay on disk."""
    if plan.tokens is None:
        return "they are classifiers, each with a head of its own"
    if any(rows for own in plan.rows.values() for rows in own):
        return "there are rows to look at or to score"
    if others := [method for method in methods if method not in RULES]:
        return f"{', '.join(others)} cannot be merged from disk; {', '.join(RULES)} can"
    if plan.tokens.owners or {source.kind for source in plan.experts} != {"transformers"}:
        return "experts are adapters or have tokens of their own"
    try:
        tensors_of(StoredModel.at(plan.base.folder), record_of(plan, methods[0]), None)
    except ValueError as error:
        return str(error)
    return None


def write_from_disk(
    plan: Plan, method: str, folder: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Merge and write, a tensor at a time; see `checkpoints.write`."""
    record, complete = record_of(plan, method), partial(save_words, plan)
    how = {"recipe": mergekit_recipe, "complete": complete, "overwrite": overwrite}
    return write(folder, record, rule=rule_of(record), **how)


def save_words(plan: Plan, new: Path) -> str:
    """The tokenizer that reads all experts' texts, and the tokens that end and pad them."""
    save_tokenizer(new, plan)
    stops, pad = plan.tokens.stops, plan.tokens.tokenizer.pad_token_id
    config = json.loads((new / "config.json").read_text("utf-8"))
    config["eos_token_id"] = list(stops) if len(stops) > 1 else stops[0]
    config |= {"pad_token_id": pad} if pad is not None else {}
    dump_json(new / "config.json", config)
    save_generation(new, plan, config)
    return ""
