"""How many unlabelled inputs a fit needs, and how wrong they may be: Proposition 3 put to the test.

Wrong inputs go with the task's own head, and the expert answers them as it answers any input.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies.protocol import DEFAULT, answered, num_tasks, with_experts
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.merging.merged_model import expert_logits
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.registry import Registry

WRONGS = Registry("kind of wrong inputs")  # name -> function(bench, others, generator) -> batches
Batches = Sequence[Sequence[Batch]]  # [task][number]


# --- what takes the place of a task's inputs ------------------------------------------------------


@WRONGS.register("other_task", label="another merged task's")
def other_task(bench: Experiment, others: Batches, generator: torch.Generator) -> Batches:
    """Every task gets the inputs of the next one."""
    own = bench.problem.batches
    return [*own[1:], own[0]]


@WRONGS.register("outside", label="another domain's")
def outside(bench: Experiment, others: Batches, generator: torch.Generator) -> Batches:
    """Inputs of tasks that are not merged, the same task's again where there are fewer."""
    number = len(bench.problem.batches)
    if not others:
        raise ValueError("inputs of another domain need a task that is not merged; name one more")
    every = max(sum(len(batch.weight) for batch in batches) for batches in others)
    return few([others[n % len(others)] for n in range(number)], every, generator)


@WRONGS.register("shuffled", label="own, words shuffled")
def shuffled(bench: Experiment, others: Batches, generator: torch.Generator) -> Batches:
    """The task's own tokens in a random order."""
    return changed_tokens(bench, lambda ids: ids[torch.randperm(len(ids), generator=generator)])


@WRONGS.register("random", label="random tokens")
def random_tokens(bench: Experiment, others: Batches, generator: torch.Generator) -> Batches:
    """As many tokens, drawn evenly from the vocabulary without its special ones."""
    special = set(bench.base.tokenizer.all_special_ids)
    allowed = [n for n in range(len(bench.base.tokenizer)) if n not in special]
    choices = torch.tensor(allowed)

    def drawn(ids: Tensor) -> Tensor:
        return choices[torch.randint(len(choices), (len(ids),), generator=generator)]

    return changed_tokens(bench, drawn)


def changed_tokens(bench: Experiment, change: Callable[[Tensor], Tensor]) -> Batches:
    """The inputs with every row's ordinary tokens changed; special ones and padding stay."""
    special = torch.tensor(sorted(bench.base.tokenizer.all_special_ids))

    def of(batch: Batch) -> Batch:
        ids = batch.inputs["input_ids"].clone()
        for row in ids:
            words = ~torch.isin(row.cpu(), special)
            row[words.to(row.device)] = change(row.cpu()[words]).to(row.device)
        return replace(batch, inputs={**batch.inputs, "input_ids": ids})

    return [[of(batch) for batch in batches] for batches in bench.problem.batches]


def mixed(own: Batches, wrong: Batches, share: float, generator: torch.Generator) -> Batches:
    """A share of every task's batches replaced by wrong ones, at random places."""
    found = []
    for batches, others in zip(own, wrong, strict=True):
        order = torch.randperm(len(batches), generator=generator).tolist()
        chosen = set(order[: round(share * len(batches))])
        found.append(
            [others[n % len(others)] if n in chosen else batch for n, batch in enumerate(batches)]
        )
    return found


def few(batches: Batches, count: int, generator: torch.Generator) -> list[list[Batch]]:
    """`count` inputs of every task: whole batches drawn at random, or a part of one."""
    found = []
    for own in batches:
        order = [own[n] for n in torch.randperm(len(own), generator=generator).tolist()]
        kept, left = [], count
        while left > 0 and order:
            kept.append(first_rows(order.pop(0), left))
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


def fitted(
    bench: Experiment, what: Sequence, batches: Batches, *, grouping: str, steps: int, seed: int
) -> list[dict]:
    """Test answers after so many steps of Adam on these inputs; none: the average."""
    problem = replace(bench.problem, batches=batches)
    vectors = problem.vectors

    def fit() -> Float[Tensor, " N"]:
        longest = max(map(len, batches))
        if not longest:
            return vectors.merge([1 / len(vectors.tasks)] * len(vectors.tasks))
        epochs = math.ceil(steps / longest)
        return METHODS["divmerge"](
            problem, grouping=grouping, inputs=10**6, epochs=epochs, seed=seed, progress=False
        )

    return answered(bench, [*what, grouping, steps, seed], fit)


def amounts(
    benches: Mapping[int, Experiment],
    counts: Sequence[int],
    *,
    groupings: Sequence[str],
    steps: int,
) -> pd.DataFrame:
    """Predictions by the number of inputs per task, the method, all with as many steps.

    The largest number is the first. No inputs leave the start, 1/T. Which inputs are taken is drawn
    anew by seed. Labels: tasks (their number) and grouping.
    """
    parts = []
    for grouping in groupings:
        rows: list[dict] = []
        jobs = [(seed, count) for seed in benches for count in sorted(counts, reverse=True)]
        for seed, count in tqdm(jobs, f"number of inputs, per {grouping}", leave=False):
            bench, generator = benches[seed], torch.Generator().manual_seed(seed)
            chosen = few(bench.problem.batches, count, generator)
            options = {"grouping": grouping, "steps": steps, "seed": seed}
            found = fitted(bench, ["few", count], chosen, **options)
            rows += [{**row, "method": str(count), "seed": seed} for row in found]
        parts.append(with_experts(rows, benches, grouping=grouping, tasks=num_tasks(benches)))
    return pd.concat(parts, ignore_index=True)


def wrong_inputs(
    benches: Mapping[int, Experiment],
    others: Mapping[int, Batches],
    *,
    inputs: int,
    shares: Sequence[float],
    groupings: Sequence[str],
    steps: int,
) -> pd.DataFrame:
    """Predictions by kind and share of wrong inputs, beside those of right ones, `default`.

    others: by seed, inputs of tasks that are not merged. inputs: per task. Labels: tasks (their
    number) and grouping; the method is `kind=share`, and kind `none` is the start, 1/T.
    """
    parts = []
    for grouping in groupings:
        rows: list[dict] = []
        for seed, bench in benches.items():
            right = few(bench.problem.batches, inputs, torch.Generator().manual_seed(seed))
            smaller = replace(bench, problem=replace(bench.problem, batches=right))
            jobs = {(DEFAULT, 0.0): right, ("none", 1.0): [[] for _ in right]}
            for kind in WRONGS:
                generator = torch.Generator().manual_seed(seed)
                wrong = WRONGS[kind](smaller, others[seed], generator)
                jobs |= {(kind, share): mixed(right, wrong, share, generator) for share in shares}
            options = {"grouping": grouping, "steps": steps, "seed": seed}
            for (kind, share), chosen in tqdm(jobs.items(), f"wrong inputs, {seed}", leave=False):
                found = fitted(bench, ["wrong", kind, share, inputs], chosen, **options)
                label = DEFAULT if kind == DEFAULT else f"{kind}={share}"
                rows += [{**row, "method": label, "seed": seed} for row in found]
        parts.append(with_experts(rows, benches, grouping=grouping, tasks=num_tasks(benches)))
    return pd.concat(parts, ignore_index=True)


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
        for index, batch in enumerate(batches):
            own = problem.logits(flat, task, batch)
            loss = batch.weight @ DIVERGENCES["js"](targets[task][index], own)
            total += float(loss) / len(batches)
    return total


def shifts(
    benches: Mapping[int, Experiment], others: Mapping[int, Batches], *, inputs: int, steps: int
) -> pd.DataFrame:
    """Both sides of Proposition 3, for the average and for a fit on the right inputs.

    A mixture with a share s of wrong inputs is at most s away in total variation, and its objective
    is (1 - s) times the right one plus s times the wrong one. So both sides are linear in s, and a
    row per seed, kind and model at s = 1 tells all. Columns: seed, kind, model, right and wrong
    (objectives, in nats), apart (the left side at s = 1), bound (2 log 2 per task).
    """
    rows = []
    for seed, bench in tqdm(benches.items(), "Proposition 3", leave=False):
        find = partial(sides, bench, others[seed], inputs, steps, seed)
        found = kept(bench, find, "proposition 3", inputs, steps, seed)
        rows += [{"seed": seed, **row} for row in found]
    return pd.DataFrame(rows)


def sides(bench: Experiment, others: Batches, inputs: int, steps: int, seed: int) -> list[dict]:
    """Proposition 3 on one bench: a row per kind and model."""
    right = few(bench.problem.batches, inputs, torch.Generator().manual_seed(seed))
    problem, number = replace(bench.problem, batches=right), len(right)
    epochs = math.ceil(steps / max(map(len, right)))
    models = {
        "average": problem.vectors.merge([1 / number] * number),
        "DivMerge": METHODS["divmerge"](
            problem, grouping="layer", inputs=10**6, epochs=epochs, seed=seed, progress=False
        ),
    }
    rows, smaller = [], replace(bench, problem=problem)
    for kind in WRONGS:
        generator = torch.Generator().manual_seed(seed)
        wrong = mixed(right, WRONGS[kind](smaller, others, generator), 1.0, generator)
        for model, flat in models.items():
            a = divergence_sum(problem, flat)
            b = divergence_sum(replace(problem, batches=wrong), flat)
            row = {"kind": kind, "model": model, "right": a, "wrong": b, "apart": abs(a - b)}
            rows.append({**row, "bound": 2 * math.log(2) * number})
    return rows
