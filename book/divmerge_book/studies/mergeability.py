"""Does a cheap number tell, before a merge, which experts will hurt each other?

All pairs of a bench's experts are merged by several methods. For each task of each pair we keep
what it loses, and numbers that look at weights alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import SIZES, Experiment, prepare
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.interference.spectra import alignment_between, mean_alignment
from divmerge_book.interference.weights import cosine, magnitude_overlap, sign_conflict, touched
from divmerge_book.studies.continual_merging import expert_accuracies
from divmerge_book.studies.mantel import VIEWS, correlate
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import largest
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import METHODS
from divmerge_core.registry import Registry

MERGES = Registry("merge")  # name -> options of the method named in its facts
MERGES.register("average", method="average", label="average")({})
MERGES.register("sum", method="task_arithmetic", label="sum")({"scale": 1.0})
MERGES.register("ties", method="ties", label="TIES")({})
MERGES.register("tsv_m", method="tsv_m", label="TSV-M")({})
MERGES.register("divmerge", method="divmerge", label="DivMerge")({"progress": False})

DAMAGES = {"drop": "accuracy lost, share of the expert's", "js": "JS from the expert, nats"}


@dataclass(frozen=True)
class Effort:
    """How much a run measures. draws: of bootstrap and permutations. epochs, inputs: of DivMerge.

    rows: test rows per task. seeds: of experts.
    """

    seeds: tuple[int, ...]
    merges: tuple[str, ...]
    rows: int
    inputs: int
    epochs: int
    draws: int


FAST = ("average", "ties")
EFFORTS = {
    "smoke": Effort((0,), ("average", "sum"), rows=40, inputs=16, epochs=1, draws=200),
    "default": Effort((0,), FAST, rows=48, inputs=16, epochs=2, draws=500),
    "full": Effort((0, 1, 2), tuple(MERGES), rows=150, inputs=32, epochs=2, draws=5000),
}


def benches(
    suite: str,
    size: str,
    tasks: Sequence[str] | None = None,
    *,
    encoder: str,
    device: str = "cpu",
    seeds: Sequence[int] = (),
    rows: int | None = None,
    inputs: int | None = None,
) -> dict[int, Experiment]:
    """Benches by seed of the experts, with test rows and unlabelled inputs of a size's effort.

    seeds, rows, inputs: the effort's where they are not given. Raises ValueError as `prepare`.
    """
    effort = EFFORTS[size]
    counts = {"test_rows": rows or effort.rows, "merge_rows": inputs or effort.inputs}
    wanted = replace(SIZES[size], **counts)
    return {
        seed: prepare(suite, tasks, size=wanted, seed=seed, device=device, encoder=encoder)
        for seed in seeds or effort.seeds
    }


# --- numbers about weights ------------------------------------------------------------------------

NUMBERS = Registry("number")  # name -> function(task vectors, the same without untouched words)
Matrix = Float[Tensor, "T T"]


@NUMBERS.register("conflict_all", label="sign conflict, all parameters", sign=1)
def conflict_all(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Sign conflict with the rows in it that only weight decay moved."""
    return sign_conflict(dense(vectors.deltas))


@NUMBERS.register("conflict", label="sign conflict, touched", sign=1)
def conflict(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Sign conflict of what both tasks learned."""
    return sign_conflict(dense(learned.deltas))


@NUMBERS.register("conflict_large", label="sign conflict, largest fifth", sign=1)
def conflict_large(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Sign conflict of what TIES keeps of both (Yadav et al. 2023)."""
    return sign_conflict(torch.stack([largest(row, 0.2) for row in dense(vectors.deltas)]))


@NUMBERS.register("cosine", label="cosine", sign=-1)
def cosine_all(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Cosine; untouched words hardly change it."""
    return cosine(dense(vectors.deltas))


@NUMBERS.register("overlap", label="magnitude overlap, largest fifth", sign=1)
def overlap(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Share of the largest fifth that two tasks have in common, where both learned."""
    return magnitude_overlap(dense(learned.deltas))


@NUMBERS.register("alignment_partner", label="SAR with the partner", sign=1)
def alignment_partner(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """How much of a task's change lies in the space of its partner's."""
    return alignment_between(vectors)


@NUMBERS.register("norm_own", label="own length", sign=-1)
def norm_own(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Length of the task's own vector: it knows nothing of the partner."""
    norms = vectors.norms().double()
    return norms[:, None].expand(-1, len(norms))


@NUMBERS.register("norm_partner", label="partner's length", sign=1)
def norm_partner(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Length of the partner's vector."""
    return norm_own(vectors, learned).T


@NUMBERS.register("norm_ratio", label="partner's length over own", sign=1)
def norm_ratio(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """log of the partner's length over the task's own."""
    return (norm_partner(vectors, learned) / norm_own(vectors, learned)).log()


@NUMBERS.register("length_sum", label=r"length of the sum", sign=1)
def length_sum(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Length of the sum of both vectors."""
    deltas = dense(vectors.deltas)
    inner, squares = deltas @ deltas.T, vectors.norms().square()
    return (squares[:, None] + squares + 2 * inner).clamp(min=0).sqrt()


AFTER = {  # numbers that need the merged weights, but no input
    "alignment": ("SAR with the merged change", -1),
    "distance": ("distance from the expert", 1),
}
INPUTS = {"answers": ("JS on unlabelled inputs", 1)}  # the reference: no number about weights


def label_of(number: str) -> str:
    """A number's name in a figure."""
    return NUMBERS.facts[number]["label"] if number in NUMBERS else (AFTER | INPUTS)[number][0]


def expected_sign(number: str) -> int:
    """+1 where more of it should mean more damage, -1 where less."""
    return NUMBERS.facts[number]["sign"] if number in NUMBERS else (AFTER | INPUTS)[number][1]


# --- what a merge costs ---------------------------------------------------------------------------


Answers = Mapping[str, Sequence[Tensor]]  # logits by batch, on `test` rows and on `inputs`


@torch.no_grad()
def answers(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int, exam: LabelledSplit
) -> Answers:
    """What parameters answer on a task's test rows, and on its unlabelled inputs."""
    asked = {"test": exam.batches, "inputs": problem.batches[task]}
    return {
        kind: [problem.logits(flat, task, batch) for batch in batches]
        for kind, batches in asked.items()
    }


def js(expert: Sequence[Tensor], merged: Sequence[Tensor]) -> float:
    """Mean JS divergence between answers, in nats, at most log 2."""
    found = [DIVERGENCES["js"](p, q) for p, q in zip(expert, merged, strict=True)]
    return torch.cat(found).double().mean().item()


def merged_pair(
    bench: Experiment, name: str, options: Mapping, experts: Callable[[str], Answers]
) -> list[dict]:
    """One merge of a bench's two tasks, from the cache or made now: a record per task.

    experts: a task's name to its expert's answers. Keys: accuracy and js on test rows; answers, the
    JS on the unlabelled inputs; alignment and distance (see AFTER).
    """

    def find() -> list[dict]:
        problem, records = bench.problem, []
        vectors = problem.vectors
        flat = METHODS[MERGES.facts[name]["method"]](problem, **options)
        aligned = mean_alignment(vectors, flat - vectors.base)
        for task, own in enumerate(vectors.tasks):
            exam, expert = bench.test[task], experts(own)
            said = answers(problem, flat, task, exam)
            record = {"alignment": aligned[task]}
            record["distance"] = (flat - vectors.expert(own)).double().norm().item()
            right = torch.cat(said["test"]).argmax(-1) == exam.gold
            record["accuracy"] = right.double().mean().item()
            record["js"] = js(expert["test"], said["test"])
            record["answers"] = js(expert["inputs"], said["inputs"])
            records.append(record)
        return records

    return kept(bench, find, "pair", name, options, method=MERGES.facts[name]["method"])


def options_for(name: str, effort: Effort, seed: int) -> dict:
    """A merge's options: the registered ones, and how long DivMerge learns."""
    own = {"inputs": effort.inputs, "epochs": effort.epochs, "seed": seed}
    return {**MERGES[name], **(own if name == "divmerge" else {})}


def pairs(benches: Mapping[int, Experiment], effort: Effort) -> pd.DataFrame:
    """Every ordered pair of tasks, for every seed and method of merging.

    benches: by seed of the experts, with the same tasks. Columns: seed, method, task, partner;
    accuracy and expert (the expert's) on test rows; drop, 1 minus their ratio; js from the expert
    on test rows; all NUMBERS, those of AFTER, and INPUTS. Raises ValueError for fewer than three
    tasks.
    """
    rows = []
    for seed, bench in benches.items():
        tasks = bench.problem.vectors.tasks
        if len(tasks) < 3:
            raise ValueError(f"ranking pairs needs three tasks or more, got {list(tasks)}")
        alone, numbers = expert_accuracies(bench), weight_numbers(bench.problem.vectors)
        experts = cache(partial(expert_answers, bench))
        for both in tqdm(list(combinations(tasks, 2)), f"pairs, seed {seed}", leave=False):
            some = bench.select(both)
            for name in effort.merges:
                found = merged_pair(some, name, options_for(name, effort, seed), experts)
                for record, task, partner in zip(found, both, reversed(both), strict=True):
                    label = {"seed": seed, "method": name, "task": task, "partner": partner}
                    place = tasks.index(task), tasks.index(partner)
                    own = {key: values[place].item() for key, values in numbers.items()}
                    drop = 1 - record["accuracy"] / alone[task]
                    rows.append({**label, "expert": alone[task], "drop": drop, **record, **own})
    return pd.DataFrame(rows)


def expert_answers(bench: Experiment, task: str) -> Answers:
    """A task's own expert's answers."""
    number = bench.problem.vectors.tasks.index(task)
    expert = bench.problem.vectors.expert(task)
    return answers(bench.problem, expert, number, bench.test[number])


def weight_numbers(vectors: TaskVectors) -> dict[str, Matrix]:
    """All NUMBERS of every pair of tasks."""
    learned = touched(vectors)
    return {name: find(vectors, learned) for name, find in NUMBERS.items()}


# --- the question ---------------------------------------------------------------------------------


def stacked(table: pd.DataFrame, columns: Sequence[str]) -> Float[np.ndarray, "M K S T T"]:
    """Columns of `pairs` as matrices by method, column and seed; NaN on their diagonals."""
    tasks = list(dict.fromkeys(table.task))
    wide = table.set_index(["method", "seed", "task", "partner"])[list(columns)]
    keys = [list(dict.fromkeys(table[name])) for name in ("method", "seed")]
    every = pd.MultiIndex.from_product([*keys, tasks, tasks])
    values = wide.reindex(every).to_numpy(float)
    shape = (len(keys[0]), len(keys[1]), len(tasks), len(tasks), len(columns))
    return np.moveaxis(values.reshape(shape), -1, 1)


def correlations(table: pd.DataFrame, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Rank correlation of every number with every damage, by view and method of merging.

    table: of `pairs`. Columns: view, method, number, damage, rho, low, high, p, p_max, threshold
    (see `dyads.correlate`). p_max is corrected for all numbers about weights, merges and damages of
    a view; the reference INPUTS stands outside that family, and has a family of its own.
    """
    rows, damages = [], list(DAMAGES)
    harm, methods = stacked(table, damages), list(dict.fromkeys(table.method))
    for view in tqdm(VIEWS, "views", leave=False):
        for names in ([*NUMBERS, *AFTER], list(INPUTS)):
            found = correlate(stacked(table, names), harm, view=view, draws=draws, seed=seed)
            for m, k, n in np.ndindex(found.value.shape):
                label = {"view": view, "method": methods[m]}
                label |= {"number": names[k], "damage": damages[n]}
                fields = ("low", "high", "p", "p_max")
                some = {key: float(getattr(found, key)[m, k, n]) for key in fields}
                rho = float(found.value[m, k, n])
                rows.append({**label, "rho": rho, **some, "threshold": found.threshold})
    return pd.DataFrame(rows)
