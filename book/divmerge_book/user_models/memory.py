"""What the merge of a checked plan needs of memory, from headers and configurations alone."""

import os
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from divmerge_book.models.encoders import check_device, resolve
from divmerge_book.planning.memory import Line, Plan, advised, lines, size
from divmerge_book.planning.workloads import Fit, Model
from divmerge_book.user_models.plan import Plan as Checked
from divmerge_book.user_models.streaming import merged_names, streamable
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.methods import METHODS, parse

TOGETHER = 4  # rows of a task in one step of a fit
LIGHTER = ("bfloat16", "int8")
FROM_STORE = ("average", "task_arithmetic")  # read any storage as it is; others widen task vectors
COUNTED = (*FROM_STORE, "divmerge", "adamerging")  # whose plan has all that they hold


def room(device: torch.device) -> tuple[int, int]:
    """Bytes that are free on a device, and all that it has; a container's limit is one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    free = whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for place in (Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")):
        words = place.read_text("utf-8").split() if place.is_file() else []
        if "MemAvailable:" in words:
            free = 1024 * int(words[words.index("MemAvailable:") + 1])
        elif words and words[0].isdecimal():
            whole = min(whole, int(words[0]))
    return min(free, whole), whole


def check_storage(plan: Checked) -> None:
    """Raise ValueError where task vectors cannot be kept as the description's storage says."""
    storage, owners = plan.description.storage, (plan.tokens or plan.vocabulary).owners
    if owners and storage in ("int8", "low_rank"):
        raise ValueError(
            f"{plan.description.path}: storage is {storage}, and experts have rows for tokens of "
            "their own, which are written into task vectors one by one; take bfloat16 or float32"
        )
    if storage != "low_rank":
        return
    held = StoredModel.at(plan.base.folder).cores
    for source in plan.experts:
        whole = source.adapter is None
        names = () if whole else source.adapter.saved.values()
        saved = {name.removeprefix(source.prefix) for name in names}
        if whole or (saved := sorted(saved & set(held))):
            raise ValueError(
                f"{plan.description.path}: storage is low_rank, which keeps the factors of LoRA "
                f"adapters, and expert {source.task.expert} "
                + ("is a whole model" if whole else f"saved {saved[:3]} whole")
                + "; take int8 or bfloat16"
            )


def fit_of(plan: Checked, precision: str) -> tuple[Model, Fit]:
    """The merged model in numbers, and a step of a fit at most: rows as long as they may be."""
    words, language = plan.tokens or plan.vocabulary, plan.tokens is not None
    table = plan.base.shapes.get(plan.base.table, (words.rows,))
    names = plan.base.shapes if language else merged_names(plan)
    numbers = sum(prod(plan.base.shapes[name]) for name in names)
    numbers += (words.rows - table[0]) * prod(table[1:]) * bool(plan.base.table)
    try:
        model = replace(Model.of(plan.base.config, head=language), parameters=numbers)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # Its activations are not counted.
        model = Model(numbers, max(map(prod, plan.base.shapes.values())), *[0] * 7)
    tokens, answers = plan.description.max_length, TOGETHER
    classes = max((len(source.labels) for source in plan.experts), default=2)
    if language:
        asked = [len(ids) for source in plan.experts for ids in source.reading.asked]
        most = plan.description.max_new
        tokens, answers, classes = max(asked, default=1) + most, TOGETHER * most, words.rows
    rows = sum(len(own or ()) for own in plan.rows["merge"])
    ranks = [source.adapter.rank for source in plan.experts if source.adapter]
    how = {"precision": precision, "deltas": plan.description.storage, "tasks": len(plan.tasks)}
    how |= {"inputs": max(1, -(-rows // len(plan.tasks))), "rank": max(ranks, default=16)}
    return model, Fit(TOGETHER, tokens, answers, classes, **how)


def memory_plans(
    plan: Checked, methods: Sequence[str], *, device: str = "cpu", precision: str = "float32"
) -> tuple[Plan, ...]:
    """Plans of merging in memory: of the merge, and of reading and writing where it needs more.

    Raises ValueError where the device could not hold one of them if all its memory were free.
    """
    place = check_device(device)
    free, whole = room(place)
    model, fit = fit_of(plan, resolve(precision, place))
    if place.type == "cpu":  # what would be streamed lies in this memory
        same = {"streamed": "float32", "streamed_bfloat16": "bfloat16"}
        fit = replace(fit, deltas=same.get(fit.deltas, fit.deltas))
    n, name = 4 * model.parameters, "the GPU" if place.type == "cuda" else "this machine's memory"
    fits = any("unlabelled inputs" in METHODS.facts[parse(spec)[0]]["needs"] for spec in methods)
    lasting = {"base", "task vectors", *(("experts' answers",) if plan.tokens else ()), "context"}
    kept = (
        Line("loaded base", n, "N x 4 bytes, the model that answers"),
        Line("merges", n * len(methods), f"{len(methods)} x N x 4 bytes"),
    )
    times = 3 if plan.tokens else 2  # a model, its bytes on their way, and for language its vector
    read = Line("what is read or written", times * n, f"{times} x N x 4 bytes")
    others = [spec for spec in methods if parse(spec)[0] not in COUNTED]
    line = Line("working copies", 2 * n * fit.tasks, f"2 x {fit.tasks} x N x 4 bytes (assumed)")
    if fits:
        line = Line("working copies", 0, f"not counted: what {', '.join(others)} holds besides")
    copies = (line,) * bool(others)

    def merging(**fields: object) -> tuple[Line, ...]:
        every = lines(model, replace(fit, **fields))
        return (*(one for one in every if fits or one.what in lasting), *kept, *copies)

    def reading(**fields: object) -> tuple[Line, ...]:
        every = lines(model, replace(fit, **fields))
        return (*(one for one in every if one.what in lasting), *kept, read)

    title = f"{model.name}, N = {model.parameters:,}, {fit.tasks} tasks"
    first, second = (
        advised(Plan(f"{what}: {title}", name, of(), free), ways(plan, fit), of)
        for what, of in (("Merging", merging), ("Reading and writing", reading))
    )
    streams = all(source.kind in streamable(plan) for source in plan.experts)
    disk = "without rows, methods that need none are merged from disk to disk; " * streams
    more = (f"{disk}fewer tasks, or fewer methods in one command, take less",)
    found = tuple(
        one if one.fits else replace(one, advice=one.advice + more)
        for one in ((first, second) if second.total > first.total else (first,))
    )
    if (most := found[-1]).total > whole:
        raise ValueError(
            f"{plan.description.path}: the merge needs {size(most.total)}, and {name} is "
            f"{size(whole)} in all, of which {size(free)} are free\n{most}"
        )
    return found


def ways(plan: Checked, fit: Fit) -> dict[str, dict]:
    """Changes of the description that take less memory: text -> fields of the fit."""
    found = {f"storage: {one}": {"deltas": one} for one in LIGHTER}
    if all(source.adapter for source in plan.experts):
        found["storage: low_rank"] = {"deltas": "low_rank"}
    if plan.tokens and fit.inputs > 1:
        found["half as many merge rows"] = {"inputs": -(-fit.inputs // 2)}
        found["half of max_new"] = {"answers": -(-fit.positions // 2)}
    return found
