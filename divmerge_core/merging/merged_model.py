"""Merged parameters in one preallocated buffer; the module's parameters are views of it.

Autograd stops at the buffer; one product with the task vectors gives the gradient in Lambda.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.divergences.parse import Objective
from divmerge_core.kernels.delta_storage import Deltas, LowRankDeltas
from divmerge_core.kernels.expert_cache import TopKLogProbs
from divmerge_core.kernels.merge import add_inner, grouped_inner, grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.kernels.table_rows import TableRows
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.layer_inputs import embedding_tables, rows_read
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors

Answers = Tensor | TopKLogProbs  # [A, V]: logits, or what cache_expert made of them


@torch.no_grad()
def expert_logits(problem: MergeProblem) -> list[list[Answers]]:
    """Every expert's answers on its own inputs, computed once: `[task][batch] -> [A, V]`.

    Those that a batch holds already are taken as they are.
    """

    def answers(number: int) -> list[Answers]:  # one expert's N parameters at a time
        batches = problem.batches[number]
        if all(batch.expert is not None for batch in batches):
            return [batch.expert for batch in batches]
        expert = problem.vectors.expert(problem.vectors.tasks[number])
        return [problem.logits(expert, number, batch) for batch in batches]

    return [answers(number) for number in range(len(problem.vectors.tasks))]


def validate_targets(problem: MergeProblem, targets: Sequence[Sequence[Answers]]) -> None:
    """Raise ValueError where targets are not one [A, V] per task and batch."""
    wanted = [[len(batch.weight) for batch in batches] for batches in problem.batches]
    given = [
        [len(one.log_probs if isinstance(one, TopKLogProbs) else one) for one in every]
        for every in targets
    ]
    if given != wanted:
        raise ValueError(
            f"targets must hold logits [A, V] for every task and batch: {wanted} rows by task and "
            f"batch, got {given}; `expert_logits(problem)` has the form"
        )


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


def moved_tensors(vectors: TaskVectors) -> list[bool]:
    """Which tensors any expert has changed; all, where that is not to be seen or none has.

    The others' gradients would be multiplied by zeros: a backward pass can end above them.
    """
    if not isinstance(vectors.deltas, Tensor):
        return [True] * len(vectors.layout.names)
    found = [bool(vectors.deltas[:, a:b].any()) for a, b in vectors.layout.bounds]
    return found if any(found) else [True] * len(found)


def as_read(problem: MergeProblem, vectors: TaskVectors) -> TaskVectors:
    """The vectors with whole embedding tables of a low-rank store cut to the rows that are read.

    A fit on the problem's inputs merges these rows alone, and has gradients of no others.
    """
    stored = dict(getattr(vectors.deltas, "factors", {}))
    tables = embedding_tables(problem) if stored else {}
    bounds = dict(zip(vectors.layout.names, vectors.layout.bounds, strict=True))
    places = {name: bounds[name][0] for name in tables}
    whole = {n: tables[n] for n, at in places.items() if at in stored and len(stored[at].left) == 1}
    if not whole:
        return vectors
    for name, read in rows_read(problem, whole).items():
        kept, table = stored[places[name]], vectors.layout.unflatten(vectors.base)[name]
        deltas, rows = kept.right.unflatten(1, table.shape), read.nonzero()[:, 0]
        stored[places[name]] = TableRows.of(table, rows, deltas, kept.ranks)
    return replace(vectors, deltas=LowRankDeltas(vectors.deltas.shape, stored))


def gather_in_buffer(
    leaves: Mapping[str, Tensor], vectors: TaskVectors, segments: Segments
) -> Callable[[], Tensor]:
    """Let gradients add up in one buffer [N]; one pass over it gives dL/dLambda.

    Takes any number of backward passes per step, and a single launch on a GPU.
    """
    buffer = torch.zeros_like(vectors.base)
    for leaf, view in zip(leaves.values(), vectors.layout.unflatten(buffer).values(), strict=True):
        if leaf.requires_grad:
            leaf.grad = view

    def collect() -> Float[Tensor, "T G"]:
        result = grouped_inner(buffer, vectors.deltas, segments)
        buffer.zero_()
        return result

    return collect


def consume(total: Tensor, deltas: Deltas, rows: Sequence, start: int, leaf: Tensor) -> None:
    """Multiply a tensor's gradient, add the products to total [T, G], and free it."""
    grad = leaf.grad.to_local() if hasattr(leaf.grad, "to_local") else leaf.grad
    add_inner(total, grad.flatten(), deltas, rows, start)
    leaf.grad = None


def accumulate_with_hooks(
    leaves: Mapping[str, Tensor],
    vectors: TaskVectors,
    segments: Segments,
    hooks: list | None = None,
) -> Callable[[], Tensor]:
    """Multiply every tensor's gradient as soon as it is ready, and free it: no buffer [N].

    The peak is the largest tensor's gradient. hooks: receives the handles. Of sharded parameters
    the local gradient is taken.
    """
    result = vectors.base.new_zeros(len(vectors.tasks), segments.num_groups)

    for leaf, (start, stop) in zip(leaves.values(), vectors.layout.bounds, strict=True):
        if leaf.requires_grad and start < stop:
            hook = partial(consume, result, vectors.deltas, segments.within(start, stop), start)
            handle = leaf.register_post_accumulate_grad_hook(hook)
            if hooks is not None:
                hooks.append(handle)

    def collect() -> Float[Tensor, "T G"]:
        gathered = result.clone()
        result.zero_()
        return gathered

    return collect


GRADIENTS = {"stream": accumulate_with_hooks, "buffer": gather_in_buffer}


def objective_against(
    expert: Answers, logits: Float[Tensor, "A V"], objective: Objective
) -> Tensor:
    """The objective per position; where an expert keeps its top answers only, on these [A]."""
    if isinstance(expert, TopKLogProbs):
        return objective(expert.log_probs, expert.coarsen(logits))
    return objective(expert, logits)


def step_loss(
    problem: MergeProblem,
    leaves: Mapping[str, Tensor],
    experts: Sequence[Sequence[Answers]],
    chosen: Sequence[int],
    objective: Objective,
) -> Float[Tensor, ""]:
    """Sum over tasks of the objective's mean on one batch each: the chosen ones."""
    pairs = [(task, problem.batches[task][index]) for task, index in enumerate(chosen)]
    return sum(
        batch.weight @ objective_against(experts[task][chosen[task]], logits, objective)
        for (task, batch), logits in zip(pairs, problem.forward(leaves, pairs), strict=True)
    )


def rounds(counts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """(task, batch number) of all batches, one of every task that has any left at a time."""
    for number in range(max(counts)):
        yield [(task, number) for task, count in enumerate(counts) if number < count]


@dataclass(frozen=True)
class MergedModel:
    """The merged model in one buffer [N], whose views are the model's parameters.

    vectors: what the coefficients scale: the problem's task vectors, or components of them.
    read: these as far as the problem's inputs read them. targets: the logits that the merged
    model's are held to, `[task][batch] -> [A, V]`. collect: of GRADIENTS, what the backward passes
    since its last call add up to, as dL/dLambda [T, G].
    """

    problem: MergeProblem
    vectors: TaskVectors
    read: TaskVectors
    coefficients: Coefficients
    objective: Objective
    targets: Sequence[Sequence[Answers]]
    flat: Float[Tensor, " N"]
    leaves: Mapping[str, Tensor]
    collect: Callable[[], Tensor]

    @classmethod
    def of(
        cls,
        problem: MergeProblem,
        vectors: TaskVectors,
        coefficients: Coefficients,
        objective: Objective,
        targets: Sequence[Sequence[Answers]],
        gradients: str,
    ) -> "MergedModel":
        """The buffer, with nothing merged into it yet."""
        flat, read = torch.empty_like(vectors.base), as_read(problem, vectors)
        leaves = vectors.layout.unflatten(flat)
        moved = [True] * len(leaves) if problem.reducer else moved_tensors(vectors)
        for leaf, needed in zip(leaves.values(), moved, strict=True):
            leaf.requires_grad_(needed)
        if problem.reducer:  # gradients come to the module's own shares, not to these leaves
            collect = problem.reducer.gather(vectors, coefficients.segments)
        else:
            collect = GRADIENTS[gradients](leaves, read, coefficients.segments)
        return cls(problem, vectors, read, coefficients, objective, targets, flat, leaves, collect)

    def merge(self, vectors: TaskVectors | None = None) -> Float[Tensor, "T G"]:
        """Merge into the buffer; returns the coefficients, with the graph of their link.

        vectors: None for those that are read: rows of tables that no input reads stay the base's.
        """
        vectors, coeffs = vectors or self.read, self.coefficients()
        segments, out = self.coefficients.segments, self.flat
        grouped_merge(
            vectors.base, vectors.deltas, coeffs.detach(), segments, out=out, validate=False
        )
        return coeffs

    def whole(self) -> Float[Tensor, " N"]:
        """The buffer, with all parameters merged."""
        if self.read is not self.vectors:
            self.merge(self.vectors)
        return self.flat

    def loss(self, chosen: Sequence[int]) -> Float[Tensor, ""]:
        """The loss on one batch of every task: the chosen ones."""
        return step_loss(self.problem, self.leaves, self.targets, chosen, self.objective)

    def backward_all(self) -> float:
        """The loss on all inputs; its gradient is left for `collect`."""
        counts, total = [len(batches) for batches in self.problem.batches], 0.0
        for pairs in rounds(counts):
            read = [(task, self.problem.batches[task][index]) for task, index in pairs]
            logits = self.problem.forward(self.leaves, read)
            loss = sum(
                batch.weight
                @ objective_against(self.targets[task][index], own, self.objective)
                / counts[task]
                for (task, index), (_, batch), own in zip(pairs, read, logits, strict=True)
            )
            loss.backward()
            total += loss.item()
        return self.total(total)

    def total(self, loss: float) -> float:
        """A loss on this device's rows, and on those of all others where there are any."""
        return self.problem.reducer.total(loss) if self.problem.reducer else loss
