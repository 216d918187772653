"""Fits beside DivMerge+: what was tried after it had missed its target against ProDistill.

Each changes one thing and is run once, without a search. Tables are predictions, see
`predictions.packed`, with the objective on the inputs of the fit and on validation rows.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.interference import behaviour
from divmerge_book.studies.predictions import with_experts
from divmerge_book.studies.study import Experiments, study
from divmerge_core.divergences import js
from divmerge_core.merging.merged_model import expert_logits
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import limit

OURS, TWO_BANDS = "divmerge+", {"basis": "tsv:2"}
MORE = "four times the inputs"
FITS = {  # name -> method, its options
    "divmerge+": (OURS, TWO_BANDS),
    "five bands": (OURS, {"basis": "tsv:5"}),
    "temperature 3": (OURS, {**TWO_BANDS, "temperature": 3.0}),
    "reverse KL": (OURS, {**TWO_BANDS, "divergence": "reverse_kl"}),
    "KL": (OURS, {**TWO_BANDS, "divergence": "kl"}),
    MORE: (OURS, TWO_BANDS),
    f"five bands, {MORE}": (OURS, {"basis": "tsv:5"}),
    "prodistill": ("prodistill", {}),
    f"prodistill, {MORE}": ("prodistill", {}),
}
THEN = {  # name of a fit -> of one that starts at its merge, method, options
    "divmerge+": ("divmerge+ then all weights", "distillation", {"init": 0.0}),
    "prodistill": ("prodistill then divmerge+", OURS, {**TWO_BANDS, "init": 0.0, "lr": 0.05}),
}


@torch.no_grad()
def started_at(problem: MergeProblem, merged: Float[Tensor, " N"]) -> MergeProblem:
    """The problem with a merge as its base: the same task vectors, and the experts' own answers."""
    every = [
        [replace(batch, expert=answer) for batch, answer in zip(own, answers, strict=True)]
        for own, answers in zip(problem.batches, expert_logits(problem), strict=True)
    ]
    return replace(problem, vectors=replace(problem.vectors, base=merged), batches=every)


@torch.no_grad()
def distance(
    problem: MergeProblem, merged: Float[Tensor, " N"], batches: Sequence[Sequence[Batch]]
) -> float:
    """JS from the experts on these inputs, in nats: a mean over inputs, then over tasks."""
    found = [
        js(answers, behaviour.all_logits(problem, merged, task, batches[task])).mean()
        for task, answers in enumerate(behaviour.expert_logits(problem, batches))
    ]
    return torch.stack(found).mean().item()


def tried(experiment: Experiment, *, seed: int, fit: str, inputs: int, epochs: int) -> pd.DataFrame:
    """Test predictions of a fit, and of the one that goes on from it, with their objectives."""
    name, options = FITS[fit]
    count = inputs * 4 if fit.endswith(MORE) else inputs
    shared = {"inputs": count, "epochs": epochs, "seed": seed, "progress": False}
    problem, unseen = experiment.problem, [split.batches for split in experiment.validation]
    made = {fit: METHODS[name](problem, **options, **shared)}
    if fit in THEN:
        then, name, options = THEN[fit]
        made[then] = METHODS[name](started_at(problem, made[fit]), **options, **shared)
    read = limit(problem, count, "task").batches
    found = [
        evaluate(problem, merged, experiment.test, method=method).assign(
            read=distance(problem, merged, read), unseen=distance(problem, merged, unseen)
        )
        for method, merged in made.items()
    ]
    return pd.concat(found, ignore_index=True)


def peer(fit: str) -> str:
    """The fit of ProDistill that reads as many inputs."""
    return f"prodistill, {MORE}" if fit.endswith(MORE) else "prodistill"


def ideas(experiments: Experiments, *, inputs: int, epochs: int) -> pd.DataFrame:
    """Predictions of every fit, with facts `read` and `unseen`: the objective in nats.

    inputs: that a fit reads per task; those of MORE read four times as many, where there are.
    """
    jobs = [{"fit": fit} for fit in FITS]
    rows = study(tried, experiments, jobs, inputs=inputs, epochs=epochs)
    return with_experts(rows, experiments, facts=["read", "unseen"])
