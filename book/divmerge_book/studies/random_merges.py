"""Does a divergence that needs no label tell which merged model is good? Hundreds of models asked.

Models are merged with random coefficients, not fitted ones. Of every model we note, per task, the
divergences from the expert on unlabelled merge rows, the entropy of its answers there, and its
accuracy on validation and on test rows. Pieces of PIECE models are kept in the cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_core.divergences import DIVERGENCES, entropy
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.problem import Batch
from divmerge_core.registry import Registry

PIECE = 20  # models in a piece of the cache
MEASURES = ("js", "kl", "reverse_kl", "entropy")  # in nats; the last one asks no expert


@dataclass(frozen=True)
class Effort:
    """How many models are drawn for every seed of experts, and on how many rows they are asked.

    tasks, layers, near: models of all T experts, by the draws in DRAWS. pairs: models of every pair
    of neighbours in the list of tasks (the last one's neighbour is the first). merge, validation,
    test: rows per task.
    """

    tasks: int
    layers: int
    near: int
    pairs: int
    merge: int
    validation: int
    test: int


EFFORTS = {
    "smoke": Effort(tasks=6, layers=0, near=0, pairs=0, merge=8, validation=16, test=24),
    "default": Effort(tasks=20, layers=5, near=5, pairs=0, merge=16, validation=32, test=64),
    "full": Effort(tasks=100, layers=30, near=30, pairs=10, merge=64, validation=64, test=160),
}


# --- random coefficients --------------------------------------------------------------------------

DRAWS = Registry("draw")  # name -> function(T, tensors, generator) -> [T, 1] or [T, tensors]


def scaled(num_tasks: int, reach: float, generator: torch.Generator) -> Float[Tensor, "T 1"]:
    """s u_t with s uniform in [0, reach] and every u_t uniform in [0, 1]."""
    scale, shares = torch.rand(1, generator=generator), torch.rand(num_tasks, generator=generator)
    return (reach * scale * shares)[:, None]


@DRAWS.register("task", label="all experts, per task")
def per_task(num_tasks: int, tensors: int, generator: torch.Generator) -> Float[Tensor, "T 1"]:
    """s u_t: s is uniform in [0, 1], every u_t is too."""
    return scaled(num_tasks, 1.0, generator)


@DRAWS.register("layer", label="all experts, per layer")
def per_layer(num_tasks: int, tensors: int, generator: torch.Generator) -> Float[Tensor, "T P"]:
    """s u_t v_tp: as per task, times a v uniform in [0, 2] for every task and tensor."""
    return scaled(num_tasks, 1.0, generator) * around(num_tasks, tensors, generator, 1.0)


@DRAWS.register("near", label="near a good one")
def near(num_tasks: int, tensors: int, generator: torch.Generator) -> Float[Tensor, "T 1"]:
    """Factors uniform in [0.5, 1.5] for the coefficients of a model that is good already."""
    return around(num_tasks, 1, generator, 0.5)


@DRAWS.register("pair", label="two experts, per task")
def of_a_pair(num_tasks: int, tensors: int, generator: torch.Generator) -> Float[Tensor, "T 1"]:
    """s u_t with s uniform in [0, 2]: fewer experts take larger coefficients."""
    return scaled(num_tasks, 2.0, generator)


def around(
    num_tasks: int, columns: int, generator: torch.Generator, width: float
) -> Float[Tensor, "T K"]:
    """Factors uniform in [1 - width, 1 + width]."""
    return 1 - width + 2 * width * torch.rand(num_tasks, columns, generator=generator)


def random_coefficients(
    kind: str, num_tasks: int, tensors: int, number: int, seed: int, centre: int | None = None
) -> Float[Tensor, "T K"]:
    """Coefficients of the model with this number: K is 1, or the number of tensors.

    centre: the number of the model drawn per task that a model `near` it varies.
    """
    generator = torch.Generator().manual_seed(100_000 * seed + number)
    coeffs = DRAWS[kind](num_tasks, tensors, generator)
    if centre is None:
        return coeffs
    return coeffs * random_coefficients("task", num_tasks, tensors, centre, seed)


def random_merge(
    bench: Experiment, kind: str, number: int, seed: int = 0, centre: int | None = None
) -> Float[Tensor, " N"]:
    """The merged model with this number (see `random_coefficients`)."""
    vectors = bench.problem.vectors
    layout, count = vectors.layout, len(vectors.tasks)
    coeffs = random_coefficients(kind, count, len(layout.names), number, seed, centre)
    grouping = "task" if coeffs.shape[1] == 1 else "layer"
    segments = Segments.of(layout.bounds, groups_of(layout, grouping)[1])
    return grouped_merge(vectors.base, vectors.deltas, coeffs.to(vectors.base), segments)


# --- what a model answers -------------------------------------------------------------------------


@torch.no_grad()
def answers(
    bench: Experiment, flat: Float[Tensor, " N"], task: int, batches: Sequence[Batch]
) -> Float[Tensor, "A V"]:
    """Logits of one model on all these batches, through one task's head."""
    named = bench.problem.vectors.layout.unflatten(flat)
    return torch.cat(bench.problem.forward(named, [(task, batch) for batch in batches]))


def right(bench: Experiment, flat: Float[Tensor, " N"], task: int, exam: LabelledSplit) -> float:
    """Share of right answers, 0 to 1."""
    found = answers(bench, flat, task, exam.batches).argmax(-1)
    return (found == exam.gold).double().mean().item()


def own_answers(bench: Experiment) -> list[Float[Tensor, "A V"]]:
    """Every expert's logits on its own merge rows."""
    problem = bench.problem
    return [
        answers(bench, problem.vectors.expert(task), number, problem.batches[number])
        for number, task in enumerate(problem.vectors.tasks)
    ]


def asked(
    bench: Experiment, flat: Float[Tensor, " N"], task: int, expert: Float[Tensor, "A V"]
) -> dict[str, float]:
    """One model on one task: MEASURES in nats (means over merge rows), validation, accuracy."""
    merged = answers(bench, flat, task, bench.problem.batches[task])
    means = {name: DIVERGENCES[name](expert, merged).mean().item() for name in MEASURES[:-1]}
    means |= {"entropy": entropy(merged).mean().item()}
    means |= {"validation": right(bench, flat, task, bench.validation[task])}
    means |= {"accuracy": right(bench, flat, task, bench.test[task])}
    return {name: round(value, 5) for name, value in means.items()}


def crossed(bench: Experiment) -> pd.DataFrame:
    """Every expert asked about every task, through the task's head: the paper's Figure 5, ours.

    Columns: task (whose rows, head and reference expert), model (the expert asked), MEASURES,
    validation and accuracy. Where the two names agree stands the trivial point.
    """
    tasks = bench.problem.vectors.tasks

    def find() -> list[dict]:
        experts, rows = own_answers(bench), []
        for model in tasks:
            flat = bench.problem.vectors.expert(model)
            for number, task in enumerate(tasks):
                found = asked(bench, flat, number, experts[number])
                rows.append({"task": task, "model": model, **found})
        return rows

    return pd.DataFrame(kept(bench, find, "every expert on every task"))


def drawn_models(
    bench: Experiment, kind: str, count: int, *, seed: int = 0, centre: int | None = None
) -> pd.DataFrame:
    """Models number 0 to count - 1 of a kind in DRAWS, a row per model and task.

    Columns: draws (the kind), model, task, MEASURES, validation and accuracy. Raises ValueError for
    an unknown kind, a count below 1, and a centre for another kind than `near`, which needs one.
    """
    DRAWS[kind]
    if count < 1 or (kind == "near") != (centre is not None):
        raise ValueError(
            f"draw one model or more, and give a centre to 'near' alone; got {count} of {kind!r} "
            f"with centre {centre}"
        )
    tasks, rows, experts = bench.problem.vectors.tasks, [], []
    tensors = len(bench.problem.vectors.layout.names)
    for start in tqdm(range(0, count, PIECE), kind, leave=False):
        stop = min(start + PIECE, count)
        sums = [
            random_coefficients(kind, len(tasks), tensors, n, seed, centre).double().sum().item()
            for n in range(start, stop)
        ]

        def find(models: range = range(start, stop)) -> list[dict]:
            experts.extend(() if experts else own_answers(bench))
            piece = []
            for model in models:
                flat = random_merge(bench, kind, model, seed, centre)
                for number, task in enumerate(tasks):
                    found = asked(bench, flat, number, experts[number])
                    piece.append({"draws": kind, "model": model, "task": task, **found})
            return piece

        rows += kept(bench, find, "random merges", kind, centre, seed, start, sums)
    return pd.DataFrame(rows)


def good_one(models: pd.DataFrame) -> int:
    """The number of the model with the highest mean validation accuracy over tasks."""
    return int(models.groupby("model").validation.mean().idxmax())


def rings(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Every task with the next one, the last with the first; of two tasks, the one pair."""
    pairs = [(task, tasks[(n + 1) % len(tasks)]) for n, task in enumerate(tasks)]
    return pairs[: 1 if len(tasks) == 2 else None]


def of_seed(bench: Experiment, effort: Effort, seed: int) -> pd.DataFrame:
    """All models of an effort on one bench; the column `experts` is `all`, or a pair's names."""
    tasks = bench.problem.vectors.tasks
    whole = [drawn_models(bench, "task", effort.tasks, seed=seed)]
    if effort.layers:
        whole.append(drawn_models(bench, "layer", effort.layers, seed=seed))
    if effort.near:
        centre = good_one(whole[0])
        whole.append(drawn_models(bench, "near", effort.near, seed=seed, centre=centre))
    parts = [part.assign(experts="all") for part in whole]
    for pair in rings(tasks) if effort.pairs and len(tasks) > 2 else []:
        part = drawn_models(bench.select(pair), "pair", effort.pairs, seed=seed)
        parts.append(part.assign(experts="+".join(pair)))
    return pd.concat(parts, ignore_index=True).assign(seed=seed)


def evidence(benches: Mapping[int, Experiment], effort: Effort) -> dict[str, pd.DataFrame]:
    """All models of an effort on every bench (by seed of experts).

    Returns `models` (rows of `drawn_models`, with columns experts and seed) and `cross` (of
    `crossed`, with a column seed).
    """
    models, cross = [], []
    for seed, bench in tqdm(benches.items(), "seeds of experts", leave=False):
        cross.append(crossed(bench).assign(seed=seed))
        models.append(of_seed(bench, effort, seed))
    found = {"models": models, "cross": cross}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}
