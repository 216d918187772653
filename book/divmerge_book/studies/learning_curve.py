"""How many unlabelled inputs a fit needs, and which inputs: a test of Proposition 3.

Shifted inputs pass through the task's own head, and the expert's answers to them are the targets.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.studies.predictions import with_experts
from divmerge_book.studies.protocol import DEFAULT, num_tasks
from divmerge_book.studies.study import study
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.merging.merged_model import expert_logits
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.registry import Registry

# name -> function(experiment, inputs of other tasks, generator) -> batches
INPUT_SHIFTS = Registry("input shift")
Batches = Sequence[Sequence[Batch]]  # [task][number]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- shifted inputs -------------------------------------------------------------------------------


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

    def drawn(ids: Tensor) -> Tensor:
        return choices[torch.randint(len(choices), (len(ids),), generator=generator)]

    return changed_tokens(experiment, drawn)


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
        chosen = set(order[: round(share * len(batches))])
        found.append(
            [others[n % len(others)] if n in chosen else batch for n, batch in enumerate(batches)]
        )
    return found


def sample_inputs(batches: Batches, count: int, generator: torch.Generator) -> list[list[Batch]]:
    """`count` inputs of every task: whole batches drawn at random, or a part of one."""
    found = []
    for own in batches:
        order = torch.randperm(len(own), generator=generator).tolist()
        kept, left = [], count
        while left > 0 and order:
            kept.append(first_rows(own[order.pop(0)], left))
            left -= len(kept[-1].weight)
        found.append(kept)
    return found


def first_rows(batch: Batch, count: int) -> Batch:
    """The first rows of a classifier's batch, with equal weights."""
    if len(batch.weight) <= count:
        return batch
    inputs = {key: values[:count] for key, values in batch.inputs.items()}
    return Batch(inputs, batch.weight.new_full((count,), 1 / count))


# --- studies --------------------------------------------------------------------------------------


def fit_on(
    problem: MergeProblem, batches: Batches, *, grouping: str, steps: int, seed: int
) -> Float[Tensor, " N"]:
    """DivMerge after so many steps of Adam on these inputs; the average where there are none."""
    if not any(map(len, batches)):
        return METHODS["average"](problem)
    epochs = math.ceil(steps / max(map(len, batches)))
    options = {"grouping": grouping, "inputs": 10**6, "epochs": epochs, "seed": seed}
    return METHODS["divmerge"](replace(problem, batches=batches), progress=False, **options)


def shifted_inputs(
    experiment: Experiment, others: Batches, kind: str, share: float, inputs: int, seed: int
) -> tuple[MergeProblem, Batches]:
    """The problem with so many inputs per task, and these with a share of shifted ones.

    kind: of INPUT_SHIFTS, DEFAULT for the inputs themselves, `none` for no inputs.
    """
    own = sample_inputs(experiment.problem.batches, inputs, seeded(seed))
    problem, generator = replace(experiment.problem, batches=own), seeded(seed)
    if kind in (DEFAULT, "none"):
        return problem, own if kind == DEFAULT else [[] for _ in own]
    shifted = INPUT_SHIFTS[kind](replace(experiment, problem=problem), others, generator)
    return problem, mixed(own, shifted, share, generator)


def fit_on_inputs(
    experiment: Experiment,
    *,
    others: Mapping[int, Batches],
    seed: int,
    kind: str,
    share: float,
    inputs: int,
    grouping: str,
    steps: int,
    method: str,
) -> pd.DataFrame:
    """Test predictions of a fit on so many inputs per task, a share of them shifted."""
    _, batches = shifted_inputs(experiment, others.get(seed, []), kind, share, inputs, seed)
    flat = fit_on(experiment.problem, batches, grouping=grouping, steps=steps, seed=seed)
    return evaluate(experiment.problem, flat, experiment.test)


def predicted(
    experiments: Mapping[int, Experiment],
    others: Mapping[int, Batches],
    jobs: Sequence[Mapping],
    groupings: Sequence[str],
    steps: int,
) -> pd.DataFrame:
    """Predictions of `fit_on_inputs` and of the experts, by grouping and tasks (their number)."""
    jobs = [{"grouping": grouping, **job} for grouping in groupings for job in jobs]
    rows = study(partial(fit_on_inputs, others=others), experiments, jobs, steps=steps)
    rows["tasks"] = num_tasks(experiments)
    return with_experts(rows, experiments, ["grouping", "tasks"])


def learning_curve(
    experiments: Mapping[int, Experiment],
    counts: Sequence[int],
    *,
    groupings: Sequence[str],
    steps: int,
) -> pd.DataFrame:
    """Predictions by the number of inputs per task, the method, all with as many steps.

    The largest number comes first. No inputs leave the start, 1/T. The inputs are sampled anew for
    every seed. Labels: grouping, tasks.
    """
    own = {"kind": DEFAULT, "share": 0.0}
    jobs = [{**own, "inputs": n, "method": str(n)} for n in sorted(counts, reverse=True)]
    return predicted(experiments, {}, jobs, groupings, steps)


def input_shifts(
    experiments: Mapping[int, Experiment],
    others: Mapping[int, Batches],
    *,
    inputs: int,
    shares: Sequence[float],
    groupings: Sequence[str],
    steps: int,
) -> pd.DataFrame:
    """Predictions by kind and share of shifted inputs, beside those of a task's own, `default`.

    others: by seed, inputs of the tasks that `select` left out. inputs: per task. Labels: grouping,
    tasks; the method is `kind=share`, and kind `none` is the start, 1/T.
    """
    kinds = [("none", 1.0), *((kind, share) for kind in INPUT_SHIFTS for share in shares)]
    jobs = [{"kind": DEFAULT, "share": 0.0, "method": DEFAULT}]
    jobs += [{"kind": kind, "share": s, "method": f"{kind}={s}"} for kind, s in kinds]
    jobs = [{**job, "inputs": inputs} for job in jobs]
    return predicted(experiments, others, jobs, groupings, steps)


@torch.no_grad()
def divergence_sum(
    problem: MergeProblem,
    flat: Float[Tensor, " N"],
    targets: Sequence[Sequence[Tensor]] | None = None,
) -> float:
    """Sum over tasks of the mean Jensen-Shannon divergence from the expert, in nats.

    targets: the experts' logits where they are known already.
    """
    total, targets = 0.0, targets or expert_logits(problem)
    for task, batches in enumerate(problem.batches):
        for batch, expert in zip(batches, targets[task], strict=True):
            loss = batch.weight @ DIVERGENCES["js"](expert, problem.logits(flat, task, batch))
            total += float(loss) / len(batches)
    return total


def both_sides(
    experiment: Experiment, *, others: Mapping[int, Batches], seed: int, inputs: int, steps: int
) -> list[dict]:
    """Proposition 3 on one experiment: a row per kind of shift and model."""
    own, batches = shifted_inputs(experiment, [], DEFAULT, 0.0, inputs, seed)
    count = len(batches)
    models = {
        "average": METHODS["average"](own),
        "DivMerge": fit_on(own, batches, grouping="layer", steps=steps, seed=seed),
    }
    right, rows = {name: divergence_sum(own, flat) for name, flat in models.items()}, []
    for kind in INPUT_SHIFTS:
        _, shifted = shifted_inputs(experiment, others[seed], kind, 1.0, inputs, seed)
        for model, flat in models.items():
            a, b = right[model], divergence_sum(replace(own, batches=shifted), flat)
            row = {"kind": kind, "model": model, "right": a, "wrong": b, "apart": abs(a - b)}
            rows.append({**row, "bound": 2 * math.log(2) * count})
    return rows


def proposition3(
    experiments: Mapping[int, Experiment], others: Mapping[int, Batches], *, inputs: int, steps: int
) -> pd.DataFrame:
    """Both sides of Proposition 3, for the average and for a fit on a task's own inputs.

    A mixture with a share s of shifted inputs is at most s away in total variation, and its
    objective is (1 - s) times that of the own inputs plus s times that of the shifted ones. Both
    sides are linear in s, so a row per seed, kind and model at s = 1 suffices. Columns: seed, kind,
    model, right and wrong (objectives on own and shifted inputs, in nats), apart (the left side at
    s = 1), bound (2 log 2 per task).
    """
    measure = partial(both_sides, others=others)
    return study(measure, experiments, [{}], inputs=inputs, steps=steps)
