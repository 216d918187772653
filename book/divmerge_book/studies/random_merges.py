"""Does a divergence, which needs no label, predict which merged model is good?

Models are merged with random coefficients, not fitted ones. For every model and task we record the
divergences from the expert on unlabelled merge rows, the entropy of its answers there, and its
accuracy on validation and on test rows.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.studies.study import study
from divmerge_core.divergences import DIVERGENCES, entropy
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.problem import Batch
from divmerge_core.registry import Registry

PIECE = 20  # models in a cached result
MEASURES = ("js", "kl", "reverse_kl", "entropy")  # in nats; the last one needs no expert


# --- random coefficients --------------------------------------------------------------------------

SAMPLERS = Registry("sampler")  # name -> function(T, tensors, generator) -> [T, 1] or [T, tensors]


def scaled(num_tasks: int, reach: float, generator: torch.Generator) -> Float[Tensor, "T 1"]:
    """s u_t with s uniform in [0, reach] and every u_t uniform in [0, 1]."""
    scale, shares = torch.rand(1, generator=generator), torch.rand(num_tasks, generator=generator)
    return (reach * scale * shares)[:, None]


@SAMPLERS.register("task", label="all experts, per task")
def per_task(num_tasks: int, tensors: int, generator: torch.Generator) -> Float[Tensor, "T 1"]:
    """s u_t: s is uniform in [0, 1], every u_t is too."""
    return scaled(num_tasks, 1.0, generator)


@SAMPLERS.register("layer", label="all experts, per layer")
def per_layer(num_tasks: int, tensors: int, generator: torch.Generator) -> Float[Tensor, "T P"]:
    """s u_t v_tp: as per task, times a v uniform in [0, 2] for every task and tensor."""
    return scaled(num_tasks, 1.0, generator) * around(num_tasks, tensors, generator, 1.0)


@SAMPLERS.register("near", label="near a good one")
def near(num_tasks: int, tensors: int, generator: torch.Generator) -> Float[Tensor, "T 1"]:
    """Factors uniform in [0.5, 1.5] for the coefficients of a model that is good already."""
    return around(num_tasks, 1, generator, 0.5)


@SAMPLERS.register("pair", label="two experts, per task")
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
    coeffs = SAMPLERS[kind](num_tasks, tensors, generator)
    if centre is None:
        return coeffs
    return coeffs * random_coefficients("task", num_tasks, tensors, centre, seed)


def random_merge(
    experiment: Experiment, kind: str, number: int, seed: int = 0, centre: int | None = None
) -> Float[Tensor, " N"]:
    """The merged model with this number; see `random_coefficients`."""
    vectors = experiment.problem.vectors
    layout, count = vectors.layout, len(vectors.tasks)
    coeffs = random_coefficients(kind, count, len(layout.names), number, seed, centre)
    grouping = "task" if coeffs.shape[1] == 1 else "layer"
    segments = Segments.of(layout.bounds, groups_of(layout, grouping)[1])
    return grouped_merge(vectors.base, vectors.deltas, coeffs.to(vectors.base), segments)


# --- measures of a model --------------------------------------------------------------------------


@torch.no_grad()
def logits_of(
    experiment: Experiment, flat: Float[Tensor, " N"], task: int, batches: Sequence[Batch]
) -> Float[Tensor, "A V"]:
    """Logits of one model on all these batches, through one task's head."""
    named = experiment.problem.vectors.layout.unflatten(flat)
    return torch.cat(experiment.problem.forward(named, [(task, batch) for batch in batches]))


def expert_logits(experiment: Experiment) -> list[Float[Tensor, "A V"]]:
    """Every expert's logits on its own merge rows."""
    problem = experiment.problem
    return [
        logits_of(experiment, problem.vectors.expert(task), number, problem.batches[number])
        for number, task in enumerate(problem.vectors.tasks)
    ]


def measured(
    experiment: Experiment, flat: Float[Tensor, " N"], experts: Sequence[Float[Tensor, "A V"]]
) -> list[dict]:
    """One model, a row per task: MEASURES (nats, means over merge rows), validation, accuracy."""

    def accuracy(task: int, split: LabelledSplit) -> float:
        said = logits_of(experiment, flat, task, split.batches).argmax(-1)
        return (said == split.gold).double().mean().item()

    rows = []
    for number, task in enumerate(experiment.problem.vectors.tasks):
        merged = logits_of(experiment, flat, number, experiment.problem.batches[number])
        found = {n: DIVERGENCES[n](experts[number], merged).mean().item() for n in MEASURES[:-1]}
        found["entropy"] = entropy(merged).mean().item()
        found["validation"] = accuracy(number, experiment.validation[number])
        found["accuracy"] = accuracy(number, experiment.test[number])
        rows.append({"task": task} | {name: round(value, 5) for name, value in found.items()})
    return rows


def experts_on_tasks(experiment: Experiment, *, seed: int) -> list[dict]:
    """Every expert on every task, through the task's head: Figure 5 of the paper, measured here.

    Columns: task (whose rows, head and reference expert), model (the expert measured), MEASURES,
    validation and accuracy. Where the two names agree stands the trivial point.
    """
    experts, vectors = expert_logits(experiment), experiment.problem.vectors
    return [
        {"model": model, **row}
        for model in vectors.tasks
        for row in measured(experiment, vectors.expert(model), experts)
    ]


def measure_models(
    experiment: Experiment, *, seed: int, draws: str, first: int, last: int, centre: int | None
) -> list[dict]:
    """The rows of models number `first` to `last` of a sampler."""
    experts = expert_logits(experiment)
    return [
        {"model": number, **row}
        for number in range(first, last + 1)
        for row in measured(
            experiment, random_merge(experiment, draws, number, seed, centre), experts
        )
    ]


def sampled_models(
    experiment: Experiment, kind: str, count: int, *, seed: int = 0, centre: int | None = None
) -> pd.DataFrame:
    """Models number 0 to count - 1 of a kind in SAMPLERS, a row per model and task.

    Columns: draws (the kind), model, task, MEASURES, validation and accuracy. Raises ValueError for
    an unknown kind, a count below 1, and a centre for another kind than `near`, which needs one.
    """
    SAMPLERS[kind]
    if count < 1 or (kind == "near") != (centre is not None):
        raise ValueError(
            f"draw one model or more, and give a centre to 'near' alone; got {count} of {kind!r} "
            f"with centre {centre}"
        )
    jobs = [
        {"draws": kind, "first": n, "last": min(n + PIECE, count) - 1, "centre": centre}
        for n in range(0, count, PIECE)
    ]
    found = study(measure_models, {seed: experiment}, jobs)
    return found.drop(columns=["first", "last", "centre", "seed"])


def best_model(models: pd.DataFrame) -> int:
    """The number of the model with the highest mean validation accuracy over tasks."""
    return int(models.groupby("model").validation.mean().idxmax())


def neighbours(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Every task with the next one, the last with the first; of two tasks, the one pair."""
    pairs = [(task, tasks[(n + 1) % len(tasks)]) for n, task in enumerate(tasks)]
    return pairs[: 1 if len(tasks) == 2 else None]


def models_of_seed(experiment: Experiment, counts: SimpleNamespace, seed: int) -> pd.DataFrame:
    """All models of one seed; the column `experts` is `all`, or a pair's names."""
    tasks, sample = experiment.problem.vectors.tasks, partial(sampled_models, seed=seed)
    parts = [sample(experiment, "task", counts.task)]
    if counts.layer:
        parts.append(sample(experiment, "layer", counts.layer))
    if counts.near:
        parts.append(sample(experiment, "near", counts.near, centre=best_model(parts[0])))
    parts = [part.assign(experts="all") for part in parts]
    for pair in neighbours(tasks) if counts.pair and len(tasks) > 2 else []:
        part = sample(experiment.select(pair), "pair", counts.pair)
        parts.append(part.assign(experts="+".join(pair)))
    return pd.concat(parts, ignore_index=True).assign(seed=seed)


def random_merges(
    experiments: Mapping[int, Experiment], counts: SimpleNamespace
) -> dict[str, pd.DataFrame]:
    """All models of every experiment (by seed of experts).

    counts: models by sampler (task, layer, near, pair), see `sizes`. Returns `models` (rows of
    `sampled_models`, with columns experts and seed) and `cross` (of `experts_on_tasks`, and seed).
    """
    models = [models_of_seed(experiment, counts, seed) for seed, experiment in experiments.items()]
    cross = study(experts_on_tasks, experiments, [{}])
    return {"models": pd.concat(models, ignore_index=True), "cross": cross}
