"""Pools in which some experts are corrupted, and how well different methods detect them.

A pool has T honest experts under their tasks' names, and corrupted ones beside them under names of
their own. Merges of it are scored on the honest tasks.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import validation_anp
from divmerge_book.studies.evaluator import accuracies, scores_by_task
from divmerge_book.studies.study import study
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.methods import METHODS
from divmerge_core.registry import Registry

CORRUPTIONS = Registry("corruption")  # (task vectors [T, N], strangers [T, N], t, generator) -> [N]
Values = np.ndarray | pd.Series | Tensor  # [M]
Score = Callable[[tuple[bool, ...]], float]  # of the average of the chosen members
NOISE = 2.0  # norm of the noise, in units of the task vector's


@CORRUPTIONS.register("noise", label="noise")
def noise(deltas: Tensor, strangers: Tensor, task: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise on the whole task vector, with NOISE times its norm."""
    drawn = torch.randn(deltas.shape[1], generator=generator).to(deltas)
    scale = deltas[task].square().sum().sqrt() / drawn.square().sum().sqrt()
    return deltas[task] + NOISE * scale * drawn


@CORRUPTIONS.register("flip", label="sign flip")
def flip(deltas: Tensor, strangers: Tensor, task: int, generator: torch.Generator) -> Tensor:
    """The negated task vector."""
    return -deltas[task]


@CORRUPTIONS.register("label", label="deceptive label")
def label(deltas: Tensor, strangers: Tensor, task: int, generator: torch.Generator) -> Tensor:
    """Another task's expert under this task's name."""
    others = [t for t in range(len(deltas)) if t != task]
    return strangers[others[int(torch.randint(len(others), (1,), generator=generator))]]


@dataclass(frozen=True)
class Pool:
    """Honest and corrupted experts of one experiment; `bad` marks the corrupted ones."""

    experiment: Experiment
    problem: MergeProblem
    bad: Bool[Tensor, " M"]

    def average(self, chosen: Sequence[bool]) -> Float[Tensor, " N"]:
        return self.problem.vectors.merge([c / sum(chosen) for c in chosen])


def contaminate(
    experiment: Experiment, kind: str, share: float, *, strangers: TaskVectors, seed: int = 0
) -> Pool:
    """The experiment's experts plus corrupted ones, about `share`, in [0, 1), of the pool.

    T honest experts get round(T share / (1 - share)) corrupted ones, which claim the tasks in turn,
    in random order, have no inputs, and use the head of the task they claim. strangers: experts'
    task vectors from another seed, for deceptive labels.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}; 0.5 corrupts every second member")
    problem, vectors = experiment.problem, experiment.problem.vectors
    honest = len(vectors.tasks)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(honest, generator=generator).tolist()
    claims = [order[n % honest] for n in range(round(honest * share / (1 - share)))]
    deltas, other = dense(vectors.deltas), dense(strangers.deltas)
    made = [CORRUPTIONS[kind](deltas, other, task, generator) for task in claims]
    names = [f"{vectors.tasks[task]}, {kind} {n}" for n, task in enumerate(claims)]
    rows, tasks = torch.stack([*deltas, *made]), (*vectors.tasks, *names)
    heads = (*range(honest), *claims)

    def forward(parameters, pairs) -> list[Tensor]:
        return problem.forward(parameters, [(heads[member], batch) for member, batch in pairs])

    every = TaskVectors(vectors.layout, tasks, vectors.base, rows)
    batches = [*problem.batches, *([] for _ in claims)]
    pool = MergeProblem(every, batches, forward, problem.module)
    return Pool(experiment, pool, torch.arange(len(heads)) >= honest)


def auc(values: Values, bad: Values) -> float:
    """Probability that a good value exceeds a bad one, ties counting half; NaN if none is bad."""
    values, bad = np.asarray(values), np.asarray(bad, dtype=bool)
    if bad.all() or not bad.any():
        return math.nan
    found = stats.mannwhitneyu(values[~bad], values[bad], method="asymptotic").statistic
    return float(found / (bad.sum() * (~bad).sum()))


def cosine(deltas: Float[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """Cosine of every task vector with the mean of the others."""
    gram = (deltas @ deltas.T).double()
    own, with_all = gram.diagonal(), gram.sum(1)
    rest = (gram.sum() - 2 * with_all + own).clamp(min=1e-300).sqrt()  # norm of the others' sum
    return (with_all - own) / (own.sqrt() * rest)


def norm(deltas: Float[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """Minus |log| of the ratio of a task vector's norm to the median norm; at most 0."""
    norms = torch.stack([row.square().sum().sqrt() for row in deltas]).double()
    return -(norms / norms.median()).log().abs()


def subset_score(pool: Pool) -> Score:
    """ANP of an average of members on the honest tasks' validation rows, once for each subset."""
    return lru_cache(None)(lambda chosen: validation_anp(pool.experiment, pool.average(chosen)))


def leave_one_out(score: Score, count: int) -> Float[Tensor, " M"]:
    """Decrease of the validation score when a member is left out: M + 1 scores."""
    whole = score((True,) * count)
    drops = [whole - score(tuple(n != left for n in range(count))) for left in range(count)]
    return torch.tensor(drops, dtype=torch.float64)


def policy(
    pool: Pool, score: Score, *, steps: int, seed: int
) -> tuple[Float[Tensor, " M"], list[bool], list[float]]:
    """`selection_policy` on the pool: its weight of every member, the chosen ones, the rewards.

    It learns on unit vectors, of which an average is the coefficients: only the subsets that it
    scores are merged from the real pool.
    """
    names, trust, rewards = pool.problem.vectors.tasks, [], []
    eye = torch.eye(len(names), dtype=torch.float64)
    layout = Layout(("coefficients",), ((len(names),),))
    units = TaskVectors(layout, names, torch.zeros_like(eye[0]), eye)
    problem = MergeProblem(units, [[] for _ in names], lambda parameters, pairs: [])

    def reward(coefficients: Float[Tensor, " M"]) -> float:
        rewards.append(score(tuple((coefficients > 0).tolist())))
        return rewards[-1]

    options = {"steps": steps, "seed": seed, "on_trust": trust.append, "progress": False}
    chosen = METHODS["selection_policy"](problem, score=reward, **options)
    return trust[0], (chosen > 0).tolist(), rewards


def shuffled(rewards: Sequence[float], seed: int) -> Callable[[object], float]:
    """A score that returns these rewards in random order, whatever was merged."""
    left = list(rewards)
    random.Random(seed).shuffle(left)
    return lambda chosen: left.pop()


def detection(
    experiment: Experiment,
    *,
    strangers: TaskVectors,
    seed: int,
    kind: str,
    share: float,
    steps: int,
) -> list[dict]:
    """Every method of choosing members, on one corrupted pool; the columns of `corrupted_pools`.

    Rules, fixed before any pool was scored: leave one out keeps members whose removal does not
    raise the score; cosine, at least half the median; norm, at most 1.5 times off the median.
    """
    kind = kind if share else next(iter(CORRUPTIONS))
    pool = contaminate(experiment, kind, share, strangers=strangers, seed=seed)
    deltas, bad, rows = dense(pool.problem.vectors.deltas), pool.bad.numpy(), []

    def add(method: str, chosen: object, values: Tensor | None = None, **cost: int) -> None:
        chosen = np.asarray(chosen, dtype=bool)
        chosen = (chosen if chosen.any() else ~chosen).tolist()
        row = {"share": bad.mean().item(), "members": len(bad), "method": method}
        row |= {"auc": math.nan if values is None else auc(values, bad), "mass": math.nan}
        if method in ("policy", "shuffled"):
            row["mass"] = (values[pool.bad].sum() / values.sum()).item()
        row |= {"kept": bad[chosen].mean().item(), "calls": 0, "scored": 0, **cost}
        found = accuracies(experiment, pool.average(chosen))
        rows.append(row | scores_by_task(experiment, found))

    add("all", bad | True)
    add("oracle", ~bad)
    angles, norms = cosine(deltas), norm(deltas)
    add("cosine", angles >= angles.median() / 2, angles)
    add("norm", norms >= -math.log(1.5), norms)
    drops = leave_one_out(score := subset_score(pool), len(bad))
    add("leave_one_out", drops >= 0, drops, calls=1 + len(bad), scored=score.cache_info().misses)
    trust, chosen, rewards = policy(pool, score := subset_score(pool), steps=steps, seed=seed)
    add("policy", chosen, trust, calls=len(rewards), scored=score.cache_info().misses)
    for number in range(3):
        control = shuffled(rewards, number)
        trust, chosen, _ = policy(pool, control, steps=steps, seed=seed + 1 + number)
        add("shuffled", chosen, trust, calls=len(rewards))
    return rows


def corrupted_pools(
    experiments: Mapping[int, tuple[Experiment, Experiment]],
    *,
    shares: Sequence[float],
    steps: int,
) -> pd.DataFrame:
    """Detection of corrupted members, by kind, share and seed.

    experiments: by seed, one, and one of other experts, the strangers. shares: requested. Columns:
    seed, kind (`none` without corruption), share (of the pool itself), members, method; auc, of
    ranking honest above corrupted members; mass, the share of a policy's weight on corrupted
    members; kept, the contamination: the share of corrupted ones among those merged; calls of the
    validation score, and scored, how many subsets were evaluated; `scores_by_task`.
    """
    jobs = [{"kind": "none", "share": 0.0}] if 0.0 in shares else []
    jobs += [{"kind": kind, "share": share} for share in shares if share for kind in CORRUPTIONS]
    tables = []
    for seed, (experiment, other) in experiments.items():
        measure = partial(detection, strangers=other.problem.vectors)
        tables.append(study(measure, {seed: experiment}, jobs, keys=other.digest, steps=steps))
    return pd.concat(tables, ignore_index=True)
