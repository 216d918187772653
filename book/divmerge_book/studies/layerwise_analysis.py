"""Where in a model task vectors are long, agree and conflict: tables by pair, layer and depth."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.interference.spectra import (
    alignment_between,
    chance_alignment,
    effective_rank,
    inner_matrices,
    mean_alignment,
    spectra,
    stable_rank,
)
from divmerge_book.interference.weights import (
    both_nonzero,
    by_group,
    columns,
    cosine,
    decay_only,
    grouped,
    kind_of,
    magnitude_overlap,
    mean_with_others,
    norms_by_group,
    sign_conflict,
    trained,
    upper,
)
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import largest
from divmerge_core.merging.task_vectors import TaskVectors

RESIDUALS = (0.05, 0.1, 0.2, 0.3, 0.5)
MEASURES = {"conflict": sign_conflict, "cosine": cosine}


def weight_statistics(experiments: Mapping[int, Experiment], size: str) -> dict[str, pd.DataFrame]:
    """Tables pairs, idle, places, lengths, overlap, ranks and alignment, over seeds of experts.

    experiments: by seed. Sizes below `full` use one share of largest entries and three cut-offs.
    """
    shares, cuts = ((0.05, 0.2), RESIDUALS) if size == "full" else ((0.2,), RESIDUALS[::2])
    tables = {
        **{"pairs": pair_table, "idle": decay_table, "places": conflict_by_place},
        **{"lengths": norms_by_place, "overlap": partial(overlap_table, shares=shares)},
        "ranks": lambda vectors: spectrum_table(vectors).drop(columns="energy"),
        "alignment": partial(alignment_table, residuals=cuts),
    }
    found = {}
    for name, table in tqdm(tables.items(), "weights", leave=False):
        seeds = {seed: table(one.problem.vectors) for seed, one in experiments.items()}
        found[name] = pd.concat(seeds, names=["seed"]).reset_index("seed").reset_index(drop=True)
    return found


def pair_rows(
    tasks: Sequence[str], matrices: Mapping[str, Float[Tensor, "T T"]], **labels: object
) -> list[dict]:
    """One record per pair of tasks: labels, task, partner, and a column per symmetric matrix."""
    values = {name: upper(matrix) for name, matrix in matrices.items()}
    return [
        {**labels, "task": a, "partner": b, **{name: values[name][n] for name in values}}
        for n, (a, b) in enumerate(combinations(tasks, 2))
    ]


def pair_table(vectors: TaskVectors) -> pd.DataFrame:
    """Sign conflict and cosine of every pair: columns counted, task, partner, conflict, cosine.

    counted: `all` parameters; `touched`, without embedding rows that only decayed (`trained`); or
    `largest fifth`, which TIES keeps of each vector.
    """
    deltas = dense(vectors.deltas)
    counted = {"all": deltas, "touched": dense(trained(vectors).deltas)}
    counted["largest fifth"] = torch.stack([largest(row, 0.2) for row in deltas])
    rows = []
    for name, some in counted.items():
        found = {column: measure(some) for column, measure in MEASURES.items()}
        rows += pair_rows(vectors.tasks, found, counted=name)
    return pd.DataFrame(rows)


def overlap_table(vectors: TaskVectors, *, shares: Sequence[float] = (0.05, 0.2)) -> pd.DataFrame:
    """Magnitude overlap of every pair, over the trained parameters.

    Columns: share (the chance level), within (model, or tensor: the mean over tensors of the
    overlap inside each, weighted by the entries that both change), task, partner, overlap. An
    overlap above chance in the model but not within tensors says which tensors change most.
    """
    learned, rows = trained(vectors), []
    weights = by_group(both_nonzero, learned, "layer")  # [P, T, T]
    weights = weights / weights.sum(dim=0).clamp(min=1)
    for share in shares:
        measure = partial(magnitude_overlap, share=share)
        inside = (by_group(measure, learned, "layer").double() * weights).sum(dim=0)
        for within, values in (("model", measure(dense(learned.deltas))), ("tensor", inside)):
            rows += pair_rows(vectors.tasks, {"overlap": values}, share=share, within=within)
    return pd.DataFrame(rows)


def decay_table(vectors: TaskVectors) -> pd.DataFrame:
    """Rows that only weight decay changed: task, and their shares of parameters and length.

    length: share of the squared norm.
    """
    squares, mask = dense(vectors.deltas).double().square(), decay_only(vectors)
    length = (squares * mask).sum(dim=1) / squares.sum(dim=1)
    parameters = mask.double().mean(dim=1).tolist()
    return pd.DataFrame({"task": vectors.tasks, "parameters": parameters, "length": length})


def conflict_by_place(vectors: TaskVectors, grouping: str = "place") -> pd.DataFrame:
    """Conflict and cosine of every pair in every group of trained parameters.

    Columns: place, kind, task, partner, conflict, cosine. grouping: as for `norms_by_group`.
    """
    learned, rows = trained(vectors), []
    names, numbers = grouped(vectors.layout, grouping)
    found = {column: by_group(f, learned, grouping) for column, f in MEASURES.items()}
    for g, place in enumerate(names):
        kind = kind_of(vectors.layout.names[numbers.index(g)])
        values = {column: some[g] for column, some in found.items()}
        rows += pair_rows(vectors.tasks, values, place=place, kind=kind)
    return pd.DataFrame(rows)


def norms_by_place(vectors: TaskVectors, grouping: str = "place") -> pd.DataFrame:
    """Distribution of every task vector's squared norm over groups of parameters.

    Columns: place, task, share (of the squared norm), rms (root mean square of the entries;
    decayed embedding rows do not count).
    """
    norms = norms_by_group(vectors, grouping).double()
    learned, rows = dense(trained(vectors).deltas) != 0, []
    for g, (name, slices) in enumerate(columns(vectors.layout, grouping)):
        counts = sum(learned[:, place].sum(dim=1) for place in slices).clamp(min=1)
        share = (norms[:, g] / norms.norm(dim=1)).square().tolist()
        rms = (norms[:, g] / counts.sqrt()).tolist()
        own = {"place": name, "task": vectors.tasks, "share": share, "rms": rms}
        rows.append(pd.DataFrame(own))
    return pd.concat(rows, ignore_index=True)


def spectrum_table(vectors: TaskVectors) -> pd.DataFrame:
    """Singular values of every task's change of every linear layer.

    Columns: layer, task, full (the shorter side), stable, effective (ranks), energy (list: shares
    of the squared norm, largest first).
    """
    rows = []
    for layer, values in spectra(vectors).items():
        for task, own in zip(vectors.tasks, values, strict=True):
            squares = own.square()
            energy = (squares / squares.sum().clamp(min=torch.finfo(own.dtype).tiny)).tolist()
            row = {"layer": layer, "task": task, "full": len(own), "stable": stable_rank(own)}
            rows.append({**row, "effective": effective_rank(own), "energy": energy})
    return pd.DataFrame(rows)


def alignment_table(
    vectors: TaskVectors, *, residuals: Sequence[float] = RESIDUALS
) -> pd.DataFrame:
    """SAR over its cut-off: with the sum of all task vectors, with another task, and by chance.

    Means over tasks (or pairs) and linear layers. Columns: residual, merged, partner, chance (with
    the sum), chance_partner.
    """
    total, inner, rows = dense(vectors.deltas).sum(dim=0), inner_matrices(vectors).values(), []
    for residual in residuals:
        chance = partial(chance_alignment, residual=residual)
        between = alignment_between(vectors, residual=residual)
        row = {"residual": residual}
        row["merged"] = float(np.mean(mean_alignment(vectors, total, residual=residual)))
        row["partner"] = mean_with_others(between).mean().item()
        row["chance"] = float(np.mean([chance(deltas.sum(dim=0)) for deltas in inner]))
        row["chance_partner"] = float(np.mean([chance(one) for deltas in inner for one in deltas]))
        rows.append(row)
    return pd.DataFrame(rows)
