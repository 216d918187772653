"""Experiments: base model, experts, merge problem, and the labelled validation and test splits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from torch import Tensor
from tqdm import tqdm

from divmerge_book.data.code_digest import code_digest, key_of
from divmerge_book.data.tasks import SUITES, TASKS
from divmerge_book.evaluation.language_scoring import WrittenSplit, likelihood_split, written_split
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.evaluation.sizes import SIZES, LanguageSize, Size, size_of
from divmerge_book.models.encoders import (
    Base,
    check_device,
    classifier_forward,
    load_base,
    make_batches,
    resolve,
)
from divmerge_book.models.finetuning import Expert, data_digest, fine_tune
from divmerge_book.models.language.agreement import check_forward
from divmerge_book.models.language.completions import completions
from divmerge_book.models.language.finetuning import language_expert
from divmerge_book.models.language.forward import language_forward
from divmerge_book.models.language.models import Language, load_language
from divmerge_book.models.language.prompts import PROMPTS
from divmerge_book.models.language.reading import answer_tokens
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.storage import cache_dir

SPARE = 3  # tokens that a written answer may have beside its word: a full stop, spaces


@dataclass(frozen=True)
class Experiment:
    """A merge problem with the labelled splits that it must not see.

    unfinished: a folder for checkpoints of fits, so that a killed fit resumes; None where passes
    are fast. Of language suites, validation and test are scored by the likelihood of a task's
    words, or by ROUGE-1 where it is free-form; `written` are the test rows, answered by generation;
    `completions` are every expert's answers to its unlabelled prompts; and the weights of experts
    are held by the problem's task vectors alone.
    """

    base: Base | Language
    experts: Sequence[Expert]
    problem: MergeProblem
    validation: Sequence[LabelledSplit | WrittenSplit]
    test: Sequence[LabelledSplit | WrittenSplit]
    digest: str
    unfinished: Path | None = None
    written: Sequence[WrittenSplit] = ()
    completions: Sequence = ()

    def select(self, tasks: Sequence[str]) -> "Experiment":
        """The experiment on some of its tasks."""
        digest, every = f"{self.digest} {tuple(tasks)}", self.problem.vectors.tasks
        if tuple(tasks) == every:  # spares a copy of the task vectors
            return replace(self, digest=digest)
        numbers = [every.index(task) for task in tasks]
        lists = ("experts", "validation", "test", "written", "completions")
        found = {name: getattr(self, name) for name in lists}
        chosen = {name: [own[n] for n in numbers] for name, own in found.items() if own}
        return replace(self, problem=self.problem.select(tasks), digest=digest, **chosen)


def task_names(suite: str, tasks: Sequence[str] | None, *, least: int = 2) -> list[str]:
    """The given tasks, or all of the suite's.

    Raises ValueError for tasks outside the suite, named twice, or fewer than `least`.
    """
    allowed = SUITES[suite].tasks
    chosen = list(tasks or allowed)
    known = [TASKS[task].name in allowed for task in chosen]
    if not all(known) or len(chosen) < least or len(set(chosen)) < len(chosen):
        few = {2: "two", 3: "three"}[least]
        raise ValueError(
            f"suite {suite!r} merges {few} or more distinct tasks of {', '.join(allowed)}; "
            f"got {chosen}"
        )
    return chosen


def first_rows(task: str, split: str, rows: int | None) -> datasets.Dataset:
    """The first rows of a split, None for all; splits are shuffled when they are made."""
    data = TASKS[task].load(split)
    return data.select(range(min(rows or len(data), len(data))))


def labelled_split(
    task: str, split: str, rows: int | None, base: Base, max_length: int
) -> LabelledSplit:
    """The first `rows` rows of a task's labelled split."""
    data = first_rows(task, split, rows)
    batches, order = make_batches(data, base, batch_size=64, max_length=max_length)
    return LabelledSplit(batches, torch.tensor(data["label"], device=base.device)[order])


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
    rows = [first_rows(expert.task, "merge", merge_rows) for expert in experts]
    batches = [make_batches(few, base, batch_size=4, max_length=max_length)[0] for few in rows]
    vectors = TaskVectors.from_states(base.state, {e.task: e.state for e in experts})
    forward = classifier_forward(base, [e.head for e in experts], precision=precision)
    return MergeProblem(vectors, batches, forward, base.encoder)


def digest_of(
    make: Callable, names: Sequence[str], base: Base | Language, experts: Sequence[Expert], *what
) -> str:
    """A digest of all that decides an experiment: its code, base, experts, rows, and `what`."""
    weights = [expert.manifest["model.safetensors"] for expert in experts]
    seen = [data_digest(TASKS[n].load(s)) for n in names for s in ("merge", "validation", "test")]
    return key_of(code_digest(make), names, base.digest, weights, seen, what)


def prepare(
    suite: str,
    tasks: Sequence[str] | None = None,
    *,
    size: Size | str = "default",
    seed: int = 0,
    device: str = "cpu",
    encoder: str | None = None,
) -> Experiment:
    """The experiment of a suite of classes: experts come from the cache or are trained.

    Raises ValueError for an unknown suite, task, size, encoder, device or seed before anything is
    trained.
    """
    if SUITES[suite].head != "classes":
        raise ValueError(
            f"suite {suite!r} is answered in words: use divmerge_book.prepare_language"
        )
    size = SIZES[size] if isinstance(size, str) else size
    names = task_names(suite, tasks)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seeds are 0 or more and less than 2**63, got {seed}")
    recipes = {name: size.recipe_for(suite, name) for name in names}
    (length,) = {recipe.max_length for recipe in recipes.values()}
    place = check_device(device)
    base = load_base(encoder or size.encoder, device)
    experts = [
        fine_tune(base, TASKS[name], recipes[name], seed=seed)
        for name in tqdm(names, f"experts, seed {seed}", leave=False)
    ]
    settings = {"max_length": length, "precision": resolve(size.precision, place)}
    problem = make_problem(base, experts, merge_rows=size.merge_rows, **settings)
    splits = [
        [labelled_split(name, split, rows, base, length) for name in names]
        for split, rows in (("validation", size.validation_rows), ("test", size.test_rows))
    ]
    counts = (size.merge_rows, size.validation_rows, size.test_rows)
    digest = digest_of(prepare, names, base, experts, counts, place.type, settings)
    return Experiment(base, experts, problem, *splits, digest)


class States(Mapping):
    """Experts' parameters by task, loaded on access: one expert in memory at a time."""

    def __init__(self, tasks: Sequence[str], load: Callable[[str], Expert]):
        self.tasks, self.load = tuple(tasks), load

    def __getitem__(self, task: str) -> Mapping[str, Tensor]:
        return self.load(task).state

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


def prepare_language(
    suite: str,
    tasks: Sequence[str] | None = None,
    *,
    size: LanguageSize | str = "default",
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Experiment:
    """The experiment of a language suite: experts and completions are cached, or made now.

    suite: `embedded_lm`, `glue` or `glue_lm`. size: `smoke`, `default`, `full`, or a LanguageSize
    of your own (`replace(LANGUAGE_SIZES["glue/default"], base=...)`). An interrupted run resumes.
    Raises ValueError for an unknown suite, task, size or device, for a base that cannot be loaded,
    and for one whose logits differ from the model's own (see `check_forward`), before anything is
    trained.
    """
    size = size_of(suite, size)
    names, place = task_names(suite, tasks), check_device(device)
    base = load_language(size.base or SUITES[suite].base, device=device, blocks=size.blocks)
    check_forward(base)
    size = replace(size, recipe=size.recipe.on(base), precision=resolve(size.precision, place))

    def load(name: str) -> Expert:
        return language_expert(base, TASKS[name], size.recipe, seed=seed, progress=progress)

    settings = {name: getattr(size, name) for name in ("batch_size", "precision", "top")}
    settings |= {name: getattr(size.recipe, name) for name in ("max_length", "max_new")}
    experts, answered = [], []
    for name in (bar := tqdm(names, f"experts, seed {seed}", leave=False, disable=not progress)):
        bar.set_postfix_str(name)
        expert, rows = load(name), first_rows(name, "merge", size.merge_rows)
        key = [expert.manifest["model.safetensors"]]
        asked = (base, expert.state, PROMPTS[name], rows)
        answered.append(completions(*asked, key=key, progress=progress, **settings))
        experts.append(replace(expert, state={}))
    vectors = TaskVectors.from_states(base.state, States(names, load), storage=size.storage)
    options = {"precision": size.precision, "checkpointing": size.checkpointing}
    forward = language_forward(base.model, **options)
    problem = MergeProblem(vectors, [one.batches for one in answered], forward, base.model)
    kinds = [("validation", False), ("test", False), ("test", True)]
    splits = [[language_split(base, name, *kind, size) for name in names] for kind in kinds]
    deciding = replace(size, seeds=(), candidates=0, epochs=0)  # these are options of methods
    digest = digest_of(prepare_language, names, base, experts, deciding, place.type)
    folder = cache_dir() / "unfinished"
    return Experiment(base, experts, problem, *splits[:2], digest, folder, splits[2], answered)


def language_split(
    base: Language, task: str, split: str, write: bool, size: LanguageSize
) -> LabelledSplit | WrittenSplit:
    """A task's labelled rows: by likelihood; by generation where `write`, or free-form."""
    prompt, longest = PROMPTS[task], size.recipe.max_length
    data = first_rows(task, split, getattr(size, f"{split}_rows"))
    if TASKS[task].answers and not write:
        return likelihood_split(base, prompt, data, max_length=longest)
    words = [len(answer_tokens(base, " " + word)) for word in prompt.words]
    most = max(words, default=size.recipe.max_new) + SPARE  # a longer answer matches no word
    length = {"max_length": longest, "max_new": min(size.recipe.max_new, most)}
    return written_split(base, prompt, data, precision=size.precision, **length)
