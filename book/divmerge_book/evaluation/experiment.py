"""A suite made ready: base, experts, merge problem, and the labelled splits that it must not
see."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from divmerge_book.data.code_digest import code_digest, key_of
from divmerge_book.data.tasks import SUITES, TASKS
from divmerge_book.evaluation.metrics import AnySplit, LabelledSplit
from divmerge_book.models.encoders import (
    Base,
    check_device,
    classifier_forward,
    load_base,
    make_batches,
    resolve,
)
from divmerge_book.models.finetuning import Expert, Recipe, data_digest, fine_tune
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.registry import Registry


@dataclass(frozen=True)
class Size:
    """How much is trained, merged and scored. A row count of None means all that the split has.

    inputs: unlabelled rows per task that a fit sees; None means the paper's 200, or 400 with one
    coefficient per layer. precision: of the encoder's matrix products while merging and scoring
    (see Recipe). candidates: options tried per method on validation rows at the first seed; the
    best is used for every seed. None tries all; 1 takes the published values. calls: how often
    a method that searches by itself may ask for a validation score. steps: of fits that do not run
    the model, at most; None leaves each its own.
    """

    encoder: str
    seeds: tuple[int, ...]
    recipe: Recipe = field(default_factory=Recipe)
    glue_recipe: Recipe = field(default_factory=lambda: Recipe(rows=12000))
    merge_rows: int | None = None
    validation_rows: int | None = 100
    test_rows: int | None = None
    inputs: int | None = None
    epochs: int = 4
    precision: str = "auto"
    candidates: int | None = None
    calls: int = 100
    steps: int | None = None

    def recipe_for(self, suite: str, task: str) -> Recipe:
        """How a suite's expert on a task is trained: GLUE's on more rows, as its tasks are harder.

        GLUE's tasks with fewer than 8,000 training rows are trained for twice as many epochs.
        """
        if suite != "glue_encoder":
            return self.recipe
        few = task in ("cola", "rte", "mrpc")
        return replace(self.glue_recipe, epochs=self.glue_recipe.epochs * (1 + few))


SIZES = Registry("size")
QUICK = Recipe(rows=400)
SIZES.register("smoke")(
    Size(
        encoder="bert_tiny",
        seeds=(0,),
        recipe=QUICK,
        glue_recipe=QUICK,
        merge_rows=40,
        validation_rows=50,
        test_rows=100,
        epochs=2,
        precision="float32",
        candidates=1,
        calls=10,
        steps=40,
    )
)
SIZES.register("default")(
    Size(
        encoder="minilm",
        seeds=(0,),
        merge_rows=32,
        validation_rows=32,
        test_rows=150,
        candidates=1,
        calls=60,
    )
)
SIZES.register("full")(Size(encoder="minilm", seeds=(0, 1, 2), inputs=100))


@dataclass(frozen=True)
class Experiment:
    """A merge problem with the labelled splits that it must not see.

    unfinished: a folder that keeps fits which are killed, where a pass takes seconds; else None.
    """

    base: Base
    experts: Sequence[Expert]
    problem: MergeProblem
    validation: Sequence[AnySplit]
    test: Sequence[AnySplit]
    digest: str
    unfinished: Path | None = None

    def select(self, tasks: Sequence[str]) -> "Experiment":
        """The same bench for some of its tasks."""
        digest, every = f"{self.digest} {tuple(tasks)}", self.problem.vectors.tasks
        if tuple(tasks) == every:  # spares a copy of the task vectors
            return replace(self, digest=digest)
        numbers = [every.index(task) for task in tasks]
        return replace(
            self,
            experts=[self.experts[n] for n in numbers],
            problem=self.problem.select(tasks),
            validation=[self.validation[n] for n in numbers],
            test=[self.test[n] for n in numbers],
            digest=digest,
        )


def task_names(suite: str, tasks: Sequence[str] | None) -> list[str]:
    """The tasks asked for, or all of the suite's.

    Raises ValueError for tasks outside the suite, named twice, or fewer than two.
    """
    allowed = SUITES[suite].tasks
    chosen = list(tasks or allowed)
    for task in chosen:
        TASKS[task]
    outside = [task for task in chosen if task not in allowed]
    if outside or len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"suite {suite!r} merges two or more distinct tasks of {', '.join(allowed)}; "
            f"got {chosen}"
        )
    return chosen


def exam(task: str, split: str, rows: int | None, base: Base, max_length: int) -> LabelledSplit:
    """The first `rows` rows of a labelled split (rows are in random order already)."""
    data = TASKS[task].load(split)
    data = data.select(range(min(rows or len(data), len(data))))
    batches, order = make_batches(data, base, batch_size=64, max_length=max_length)
    labels = torch.tensor(data["label"], device=batches[0].weight.device)
    return LabelledSplit(batches, labels[order])


def make_problem(
    base: Base,
    experts: Sequence[Expert],
    *,
    merge_rows: int | None = None,
    max_length: int = 64,
    precision: str = "float32",
) -> MergeProblem:
    """A MergeProblem of experts of one base, on their tasks' unlabelled merge split.

    Raises ValueError where an expert's base, tensors or answers are not those expected.
    """
    for expert in experts:
        if expert.manifest["base"] != base.digest:
            raise ValueError(
                f"expert {expert.task!r} was trained from {expert.manifest['encoder']!r} with "
                f"other weights or vocabulary than {base.name!r}; load its own base"
            )
        if tuple(expert.manifest["answers"]) != TASKS[expert.task].answers:
            raise ValueError(
                f"expert {expert.task!r} answers {expert.manifest['answers']}, the task "
                f"{list(TASKS[expert.task].answers)}; train it on this task's labels"
            )
    batches = []
    for expert in experts:
        rows = TASKS[expert.task].load("merge")
        rows = rows.select(range(min(merge_rows or len(rows), len(rows))))
        batches.append(make_batches(rows, base, batch_size=4, max_length=max_length)[0])
    vectors = TaskVectors.from_states(base.state, {e.task: e.state for e in experts})
    forward = classifier_forward(base, [e.head for e in experts], precision=precision)
    return MergeProblem(vectors, batches, forward, base.encoder)


def prepare(
    suite: str,
    tasks: Sequence[str] | None = None,
    *,
    size: Size | str = "default",
    seed: int = 0,
    device: str = "cpu",
    encoder: str | None = None,
) -> Experiment:
    """Base, experts (from the cache, or trained now), problem and exams of a suite.

    Raises ValueError for an unknown suite, task, size, encoder or device before anything is
    trained.
    """
    if SUITES[suite].head != "classes":
        raise ValueError(
            f"suite {suite!r} is answered in words: use divmerge_book.prepare_language"
        )
    size = SIZES[size] if isinstance(size, str) else size
    names = task_names(suite, tasks)
    recipes = {name: size.recipe_for(suite, name) for name in names}
    (length,) = {recipe.max_length for recipe in recipes.values()}
    check_device(device)
    base = load_base(encoder or size.encoder, device)
    experts = [
        fine_tune(base, TASKS[name], recipes[name], seed=seed)
        for name in tqdm(names, f"experts, seed {seed}", leave=False)
    ]
    precision = resolve(size.precision, check_device(device))
    problem = make_problem(
        base,
        experts,
        merge_rows=size.merge_rows,
        max_length=length,
        precision=precision,
    )
    validation, test = (
        [exam(name, split, rows, base, length) for name in names]
        for split, rows in (("validation", size.validation_rows), ("test", size.test_rows))
    )
    weights = [expert.manifest["model.safetensors"] for expert in experts]
    seen = [data_digest(TASKS[n].load(s)) for n in names for s in ("merge", "validation", "test")]
    counts = (size.merge_rows, size.validation_rows, size.test_rows, length)
    place = (check_device(device).type, precision)
    digest = key_of(code_digest(prepare), names, base.digest, weights, seen, counts, place)
    return Experiment(base, experts, problem, validation, test, digest)
