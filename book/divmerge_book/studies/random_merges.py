"""Does a divergence, which needs no label, predict which merged model is good?

Models are merged with random coefficients, not fitted ones. For every model and task we record the
divergences from the expert on unlabelled merge rows, the entropy of its answers there, and its
accuracy on validation and on test rows.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import predict
from divmerge_book.interference.behaviour import all_logits, expert_logits
from divmerge_book.studies.objective_fits import merge
from divmerge_book.studies.study import Experiments, study
from divmerge_core.divergences import DIVERGENCES, entropy
from divmerge_core.registry import Registry

PIECE = 20  # models in a cached result
MEASURES = ("js", "kl", "reverse_kl", "entropy")  # in nats; the last one needs no expert
SAMPLERS = Registry("sampler")  # name -> function(T, tensors, generator) -> [T, 1] or [T, tensors]


def per_task(num_tasks: int, tensors: int, generator: torch.Generator) -> Float[Tensor, "T 1"]:
    """s u_t: s is uniform in [0, 1], every u_t is too."""
    scale = torch.rand(1, generator=generator)
    return (scale * torch.rand(num_tasks, generator=generator))[:, None]


def around(
    num_tasks: int, columns: int, generator: torch.Generator, width: float
) -> Float[Tensor, "T K"]:
    """Factors uniform in [1 - width, 1 + width]."""
    return 1 - width + 2 * width * torch.rand(num_tasks, columns, generator=generator)


SAMPLERS.register("task", label="all experts, per task")(per_task)
SAMPLERS.register("layer", label="all experts, per layer")(  # a factor in [0, 2] per tensor
    lambda tasks, tensors, draw: per_task(tasks, tensors, draw) * around(tasks, tensors, draw, 1.0)
)
SAMPLERS.register("near", label="near a good one")(  # factors for its coefficients
    lambda tasks, tensors, draw: around(tasks, 1, draw, 0.5)
)
SAMPLERS.register("pair", label="two experts, per task")(  # fewer take larger coefficients
    lambda tasks, tensors, draw: 2.0 * per_task(tasks, tensors, draw)
)


def random_coefficients(
    sampler: str, num_tasks: int, tensors: int, number: int, seed: int, centre: int | None = None
) -> Float[Tensor, "T K"]:
    """Coefficients of the model with this number: K is 1, or the number of tensors.

    centre: the number of the model drawn per task that a model `near` it varies.
    """
    generator = torch.Generator().manual_seed(100_000 * seed + number)
    coeffs = SAMPLERS[sampler](num_tasks, tensors, generator)
    if centre is None:
        return coeffs
    return coeffs * random_coefficients("task", num_tasks, tensors, centre, seed)


def random_merge(
    experiment: Experiment, sampler: str, number: int, seed: int = 0, centre: int | None = None
) -> Float[Tensor, " N"]:
    """The merged model with this number; see `random_coefficients`."""
    vectors = experiment.problem.vectors
    sizes = len(vectors.tasks), len(vectors.layout.names)
    coeffs = random_coefficients(sampler, *sizes, number, seed, centre)
    return merge(vectors, coeffs, "task" if coeffs.shape[1] == 1 else "layer")


def measured(
    experiment: Experiment, flat: Float[Tensor, " N"], experts: Sequence[Float[Tensor, "A V"]]
) -> list[dict]:
    """One model, a row per task: MEASURES (nats, means over merge rows), validation, accuracy."""
    problem, rows = experiment.problem, []
    splits = {"validation": experiment.validation, "accuracy": experiment.test}
    for number, task in enumerate(problem.vectors.tasks):
        merged = all_logits(problem, flat, number, problem.batches[number])
        found = {n: DIVERGENCES[n](experts[number], merged).mean().item() for n in MEASURES[:-1]}
        found["entropy"] = entropy(merged).mean().item()
        for name, split in splits.items():
            said = predict(problem, flat, number, split[number])
            found[name] = (said == split[number].gold).double().mean().item()
        rows.append({"task": task} | {name: round(value, 5) for name, value in found.items()})
    return rows


def experts_on_tasks(experiment: Experiment, *, seed: int) -> list[dict]:
    """Every expert on every task, through the task's head: Figure 5 of the paper, measured here.

    Columns: task (of rows, head and reference expert), model (the expert), and those of `measured`.
    """
    vectors = experiment.problem.vectors
    experts = expert_logits(experiment.problem, experiment.problem.batches)
    return [
        {"model": model, **row}
        for model in vectors.tasks
        for row in measured(experiment, vectors.expert(model), experts)
    ]


def measure_models(
    experiment: Experiment, *, seed: int, sampler: str, first: int, last: int, centre: int | None
) -> list[dict]:
    """The rows of models number `first` to `last` of a sampler."""
    experts = expert_logits(experiment.problem, experiment.problem.batches)
    rows = []
    for number in range(first, last + 1):
        flat = random_merge(experiment, sampler, number, seed, centre)
        rows += [{"model": number, **row} for row in measured(experiment, flat, experts)]
    return rows


def sampled_models(
    experiment: Experiment, sampler: str, count: int, *, seed: int = 0, centre: int | None = None
) -> pd.DataFrame:
    """Models number 0 to count - 1 of a sampler, a row per model and task.

    Columns: sampler, model, and those of `measured`. Raises ValueError for an unknown sampler, a
    count below 1, and a centre for another sampler than `near`, which needs one.
    """
    SAMPLERS[sampler]
    if count < 1 or (sampler == "near") != (centre is not None):
        raise ValueError(
            f"draw one model or more, and give a centre to 'near' alone; got {count} of "
            f"{sampler!r} with centre {centre}"
        )
    jobs = [
        {"sampler": sampler, "first": n, "last": min(n + PIECE, count) - 1, "centre": centre}
        for n in range(0, count, PIECE)
    ]
    found = study(measure_models, {seed: experiment}, jobs)
    return found.drop(columns=["first", "last", "centre", "seed"])


def neighbours(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Every task with the next one, the last with the first; of two tasks, the one pair."""
    pairs = [(task, tasks[(n + 1) % len(tasks)]) for n, task in enumerate(tasks)]
    return pairs[: 1 if len(tasks) == 2 else None]


def models_of_seed(experiment: Experiment, counts: SimpleNamespace, seed: int) -> pd.DataFrame:
    """All models of one seed; the column `experts` is `all`, or a pair's names.

    Models `near` a good one vary the one drawn per task with the highest validation accuracy.
    """
    tasks, parts, best = experiment.problem.vectors.tasks, [], None
    for sampler in ("task", "layer", "near"):
        if sampler == "near":
            best = int(parts[0].groupby("model").validation.mean().idxmax())
        if count := getattr(counts, sampler):
            found = sampled_models(experiment, sampler, count, seed=seed, centre=best)
            parts.append(found.assign(experts="all"))
    for pair in neighbours(tasks) if counts.pair and len(tasks) > 2 else []:
        found = sampled_models(experiment.select(pair), "pair", counts.pair, seed=seed)
        parts.append(found.assign(experts="+".join(pair)))
    return pd.concat(parts, ignore_index=True).assign(seed=seed)


def random_merges(experiments: Experiments, counts: SimpleNamespace) -> dict[str, pd.DataFrame]:
    """Tables `models` and `cross` of every experiment, by seed of experts.

    counts: models by sampler (task, layer, near, pair), see `sizes`. models: of `sampled_models`,
    with experts and seed; cross: of `experts_on_tasks`, with seed.
    """
    models = [models_of_seed(experiment, counts, seed) for seed, experiment in experiments.items()]
    cross = study(experts_on_tasks, experiments, [{}])
    return {"models": pd.concat(models, ignore_index=True), "cross": cross}
