"""What the tests share: a linear model to merge, and toy tasks with their words."""

import errno
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from divmerge_book import Experiment, Task
from divmerge_book.data.splits import Row, Splits
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.models.finetuning import Expert, Recipe
from hypothesis import strategies as st
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.func import functional_call

from divmerge_core import Batch, Layout, MergeProblem, TaskVectors
from divmerge_core.kernels import threads

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "book" / "results"
INF, NAN = float("inf"), float("nan")
QUIET = {"progress": False}


def refuses(message: str):
    """A block that raises a ValueError whose message matches."""
    return pytest.raises(ValueError, match=message)


def raising(error: BaseException):
    """A function that raises this error, whatever it is given."""

    def call(*args, **options):
        raise error

    return call


refuse = raising(OSError(errno.EROFS, os.strerror(errno.EROFS)))  # as on a read-only disk


def places(ax: Axes, marker: str) -> list[list[float]]:
    """Coordinates of every mark of this kind."""
    lines = [line for line in ax.get_lines() if line.get_marker() == marker]
    return [np.column_stack(line.get_data()).squeeze().tolist() for line in lines]


def forbid(*args, **options):
    """In the place of a function that must not be called."""
    pytest.fail("what must not be called is called")


@contextmanager
def shared_by(count: int) -> Iterator[None]:
    """A CPU's merges and gradients shared out to so many threads, however small they are."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "SHARED", 1)
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


# --- logits
def one_hot(winner: int, *, gap: float = 1e4, classes: int = 3) -> Tensor:
    """A row of logits at -gap with the winner at +gap."""
    row = torch.full((1, classes), -gap)
    row[0, winner] = gap
    return row


@st.composite
def logit_pairs(draw) -> list[Tensor]:
    """Two rows of float32 logits over the same 1 to 6 classes, some masked on either side."""
    classes, sides = draw(st.integers(1, 6)), []
    number = st.floats(-1e4, 1e4, width=32)
    entry = st.one_of(number, st.just(-INF))
    for _ in range(2):
        row = draw(st.lists(entry, min_size=classes, max_size=classes))
        row[draw(st.integers(0, classes - 1))] = draw(number)  # at least one class is allowed
        sides.append(torch.tensor([row], dtype=torch.float32))
    return sides


# --- problems to merge
def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layout_of(**tensors: tuple[int, ...]) -> Layout:
    return Layout(tuple(tensors), tuple(tensors.values()))


def batch_of(x: Tensor, **others) -> Batch:
    """Inputs of equal weight."""
    return Batch({"x": x}, torch.full((len(x),), 1 / len(x), dtype=x.dtype), **others)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def module_problem(
    module: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]],
    batches: Sequence[Sequence[Batch]] | None = None,
    answer: Callable | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> MergeProblem:
    """Experts of a module, whose logits are its output for `x`, or `answer(parameters, batch)`."""
    module.requires_grad_(False)

    def output(parameters, batch):
        return functional_call(module, parameters, batch.inputs["x"])

    def forward(parameters, pairs) -> list[Tensor]:
        return [(answer or output)(dict(parameters), batch) for _, batch in pairs]

    vectors = TaskVectors.from_states(base or state_of(module), experts)
    return MergeProblem(vectors, batches or [[] for _ in experts], forward, module)


class LinearModel(nn.Module):
    """Three linear maps in a row, named as a transformer's, so that every grouping has groups."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.embeddings = nn.Linear(features, features, bias=False)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            nn.ModuleDict({"dense": nn.Linear(features, width)}) for width in (features, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x)
        for layer in self.encoder.layer:
            x = layer["dense"](x)
        return x


def linear_problem(
    *,
    num_tasks: int = 3,
    features: int = 6,
    classes: int = 4,
    batches: int = 3,
    rows: int = 5,
    scale: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> MergeProblem:
    """Random base, random experts around it, random unlabelled inputs: five tensors."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    model = LinearModel(features, classes).to(dtype)
    base = {name: drawn(*value.shape) for name, value in model.named_parameters()}
    experts = {
        f"task{t}": {name: value + scale * drawn(*value.shape) for name, value in base.items()}
        for t in range(num_tasks)
    }
    inputs = [[batch_of(drawn(rows, features)) for _ in range(batches)] for _ in range(num_tasks)]
    return module_problem(model, experts, inputs, base=base)


def problem_of(
    *deltas: Tensor | Sequence[float],
    base: float | list[float] = 0.0,
    module: nn.Module | None = None,
    **shapes: tuple[int, ...],
) -> MergeProblem:
    """A problem with these task vectors, in float64 and without inputs.

    One tensor `weight` of the task vectors' own shape unless `shapes` says otherwise.
    """
    tensors = [torch.as_tensor(delta, dtype=torch.float64) for delta in deltas]
    layout = layout_of(**(shapes or {"weight": tuple(tensors[0].shape)}))
    start = torch.tensor(base, dtype=torch.float64).expand(layout.size).clone()
    names = tuple(f"task{number}" for number in range(len(tensors)))
    rows = torch.stack([tensor.flatten() for tensor in tensors])
    vectors = TaskVectors(layout, names, start, rows)
    return MergeProblem(vectors, [[] for _ in names], lambda parameters, pairs: [], module)


def experiment_of(problem: MergeProblem, base, digest: str = "linear") -> Experiment:
    """An experiment whose labels are the predictions of every task's expert."""
    splits = []
    for number, task in enumerate(problem.vectors.tasks):
        expert, batches = problem.vectors.expert(task), problem.batches[number]
        labels = [problem.logits(expert, number, batch).argmax(-1) for batch in batches]
        splits.append(LabelledSplit(batches, torch.cat(labels)))
    experts = [Expert(task, {}, {}, {}) for task in problem.vectors.tasks]
    return Experiment(base, experts, problem, splits, splits, digest)


def linear_experiment(base, tasks: int, *, digest="linear", seed=0, **options) -> Experiment:
    """An experiment of linear tasks whose right answers are those of every task's expert."""
    problem = linear_problem(num_tasks=tasks, scale=0.8, seed=seed, **options)
    return experiment_of(problem, base, digest)


def fewer(problem: MergeProblem, batches: int) -> MergeProblem:
    """The same problem with the first few batches of every task."""
    return replace(problem, batches=[every[:batches] for every in problem.batches])


def frozen(problem: MergeProblem, tensors: slice, tasks: slice = slice(None)) -> MergeProblem:
    """The same problem with experts that left some tensors as they were."""

    def freeze(deltas: Tensor) -> Tensor:
        deltas = deltas.clone()
        for start, stop in problem.vectors.layout.bounds[tensors]:
            deltas[tasks, start:stop] = 0
        return deltas

    return replace(problem, vectors=problem.vectors.map(freeze))


# --- toy tasks: one word of a text decides
FILLERS = "the a film song book of in on with and very quite old new long short".split()
MARKERS = {
    "mood": {"bad": "negative", "good": "positive"},
    "place": {"here": "near", "there": "far", "nowhere": "unknown"},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS]
WORDS += [marker for markers in MARKERS.values() for marker in markers]
COUNTS = {"train": 160, "validation": 40, "merge": 24, "test": 60}
TINY_RECIPE = Recipe(None, epochs=4, lr=1e-2, batch_size=16, max_length=12, precision="float32")


def sentences(name: str, count: int, *, seed: int = 0) -> list[Row]:
    """Distinct sentences of filler words, each with one word that decides its answer."""
    generator = random.Random(f"{name} {seed}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        words = generator.choices(FILLERS, k=generator.randint(3, 7))
        marker = generator.choice(list(MARKERS[name]))
        words.insert(generator.randint(0, len(words)), marker)
        rows[" ".join(words)] = (" ".join(words), None, MARKERS[name][marker])
    return list(rows.values())


def toy_splits(name: str, *, seed: int = 0) -> Splits:
    rows = iter(sentences(name, sum(COUNTS.values()), seed=seed))
    return {split: [next(rows) for _ in range(count)] for split, count in COUNTS.items()}


def toy_task(name: str, *, seed: int = 0) -> Task:
    """A task that a tiny encoder learns in seconds."""
    answers = tuple(dict.fromkeys(MARKERS[name].values()))
    key = f"{name} {seed}"
    rows = lambda: toy_splits(name, seed=seed)  # noqa: E731
    return Task(name, "toy", answers, False, "made here", rows, lambda: key)


def task_of(splits: Splits, *, answers=("no", "yes"), pair: bool = False, name="given") -> Task:
    """A task with exactly these rows."""
    return Task(name, "toy", answers, pair, "made here", lambda: splits, lambda: repr(splits))
