"""Where in a model task vectors are long, agree and conflict: tables by pair, layer and depth."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations, product

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.interference import spectra, weights
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.linalg import largest
from divmerge_core.merging.task_vectors import TaskVectors

RESIDUALS = (0.05, 0.1, 0.2, 0.3, 0.5)
MEASURES = {"conflict": weights.sign_conflict, "cosine": weights.cosine}


def weight_statistics(experiments: Mapping[int, Experiment], size: str) -> dict[str, pd.DataFrame]:
    """Tables pairs, idle, places, lengths, overlap, ranks and alignment, over seeds of experts.

    Sizes below `full` use one share of largest entries and three cut-offs.
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


def training_tokens(experiment: Experiment) -> set[int]:
    """Numbers of the tokens in the first expert's training rows, as the expert read them."""
    expert, made = experiment.experts[0], experiment.experts[0].manifest
    rows = TASKS[expert.task].load("train").shuffle(seed=made["seed"]).select(range(made["rows"]))
    texts = [list(rows[name]) for name in ("text", "pair") if name in rows.column_names]
    cut = {"truncation": True, "max_length": made["recipe"]["max_length"]}
    return {token for row in experiment.base.tokenizer(*texts, **cut)["input_ids"] for token in row}


def by_pair(
    tasks: Sequence[str], labels: pd.DataFrame, **stacks: Float[Tensor, "G T T"]
) -> pd.DataFrame:
    """A row per label and pair of tasks: labels, task, partner, a column per symmetric matrix."""
    pairs = pd.DataFrame(combinations(tasks, 2), columns=["task", "partner"])
    upper = torch.triu_indices(len(tasks), len(tasks), offset=1)  # in the pairs' order
    columns = {name: stack[:, *upper].flatten().tolist() for name, stack in stacks.items()}
    return labels.merge(pairs, how="cross").assign(**columns)


def pair_table(vectors: TaskVectors) -> pd.DataFrame:
    """Sign conflict and cosine of every pair: columns counted, task, partner, conflict, cosine.

    counted: `all` parameters; `touched`, as `trained`; or `largest fifth`, which TIES keeps.
    """
    deltas = dense(vectors.deltas)
    counted = {"all": deltas, "touched": dense(weights.trained(vectors).deltas)}
    counted["largest fifth"] = torch.stack([largest(row, 0.2) for row in deltas])
    found = {key: torch.stack([*map(f, counted.values())]) for key, f in MEASURES.items()}
    return by_pair(vectors.tasks, pd.DataFrame({"counted": [*counted]}), **found)


def overlap_table(vectors: TaskVectors, *, shares: Sequence[float] = (0.05, 0.2)) -> pd.DataFrame:
    """Magnitude overlap of every pair, over the trained parameters.

    Columns: share (the chance level), within (model, or tensor: the mean over tensors, weighted by
    the entries that both change), task, partner, overlap. An overlap above chance in the model but
    not within tensors says which tensors change most.
    """
    learned, found = weights.trained(vectors), []
    both = weights.by_group(weights.both_nonzero, learned, "layer")  # [P, T, T]
    for share in shares:
        measure = partial(weights.magnitude_overlap, share=share)
        inside = weights.by_group(measure, learned, "layer").double() * both
        inside = inside.sum(dim=0) / both.sum(dim=0).clamp(min=1)
        found += [measure(dense(learned.deltas)).double(), inside]
    labels = pd.DataFrame(product(shares, ("model", "tensor")), columns=["share", "within"])
    return by_pair(vectors.tasks, labels, overlap=torch.stack(found))


def decay_table(vectors: TaskVectors) -> pd.DataFrame:
    """Rows that only weight decay changed: task, their shares of parameters and squared norm."""
    squares, mask = dense(vectors.deltas).double().square(), weights.decay_only(vectors)
    length = (squares * mask).sum(dim=1) / squares.sum(dim=1)
    parameters = mask.double().mean(dim=1).tolist()
    return pd.DataFrame({"task": vectors.tasks, "parameters": parameters, "length": length})


def conflict_by_place(vectors: TaskVectors) -> pd.DataFrame:
    """Conflict and cosine of every pair: place, kind, task, partner, conflict, cosine."""
    learned = weights.trained(vectors)
    names, numbers = weights.grouped(vectors.layout, "place")
    found = {key: weights.by_group(f, learned, "place") for key, f in MEASURES.items()}
    kinds = [weights.kind_of(vectors.layout.names[numbers.index(g)]) for g in range(len(names))]
    return by_pair(vectors.tasks, pd.DataFrame({"place": names, "kind": kinds}), **found)


def norms_by_place(vectors: TaskVectors) -> pd.DataFrame:
    """Every task vector by place: share (of its squared norm), rms (of its trained entries)."""
    norms = weights.norms_by_group(vectors, "place").double()  # [T, G]
    learned = dense(weights.trained(vectors).deltas) != 0
    groups = weights.columns(vectors.layout, "place")
    counts = [sum(learned[:, place].sum(dim=1) for place in slices) for _, slices in groups]
    share = (norms / norms.norm(dim=1, keepdim=True)).square()
    rms = norms / torch.stack(counts, dim=1).clamp(min=1).sqrt()
    index = pd.MultiIndex.from_product([dict(groups), vectors.tasks], names=["place", "task"])
    values = {"share": share.T.flatten().tolist(), "rms": rms.T.flatten().tolist()}
    return pd.DataFrame(values, index).reset_index()


def spectrum_table(vectors: TaskVectors) -> pd.DataFrame:
    """Singular values of every task's change of every linear layer.

    Columns: layer, task, full (the shorter side), stable, effective (ranks), energy (list: shares
    of the squared norm, largest first).
    """
    rows = []
    for layer, deltas in spectra.inner_matrices(vectors).items():
        for task, own in zip(vectors.tasks, map(spectra.singular_values, deltas), strict=True):
            total = own.square().sum().clamp(min=torch.finfo(own.dtype).tiny)
            row = {"layer": layer, "task": task, "full": len(own)}
            row |= {"stable": spectra.stable_rank(own), "effective": spectra.effective_rank(own)}
            rows.append(row | {"energy": (own.square() / total).tolist()})
    return pd.DataFrame(rows)


def alignment_table(
    vectors: TaskVectors, *, residuals: Sequence[float] = RESIDUALS
) -> pd.DataFrame:
    """SAR over its cut-off, means over tasks (or pairs) and linear layers.

    Columns: residual, merged (with the sum of all task vectors), partner (with another task),
    chance (with the sum), chance_partner.
    """
    total, rows = dense(vectors.deltas).sum(dim=0), []
    inner = spectra.inner_matrices(vectors).values()  # [T, M, K] each
    for residual in residuals:
        chance = partial(spectra.chance_alignment, residual=residual)
        between = spectra.alignment_between(vectors, residual=residual)
        means = {
            "merged": spectra.mean_alignment(vectors, total, residual=residual),
            "partner": weights.mean_with_others(between).tolist(),
            "chance": [chance(deltas.sum(dim=0)) for deltas in inner],
            "chance_partner": [chance(one) for deltas in inner for one in deltas],
        }
        rows.append({"residual": residual} | {key: float(np.mean(v)) for key, v in means.items()})
    return pd.DataFrame(rows)
