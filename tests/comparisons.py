"""What merges are compared with: their changes and answers, naive references, quick runs."""

from collections.abc import Callable, Sequence

import torch
from helpers import linear_problem
from torch import Tensor
from torch.testing import assert_close

from divmerge_core import MergeProblem
from divmerge_core.divergences import js
from divmerge_core.methods import METHODS, options_of, parse


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert_close(found, expected, rtol=0, atol=tolerance)


def inputs_of(problem: MergeProblem, task: int) -> Tensor:
    return torch.cat([batch.inputs["x"] for batch in problem.batches[task]])


def change(problem: MergeProblem, merged: Tensor) -> Tensor:
    """What a merge added to the base."""
    return merged - problem.vectors.base


def changes(problem: MergeProblem, merged: Tensor) -> dict[str, Tensor]:
    """What a merge added to every tensor of the base."""
    return problem.vectors.layout.unflatten(change(problem, merged))


def by_task(problem: MergeProblem, name: str) -> Tensor:
    """One tensor's deltas of all tasks."""
    rows = map(problem.vectors.layout.unflatten, problem.vectors.deltas)
    return torch.stack([row[name] for row in rows])


def answers(problem: MergeProblem, merged) -> list[Tensor]:
    """Logits of a merged vector, or of a predictor, on every input."""
    with torch.no_grad():
        return [
            problem.logits_of(merged, task, batch)
            for task, batches in enumerate(problem.batches)
            for batch in batches
        ]


def mean_divergence(problem: MergeProblem, merged, divergence: Callable = js) -> float:
    """Mean divergence of a merged vector or a predictor from every task's expert, on all inputs."""
    found, rows = iter(answers(problem, merged)), []
    for task, name in enumerate(problem.vectors.tasks):
        expert = problem.vectors.expert(name)
        for batch in problem.batches[task]:
            rows.append(divergence(problem.logits(expert, task, batch), next(found)).mean())
    return float(torch.stack(rows).mean())


def naive_merge(problem: MergeProblem, coeffs: Tensor, groups: Sequence[int]) -> dict[str, Tensor]:
    """The merge as a dictionary of tensors, one Python sum per tensor: what autograd can follow."""
    layout, vectors = problem.vectors.layout, problem.vectors
    base = layout.unflatten(vectors.base)
    deltas = [layout.unflatten(row) for row in vectors.deltas]
    return {
        name: base[name] + sum(coeffs[t, group] * delta[name] for t, delta in enumerate(deltas))
        for name, group in zip(layout.names, groups, strict=True)
    }


def naive_loss(problem: MergeProblem, parameters, objective: Callable) -> Tensor:
    """Sum over tasks of the mean objective on the task's first batch."""
    loss = 0
    for task, name in enumerate(problem.vectors.tasks):
        batch = problem.batches[task][0]
        expert = problem.logits(problem.vectors.expert(name), task, batch).detach()
        merged = problem.forward(parameters, [(task, batch)])[0]
        loss = loss + batch.weight @ objective(expert, merged)
    return loss


def adam(start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, lr: float) -> Tensor:
    """Kingma and Ba's Algorithm 1; `gradient` gives the gradient at a point."""
    place, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        slope = gradient(place)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        bent = (square / (1 - 0.999**step)).sqrt() + 1e-8
        place = place - lr * (mean / (1 - 0.9**step)) / bent
    return place


def toy(spec: str, **options) -> MergeProblem:
    """A problem with as many experts as the method takes, and no more inputs than it draws from."""
    name = parse(spec)[0]
    if "exactly" in METHODS.facts[name]:
        options["num_tasks"] = METHODS.facts[name]["exactly"]
    return linear_problem(batches=2 if "seed" in options_of(name) else 1, **options)


def square(problem: MergeProblem, merged) -> float:
    """A score that costs one forward pass."""
    with torch.no_grad():
        logits = problem.logits_of(merged, 0, problem.batches[0][0])
    return -float(logits.square().mean())


def merge(problem: MergeProblem, spec: str, **options):
    """Run a method by its name, quickly where it has steps to run."""
    name, fixed = parse(spec)
    quick = {"epochs": 2, "steps": 3, "progress": False, "seed": 0}
    quick["score"] = lambda merged: square(problem, merged)
    taken = {key: value for key, value in quick.items() if key in options_of(name)}
    return METHODS[name](problem, **{**taken, **fixed, **options})
