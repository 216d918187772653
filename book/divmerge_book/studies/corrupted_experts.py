"""Pools in which some experts are corrupted, and how well different methods detect them.

A pool is a MergeProblem: T honest experts under their tasks' names, and corrupted ones beside them
under names of their own. Merges of it are scored on the honest tasks.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

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


def contaminate(
    experiment: Experiment, kind: str, share: float, *, strangers: TaskVectors, seed: int = 0
) -> Pool:
    """The experiment's experts plus corrupted ones, which are about `share` of the pool.

    T honest experts get round(T share / (1 - share)) corrupted ones: a share of 0.4 gives 3 of 7 or
    5 of 13. Corrupted ones claim the tasks in turn, in random order. strangers: task vectors of
    experts trained from another seed, for deceptive labels. A corrupted expert has no inputs and
    uses the head of the task it claims. Raises ValueError unless share is in [0, 1).
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
    pool = TaskVectors(
        vectors.layout, (*vectors.tasks, *names), vectors.base, torch.stack([*deltas, *made])
    )
    heads = (*range(honest), *claims)

    def forward(parameters, pairs) -> list[Tensor]:
        return problem.forward(parameters, [(heads[member], batch) for member, batch in pairs])

    batches = [*problem.batches, *([] for _ in claims)]
    bad = torch.arange(len(heads)) >= honest
    return Pool(experiment, MergeProblem(pool, batches, forward, problem.module), bad)


def auc(values: Values, bad: Values) -> float:
    """Probability that a good value exceeds a bad one, ties counting half; NaN if none is bad."""
    values, bad = np.asarray(values), np.asarray(bad, dtype=bool)
    if bad.all() or not bad.any():
        return math.nan
    found = stats.mannwhitneyu(values[~bad], values[bad], method="asymptotic").statistic
    return float(found / (bad.sum() * (~bad).sum()))


# --- detection ------------------------------------------------------------------------------------


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


@dataclass
class SubsetScore:
    """Scores averages of subsets of a pool's members.

    calls: how often the validation score was requested; scored: how many subsets were evaluated.
    """

    pool: Pool
    known: dict[tuple, float] = field(default_factory=dict)
    calls: int = 0

    @property
    def cost(self) -> dict[str, int]:
        return {"calls": self.calls, "scored": len(self.known)}

    def merged(self, chosen: Sequence[bool]) -> Float[Tensor, " N"]:
        return self.pool.problem.vectors.merge([c / sum(chosen) for c in chosen])

    def __call__(self, chosen: Sequence[bool]) -> float:
        """ANP of the average on the honest tasks' validation rows."""
        key = tuple(map(bool, chosen))
        self.calls += 1
        if key not in self.known:
            self.known[key] = validation_anp(self.pool.experiment, self.merged(key))
        return self.known[key]

    def test(self, chosen: Sequence[bool]) -> dict:
        """`scores_by_task` of the average on the honest tasks' test rows."""
        experiment = self.pool.experiment
        return scores_by_task(experiment, accuracies(experiment, self.merged(chosen)))


def leave_one_out(score: Callable[[list[bool]], float], count: int) -> Float[Tensor, " M"]:
    """Decrease of the validation score when a member is left out: M + 1 scores."""
    whole = score([True] * count)
    drops = [whole - score([n != left for n in range(count)]) for left in range(count)]
    return torch.tensor(drops, dtype=torch.float64)


def unit_pool(names: Sequence[str]) -> MergeProblem:
    """A problem whose task vectors are unit vectors: merged parameters are coefficients.

    An average is linear in the coefficients, so a policy can be learned on this problem, and only
    the subsets that it scores are merged from the real pool.
    """
    eye = torch.eye(len(names), dtype=torch.float64)
    layout = Layout(("coefficients",), ((len(names),),))
    vectors = TaskVectors(layout, tuple(names), eye[0] * 0, eye)
    return MergeProblem(vectors, [[] for _ in names], lambda parameters, pairs: [])


def policy(
    pool: Pool, score: Callable[[list[bool]], float], *, steps: int, seed: int
) -> tuple[Float[Tensor, " M"], list[bool], list[float]]:
    """`selection_policy` on the pool: its weight of every member, the chosen ones, the rewards."""
    trust, rewards = [], []

    def reward(coefficients: Float[Tensor, " M"]) -> float:
        rewards.append(score((coefficients > 0).tolist()))
        return rewards[-1]

    options = {"steps": steps, "seed": seed, "trusted": trust.append, "progress": False}
    names = pool.problem.vectors.tasks
    chosen = METHODS["selection_policy"](unit_pool(names), score=reward, **options)
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
    controls: int = 3,
) -> list[dict]:
    """Every method of choosing members, on one corrupted pool; the columns of `corrupted_pools`.

    Rules, fixed before any pool was scored: leave one out keeps members whose removal does not
    raise the score; cosine, at least half the median; norm, at most 1.5 times off the median; the
    policy its own choice.
    """
    kind = kind if share else next(iter(CORRUPTIONS))
    pool = contaminate(experiment, kind, share, strangers=strangers, seed=seed)
    deltas, rows = dense(pool.problem.vectors.deltas), []
    members, bad = len(pool.bad), pool.bad.numpy()

    def add(method: str, chosen, values=None, calls: int = 0, scored: int = 0) -> None:
        chosen = np.asarray(chosen, dtype=bool)
        chosen = chosen if chosen.any() else ~chosen
        row = {"share": bad.mean().item(), "members": members, "method": method}
        row |= {"auc": math.nan if values is None else auc(values, bad), "mass": math.nan}
        if method in ("policy", "shuffled"):
            row["mass"] = (values[pool.bad].sum() / values.sum()).item()
        row |= {"kept": bad[chosen].mean().item(), "calls": calls, "scored": scored}
        rows.append(row | SubsetScore(pool).test(chosen.tolist()))

    add("all", [True] * members)
    add("oracle", ~bad)
    angles, norms = cosine(deltas), norm(deltas)
    add("cosine", angles >= angles.median() / 2, angles)
    add("norm", norms >= -math.log(1.5), norms)
    drops = leave_one_out(score := SubsetScore(pool), members)
    add("leave_one_out", drops >= 0, drops, **score.cost)
    trust, chosen, rewards = policy(pool, score := SubsetScore(pool), steps=steps, seed=seed)
    add("policy", chosen, trust, **score.cost)
    for number in range(controls):
        control = shuffled(rewards, number)
        trust, chosen, _ = policy(pool, control, steps=steps, seed=seed + 1 + number)
        add("shuffled", chosen, trust, calls=len(rewards))
    return rows


def corrupted_pools(
    experiments: Mapping[int, tuple[Experiment, Experiment]],
    *,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    shares: Sequence[float] = (0.0, 0.2, 0.4, 0.6),
    steps: int = 200,
) -> pd.DataFrame:
    """Detection of corrupted members, by kind, share and seed.

    experiments: by seed, one, and one of other experts, the strangers. shares: requested. Columns:
    seed, kind (`none` without corruption), share (of the pool itself), members, method; auc, of
    ranking honest above corrupted members; mass, the share of a policy's weight on corrupted
    members; kept, the contamination: the share of corrupted ones among those merged; calls and
    scored (see `SubsetScore`), and `scores_by_task`.
    """
    jobs = [{"kind": "none", "share": 0.0}] if 0.0 in shares else []
    jobs += [{"kind": kind, "share": share} for share in shares if share for kind in kinds]
    tables = [
        study(
            partial(detection, strangers=strangers.problem.vectors),
            {seed: experiment},
            jobs,
            keys=strangers.digest,
            steps=steps,
        )
        for seed, (experiment, strangers) in experiments.items()
    ]
    return pd.concat(tables, ignore_index=True)
