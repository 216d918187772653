"""Test accuracy of merged models, relative to the experts' and the majority classes'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.cache import cached
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import own_experts, shares
from divmerge_book.evaluation.metrics import LabelledSplit, predict
from divmerge_book.interference.behaviour import all_logits, expert_logits
from divmerge_core.divergences import js
from divmerge_core.merging.problem import Batch, Merged


def accuracies(
    experiment: Experiment, merged: Merged, tasks: Sequence[str] | None = None
) -> list[float]:
    """Accuracy on the test rows of these tasks (None: all)."""
    problem, names = experiment.problem, experiment.problem.vectors.tasks
    numbers = [names.index(task) for task in (names if tasks is None else tasks)]
    splits = [experiment.test[n] for n in numbers]
    right = [predict(problem, merged, n, s) == s.gold for n, s in zip(numbers, splits, strict=True)]
    return [some.double().mean().item() for some in right]


def expert_accuracies(experiment: Experiment) -> dict[str, float]:
    """Every expert's accuracy on its own task's test rows."""
    own = partial(own_experts, experiment, experiment.test)
    found = cached(experiment, lambda: shares(own()), "experts on test")
    return dict(zip(experiment.problem.vectors.tasks, found, strict=True))


def scores_by_task(experiment: Experiment, found: Sequence[float]) -> dict:
    """anp of these test accuracies, and lists by task: accuracies, experts, majorities.

    Raises ValueError where an expert has accuracy 0.
    """
    experts = expert_accuracies(experiment)
    if wrong := [task for task, accuracy in experts.items() if not accuracy]:
        raise ValueError(
            f"the expert of {wrong[0]!r} gets no test row right; give more rows or leave the task "
            "out"
        )
    majorities = [split.gold.bincount().max().item() / split.rows for split in experiment.test]
    lists = {"accuracies": list(found), "experts": [*experts.values()], "majorities": majorities}
    return {"anp": float(np.mean(np.divide(found, lists["experts"]))), **lists}


def subsample(split: LabelledSplit, rows: int) -> LabelledSplit:
    """`rows` rows of a split, evenly spaced in its order (by length); all if there are fewer."""
    if rows >= split.rows:
        return split
    chosen = torch.linspace(0, split.rows - 1, rows).round().long()
    batches, start = [], 0
    for batch in split.batches:
        inside = chosen[(chosen >= start) & (chosen < start + len(batch.weight))] - start
        start, count = start + len(batch.weight), len(inside)
        if count:
            inputs = {key: tensor[inside] for key, tensor in batch.inputs.items()}
            batches.append(Batch(inputs, batch.weight.new_full((count,), 1 / count)))
    return LabelledSplit(batches, split.gold[chosen])


def fewer_rows(experiment: Experiment, rows: int) -> Experiment:
    """The same experiment with `rows` test rows per task."""
    test = [subsample(split, rows) for split in experiment.test]
    return replace(experiment, test=test, digest=f"{experiment.digest} {rows} test rows")


@dataclass
class Evaluator:
    """Scores merged models on test rows, with the experts' logits computed once."""

    experiment: Experiment

    @cached_property
    def experts(self) -> list[Float[Tensor, "B V"]]:
        """Every expert's logits on its own task."""
        batches = [split.batches for split in self.experiment.test]
        return expert_logits(self.experiment.problem, batches)

    def logits(self, flat: Float[Tensor, " N"], task: int) -> Float[Tensor, "B V"]:
        return all_logits(self.experiment.problem, flat, task, self.experiment.test[task].batches)

    def score(self, logits: Float[Tensor, "B V"], task: int) -> dict[str, float]:
        """accuracy, js from the expert and nll of the labels (nats), rounded to five digits."""
        labels = self.experiment.test[task].gold
        found = {
            "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
            "js": js(self.experts[task], logits).double().mean().item(),
            "nll": torch.nn.functional.cross_entropy(logits, labels).item(),
        }
        return {name: round(value, 5) for name, value in found.items()}

    def totals(self, scores: Sequence[Mapping[str, float]]) -> dict:
        """js summed over tasks and `scores_by_task`, from the `score` of every task."""
        found = scores_by_task(self.experiment, [score["accuracy"] for score in scores])
        return {"js": round(sum(score["js"] for score in scores), 5), **found}
