"""What every expert costs every other, and what lies on the way between two of them.

ResultTable on test rows; every finished piece is kept in the cache.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.interference.behaviour import barrier
from divmerge_book.studies.landscapes import Judge, fewer, kept
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.registry import Registry

RULES = Registry("rule")  # name -> function(task vector i, task vector j, its shuffle) -> change


# --- what expert j costs task i -------------------------------------------------------------------


def permuted(row: Float[Tensor, " N"], layout: Layout, seed: int) -> Float[Tensor, " N"]:
    """A task vector with its entries shuffled within every tensor: as long, without its direction.

    What is left of its damage is that of noise of the same size in the same places.
    """
    generator, result = torch.Generator().manual_seed(seed), row.clone()
    for start, stop in layout.bounds:
        order = torch.randperm(stop - start, generator=generator).to(row.device)
        result[start:stop] = row[start:stop][order]
    return result


Change = Float[Tensor, " N"]  # of the base
RULES.register("added", label=r"$\theta_0 + \tau_i + \tau_j$")(lambda i, j, noise: i + j)
RULES.register("shuffled", label=r"$\theta_0 + \tau_i + \tau_j$, shuffled")(
    lambda i, j, noise: i + noise
)
RULES.register("averaged", label=r"$\theta_0 + (\tau_i + \tau_j) / 2$")(
    lambda i, j, noise: (i + j) / 2
)
RULES.register("halved", label=r"$\theta_0 + \tau_i / 2$")(lambda i, j, noise: i / 2)


def costs_of(bench: Experiment, other: str, seed: int) -> list[dict]:
    """What task `other` costs every other one under every rule: rule, task, accuracy, js."""
    judge, vectors, rows = Judge(bench), bench.problem.vectors, []
    deltas = dense(vectors.deltas)
    own = deltas[vectors.tasks.index(other)]
    noise = permuted(own, vectors.layout, seed)
    for number, task in enumerate(vectors.tasks):
        if task == other:
            continue
        before = judge.scored(judge.expert(number), number)["accuracy"]
        for rule, change in RULES.items():
            flat = vectors.base + change(deltas[number], own, noise)
            after = judge.scored(judge.logits(flat, number), number)
            row = {"rule": rule, "task": task, "accuracy": round(before - after["accuracy"], 5)}
            rows.append({**row, "js": round(after["js"], 5)})
    return rows


def costs(benches: Mapping[int, Experiment], *, rows: int) -> pd.DataFrame:
    """What expert j costs task i under every rule of RULES, for all ordered pairs.

    added: expert i with all of vector j. shuffled: the same with vector j shuffled. averaged: the
    mean of both experts. halved: half of vector i and nothing of j, which is the part of the mean's
    cost that j has no part in.

    benches: by seed of experts. Columns: seed, rule, task (i), other (j), accuracy (what the
    expert of i loses, in shares of 1) and js (from expert i, nats).
    """
    parts, looked = [], {seed: fewer(bench, rows) for seed, bench in benches.items()}
    jobs = [(seed, t) for seed, bench in looked.items() for t in bench.problem.vectors.tasks]
    for seed, other in tqdm(jobs, "costs of every pair", leave=False):
        find = partial(costs_of, looked[seed], other, seed)
        part = kept(looked[seed], find, "cost", list(RULES), other, seed)
        parts.append(part.assign(seed=seed, other=other))
    whole = pd.concat(parts, ignore_index=True)
    return whole[["seed", "rule", "task", "other", "accuracy", "js"]]


def matrix(table: pd.DataFrame, rule: str, column: str) -> pd.DataFrame:
    """Mean over seeds of a rule's cost: a row per task that pays, a column per expert added."""
    some, order = table[table.rule == rule], list(dict.fromkeys(table.other))
    wide = some.pivot_table(index="task", columns="other", values=column)
    return wide.reindex(index=order, columns=order)


def by_cost(table: pd.DataFrame, count: int, *, column: str = "js") -> list[str]:
    """`count` pairs `a+b`, from the one that costs both of its tasks most to the one that least.

    By the rule `added`, mean over seeds and both directions; evenly spaced by rank.
    """
    wide = matrix(table, "added", column)
    both = {
        f"{a}+{b}": wide.loc[a, b] + wide.loc[b, a] for a, b in combinations(list(wide.index), 2)
    }
    ranked = sorted(both, key=lambda pair: -both[pair])
    places = torch.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().long()
    return [ranked[place] for place in places.tolist()]


# --- the segment between two experts --------------------------------------------------------------


def segment(bench: Experiment, points: int) -> list[dict]:
    """Along the way from one of two experts to the other: at, task, accuracy, js, nll."""
    judge, vectors, rows = Judge(bench), bench.problem.vectors, []
    for at in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        flat = vectors.merge([1 - at, at])
        for number, task in enumerate(vectors.tasks):
            found = judge.scored(judge.logits(flat, number), number)
            shown = {key: round(found[key], 5) for key in ("accuracy", "js", "nll")}
            rows.append({"at": round(at, 5), "task": task, **shown})
    return rows


def segments(
    benches: Mapping[int, Experiment], pairs: Sequence[str], *, points: int, rows: int
) -> pd.DataFrame:
    """`segment` of every pair `a+b`, each task with its own head; at 0 is expert a, at 1 b.

    Columns: seed, pair, and those of `segment`. Raises ValueError for fewer than 3 points.
    """
    if points < 3:
        raise ValueError(f"points must be 3 or more, both ends and between; got {points}")
    parts = []
    jobs = [(seed, pair) for seed in benches for pair in pairs]
    for seed, pair in tqdm(jobs, "segments", leave=False):
        looked = fewer(benches[seed].select(pair.split("+")), rows)
        part = kept(looked, partial(segment, looked, points), "segment", points)
        parts.append(part.assign(seed=seed, pair=pair))
    return pd.concat(parts, ignore_index=True)


def barriers(table: pd.DataFrame) -> pd.DataFrame:
    """The barrier of every pair and seed: columns seed, pair, error, nll, error_chord, nll_chord.

    Of the test error and the cross-entropy of the gold answers (nats), each the mean of the pair's
    two tasks at every point; against the mean of the ends, and against the chord between them.
    """
    along = table.assign(error=1 - table.accuracy).groupby(["seed", "pair", "at"], sort=True)
    mean, rows = along[["error", "nll"]].mean(), []
    for (seed, pair), part in mean.groupby(level=["seed", "pair"], sort=False):
        row = {"seed": seed, "pair": pair}
        for column in ("error", "nll"):
            row[column] = barrier(list(part[column]))
            row[f"{column}_chord"] = barrier(list(part[column]), reference="chord")
        rows.append(row)
    return pd.DataFrame(rows)
