"""What a merging method may look at, and the one optimisation loop behind every adaptive method."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from divmerge_core.coefficients import Coefficients
from divmerge_core.kernels.merge import grouped_inner, grouped_merge, inner_range
from divmerge_core.kernels.segments import Segments
from divmerge_core.vectors import TaskVectors

Objective = Callable[[Tensor, Tensor], Tensor]  # (expert logits, merged logits) [A, V] -> [A]


class Diverged(ValueError):
    """A method ran off instead of converging: the message names the step and the cause."""


@dataclass(frozen=True)
class Batch:
    """What a model reads; gold answers are not in it.

    answer marks the A positions of a language model that predict the expert's answer; None for a
    classifier, where A = B. weight sums to 1: the mean over answer positions, then over inputs.
    """

    inputs: Mapping[str, Int[Tensor, "B S"] | Float[Tensor, "B D"]]
    weight: Float[Tensor, " A"]
    answer: Bool[Tensor, "B S"] | None = None


@runtime_checkable
class Predictor(Protocol):
    """What methods return that have no single merged vector: it answers for a task by itself.

    nbytes: of all that has to be stored for it to answer; heads of tasks are not counted.
    """

    @property
    def nbytes(self) -> int: ...

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]: ...


Merged = Float[Tensor, " N"] | Predictor
Pairs = Sequence[tuple[int, Batch]]  # (task number, inputs)
Forward = Callable[[Mapping[str, Tensor], Pairs], list[Tensor]]


@dataclass(frozen=True)
class MergeProblem:
    """Task vectors, unlabelled inputs of every task, and how parameters turn inputs into logits.

    forward(parameters by name, [(task, batch), ...]) -> [logits [A, V], ...]. It is pure: the same
    parameters give the same logits, and gradients flow back to the parameters. module is what
    forward calls, with the layout's names: methods that look inside put hooks on its layers.
    """

    vectors: TaskVectors
    batches: Sequence[Sequence[Batch]]
    forward: Forward = field(repr=False)
    module: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self):
        if len(self.batches) != len(self.vectors.tasks):
            raise ValueError(
                f"{len(self.vectors.tasks)} tasks but inputs for {len(self.batches)}; "
                "give one sequence of batches per task (it may be empty)"
            )

    def logits(self, flat: Float[Tensor, " N"], task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """Logits of the model with parameters `flat` on a task's inputs."""
        return self.forward(self.vectors.layout.unflatten(flat), [(task, batch)])[0]

    def logits_of(self, merged: "Merged", task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """Logits of what a method returned: merged parameters, or a predictor."""
        if isinstance(merged, Tensor):
            return self.logits(merged, task, batch)
        return merged.logits(task, batch)

    def select(self, tasks: Sequence[str]) -> "MergeProblem":
        """The same problem for some of its tasks, in the order given."""
        vectors = self.vectors.select(tasks)
        numbers = [self.vectors.tasks.index(task) for task in tasks]

        def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
            return self.forward(parameters, [(numbers[task], batch) for task, batch in pairs])

        return replace(
            self, vectors=vectors, batches=[self.batches[n] for n in numbers], forward=forward
        )

    def require_inputs(self, method: str) -> None:
        """Raise ValueError where a task has no unlabelled inputs, which `method` needs."""
        empty = [t for t, b in zip(self.vectors.tasks, self.batches, strict=True) if not b]
        if empty:
            raise ValueError(f"{method} needs unlabelled inputs of every task; none for {empty}")


@dataclass(frozen=True)
class Step:
    """Where the fit stands: seen by `watch` before each update, and once at the end.

    `flat` is the live buffer, overwritten by the next step: clone it to keep it.
    """

    number: int
    loss: float | None  # nats, summed over tasks; None at the end, where no batch was drawn
    coeffs: Float[Tensor, "T G"]
    flat: Float[Tensor, " N"]


@torch.no_grad()
def expert_logits(problem: MergeProblem) -> list[list[Tensor]]:
    """Every expert's logits on its own inputs, computed once: `[task][batch] -> [A, V]`."""

    def answers(number: int) -> list[Tensor]:  # one expert's N parameters at a time
        expert = problem.vectors.expert(problem.vectors.tasks[number])
        return [problem.logits(expert, number, batch) for batch in problem.batches[number]]

    return [answers(number) for number in range(len(problem.vectors.tasks))]


def schedule(counts: Sequence[int], epochs: int, generator: torch.Generator) -> list[list[int]]:
    """Which batch of each task every step takes: `[step][task]`, each epoch in a fresh order.

    All tasks share one order, so that batches of like length meet in a step where batches are
    sorted by length. An epoch lasts as long as the task with the most batches; others start over.
    """
    steps = []
    for _ in range(epochs):
        order = torch.randperm(max(counts), generator=generator).tolist()
        steps += [[number % count for count in counts] for number in order]
    return steps


def gather_in_buffer(
    leaves: Mapping[str, Tensor], vectors: TaskVectors, segments: Segments
) -> Callable[[], Tensor]:
    """Let gradients add up in one buffer [N]; one pass over it gives dL/dLambda.

    Takes any number of backward passes per step, and a single launch on a GPU.
    """
    buffer = torch.zeros_like(vectors.base)
    for leaf, view in zip(leaves.values(), vectors.layout.unflatten(buffer).values(), strict=True):
        leaf.grad = view

    def collect() -> Float[Tensor, "T G"]:
        result = grouped_inner(buffer, vectors.deltas, segments)
        buffer.zero_()
        return result

    return collect


def gather_as_they_come(
    leaves: Mapping[str, Tensor], vectors: TaskVectors, segments: Segments
) -> Callable[[], Tensor]:
    """Take each tensor's gradient when it is ready, multiply, and free it: no buffer [N].

    The largest tensor's gradient is the most that is held at once.
    """
    result = vectors.base.new_zeros(len(vectors.tasks), segments.num_groups)

    def consume(start: int, stop: int) -> Callable[[Tensor], None]:
        column = result[:, segments.group_at(start)]

        def hook(leaf: Tensor) -> None:
            column.add_(inner_range(leaf.grad.flatten(), vectors.deltas, start, stop))
            leaf.grad = None

        return hook

    for leaf, (start, stop) in zip(leaves.values(), vectors.layout.bounds, strict=True):
        leaf.register_post_accumulate_grad_hook(consume(start, stop))

    def collect() -> Float[Tensor, "T G"]:
        gathered = result.clone()
        result.zero_()
        return gathered

    return collect


LIMIT = 100.0  # no coefficient of a fit that converges is near it
GRADIENTS = {"stream": gather_as_they_come, "buffer": gather_in_buffer}


def step_loss(
    problem: MergeProblem,
    leaves: Mapping[str, Tensor],
    experts: Sequence[Sequence[Tensor]],
    chosen: Sequence[int],
    objective: Objective,
) -> Float[Tensor, ""]:
    """Sum over tasks of the objective's mean on one batch each: the chosen ones."""
    pairs = [(task, problem.batches[task][index]) for task, index in enumerate(chosen)]
    return sum(
        batch.weight @ objective(experts[task][chosen[task]], logits)
        for (task, batch), logits in zip(pairs, problem.forward(leaves, pairs), strict=True)
    )


def fit_coefficients(
    problem: MergeProblem,
    coefficients: Coefficients,
    objective: Objective,
    *,
    epochs: int = 4,
    lr: float = 1e-2,
    seed: int = 0,
    gradients: str = "stream",
    watch: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Adam on the coefficients, minimising sum_t E_x objective(expert_t(x), merged(x)).

    One batch of every task per step, unweighted sum over tasks (DivMerge Eq. 4 and Algorithm 1).
    The experts' logits are cached and the merged parameters are written into one live buffer whose
    views are the model's leaves; no graph runs through the merge. `coefficients` is trained in
    place; returns the merged parameters.

    epochs: passes over the inputs, at least 1. lr: Adam's step size, above 0. gradients: `stream`
    takes every tensor's gradient as it comes and frees it; `buffer` keeps all N for one pass at
    the end. Raises ValueError for values outside these ranges and a task without inputs, and
    Diverged where the loss stops being finite or a coefficient leaves [-LIMIT, LIMIT].
    """
    if epochs < 1 or not 0 < lr < float("inf"):
        raise ValueError(
            f"epochs must be 1 or more and lr above 0 and finite, got {epochs} and {lr}"
        )
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {', '.join(GRADIENTS)}, got {gradients!r}")
    problem.require_inputs("fit_coefficients")
    vectors, segments = problem.vectors, coefficients.segments
    experts = expert_logits(problem)
    live = torch.empty_like(vectors.base)
    leaves = vectors.layout.unflatten(live)
    for leaf in leaves.values():
        leaf.requires_grad_()
    collect = GRADIENTS[gradients](leaves, vectors, segments)
    adam = torch.optim.Adam(coefficients.parameters(), lr=lr)
    steps = schedule([len(b) for b in problem.batches], epochs, torch.Generator().manual_seed(seed))

    def merge() -> Tensor:
        coeffs = coefficients()
        grouped_merge(
            vectors.base, vectors.deltas, coeffs.detach(), segments, out=live, validate=False
        )
        return coeffs

    def observe(number: int, loss: float | None, coeffs: Tensor) -> None:
        coeffs = coeffs.detach().clone()
        if not math.isfinite(loss or 0.0) or not coeffs.abs().max() <= LIMIT:
            raise Diverged(
                f"fit_coefficients: the loss is {loss} at step {number}, the largest coefficient "
                f"{coeffs.abs().max():.3g}; lower lr (now {lr}) or check the experts for extreme "
                "logits"
            )
        if watch is not None:
            watch(Step(number, loss, coeffs, live))

    for number, chosen in enumerate(tqdm(steps, "fitting", disable=not progress, leave=False)):
        coeffs = merge()
        loss = step_loss(problem, leaves, experts, chosen, objective)
        observe(number, loss.item(), coeffs)
        loss.backward()
        adam.zero_grad()
        coeffs.backward(collect().to(coeffs))
        adam.step()
    observe(len(steps), None, merge())
    return live
