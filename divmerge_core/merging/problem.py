"""The input of a merging method: task vectors, unlabelled inputs, and the forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from divmerge_core.kernels.expert_cache import TopKLogProbs
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.require import require
from divmerge_core.merging.task_vectors import TaskVectors


class Diverged(ValueError):
    """A method diverged: the message names the step and the cause."""


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, without gold answers.

    answer marks the A positions of a language model (of its decoder, where it has one) that predict
    the expert's answer; None for a classifier, where A = B. weight sums to 1: the mean over answer
    positions, then over inputs.
    expert: the expert's own answers at these positions, where they are kept; None to compute them.
    """

    inputs: Mapping[str, Int[Tensor, "B _"] | Float[Tensor, "B D"]]
    weight: Float[Tensor, " A"]
    answer: Bool[Tensor, "B _"] | None = None
    expert: Float[Tensor, "A V"] | TopKLogProbs | None = None


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


@runtime_checkable
class GradientReducer(Protocol):
    """Sums losses and gradients of a fit over devices: see the book, `runner.fsdp.Shards`."""

    def gather(self, vectors: TaskVectors, segments: Segments) -> Callable[[], Tensor]:
        """Register gradient hooks; the function returned gives dL/dLambda [T, G] of all."""
        ...

    def total(self, loss: float) -> float:
        """The sum of all devices' losses."""
        ...


@dataclass(frozen=True)
class MergeProblem:
    """Task vectors, unlabelled inputs of every task, and how parameters turn inputs into logits.

    forward(parameters by name, [(task, batch), ...]) -> [logits [A, V], ...]. It is pure: the same
    parameters give the same logits, and gradients flow back to the parameters. module is what
    forward calls, with the layout's names: methods that look inside put hooks on its layers.
    reducer: set where vectors and batches are one device's share of a larger problem.
    """

    vectors: TaskVectors
    batches: Sequence[Sequence[Batch]]
    forward: Forward = field(repr=False)
    module: nn.Module | None = field(default=None, repr=False)
    reducer: GradientReducer | None = field(default=None, repr=False)

    def __post_init__(self):
        kinds = {"vectors": TaskVectors, "batches": Sequence, "forward": Callable}
        for name, kind in kinds.items():
            require(getattr(self, name), kind, name, "MergeProblem(vectors, batches, forward)")
        if len(self.batches) != len(self.vectors.tasks):
            raise ValueError(
                f"{len(self.vectors.tasks)} tasks but inputs for {len(self.batches)}; "
                "give one sequence of batches per task (it may be empty)"
            )
        for task, own in zip(self.vectors.tasks, self.batches, strict=True):
            require(own, Sequence, f"batches of {task!r}", "a list of Batch, which may be empty")

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
        if empty := [t for t, b in zip(self.vectors.tasks, self.batches, strict=True) if not b]:
            raise ValueError(f"{method} needs unlabelled inputs of every task; none for {empty}")
