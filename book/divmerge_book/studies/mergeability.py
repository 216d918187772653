"""Do statistics of task vectors predict which experts interfere, before they are merged?

All pairs of experts are merged by several methods; the table has what merging costs each task of
each pair (OUTCOMES), and what may predict it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from tqdm import tqdm

from divmerge_book.evaluation.experiment import SIZES, Experiment, prepare
from divmerge_book.interference.behaviour import js_from_expert
from divmerge_book.interference.spectra import alignment_between, mean_alignment
from divmerge_book.interference.weights import cosine, magnitude_overlap, sign_conflict, trained
from divmerge_book.studies.evaluator import accuracies, expert_accuracies
from divmerge_book.studies.mantel import VIEWS, correlate
from divmerge_book.studies.margins import scored
from divmerge_book.studies.sizes import settings
from divmerge_book.studies.study import study
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
# Name -> words, and +1 where more of it should mean more interference. PREDICTORS are of weights
# alone, `pair_statistics`; AFTER needs the merged weights too; INPUTS are the reference.
PREDICTORS = {
    "conflict_all": ("sign conflict, all parameters", 1),
    "conflict": ("sign conflict, touched", 1),
    "conflict_large": ("sign conflict, largest fifth", 1),
    "cosine": ("cosine", -1),
    "overlap": ("magnitude overlap, largest fifth", 1),
    "alignment_partner": ("SAR with the partner", 1),
    "norm_own": ("own length", -1),
    "norm_partner": ("partner's length", 1),
    "norm_ratio": ("partner's length over own", 1),
    "length_sum": ("length of the sum", 1),
}
AFTER = {
    "alignment": ("SAR with the merged change", -1),
    "distance": ("distance from the expert", 1),
}
INPUTS = {"answers": ("JS on unlabelled inputs", 1)}
LABELS = {name: words for name, (words, _) in (PREDICTORS | AFTER | INPUTS).items()}
SIGNS = {name: sign for name, (_, sign) in (PREDICTORS | AFTER | INPUTS).items()}


def experiments_of(
    suite: str,
    size: str,
    tasks: Sequence[str] | None = None,
    *,
    encoder: str,
    device: str = "cpu",
    **own: object,
) -> dict[int, Experiment]:
    """Experiments by seed of the experts. Raises ValueError as `prepare`.

    own: seeds, rows (of test, per task) and inputs (unlabelled, per task); the size's if not given.
    """
    own = settings("mergeability", size, **own)
    counts = replace(SIZES[size], test_rows=own.rows, merge_rows=own.inputs)
    return {
        seed: prepare(suite, tasks, size=counts, seed=seed, device=device, encoder=encoder)
        for seed in own.seeds
    }


def pair_statistics(vectors: TaskVectors) -> pd.DataFrame:
    """All PREDICTORS, a column each, of every task when it is merged with a partner (the index)."""
    deltas, learned = dense(vectors.deltas), dense(trained(vectors).deltas)
    norms = vectors.norms()
    own, squares = norms.double()[:, None].expand(-1, len(norms)), norms.square()
    matrices = {  # [T, T]
        "conflict_all": sign_conflict(deltas),
        "conflict": sign_conflict(learned),
        "conflict_large": sign_conflict(torch.stack([largest(row, 0.2) for row in deltas])),
        "cosine": cosine(deltas),
        "overlap": magnitude_overlap(learned),
        "alignment_partner": alignment_between(vectors),
        "norm_own": own,
        "norm_partner": own.T,
        "norm_ratio": (own.T / own).log(),
        "length_sum": (squares[:, None] + squares + 2 * deltas @ deltas.T).clamp(min=0).sqrt(),
    }
    index = pd.MultiIndex.from_product([vectors.tasks] * 2, names=["task", "partner"])
    return pd.DataFrame({name: one.flatten().tolist() for name, one in matrices.items()}, index)


def merged_pair(
    experiment: Experiment, *, seed: int, method: str, task: str, partner: str, **fit: int
) -> list[dict]:
    """One merge of two tasks: a record for each of them as `task`; the columns of `pairs`."""
    pair, experts = experiment.select([task, partner]), expert_accuracies(experiment)
    fit = {**fit, "seed": seed} if method == "divmerge" else {}
    flat = METHODS[MERGES.facts[method]["method"]](pair.problem, **MERGES[method], **fit)
    vectors, found = pair.problem.vectors, accuracies(pair, flat)
    aligned = mean_alignment(vectors, flat - vectors.base)
    return [
        {
            **{"task": own, "partner": vectors.tasks[1 - t], "alignment": aligned[t]},
            "distance": (flat - vectors.expert(own)).double().norm().item(),
            **{"accuracy": found[t], "expert": experts[own]},
            "js": js_from_expert(pair.problem, flat, t, pair.test[t].batches),
            "answers": js_from_expert(pair.problem, flat, t, pair.problem.batches[t]),
        }
        for t, own in enumerate(vectors.tasks)
    ]


def pairs(
    experiments: Mapping[int, Experiment], *, merges: Sequence[str], inputs: int, epochs: int
) -> pd.DataFrame:
    """Every ordered pair of tasks, for every seed and method of merging.

    experiments: by seed of the experts, with the same tasks. inputs, epochs: of DivMerge. Columns:
    seed, method, task, partner; accuracy and expert (the expert's) on test rows; drop, 1 minus
    their ratio; js from the expert on test rows; all PREDICTORS, AFTER and INPUTS. Raises
    ValueError for fewer than three tasks.
    """
    tasks = next(iter(experiments.values())).problem.vectors.tasks
    if len(tasks) < 3:
        raise ValueError(f"ranking pairs needs three tasks or more, got {list(tasks)}")
    both = [dict(zip(("task", "partner"), pair, strict=True)) for pair in combinations(tasks, 2)]
    jobs = [{"method": name, **pair} for pair in both for name in merges]
    table = study(merged_pair, experiments, jobs, inputs=inputs, epochs=epochs)
    table["drop"] = 1 - table.accuracy / table.expert
    weights = {seed: pair_statistics(one.problem.vectors) for seed, one in experiments.items()}
    return table.join(pd.concat(weights, names=["seed"]), on=["seed", "task", "partner"])


def stacked(table: pd.DataFrame, columns: Sequence[str]) -> Float[np.ndarray, "M K S T T"]:
    """Columns of `pairs` as matrices by method, column and seed; NaN on their diagonals."""
    names = ["method", "seed", "task", "partner"]
    levels = [list(dict.fromkeys(table[name])) for name in ("method", "seed", "task", "task")]
    every = pd.MultiIndex.from_product(levels, names=names)
    values = table.set_index(names)[list(columns)].reindex(every).to_numpy(float)
    return np.moveaxis(values.reshape(*map(len, levels), len(columns)), -1, 1)


def correlations(table: pd.DataFrame, *, draws: int) -> pd.DataFrame:
    """Rank correlation of every predictor with every outcome, by view and method of merging.

    table: of `pairs`. Columns: view, method, number (the predictor), damage (the outcome), rho,
    low, high, p, p_max, threshold (see `mantel.correlate`). p_max is corrected for all statistics
    of weights, merges and outcomes of a view; the reference INPUTS is corrected by itself.
    """
    rows, outcomes = [], stacked(table, [*OUTCOMES])
    for view in tqdm(VIEWS, "views", leave=False):
        for names in ([*PREDICTORS, *AFTER], [*INPUTS]):
            found = correlate(stacked(table, names), outcomes, view=view, draws=draws)
            levels = {"method": table.method.unique(), "number": names, "damage": [*OUTCOMES]}
            index = pd.MultiIndex.from_product(levels.values(), names=levels)
            columns = {name: np.ravel(value) for name, value in found._asdict().items()}
            threshold = columns.pop("threshold").item()
            some = pd.DataFrame(columns, index).reset_index().assign(threshold=threshold)
            rows.append(some.rename(columns={"value": "rho"}).assign(view=view))
    return pd.concat(rows, ignore_index=True)


def best_predictor(found: pd.DataFrame) -> str:
    """The number without inputs whose mean correlation over pairs is highest, in its direction.

    found: of `correlations`.
    """
    own = found[~found.number.isin(INPUTS) & (found["view"] == "pair")]
    mean = own.groupby("number").rho.mean()
    return (mean * mean.index.map(SIGNS)).idxmax()


def cost_by_method(table: pd.DataFrame, majority: pd.Series) -> pd.DataFrame:
    """What every method loses, mean and most over tasks of pairs. table: of `pairs`.

    majority: by task, the accuracy of its majority class.
    """
    scores = scored(table, majority).groupby("method", sort=False)
    named = {"drop": "accuracy lost, share", "js": "JS, nats", "kept_margin": "kept margin"}
    cost = scores[[*named]].agg(["mean", "max"]).drop(columns=[("kept_margin", "max")])
    cost["tasks below majority, %"] = 100 * scores.below.mean()
    cost.index = [MERGES.facts[name]["label"] for name in cost.index]
    return cost.rename(columns=named)


def tables(
    experiments: Mapping[int, Experiment], options: SimpleNamespace
) -> dict[str, pd.DataFrame]:
    """Tables pairs and correlations, with the options of `settings("mergeability", size)`."""
    rows = pairs(experiments, merges=options.merges, inputs=options.inputs, epochs=options.epochs)
    return {"pairs": rows, "correlations": correlations(rows, draws=options.draws)}
