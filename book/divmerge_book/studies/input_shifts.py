"""Unlabelled inputs of a fit: samples of a task's own, and shifted ones.

Shifted inputs pass through the task's own head, and the expert's answers to them are the targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_core.merging.problem import Batch
from divmerge_core.registry import Registry

# name -> function(experiment, inputs of other tasks, generator) -> batches
INPUT_SHIFTS = Registry("input shift")
Batches = Sequence[Sequence[Batch]]  # [task][number]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@INPUT_SHIFTS.register("other_task", label="another merged task's")
def other_task(experiment: Experiment, others: Batches, generator: torch.Generator) -> Batches:
    """Every task gets the inputs of the next one."""
    own = experiment.problem.batches
    return [*own[1:], own[0]]


@INPUT_SHIFTS.register("outside", label="another domain's")
def outside(experiment: Experiment, others: Batches, generator: torch.Generator) -> Batches:
    """Inputs of tasks that are not merged; a task's are used again where there are fewer tasks."""
    if not others:
        raise ValueError("inputs of another domain need a task that is not merged; name one more")
    every = max(sum(len(batch.weight) for batch in batches) for batches in others)
    number = len(experiment.problem.batches)
    return sample_inputs([others[n % len(others)] for n in range(number)], every, generator)


@INPUT_SHIFTS.register("shuffled", label="own, words shuffled")
def shuffled(experiment: Experiment, others: Batches, generator: torch.Generator) -> Batches:
    """The task's own tokens in a random order."""
    order = partial(torch.randperm, generator=generator)
    return changed_tokens(experiment, lambda ids: ids[order(len(ids))])


@INPUT_SHIFTS.register("random", label="random tokens")
def random_tokens(experiment: Experiment, others: Batches, generator: torch.Generator) -> Batches:
    """As many tokens, drawn uniformly from the vocabulary without its special ones."""
    tokenizer = experiment.base.tokenizer
    special = set(tokenizer.all_special_ids)
    choices = torch.tensor([n for n in range(len(tokenizer)) if n not in special])
    drawn = partial(torch.randint, len(choices), generator=generator)
    return changed_tokens(experiment, lambda ids: choices[drawn((len(ids),))])


def changed_tokens(experiment: Experiment, change: Callable[[Tensor], Tensor]) -> Batches:
    """The inputs with every row's ordinary tokens changed; special ones and padding stay."""
    special = torch.tensor(sorted(experiment.base.tokenizer.all_special_ids))

    def of(batch: Batch) -> Batch:
        ids = batch.inputs["input_ids"].clone()
        for row in ids:
            words = ~torch.isin(row.cpu(), special)
            row[words.to(row.device)] = change(row.cpu()[words]).to(row.device)
        return replace(batch, inputs={**batch.inputs, "input_ids": ids})

    return [[of(batch) for batch in batches] for batches in experiment.problem.batches]


def mixed(own: Batches, shifted: Batches, share: float, generator: torch.Generator) -> Batches:
    """A share of every task's batches replaced by shifted ones, at random places."""
    found = []
    for batches, others in zip(own, shifted, strict=True):
        order = torch.randperm(len(batches), generator=generator).tolist()
        mixture = list(batches)
        for n in order[: round(share * len(batches))]:
            mixture[n] = others[n % len(others)]
        found.append(mixture)
    return found


def sample_inputs(batches: Batches, count: int, generator: torch.Generator) -> list[list[Batch]]:
    """`count` inputs of every task: whole batches drawn at random, or a part of one."""
    found = []
    for own in batches:
        kept, left = [], count
        for n in torch.randperm(len(own), generator=generator).tolist():
            if left > 0:
                kept.append(first_rows(own[n], left))
                left -= len(kept[-1].weight)
        found.append(kept)
    return found


def first_rows(batch: Batch, count: int) -> Batch:
    """The first rows of a classifier's batch, with equal weights."""
    if len(batch.weight) <= count:
        return batch
    inputs = {key: values[:count] for key, values in batch.inputs.items()}
    return Batch(inputs, batch.weight.new_full((count,), 1 / count))


def input_batches(
    experiment: Experiment, others: Batches, kind: str, share: float, inputs: int, seed: int
) -> Batches:
    """So many inputs per task, a share of them shifted: INPUT_SHIFTS, `default` or `none`."""
    own = sample_inputs(experiment.problem.batches, inputs, seeded(seed))
    if kind in ("default", "none"):
        return own if kind == "default" else [[] for _ in own]
    part, generator = replace(experiment.problem, batches=own), seeded(seed)
    shifted = INPUT_SHIFTS[kind](replace(experiment, problem=part), others, generator)
    return mixed(own, shifted, share, generator)
