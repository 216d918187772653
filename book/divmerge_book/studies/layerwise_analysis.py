"""Where in a model tasks are long, agree and conflict: tables by pair, by layer and by depth."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
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
    by_group,
    columns,
    cosine,
    grouped,
    kind_of,
    magnitude_overlap,
    mean_with_others,
    norms_by_group,
    shrunk,
    sign_conflict,
    touched,
    upper,
)
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import largest
from divmerge_core.merging.task_vectors import TaskVectors

COUNTED = ("all", "touched", "largest fifth")  # which parameters a sign conflict is counted over
RESIDUALS = (0.05, 0.1, 0.2, 0.3, 0.5)


def survey(benches: Mapping[int, Experiment], size: str) -> dict[str, pd.DataFrame]:
    """All tables of this module but the spectra's shares, the experts' seed in front of every row.

    benches: by seed of the experts. Names: pairs, idle, places, lengths, overlap, ranks, alignment.
    Sizes below `full` try one share of largest entries and three cut-offs.
    """
    shares, cuts = ((0.05, 0.2), RESIDUALS) if size == "full" else ((0.2,), RESIDUALS[::2])
    functions: dict[str, Callable[[TaskVectors], pd.DataFrame]] = {
        **{"pairs": pair_counts, "idle": idle_rows, "places": conflict_places},
        **{"lengths": length_places, "overlap": partial(overlap_counts, shares=shares)},
        **{"ranks": rank_table, "alignment": partial(alignment_table, residuals=cuts)},
    }
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in functions}
    jobs = [(seed, name) for seed in benches for name in functions]
    for seed, name in (bar := tqdm(jobs, "weights", leave=False)):
        bar.set_postfix_str(f"seed {seed}, {name}")
        table = functions[name](benches[seed].problem.vectors)
        table.insert(0, "seed", seed)
        found[name].append(table)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}


def pair_counts(vectors: TaskVectors) -> pd.DataFrame:
    """Sign conflict and cosine of every pair, counted over different parameters.

    Columns: counted (one of COUNTED), task, partner, conflict, cosine. `touched` leaves embedding
    rows out that a task's texts did not touch; `largest fifth` is what TIES keeps of each vector.
    """
    deltas = dense(vectors.deltas)
    some = (
        deltas,
        dense(touched(vectors).deltas),
        torch.stack([largest(row, 0.2) for row in deltas]),
    )
    rows = []
    for counted, chosen in zip(COUNTED, some, strict=True):
        found = {"conflict": sign_conflict(chosen), "cosine": cosine(chosen)}
        rows += labelled(vectors.tasks, found, counted=counted)
    return pd.DataFrame(rows)


def labelled(
    tasks: Sequence[str], found: Mapping[str, Float[torch.Tensor, "T T"]], **label: object
) -> list[dict]:
    """One record per pair of tasks out of symmetric matrices [T, T] by column."""
    values = {name: upper(matrix) for name, matrix in found.items()}
    return [
        {**label, "task": one, "partner": other, **{name: values[name][n] for name in found}}
        for n, (one, other) in enumerate(combinations(tasks, 2))
    ]


def overlap_counts(vectors: TaskVectors, *, shares: Sequence[float] = (0.05, 0.2)) -> pd.DataFrame:
    """Magnitude overlap of every pair, in the whole model and within tensors, touched ones only.

    Columns: share (the chance level), within (model, or tensor: the mean over tensors of the
    overlap inside each, weighted by how many entries both change), task, partner, overlap. What is
    above chance in the model and not within tensors says which tensors move, not which entries.
    """
    learned, rows = touched(vectors), []
    weights = by_group(both_changed, learned, "layer")  # [P, T, T]
    weights = weights / weights.sum(dim=0).clamp(min=1)
    for share in shares:
        measure = partial(magnitude_overlap, share=share)
        inside = (by_group(measure, learned, "layer").double() * weights).sum(dim=0)
        found = {"model": measure(dense(learned.deltas)), "tensor": inside}
        for within, values in found.items():
            own = {"overlap": values}
            rows += labelled(vectors.tasks, own, share=share, within=within)
    names = ["share", "within", "task", "partner", "overlap"]
    return pd.DataFrame(rows)[names]


def both_changed(deltas: Float[torch.Tensor, "T n"]) -> Float[torch.Tensor, "T T"]:
    """How many entries every two task vectors both change."""
    changed = (deltas != 0).float()
    return sum((part @ part.T).double() for part in changed.split(2**20, dim=1))


def idle_rows(vectors: TaskVectors) -> pd.DataFrame:
    """How much of each task vector is rows that only weight decay moved.

    Columns: task; parameters and length, their shares of the count and of the squared length.
    """
    mark, rows = shrunk(vectors), []
    for task, delta, idle in zip(vectors.tasks, dense(vectors.deltas), mark, strict=True):
        squares = delta.double().square()
        length = (squares[idle].sum() / squares.sum()).item()
        rows.append({"task": task, "parameters": idle.double().mean().item(), "length": length})
    return pd.DataFrame(rows)


def conflict_places(vectors: TaskVectors, grouping: str = "place") -> pd.DataFrame:
    """What every pair of tasks shares and disputes in every group of parameters, touched ones only.

    Columns: place, kind, task, partner, conflict, cosine.
    grouping: as for `norms_by_group`.
    """
    learned, rows = touched(vectors), []
    names, numbers = grouped(vectors.layout, grouping)
    kinds = [kind_of(vectors.layout.names[numbers.index(n)]) for n in range(len(names))]
    measures = {"conflict": sign_conflict, "cosine": cosine}
    found = {name: by_group(f, learned, grouping) for name, f in measures.items()}
    for g, (place, kind) in enumerate(zip(names, kinds, strict=True)):
        own = {name: values[g] for name, values in found.items()}
        rows += labelled(vectors.tasks, own, place=place, kind=kind)
    return pd.DataFrame(rows)


def length_places(vectors: TaskVectors, grouping: str = "place") -> pd.DataFrame:
    """How every task vector's squared length is shared out over groups of parameters.

    Columns: place, task, share (of the squared length), rms (root mean square of the entries, in
    parameter units; untouched embedding rows do not count).
    """
    norms = norms_by_group(vectors, grouping).double()
    learned = dense(touched(vectors).deltas) != 0
    rows = []
    for g, (name, slices) in enumerate(columns(vectors.layout, grouping)):
        counts = sum(learned[:, place].sum(dim=1) for place in slices)
        for t, task in enumerate(vectors.tasks):
            share = (norms[t, g] / norms[t].norm()).square().item()
            rms = norms[t, g].item() / max(1, int(counts[t])) ** 0.5
            rows.append({"place": name, "task": task, "share": share, "rms": rms})
    return pd.DataFrame(rows)


def rank_table(vectors: TaskVectors) -> pd.DataFrame:
    """Ranks of every task's change of every linear layer.

    Columns: layer, task, full (the shorter side), stable, effective.
    """
    return spectrum_table(vectors).drop(columns="energy")


def spectrum_table(vectors: TaskVectors) -> pd.DataFrame:
    """Singular values of every task's change of every linear layer.

    Columns: layer, task, stable, effective (ranks), full (the shorter side), energy (list: shares
    of the squared norm, largest first).
    """
    rows = []
    for layer, values in spectra(vectors).items():
        for task, own in zip(vectors.tasks, values, strict=True):
            squares = own.square()
            energy = (squares / squares.sum().clamp(min=torch.finfo(own.dtype).tiny)).tolist()
            label = {"layer": layer, "task": task, "full": len(own)}
            ranks = {"stable": stable_rank(own), "effective": effective_rank(own)}
            rows.append({**label, **ranks, "energy": energy})
    return pd.DataFrame(rows)


def alignment_table(
    vectors: TaskVectors, *, residuals: Sequence[float] = RESIDUALS
) -> pd.DataFrame:
    """SAR over its cut-off: with the sum of all task vectors, with one other task, and by chance.

    Means over tasks (or pairs) and linear layers. Columns: residual, merged, partner, chance (with
    the sum), chance_partner.
    """
    total, rows = dense(vectors.deltas).sum(dim=0), []
    inner = inner_matrices(vectors)
    for residual in residuals:
        between = alignment_between(vectors, residual=residual)
        alone = [
            chance_alignment(delta, residual=residual)
            for deltas in inner.values()
            for delta in deltas
        ]
        sums = [chance_alignment(d.sum(dim=0), residual=residual) for d in inner.values()]
        rows.append({
            "residual": residual,
            "merged": float(np.mean(mean_alignment(vectors, total, residual=residual))),
            "partner": mean_with_others(between).mean().item(),
            "chance": float(np.mean(sums)),
            "chance_partner": float(np.mean(alone)),
        })  # fmt: skip
    return pd.DataFrame(rows)
