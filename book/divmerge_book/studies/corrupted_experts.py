"""Pools in which some experts are corrupted, and the ways to find them.

A pool is a MergeProblem: T honest experts under their tasks' names, and corrupted ones beside them
under names of their own. Merges of it are scored on the honest tasks.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import validation_anp
from divmerge_book.studies.continual_merging import accuracies, by_task, expert_accuracies
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.methods import METHODS
from divmerge_core.registry import Registry

CORRUPTIONS = Registry("corruption")  # (task vectors [T, N], strangers [T, N], t, generator) -> [N]
POLICIES = ("policy", "shuffled")
NOISE = 2.0  # length of the noise, in units of the task vector's


@CORRUPTIONS.register("noise", label="noise")
def noise(deltas: Tensor, strangers: Tensor, task: int, generator: torch.Generator) -> Tensor:
    """A damaged checkpoint: Gaussian noise on it all, NOISE times as long as the task vector."""
    drawn = torch.randn(deltas.shape[1], generator=generator).to(deltas)
    length = deltas[task].square().sum().sqrt() / drawn.square().sum().sqrt()
    return deltas[task] + NOISE * length * drawn


@CORRUPTIONS.register("flip", label="sign flip")
def flip(deltas: Tensor, strangers: Tensor, task: int, generator: torch.Generator) -> Tensor:
    """A task vector of the wrong sign: the base minus what was learned."""
    return -deltas[task]


@CORRUPTIONS.register("label", label="deceptive label")
def label(deltas: Tensor, strangers: Tensor, task: int, generator: torch.Generator) -> Tensor:
    """Another task's expert under this task's name: healthy, but not what it is said to be."""
    others = [t for t in range(len(deltas)) if t != task]
    return strangers[others[int(torch.randint(len(others), (1,), generator=generator))]]


@dataclass(frozen=True)
class Pool:
    """Honest and corrupted experts of one bench; `bad` marks the corrupted ones."""

    bench: Experiment
    problem: MergeProblem
    bad: Bool[Tensor, " M"]


def poisoned(
    bench: Experiment, kind: str, share: float, *, strangers: TaskVectors, seed: int = 0
) -> Pool:
    """The bench's experts and as many corrupted ones as bring their part of the pool near `share`.

    T honest experts get round(T share / (1 - share)) corrupted ones, so the true share depends on
    T: where 0.4 is asked for, it is 3 of 7 or 5 of 13. Corrupted ones claim the tasks in turn, in
    random order. strangers: task vectors of experts that were trained from another seed, for
    deceptive labels: a copy of one in the pool would only weigh it double. A corrupted expert has
    no inputs, and answers with the head of the task it claims. Raises ValueError unless share is in
    [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}; 0.5 corrupts every second member")
    problem, tasks = bench.problem, bench.problem.vectors.tasks
    count = round(len(tasks) * share / (1 - share))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tasks), generator=generator).tolist()
    claims = [order[n % len(tasks)] for n in range(count)]
    deltas, other = dense(problem.vectors.deltas), dense(strangers.deltas)
    made = [CORRUPTIONS[kind](deltas, other, task, generator) for task in claims]
    names = (*tasks, *(f"{tasks[task]}, {kind} {n}" for n, task in enumerate(claims)))
    vectors = TaskVectors(
        problem.vectors.layout, names, problem.vectors.base, torch.stack([*deltas, *made])
    )
    heads = (*range(len(tasks)), *claims)

    def forward(parameters, pairs) -> list[Tensor]:
        return problem.forward(parameters, [(heads[member], batch) for member, batch in pairs])

    batches = [*problem.batches, *([] for _ in claims)]
    bad = torch.tensor([n >= len(tasks) for n in range(len(names))])
    return Pool(bench, MergeProblem(vectors, batches, forward, problem.module), bad)


def auc(values: Float[Tensor, " M"], bad: Bool[Tensor, " M"]) -> float:
    """Chance that an honest expert ranks above a corrupted one, ties counting half; NaN if none."""
    gaps = values[~bad][:, None] - values[bad][None]
    return ((gaps > 0).double() + (gaps == 0).double() / 2).mean().item()


# --- what finds them without a merge --------------------------------------------------------------


def cosine(deltas: Float[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """Cosine of every task vector to the mean of the others."""
    gram = (deltas @ deltas.T).double()
    own, with_all = gram.diagonal(), gram.sum(1)
    rest = (gram.sum() - 2 * with_all + own).clamp(min=1e-300).sqrt()  # length of the others' sum
    return (with_all - own) / (own.sqrt() * rest)


def norm(deltas: Float[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """How near a task vector's length is to the median one: minus |log ratio|, at most 0."""
    lengths = torch.stack([row.square().sum().sqrt() for row in deltas]).double()
    return -(lengths / lengths.median()).log().abs()


@dataclass
class Judge:
    """Scores averages of some of a pool's members, each choice of members once.

    calls: how often the validation score was asked; scored: how often it had to be worked out.
    """

    pool: Pool
    known: dict[tuple, float] = field(default_factory=dict)
    tested: dict[tuple, list[float]] = field(default_factory=dict)
    calls: int = 0

    @property
    def scored(self) -> int:
        return len(self.known)

    def merged(self, chosen: Sequence[bool]) -> Float[Tensor, " N"]:
        return self.pool.problem.vectors.merge([c / sum(chosen) for c in chosen])

    def score(self, chosen: Sequence[bool]) -> float:
        """ANP of the average on the honest tasks' validation rows."""
        key = tuple(map(bool, chosen))
        self.calls += 1
        if key not in self.known:
            self.known[key] = validation_anp(self.pool.bench, self.merged(key))
        return self.known[key]

    def test(self, chosen: Sequence[bool]) -> dict:
        """The average on the honest tasks' test rows: anp, and `arrivals.by_task`."""
        key, bench = tuple(map(bool, chosen)), self.pool.bench
        alone = expert_accuracies(bench)
        if key not in self.tested:
            self.tested[key] = accuracies(bench, self.merged(key), list(alone))
        found, own = self.tested[key], list(alone.values())
        anp = sum(value / expert for value, expert in zip(found, own, strict=True)) / len(own)
        return {"anp": anp, **by_task(bench, found)}


def leave_one_out(judge: Judge) -> Float[Tensor, " M"]:
    """How much the validation score falls when a member is left out: M + 1 scores."""
    count = len(judge.pool.bad)
    whole = judge.score([True] * count)
    drops = [whole - judge.score([n != left for n in range(count)]) for left in range(count)]
    return torch.tensor(drops, dtype=torch.float64)


# --- the learned policy ---------------------------------------------------------------------------


def unit_pool(names: Sequence[str]) -> MergeProblem:
    """A problem whose task vectors are the unit vectors: merged parameters are coefficients.

    An average of a pool is linear in them, so a policy can be learned on this one, and only the
    choices that it scores are merged from the real one.
    """
    eye = torch.eye(len(names), dtype=torch.float64)
    layout = Layout(("coefficients",), ((len(names),),))
    vectors = TaskVectors(layout, tuple(names), eye[0] * 0, eye)
    return MergeProblem(vectors, [[] for _ in names], lambda parameters, pairs: [])


def policy(
    pool: Pool, score: Callable[[list[bool]], float], *, steps: int, seed: int
) -> tuple[Float[Tensor, " M"], list[bool], list[float]]:
    """`selection_policy` on the pool: its trust in every member, whom it merges, the rewards."""
    trust, rewards = [], []

    def reward(coefficients: Float[Tensor, " M"]) -> float:
        rewards.append(score((coefficients > 0).tolist()))
        return rewards[-1]

    chosen = METHODS["selection_policy"](
        unit_pool(pool.problem.vectors.tasks),
        score=reward,
        steps=steps,
        seed=seed,
        trusted=trust.append,
        progress=False,
    )
    return trust[0], (chosen > 0).tolist(), rewards


def shuffled(rewards: Sequence[float], seed: int) -> Callable[[object], float]:
    """A score that pays out these rewards in random order, whatever was merged."""
    left = list(rewards)
    random.Random(seed).shuffle(left)
    return lambda chosen: left.pop()


# --- all of them on one pool ----------------------------------------------------------------------


def compared(pool: Pool, *, steps: int, controls: int = 3, seed: int = 0) -> list[dict]:
    """Every way to choose on one pool: method, auc, mass, kept, calls, scored, `Judge.test`.

    auc: of ranking honest over corrupted members. mass: share of a policy's trust that corrupted
    members hold. kept: share of those merged that are corrupted.
    Rules, fixed before any pool was scored: leave one out keeps whom the score does not fall with;
    cosine, at least half the median; norm, at most 1.5 times off the median; the policy its own.
    """
    judge, deltas = Judge(pool), dense(pool.problem.vectors.deltas)
    everyone, rows = [True] * len(pool.bad), []

    def add(method: str, values: Tensor | None, chosen: Sequence[bool], judged: Mapping) -> None:
        chosen = chosen if any(chosen) else everyone
        row = {"method": method, "auc": math.nan, "mass": math.nan, **judged}
        if values is not None and pool.bad.any():
            row["auc"] = auc(values, pool.bad)
        if method in POLICIES:
            row["mass"] = (values[pool.bad].sum() / values.sum()).item()
        row["kept"] = sum(b for b, c in zip(pool.bad.tolist(), chosen, strict=True) if c)
        row["kept"] /= sum(chosen)
        rows.append({**row, **judge.test(chosen)})

    free = {"calls": 0, "scored": 0}
    add("all", None, everyone, free)
    add("oracle", None, (~pool.bad).tolist(), free)
    values = cosine(deltas)
    add("cosine", values, (values >= values.median() / 2).tolist(), free)
    values = norm(deltas)
    add("norm", values, (values >= -math.log(1.5)).tolist(), free)
    values = leave_one_out(judge)
    spent = {"calls": judge.calls, "scored": judge.scored}
    add("leave_one_out", values, (values >= 0).tolist(), spent)
    learner = Judge(pool)
    values, chosen, rewards = policy(pool, learner.score, steps=steps, seed=seed)
    add("policy", values, chosen, {"calls": learner.calls, "scored": learner.scored})
    for number in range(controls):
        score = shuffled(rewards, number)
        values, chosen, _ = policy(pool, score, steps=steps, seed=seed + 1 + number)
        add("shuffled", values, chosen, {"calls": len(rewards), "scored": 0})
    return rows


def found_in(
    bench: Experiment, strangers: Experiment, kind: str, share: float, *, steps: int, seed: int
) -> list[dict]:
    """What every way to choose members finds in one corrupted pool; see `compared`."""
    chosen = kind if share else next(iter(CORRUPTIONS))
    pool = poisoned(bench, chosen, share, strangers=strangers.problem.vectors, seed=seed)
    found = compared(pool, steps=steps, seed=seed)
    return [{"members": len(pool.bad), **row} for row in found]


def pools(
    benches: Mapping[int, tuple[Experiment, Experiment]],
    *,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    shares: Sequence[float] = (0.0, 0.2, 0.4, 0.6),
    steps: int = 200,
) -> pd.DataFrame:
    """`compared` on pools of every kind and corrupted share, over seeds.

    benches: by seed, the bench, and one of other experts, the strangers. shares: asked for, of
    corrupted members. Columns: seed, kind, share (that of the pool itself), members and those of
    `compared`. A pool without corruption has the kind `none`.
    """
    corrupt = [(kind, share) for share in shares if share for kind in kinds]
    jobs = [*([("none", 0.0)] if 0.0 in shares else []), *corrupt]
    rows = []
    jobs = [(seed, kind, share) for seed in benches for kind, share in jobs]
    for seed, kind, share in (bar := tqdm(jobs, "pools", leave=False)):
        bar.set_postfix_str(f"seed {seed}, {kind}, about {share:.0%}")
        bench, strangers = benches[seed]
        find = partial(found_in, bench, strangers, kind, share, steps=steps, seed=seed)
        honest = len(bench.problem.vectors.tasks)
        for row in kept(bench, find, "pool", kind, share, strangers.digest, steps, seed):
            true = {"share": (row["members"] - honest) / row["members"]}
            rows.append({"seed": seed, "kind": kind, **true, **row})
    return pd.DataFrame(rows)
