"""What is said of any experts' weights: their files' hashes, and how far they are from the base."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from divmerge_book.user_models.plan import Plan
from divmerge_core.checkpoints.save import input_files
from divmerge_core.merging.task_vectors import STORAGES, Layout, TaskVectors
from divmerge_core.storage import sha256

FAR = 0.5  # a task vector longer than this share of the base is no fine-tuning that we know


def stored_vectors(
    plan: Plan, layout: Layout, flat: Tensor, rows: Iterator[Tensor], long: set[str]
) -> TaskVectors:
    """Task vectors in the description's storage, out of one row [N] per expert.

    long: names of tables, whose rows may be one expert's own (see `keep_rows`). Warns of vectors
    that are none, or too long.
    """
    if plan.description.storage == "low_rank":
        for _ in rows:  # for what else is read: heads, answers
            pass
        factors = {
            source.task.name: {
                inner: tuple(part.to(flat) for part in pair)
                for name, pair in source.adapter.pairs().items()
                if (inner := name.removeprefix(source.prefix)) in layout.names
            }
            for source in plan.experts
        }
        vectors = replace(TaskVectors.from_adapters(layout.unflatten(flat), factors), base=flat)
    else:
        stored = STORAGES[plan.description.storage](rows, len(plan.tasks))
        vectors = TaskVectors(layout, plan.tasks, flat, stored)
        keep_rows(vectors, long, (plan.tokens or plan.vocabulary).owners)
    warn_of_lengths(vectors, plan.base.name)
    return vectors


def keep_rows(vectors: TaskVectors, long: set[str], owners: Mapping[int, Sequence[int]]) -> None:
    """Leave rows of tables to the experts that own them: the base gets their mean, in place.

    Other experts change nothing there, so one owner's row stands in every merge by coefficients.
    """
    if not owners:
        return
    base = vectors.layout.unflatten(vectors.base)
    matrix = getattr(vectors.deltas, "host", vectors.deltas)
    deltas = [vectors.layout.unflatten(row) for row in matrix]
    for name in long & set(base):
        for row, places in owners.items():
            parts = [deltas[place][name][row].to(base[name]) for place in places]
            own = base[name][row] + torch.stack(parts)
            base[name][row] = own.mean(0)
            for place, delta in enumerate(deltas):
                mine = own[places.index(place)] if place in places else base[name][row]
                delta[name][row] = mine - base[name][row]


def warn_of_lengths(vectors: TaskVectors, base: str) -> None:
    """Warn of task vectors that are nothing, or longer than fine-tuning makes them."""
    norms = torch.cat([vectors.select([task]).norms() for task in vectors.tasks])  # one is widened
    shares = (norms / vectors.base.double().norm()).tolist()
    for task, share in zip(vectors.tasks, shares, strict=True):
        text = f"task {task!r}: the expert is the base itself"
        if share > FAR:
            text = (
                f"task {task!r}: the task vector is {share:.2f} times as long as the base "
                f"{base!r}; is this the base that the expert was fine-tuned from?"
            )
        if share == 0 or share > FAR:
            warnings.warn(text, stacklevel=3)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights that are read, and of the folder's settings and vocabulary."""
    words = (path for path in folder.iterdir() if path.suffix in {".json", ".txt", ".model"})
    return {path.name: sha256(path) for path in sorted({*input_files(folder), *words})}
