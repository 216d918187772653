"""Users' models merged from disk to disk, where no data is asked for or given."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from divmerge_book.models import merged
from divmerge_book.models.mergekit_export import mergekit_recipe
from divmerge_book.models.streamed_methods import RULES, rule_of
from divmerge_book.user_models.language_save import save_generation, save_tokenizer
from divmerge_book.user_models.plan import Plan
from divmerge_core.checkpoints import Head, MergeRecord, write
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.checkpoints.tensor_sources import tensors_of
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.methods import METHODS, options_of
from divmerge_core.storage import dump_json


def record_of(plan: Plan, method: str, given: Mapping[str, object]) -> MergeRecord:
    """The merge by a method's published options, but for those that are given."""
    options = dict((METHODS.facts[method]["search"] or ({},))[0])
    options |= {name: value for name, value in given.items() if name in options_of(method)}
    base = StoredModel.at(plan.base.folder)
    record = MergeRecord(
        method=method,
        tasks=plan.tasks,
        base=plan.base.folder,
        experts={source.task.name: source.task.expert for source in plan.experts},
        options=options,
        data={source.task.name: {"expert": source.kind} for source in plan.experts},
        **plan.portable,
        opened={s.task.name: s.adapter.on(base) for s in plan.experts if s.adapter},
    )
    if method in ("average", "task_arithmetic"):
        weight = options.get("scale", 1 / len(plan.tasks))
        record = replace(record, coeffs=torch.full((len(plan.tasks), 1), weight))
    return record


def streamable(plan: Plan) -> set[str]:
    """Kinds of experts that are merged from disk: language models' adapters too."""
    return {"transformers"} if plan.tokens is None else {"transformers", "adapter"}


def obstacle(plan: Plan, methods: Sequence[str], options: Mapping[str, object]) -> str | None:
    """Why models are read into memory to be merged; None where they stay on disk."""
    if any(rows for own in plan.rows.values() for rows in own):
        return "the description has rows to look at or to score"
    if others := [method for method in methods if method not in RULES]:
        return f"{', '.join(others)} cannot be merged from disk; {', '.join(RULES)} can"
    kinds = {source.kind for source in plan.experts}
    if (plan.tokens or plan.vocabulary).owners or not kinds <= streamable(plan):
        return f"experts are {', '.join(sorted(kinds))}, or have tokens of their own"
    for source in plan.experts if plan.tokens is None else ():
        stored = StoredModel.at(source.task.expert).tensors.keys()
        if lost := dict(source.model.named_parameters()).keys() - stored:
            return f"{source.task.expert} names {min(lost)} otherwise than transformers does"
    try:
        base = StoredModel.at(plan.base.folder)
        record = record_of(plan, methods[0], {})
        found = {base.core(name) for name, *_ in tensors_of(base, record, None)}
        if plan.tokens is None and found != merged_names(plan):
            return "the base, or not every expert, has more than the encoder that all share"
    except ValueError as error:
        return str(error)
    return None


def write_from_disk(
    plan: Plan,
    method: str,
    folder: str | os.PathLike,
    *,
    options: Mapping[str, object],
    overwrite: bool = False,
) -> Path:
    """Merge and write, a tensor at a time; see `checkpoints.write`."""
    record = record_of(plan, method, options)
    how = {"rule": rule_of(record), "overwrite": overwrite}
    if plan.tokens is None:
        heads = heads_on_disk(plan)
        return merged.write(folder, record, heads=heads, tokenizer=plan.base.tokenizer, **how)
    how |= {"recipe": mergekit_recipe, "complete": partial(save_words, plan)}
    return write(folder, record, **how)


def merged_names(plan: Plan) -> set[str]:
    """The classifiers' tensors that base and all experts have, as the bare encoder names them."""
    held, shapes = StoredModel.at(plan.base.folder).cores, [one.shapes for one in plan.experts]
    return {n for n in plan.base.shapes if n in held and all(n in own for own in shapes)}


def heads_on_disk(plan: Plan) -> dict[str, Head]:
    """Every task's head: what its classifier has beside the merged tensors."""
    found, names = {}, merged_names(plan)
    for source in plan.experts:
        own, wanted = StoredModel.at(source.task.expert), dict(source.model.named_parameters())
        tensors = {
            name: one.mapped().view(one.shape).float()
            for name, one in own.tensors.items()
            if name in wanted and own.core(name) not in names
        }
        Layout.of(tensors).check(tensors, f"the head of expert {source.task.expert}")
        found[source.task.name] = Head(tensors, source.labels, type(source.model).__name__)
    return found


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
