"""The merges that mergekit's files describe, from disk to disk.

Sums and signs are those of float32 whatever `dtype` says, rounded once to `out_dtype`, or else
`dtype`. TIES keeps all entries that equal the smallest of those kept; DARE draws other entries than
mergekit. Buffers are the base's, and embeddings keep rows that no token has.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from divmerge_book.models.mergekit_config import KNOWN, Recipe, read_recipe
from divmerge_book.models.mergekit_folders import copies, other_fields
from divmerge_book.models.streamed_methods import (
    Change,
    as_long,
    cutoffs,
    drop_at_random,
    left_of,
    spherical,
    tally,
    unchanged,
)
from divmerge_core.checkpoints import write
from divmerge_core.checkpoints.save import validate_target
from divmerge_core.checkpoints.tensor_sources import Block, Rule


def merge_config(
    path: str | os.PathLike, output: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Merge what a file of mergekit's describes into a folder; the file goes along.

    Raises ValueError, before weights are read, for what is not read here or does not fit.
    """
    output = Path(output).expanduser().resolve()
    recipe, dtype = read_recipe(path)
    record = recipe.record
    validate_target(output, [record.base, *record.experts.values()], overwrite)
    if recipe.method in ("linear", "task_arithmetic"):
        row, *others = {tuple(coefficients(recipe, name).tolist()) for name in recipe.names}
        task_vectors = recipe.method != "linear" or abs(sum(row) - 1) < 1e-6  # else of no base
        if not others and task_vectors:  # alike in all tensors: the card shows them
            record = replace(record, coeffs=torch.tensor(row)[:, None])
    text = Path(path).expanduser().read_text("utf-8")
    return write(
        output,
        record,
        rule=rule_of(recipe),
        dtype=dtype,
        overwrite=overwrite,
        recipe=lambda record, source, kind: (text, ""),
    )


def summary(path: str | os.PathLike) -> str:
    """What a file of mergekit's describes, in a line, and notes on equal models and other configs.

    Raises ValueError as `merge_config` does.
    """
    recipe, _ = read_recipe(path)
    sizes = f"{len(recipe.record.tasks)} models, {len(recipe.names)} tensors"
    every = list(dict.fromkeys([recipe.record.base, *recipe.record.experts.values()]))
    twins = [pair for pair in combinations(every, 2) if copies(*pair)]
    notes = [f"note: {one} and {other} have equal weights" for one, other in twins]
    for folder in every[1:]:
        for name, (wanted, own) in other_fields(every[0], folder).items():
            notes.append(
                f"note: {folder} has {name} = {own!r}, and the merged folder will have {wanted!r} "
                f"of {every[0]}: its weights were not trained for that"
            )
    return "\n".join([f"{recipe.method} of {sizes}, from disk to disk", *notes])


def rule_of(recipe: Recipe) -> Rule:
    """How the recipe's method merges a tensor."""
    if recipe.method == "slerp":
        return spherical(lambda name: float(recipe.value("t", name)), of_zero=0.0)
    return elected(recipe) if recipe.method in ("ties", "dare_ties") else linear(recipe)


def weights_of(recipe: Recipe, name: str) -> Tensor:
    count = len(recipe.record.tasks)
    return torch.tensor([float(recipe.value("weight", name, model)) for model in range(count)])


def flag(recipe: Recipe, parameter: str, name: str) -> bool:
    defaults = dict(zip(("normalize", "rescale"), KNOWN[recipe.method][2:], strict=True))
    return bool(recipe.value(parameter, name, default=defaults[parameter]))


def divisor(sums: Tensor) -> Tensor:
    return torch.where(sums.abs() < 1e-8, 1, sums)


def coefficients(recipe: Recipe, name: str) -> Tensor:
    """Lambda of the task vectors at a tensor, for methods that sum them."""
    weight = weights_of(recipe, name)
    if flag(recipe, "normalize", name):
        weight = weight / divisor(weight.sum())
    return weight * float(recipe.value("lambda", name, default=1.0))


def linear(recipe: Recipe) -> Rule:
    """The sum of the weighted models, or of the base and the weighted task vectors."""

    def rule(name: str, origin: Tensor, experts: Sequence[Tensor]) -> Block:
        row = coefficients(recipe, name)
        change = thinned(recipe, name, origin, experts)
        share = float(row.sum()) if recipe.method == "linear" else 1.0  # of the base
        return lambda place, base, deltas: base.addmv_(
            change(place, deltas).T, row.to(deltas), beta=share
        )

    return rule


def thinned(recipe: Recipe, name: str, origin: Tensor, experts: Sequence[Tensor]) -> Change:
    """What a method leaves of a tensor's task vectors, by `density` and `rescale`."""
    method, count = recipe.method, len(experts)
    if method in ("linear", "task_arithmetic"):
        return unchanged
    shares = [float(recipe.value("density", name, model, 1.0)) for model in range(count)]
    rescale = flag(recipe, "rescale", name)
    if min(shares) >= 1 or not len(origin):
        return unchanged
    if method.startswith("dare"):
        drops = [1 - min(1.0, share) for share in shares]
        return drop_at_random(partial(by_name, count), drops, "l1" if rescale else "none")(
            name, origin, experts
        )
    rank = torch.tensor([max(1, int(min(1.0, share) * len(origin))) for share in shares])
    least = cutoffs(lambda upper: tally(left_of(None, name, origin, experts), upper), rank)
    least[torch.tensor(shares) <= 0] = torch.inf

    def change(place: slice, deltas: Tensor) -> Tensor:
        return deltas.masked_fill_(deltas.abs() < least, 0)

    return as_long(change, origin, experts) if rescale else change


def by_name(count: int, name: str) -> list[torch.Generator]:
    """A generator per expert, seeded by the tensor's name."""
    seeds = (hashlib.sha256(f"{number} {name}".encode()).digest()[:6] for number in range(count))
    return [torch.Generator().manual_seed(int.from_bytes(seed)) for seed in seeds]


def elected(recipe: Recipe) -> Rule:
    """The base plus what of the weighted task vectors has the sign of their sum."""

    def rule(name: str, origin: Tensor, experts: Sequence[Tensor]) -> Block:
        change, weight = thinned(recipe, name, origin, experts), weights_of(recipe, name)
        scale = float(recipe.value("lambda", name, default=1.0))
        divides = flag(recipe, "normalize", name)

        def block(place: slice, base: Tensor, deltas: Tensor) -> Tensor:
            left = change(place, deltas).mul_(weight[:, None])
            sign = torch.where(left.sum(0) < 0, -1, 1)  # plus where they cancel
            agree = ~(left * sign <= 0)  # NaN agrees, and is refused when it is written
            total = left.masked_fill_(~agree, 0).sum(0)
            if divides:
                total /= divisor(weight @ agree.to(weight))
            return total.mul_(scale).add_(base)

        return block

    return rule
