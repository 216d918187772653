"""Merging methods whose models stay on disk: a tensor at a time, in blocks of it.

A rule gives what the method of the same name in METHODS gives in memory. It needs the largest of
the tensors, and not the models, in memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from inspect import unwrap
from types import SimpleNamespace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from divmerge_book.models.method_options import check_options
from divmerge_core.checkpoints import MergeRecord
from divmerge_core.checkpoints.safetensors_io import Stored, StoredModel
from divmerge_core.checkpoints.shards import ahead
from divmerge_core.checkpoints.tensor_sources import Block, Rule, blocks, tensors_of
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import task_weights
from divmerge_core.methods.spherical import arc
from divmerge_core.registry import Registry

RULES = Registry("method that merges from disk to disk")
HALF, LOW = 16, 0xFFFF  # bits of a float32's halves
READ = 1 << 19  # numbers counted at a time

Tensors = Sequence[tuple[str, Stored, Sequence[Stored]]]  # as `tensors_of` lists them
Change = Callable[[slice, Tensor], Tensor]  # (place, deltas [T, n]) -> what is left of them
Thin = Callable[[str, Tensor, Sequence[Tensor]], Change]  # (name, the base's, every expert's)


def rule_of(record: MergeRecord) -> Rule:
    """The rule of a record's method and options.

    Raises ValueError for a method without one, and for options that the method itself refuses.
    """
    rule = RULES[record.method]
    check_options(record.method, record.tasks, record.options)
    return rule(record, **record.options)


# --- sums -----------------------------------------------------------------------------------------
def weighted(weights: Sequence[float], thin: Thin | None = None) -> Rule:
    """theta_0 + sum_t w_t tau_t, or what is left of the task vectors."""

    def rule(name: str, origin: Tensor, experts: Sequence[Tensor]) -> Block:
        change = thin(name, origin, experts) if thin else unchanged
        row = torch.tensor(weights)
        return lambda place, base, deltas: base.addmv_(change(place, deltas).T, row.to(deltas))

    return rule


def unchanged(place: slice, deltas: Tensor) -> Tensor:
    return deltas


@RULES.register("average")
def average(record: MergeRecord) -> Rule:
    return weighted([1 / len(record.tasks)] * len(record.tasks))


@RULES.register("task_arithmetic")
def task_arithmetic(record: MergeRecord, *, scale: float = 0.3) -> Rule:
    return weighted([scale] * len(record.tasks))


# --- TIES -----------------------------------------------------------------------------------------
def tally(
    deltas: Iterator[Float[Tensor, "T n"]], upper: Int[Tensor, " T"] | None
) -> Int[Tensor, "T K"]:
    """How often every upper half of a float32's bits occurs among the magnitudes of a row.

    upper: counts the lower halves of the magnitudes that have these upper ones.
    """
    counts = 0
    for block in deltas:
        bits = block.abs().float().view(torch.int32)
        halves = [row >> HALF for row in bits]
        if upper is not None:
            rows = zip(bits, halves, upper, strict=True)
            halves = [row[half == wanted] & LOW for row, half, wanted in rows]
        counts += torch.stack([torch.bincount(half, minlength=LOW + 1) for half in halves])
    return counts


def picked(
    counts: Int[Tensor, "T K"], rank: Int[Tensor, " T"]
) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
    """The bin that holds every row's rank-th largest entry, and its rank within this bin."""
    reached = counts.flip(1).cumsum(1)
    place = (reached < rank[:, None]).sum(1, keepdim=True)
    bins = counts.shape[1] - 1 - place
    above = reached.gather(1, place) - counts.gather(1, bins)
    return bins[:, 0], rank - above[:, 0]


def cutoffs(
    counted: Callable[[Tensor | None], Int[Tensor, "T K"]], rank: Int[Tensor, " T"]
) -> Float[Tensor, "T 1"]:
    """The rank-th largest magnitude of every row, in two passes: `tally` without and with upper.

    A float32 without a sign is ordered as its bits are, so this is exact.
    """
    upper, left = picked(counted(None), rank)
    lower, _ = picked(counted(upper), left)
    return (upper << HALF | lower).int().view(torch.float32)[:, None]


def rank_of(keep: float, count: int, rows: int) -> Int[Tensor, " T"]:
    """How many of so many entries a share of them is: the nearest whole number, at least one."""
    return torch.full((rows,), max(1, round(keep * count)))


def left_of(
    thin: Thin | None, name: str, base: Tensor, experts: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Every block of a tensor's task vectors, or of what is left of them."""
    change = thin(name, base, experts) if thin else unchanged
    for place, _, deltas in blocks(base, experts, READ):
        yield change(place, deltas)


@RULES.register("ties")
def ties(record: MergeRecord, *, thin: Thin | None = None, **options: object) -> Rule:
    options = SimpleNamespace(**unwrap(METHODS["ties"]).__kwdefaults__ | options)
    tasks, tensors = len(record.tasks), tensors_of(StoredModel.at(record.base), record, None)
    weight = task_weights(options.coeffs, torch.ones(tasks, 1))
    votes = weight if options.weights == "before" else torch.ones_like(weight)

    def of_tensor(name: str, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        return cutoffs(
            lambda upper: tally(left_of(thin, name, base, experts), upper),
            rank_of(options.keep, len(base), tasks),
        )

    def of_all(upper: Tensor | None) -> Tensor:
        def job(name: str, base: Stored, experts: Sequence[Stored]) -> Callable[[], Tensor]:
            theirs = [expert.mapped for expert in experts]
            return lambda: tally(left_of(thin, name, base.mapped(), [t() for t in theirs]), upper)

        return sum(ahead([job(*entry) for entry in tensors if entry[1].size]))

    whole = None
    if options.trim == "global":
        count = sum(base.size for _, base, _ in tensors)
        whole = cutoffs(of_all, rank_of(options.keep, count, tasks))

    def rule(name: str, origin: Tensor, experts: Sequence[Tensor]) -> Block:
        least = whole if whole is not None or not len(origin) else of_tensor(name, origin, experts)
        change = thin(name, origin, experts) if thin else unchanged

        def block(place: slice, base: Tensor, deltas: Tensor) -> Tensor:
            left = change(place, deltas)
            left.masked_fill_(left.abs() < least, 0)
            agree = ~(left * (votes.to(left) @ left).sign() <= 0)  # NaN is refused, not left out
            total = weight.to(left) @ left.masked_fill_(~agree, 0)
            if options.combine == "mean":
                total /= (votes.to(left) @ agree.to(left)).clamp(min=torch.finfo(left.dtype).tiny)
            return total.mul_(options.scale).add_(base)

        return block

    return rule


# --- DARE -----------------------------------------------------------------------------------------
def kept(count: int, drop: float, generator: torch.Generator) -> Bool[Tensor, " n"]:
    """torch.rand(count, generator=generator) >= drop, in half its time: from the same bits."""
    pairs = torch.empty(count // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    least = math.ceil(float(torch.tensor(drop)) * 2**24)
    stays = pairs.view(torch.int32).bitwise_and_(2**24 - 1) >= least
    halves = stays.view(torch.int16)  # the upper half of a pair was drawn first
    halves.copy_(halves << 8 | halves >> 8)
    last = torch.rand(count % 2, generator=generator) >= drop
    return torch.cat([stays, last]) if len(last) else stays


def in_order(tensors: Tensors, tasks: int, seed: int) -> Callable[[str], list[torch.Generator]]:
    """Generators for a tensor as `dare` comes to it: task after task, each through all tensors."""
    generator = torch.Generator().manual_seed(seed)
    states: dict[str, list[Tensor]] = {name: [] for name, *_ in tensors}
    for task in range(tasks):
        for name, base, _ in tensors:
            states[name].append(generator.get_state())
            if (task, name) != (tasks - 1, tensors[-1][0]):
                for start in range(0, base.size, READ):
                    kept(min(READ, base.size - start), 0.0, generator)
    return lambda name: [torch.Generator().set_state(state) for state in states[name]]


def as_long(change: Change, origin: Tensor, experts: Sequence[Tensor]) -> Change:
    """The change, scaled up so that every task vector is as long as before in the L1 norm."""
    sums = torch.zeros(2, len(experts), dtype=torch.float64)
    for place, _, deltas in blocks(origin, experts):
        sums[0] += deltas.abs_().sum(1)
        sums[1] += change(place, deltas).sum(1)
    factor = torch.where(sums[1] > 0, sums[0] / sums[1], 1)[:, None]
    return lambda place, deltas: change(place, deltas).mul_(factor.to(deltas))


def drop_at_random(
    generators: Callable[[str], list[torch.Generator]], drops: Sequence[float], rescale: str
) -> Thin:
    """Task vectors with a share of entries dropped at random and what is left scaled up.

    drops, rescale: see `dare`.
    """

    def thin(name: str, origin: Tensor, experts: Sequence[Tensor]) -> Change:
        stays = torch.empty(len(experts), len(origin), dtype=torch.uint8)  # floats come of it fast
        for row, drop, generator in zip(stays, drops, generators(name), strict=True):
            for part in row.split(READ):
                part.copy_(kept(len(part), drop, generator))

        def change(place: slice, deltas: Tensor) -> Tensor:
            return deltas.mul_(stays[:, place].to(deltas))

        if rescale == "l1":
            return as_long(change, origin, experts)
        left = 1 - torch.tensor(drops)[:, None] if rescale == "expected" else torch.ones(1)
        return lambda place, deltas: change(place, deltas).div_(left.to(deltas))

    return thin


@RULES.register("dare")
def dare(
    record: MergeRecord,
    *,
    drop: float = 0.9,
    scale: float = 0.3,
    then: str = "task_arithmetic",
    rescale: str = "expected",
    keep: float = 0.2,
    seed: int = 0,
) -> Rule:
    tasks = len(record.tasks)
    generators = in_order(tensors_of(StoredModel.at(record.base), record, None), tasks, seed)
    thin = drop_at_random(generators, [drop] * tasks, rescale)
    if then == "ties":
        return ties(record, keep=keep, scale=scale, thin=thin)
    return weighted([scale] * tasks, thin)


# --- SLERP ----------------------------------------------------------------------------------------
def spherical(share: Callable[[str], float], of_zero: float = 1.0) -> Rule:
    """Each tensor on the arc from the first expert to the second, by its own share.

    of_zero: the cosine of the angle where one of them is zero.
    """

    def rule(name: str, origin: Tensor, experts: Sequence[Tensor]) -> Block:
        gram = torch.zeros(2, 2, dtype=torch.float64)
        for _, base, deltas in blocks(origin, experts):
            ends = deltas.add_(base)
            gram += ends @ ends.T
        lengths = gram.diagonal().sqrt()
        cosine = float(gram[0, 1] / lengths.prod()) if lengths.all() else of_zero
        ways = torch.tensor(arc(min(1.0, max(-1.0, cosine)), share(name)))
        both = float(ways.sum())
        return lambda place, base, deltas: base.addmv_(deltas.T, ways.to(deltas), beta=both)

    return rule


@RULES.register("slerp")
def slerp(record: MergeRecord, *, t: float = 0.5) -> Rule:
    return spherical(lambda name: t)
