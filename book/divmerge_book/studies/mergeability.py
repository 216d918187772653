"""Do statistics of task vectors predict which experts interfere, before they are merged?

All pairs of an experiment's experts are merged by several methods. For each task of each pair the
table has what merging costs (OUTCOMES), and statistics of the weights (PREDICTORS).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.experiment import SIZES, Experiment, prepare
from divmerge_book.interference.behaviour import all_logits
from divmerge_book.interference.spectra import alignment_between, mean_alignment
from divmerge_book.interference.weights import cosine, magnitude_overlap, sign_conflict, trained
from divmerge_book.studies.evaluator import expert_accuracies
from divmerge_book.studies.mantel import VIEWS, correlate
from divmerge_book.studies.sizes import settings
from divmerge_book.studies.study import study
from divmerge_core.divergences import js
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import largest
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import METHODS
from divmerge_core.registry import Registry

MERGES = Registry("merge")  # name -> options of the method named in its facts
MERGES.register("average", method="average", label="average")({})
MERGES.register("sum", method="task_arithmetic", label="sum")({"scale": 1.0})
MERGES.register("ties", method="ties", label="TIES")({})
MERGES.register("tsv_m", method="tsv_m", label="TSV-M")({})
MERGES.register("divmerge", method="divmerge", label="DivMerge")({"progress": False})

OUTCOMES = {"drop": "accuracy lost, share of the expert's", "js": "JS from the expert, nats"}


def experiments_of(
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
    """Experiments by seed of the experts; seeds, rows and inputs: the size's if not given.

    rows: test rows per task. inputs: unlabelled, per task. Raises ValueError as `prepare`.
    """
    own = settings("mergeability", size, seeds=seeds, rows=rows, inputs=inputs)
    counts = replace(SIZES[size], test_rows=own.rows, merge_rows=own.inputs)
    return {
        seed: prepare(suite, tasks, size=counts, seed=seed, device=device, encoder=encoder)
        for seed in own.seeds
    }


# --- statistics of the weights of a pair ----------------------------------------------------------

Matrix = Float[Tensor, "T T"]
# name -> function(task vectors, the same without embedding rows that only decayed) -> [T, T];
# sign: +1 where more of it should mean more interference
PREDICTORS = Registry("predictor")


@PREDICTORS.register("conflict_all", label="sign conflict, all parameters", sign=1)
def conflict_all(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Sign conflict, rows that only decayed included."""
    return sign_conflict(dense(vectors.deltas))


@PREDICTORS.register("conflict", label="sign conflict, touched", sign=1)
def conflict(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Sign conflict of what both tasks learned."""
    return sign_conflict(dense(learned.deltas))


@PREDICTORS.register("conflict_large", label="sign conflict, largest fifth", sign=1)
def conflict_large(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Sign conflict of what TIES keeps of both (Yadav et al. 2023)."""
    return sign_conflict(torch.stack([largest(row, 0.2) for row in dense(vectors.deltas)]))


@PREDICTORS.register("cosine", label="cosine", sign=-1)
def cosine_all(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Cosine similarity."""
    return cosine(dense(vectors.deltas))


@PREDICTORS.register("overlap", label="magnitude overlap, largest fifth", sign=1)
def overlap(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Magnitude overlap of what both tasks learned."""
    return magnitude_overlap(dense(learned.deltas))


@PREDICTORS.register("alignment_partner", label="SAR with the partner", sign=1)
def alignment_partner(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Subspace alignment ratio of a task's change with its partner's."""
    return alignment_between(vectors)


@PREDICTORS.register("norm_own", label="own length", sign=-1)
def norm_own(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Norm of the task's own vector, whatever the partner."""
    norms = vectors.norms().double()
    return norms[:, None].expand(-1, len(norms))


@PREDICTORS.register("norm_partner", label="partner's length", sign=1)
def norm_partner(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Norm of the partner's vector."""
    return norm_own(vectors, learned).T


@PREDICTORS.register("norm_ratio", label="partner's length over own", sign=1)
def norm_ratio(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """log of the partner's norm over the task's own."""
    return (norm_partner(vectors, learned) / norm_own(vectors, learned)).log()


@PREDICTORS.register("length_sum", label="length of the sum", sign=1)
def length_sum(vectors: TaskVectors, learned: TaskVectors) -> Matrix:
    """Norm of the sum of both vectors."""
    deltas = dense(vectors.deltas)
    inner, squares = deltas @ deltas.T, vectors.norms().square()
    return (squares[:, None] + squares + 2 * inner).clamp(min=0).sqrt()


AFTER = {  # label and sign of predictors that need the merged weights, but no input
    "alignment": ("SAR with the merged change", -1),
    "distance": ("distance from the expert", 1),
}
INPUTS = {"answers": ("JS on unlabelled inputs", 1)}  # the reference: not a statistic of weights


def label_of(name: str) -> str:
    """A predictor's name in a figure."""
    return PREDICTORS.facts[name]["label"] if name in PREDICTORS else (AFTER | INPUTS)[name][0]


def expected_sign(name: str) -> int:
    """+1 where more of a predictor should mean more interference, -1 where less."""
    return PREDICTORS.facts[name]["sign"] if name in PREDICTORS else (AFTER | INPUTS)[name][1]


# --- the cost of a merge --------------------------------------------------------------------------


def merged_pair(
    experiment: Experiment, *, seed: int, merge: str, tasks: Sequence[str], options: Mapping
) -> list[dict]:
    """One merge of two tasks: a record per task.

    Keys: task and partner; accuracy and js (from the expert, nats) on test rows; answers, the JS on
    the unlabelled inputs; alignment and distance (see AFTER).
    """
    problem, table = experiment.problem.select(tasks), []
    vectors, names = problem.vectors, experiment.problem.vectors.tasks
    flat = METHODS[MERGES.facts[merge]["method"]](problem, **options)
    aligned = mean_alignment(vectors, flat - vectors.base)
    for task, own in enumerate(vectors.tasks):
        split, expert = experiment.test[names.index(own)], vectors.expert(own)
        test, unlabelled = (
            [all_logits(problem, some, task, batches) for some in (expert, flat)]
            for batches in (split.batches, problem.batches[task])
        )
        record = {"task": own, "partner": vectors.tasks[1 - task], "alignment": aligned[task]}
        record["distance"] = (flat - expert).double().norm().item()
        record["accuracy"] = (test[1].argmax(-1) == split.gold).double().mean().item()
        record["js"] = js(*test).double().mean().item()
        table.append(record | {"answers": js(*unlabelled).double().mean().item()})
    return table


def pairs(
    experiments: Mapping[int, Experiment], *, merges: Sequence[str], inputs: int, epochs: int
) -> pd.DataFrame:
    """Every ordered pair of tasks, for every seed and method of merging.

    experiments: by seed of the experts, with the same tasks. inputs, epochs: of DivMerge. Columns:
    seed, method, task, partner; accuracy and expert (the expert's) on test rows; drop, 1 minus
    their ratio; js from the expert on test rows; all PREDICTORS, AFTER and INPUTS. Raises
    ValueError for fewer than three tasks.
    """
    tables = []
    for seed, experiment in experiments.items():
        tasks = experiment.problem.vectors.tasks
        if len(tasks) < 3:
            raise ValueError(f"ranking pairs needs three tasks or more, got {list(tasks)}")
        fit = {"divmerge": {"inputs": inputs, "epochs": epochs, "seed": seed}}
        jobs = [
            {"merge": name, "tasks": list(both), "options": {**MERGES[name], **fit.get(name, {})}}
            for both in combinations(tasks, 2)
            for name in merges
        ]
        table = study(merged_pair, {seed: experiment}, jobs).rename(columns={"merge": "method"})
        expert = table.task.map(expert_accuracies(experiment))
        table = table.assign(expert=expert, drop=1 - table.accuracy / expert)
        places = [table[name].map(tasks.index) for name in ("task", "partner")]
        for name, values in pair_statistics(experiment.problem.vectors).items():
            table[name] = values[places[0], places[1]].tolist()
        tables.append(table.drop(columns=["tasks", "options"]))
    return pd.concat(tables, ignore_index=True)


def pair_statistics(vectors: TaskVectors) -> dict[str, Matrix]:
    """All PREDICTORS of every pair of tasks."""
    learned = trained(vectors)
    return {name: statistic(vectors, learned) for name, statistic in PREDICTORS.items()}


# --- correlations ---------------------------------------------------------------------------------


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
    """Rank correlation of every predictor with every outcome, by view and method of merging.

    table: of `pairs`. Columns: view, method, number (the predictor), damage (the outcome), rho,
    low, high, p, p_max, threshold (see `mantel.correlate`). p_max is corrected for all statistics
    of weights, merges and outcomes of a view; the reference INPUTS is corrected by itself.
    """
    rows, outcomes = [], stacked(table, [*OUTCOMES])
    methods, ends = list(dict.fromkeys(table.method)), ("low", "high", "p", "p_max")
    for view in tqdm(VIEWS, "views", leave=False):
        for names in ([*PREDICTORS, *AFTER], [*INPUTS]):
            found = correlate(stacked(table, names), outcomes, view=view, draws=draws, seed=seed)
            for m, k, n in np.ndindex(found.value.shape):
                row = {"view": view, "method": methods[m], "number": names[k]}
                row |= {"damage": [*OUTCOMES][n], "rho": float(found.value[m, k, n])}
                row |= {name: float(getattr(found, name)[m, k, n]) for name in ends}
                rows.append({**row, "threshold": found.threshold})
    return pd.DataFrame(rows)


def tables(
    experiments: Mapping[int, Experiment], options: SimpleNamespace
) -> dict[str, pd.DataFrame]:
    """Tables pairs and correlations, with the options of `settings("mergeability", size)`."""
    rows = pairs(experiments, merges=options.merges, inputs=options.inputs, epochs=options.epochs)
    return {"pairs": rows, "correlations": correlations(rows, draws=options.draws)}
