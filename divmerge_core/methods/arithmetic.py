"""Methods that need nothing but the weights: sums of task vectors, trimmed, thinned or scaled."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.stores import dense
from divmerge_core.linalg import largest
from divmerge_core.methods import METHODS
from divmerge_core.problem import MergeProblem
from divmerge_core.vectors import Layout


def check_choice(option: str, given: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless an option has one of its values."""
    if given not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}; got {given!r}")


def check_keep(keep: float) -> None:
    """Raise ValueError unless a share of entries to keep is in (0, 1]."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}; 0.2 keeps the largest fifth")


def moved(problem: MergeProblem, change: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The base plus a change, in the base's precision."""
    return (problem.vectors.base + change).to(problem.vectors.base.dtype)


def task_weights(
    given: Sequence[float | int] | None, deltas: Float[Tensor, "T N"]
) -> Float[Tensor, " T"]:
    """One weight per task, beside the task vectors; None means 1 for every task.

    Raises ValueError unless there is one positive, finite number per task.
    """
    weights = [1.0] * len(deltas) if given is None else list(given)
    if len(weights) != len(deltas) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"give one positive, finite weight for each of {len(deltas)} tasks, got {weights}"
        )
    return deltas.new_tensor(weights)


# --- sums -----------------------------------------------------------------------------------------


@METHODS.register(
    "average",
    source="Wortsman et al. 2022",
    needs="nothing",
    cost="weights",
    symmetric=True,
    search=(),
)
def average(problem: MergeProblem) -> Float[Tensor, " N"]:
    """The mean of the experts: every coefficient 1/T (arXiv 2203.05482)."""
    num_tasks = len(problem.vectors.tasks)
    return problem.vectors.merge([1 / num_tasks] * num_tasks)


@METHODS.register(
    "task_arithmetic",
    source="Ilharco et al. 2023",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    search=tuple({"scale": scale} for scale in (0.3, 0.2, 0.4, 0.5, 0.7, 1.0)),
)
def task_arithmetic(problem: MergeProblem, *, scale: float = 0.3) -> Float[Tensor, " N"]:
    """Base plus `scale` times the sum of task vectors, for all tensors alike (arXiv 2212.04089)."""
    return problem.vectors.merge([scale] * len(problem.vectors.tasks))


@METHODS.register(
    "ties",
    source="Yadav et al. 2023",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    search=tuple({"scale": scale} for scale in (1.0, 0.5, 1.5, 2.0, 2.5, 3.0)),
)
def ties(
    problem: MergeProblem,
    *,
    keep: float = 0.2,
    scale: float = 1.0,
    coeffs: Sequence[float | int] | None = None,
    trim: str = "global",
    weights: str = "after",
    combine: str = "mean",
) -> Float[Tensor, " N"]:
    """Trim, elect sign, disjoint mean: `scale` times the mean of the entries that agree.

    Each task vector keeps its largest `keep` share of entries; every coordinate takes the sign of
    the sum of what is left, and the mean of the entries of that sign (arXiv 2306.01708). A sum of
    exactly zero elects no sign and changes nothing.

    trim: `global` ranks entries over the whole model (the paper, FusionBench), `tensor` within
    each tensor (mergekit). coeffs: a weight per task, None for 1. weights: `before` lets weighted
    entries vote and divides by the sum of weights that agree (mergekit); `after` lets all vote
    alike and divides by their number (PEFT). combine: `mean`, or `sum` without a division
    (FusionBench's setting, at scale 0.3). Public tools differ in more: all round the number of
    entries kept down, and FusionBench keeps one more; where a sum is zero mergekit elects plus and
    FusionBench the sign of the majority of coordinates. Raises ValueError unless keep is in (0, 1],
    coeffs are T positive numbers and the other options are among the values named here.
    """
    check_keep(keep)
    check_choice("trim", trim, ("global", "tensor"))
    check_choice("weights", weights, ("before", "after"))
    check_choice("combine", combine, ("mean", "sum"))
    deltas = dense(problem.vectors.deltas)
    weight = task_weights(coeffs, deltas)
    voice = weight if weights == "before" else torch.ones_like(weight)  # [T]
    whole = ((0, deltas.shape[1]),)
    trimmed = deltas.clone()
    for row in trimmed:  # one task at a time: a magnitude copy of all T would double the memory
        for start, stop in whole if trim == "global" else problem.vectors.layout.bounds:
            if start < stop:
                row[start:stop] = largest(row[start:stop], keep)
    agree = (trimmed * (voice @ trimmed).sign()) > 0  # [T, N]
    total = weight @ torch.where(agree, trimmed, 0)
    if combine == "mean":
        count = voice @ agree.to(voice.dtype)
        total = total / torch.where(count > 0, count, 1)
    return moved(problem, scale * total)


def thinned(
    row: Float[Tensor, " N"],
    drop: float,
    rescale: str,
    layout: Layout,
    generator: torch.Generator,
) -> Float[Tensor, " N"]:
    """One task vector with entries dropped at random and what is left scaled up."""
    stays = torch.rand(len(row), generator=generator) >= drop  # on the CPU: alike on any device
    left = row * stays.to(row.device)
    if rescale == "expected":
        left /= 1 - drop
    elif rescale == "l1":
        for start, stop in layout.bounds:
            size = left[start:stop].abs().sum()
            left[start:stop] *= row[start:stop].abs().sum() / torch.where(size > 0, size, 1)
    return left


@METHODS.register(
    "dare",
    source="Yu et al. 2024",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=False,  # which entries a task loses depends on its place
    between=False,  # what survives is scaled up tenfold
    search=(
        *({"scale": scale} for scale in (0.3, 0.5, 1.0)),
        {"drop": 0.5},
        {"then": "ties", "scale": 1.0},
        {"then": "ties", "scale": 0.5, "drop": 0.5},
    ),
)
def dare(
    problem: MergeProblem,
    *,
    drop: float = 0.9,
    scale: float = 0.3,
    then: str = "task_arithmetic",
    rescale: str = "expected",
    keep: float = 0.2,
    seed: int = 0,
) -> Float[Tensor, " N"]:
    """Drop entries of every task vector at random, scale up the rest, then merge what is left.

    Every entry of every tensor goes with probability `drop`, independently; the rest is divided by
    1 - drop, so that the expectation is the task vector itself (arXiv 2311.03099). then:
    `task_arithmetic`, or `ties` with its `keep`. rescale: `expected`; `l1` makes every tensor as
    long as before in the L1 norm (mergekit's default); `none`. mergekit's DARE-TIES trims no more:
    that is keep=1.0. FusionBench drops half. One draw alone is noisy: with drop=0.9 the variance of
    an entry is nine times its square. Raises ValueError unless drop is in [0, 1) and keep in
    (0, 1], and for an unknown name.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop}; 0.9 keeps a tenth of the entries")
    check_keep(keep)
    check_choice("then", then, ("task_arithmetic", "ties"))
    check_choice("rescale", rescale, ("expected", "l1", "none"))
    vectors, generator = problem.vectors, torch.Generator().manual_seed(seed)
    rows = [thinned(row, drop, rescale, vectors.layout, generator) for row in dense(vectors.deltas)]
    sparse = replace(problem, vectors=replace(vectors, deltas=torch.stack(rows)))
    if then == "ties":
        return ties(sparse, keep=keep, scale=scale)
    return task_arithmetic(sparse, scale=scale)


# --- layer scaling --------------------------------------------------------------------------------


def depths(layout: Layout) -> list[float]:
    """How deep each tensor lies in its stack of blocks: 0 for the first block, 1 for the last.

    A block is the first number in a name, its stack what stands before. Tensors outside all blocks
    lie at 0. Raises ValueError where no tensor is in a block.
    """
    found = [re.match(r"(?:(.*?)\.)?(\d+)\.", name) for name in layout.names]
    last: dict[str | None, int] = {}
    for match in filter(None, found):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    if not last:
        raise ValueError(
            f"lines scales by depth, and no tensor's name has a block number: {layout.names[:3]}; "
            "name blocks as in 'encoder.layer.0.dense.weight'"
        )
    return [int(match[2]) / max(last[match[1]], 1) if match else 0.0 for match in found]


@METHODS.register(
    "lines",
    source="Wang et al. 2025",
    needs="validation labels, for the scale",
    cost="weights",
    symmetric=True,
    between=False,  # alone, an expert's last block is scaled by 1 + beta
    search=tuple({"beta": beta} for beta in (0.5, 0.2, 0.3, 0.4, 0.7, 1.0)),
)
def lines(
    problem: MergeProblem,
    *,
    rule: str = "task_arithmetic",
    options: Mapping[str, object] | None = None,
    alpha: float | None = None,
    beta: float = 0.5,
) -> Float[Tensor, " N"]:
    """Any rule's merge, its change scaled by depth: alpha in the first block, linearly more after.

    Block l of L receives alpha + beta l / (L - 1) times what the rule changes; tensors outside the
    blocks, such as embeddings and a final norm, receive alpha (arXiv 2410.17146). rule: a method
    that returns parameters, called with `options`, and at scale 1 where it has a scale and none is
    given. alpha: None for |sum of task vectors|_1 / |the rule's change|_1 / T, which is 1/T for
    task arithmetic. beta is to be chosen on validation rows. For one expert the paper takes a small
    alpha and beta = 1 - alpha. Data is needed where the rule needs some. Raises
    ValueError for an unknown rule, one without a single vector, itself, and a model without blocks.
    """
    from divmerge_core.methods import options_of  # defined after the methods are imported

    function = METHODS[rule]
    if rule == "lines" or METHODS.facts[rule].get("returns") == "predictor":
        raise ValueError(f"rule must be another method that returns parameters, got {rule!r}")
    share, vectors = depths(problem.vectors.layout), problem.vectors
    given = {"scale": 1.0} if "scale" in options_of(rule) else {}
    change = function(problem, **{**given, **(options or {})}) - vectors.base
    if alpha is None:
        whole, size = dense(vectors.deltas).sum(dim=0).abs().sum(), change.abs().sum()
        alpha = float(whole / torch.where(size > 0, size, 1)) / len(vectors.tasks)
    for (start, stop), depth in zip(vectors.layout.bounds, share, strict=True):
        change[start:stop] *= alpha + beta * depth
    return moved(problem, change)
