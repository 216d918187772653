"""A language suite made ready: base, experts, their completions, merge problem and exams."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import datasets
from torch import Tensor
from tqdm import tqdm

from divmerge_book.data.code_digest import code_digest, key_of
from divmerge_book.data.tasks import SUITES, TASKS
from divmerge_book.evaluation.experiment import Experiment, task_names
from divmerge_book.evaluation.language_scoring import WrittenExam, likelihood_exam, written_exam
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.models.encoders import check_device, resolve
from divmerge_book.models.finetuning import Expert, data_digest
from divmerge_book.models.language.agreement import check_forward
from divmerge_book.models.language.completions import Completions, completions
from divmerge_book.models.language.finetuning import language_expert
from divmerge_book.models.language.forward import language_forward
from divmerge_book.models.language.models import Language, load_language
from divmerge_book.models.language.prompts import PROMPTS
from divmerge_book.models.language.reading import answer_tokens
from divmerge_book.models.language.training import LanguageRecipe
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.registry import Registry
from divmerge_core.storage import cache_dir

SPARE = 3  # tokens that a written answer may have beside its word: a full stop, spaces
LANGUAGE_SIZES = Registry("size of a language suite")  # "suite/size"


@dataclass(frozen=True)
class LanguageSize:
    """How much is trained, merged and scored. A row count of None means all that the split has.

    base: a name, folder or hub name; None for the suite's. blocks: keep only the base's first ones.
    merge_rows: unlabelled prompts per task, which are all that a fit sees. batch_size: prompts per
    task and step of a fit. top: likeliest words of an expert that are kept per position, None for
    the whole vocabulary in bfloat16. storage: of task vectors. precision and checkpointing: see
    `language_forward`. epochs: of fits. candidates: options tried per method on validation rows.
    """

    recipe: LanguageRecipe
    base: str | None = None
    blocks: int | None = None
    seeds: tuple[int, ...] = (0,)
    merge_rows: int | None = 16
    validation_rows: int | None = 32
    test_rows: int | None = 60
    batch_size: int = 4
    epochs: int = 4
    candidates: int = 1
    top: int | None = None
    storage: str = "float32"
    precision: str = "auto"
    checkpointing: bool = False


UPPER = LanguageRecipe(rows=800, lr=3e-4, trains="top:6")
SEVERAL = LanguageRecipe(
    rows=6000,
    epochs=2,
    lr=1e-5,
    batch_size=32,
    micro=16,
    max_length=256,
    max_new=8,
    precision="bfloat16",
    checkpointing=True,
)
QUICK = replace(UPPER, rows=64, lr=1e-3, trains="all", max_length=48, max_new=8)
GLUE = LanguageSize(
    SEVERAL,
    merge_rows=100,
    validation_rows=100,
    test_rows=200,
    storage="bfloat16",
    precision="bfloat16",
    checkpointing=True,
)
for name, size in {
    "embedded_lm/smoke": LanguageSize(
        QUICK, blocks=2, merge_rows=8, validation_rows=8, test_rows=12, epochs=2
    ),
    "embedded_lm/default": LanguageSize(UPPER),
    "embedded_lm/full": LanguageSize(
        UPPER, seeds=(0, 1, 2), merge_rows=32, test_rows=200, candidates=3
    ),
    "glue/smoke": replace(
        GLUE, recipe=replace(SEVERAL, rows=64, epochs=1), merge_rows=8, test_rows=16
    ),
    "glue/default": GLUE,
    "glue/full": replace(
        GLUE, recipe=replace(SEVERAL, rows=None), merge_rows=200, test_rows=None, seeds=(0, 1, 2)
    ),
}.items():
    LANGUAGE_SIZES.register(name)(size)


@dataclass(frozen=True)
class LanguageBench(Experiment):
    """A merge problem over a vocabulary, with the labelled splits that it must not see.

    validation and test: by likelihood of a task's words, by ROUGE-1 where it is free-form.
    written: the test rows again, answered by writing. completions: what each expert wrote on its
    unlabelled prompts. Experts' weights stand in the problem's vectors alone, once.
    """

    base: Language
    written: Sequence[WrittenExam] = ()
    completions: Sequence[Completions] = ()

    def select(self, tasks: Sequence[str]) -> "LanguageBench":
        """The same bench for some of its tasks."""
        numbers = [self.problem.vectors.tasks.index(task) for task in tasks]
        return replace(
            super().select(tasks),
            written=[self.written[n] for n in numbers],
            completions=[self.completions[n] for n in numbers],
        )


class States(Mapping):
    """Experts' parameters by task, read when asked for: one expert in memory at a time."""

    def __init__(self, tasks: Sequence[str], load):
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
) -> LanguageBench:
    """Base, experts and their completions (from the cache, or made now), problem and exams.

    suite: one whose tasks are answered in words: `embedded_lm` or `glue`. size: `smoke`, `default`,
    `full`, or a LanguageSize of your own (`replace(LANGUAGE_SIZES["glue/default"], base=...)`). A
    run that was killed goes on where it stood. Raises ValueError for an unknown suite, task, size
    or device, for a base that cannot be loaded, and for one whose logits we do not get right (see
    `check_forward`), before anything is trained.
    """
    size = size_of(suite, size)
    names = task_names(suite, tasks)
    place = check_device(device)
    base = load_language(size.base or SUITES[suite].base, device=device, blocks=size.blocks)
    check_forward(base)
    size = replace(size, recipe=size.recipe.on(base), precision=resolve(size.precision, place))

    def load(name: str) -> Expert:
        return language_expert(base, TASKS[name], size.recipe, seed=seed, progress=progress)

    experts, known = [], []
    for name in (bar := tqdm(names, f"experts, seed {seed}", leave=False, disable=not progress)):
        bar.set_postfix_str(name)
        expert = load(name)
        known.append(completed(base, expert, size, progress=progress))
        experts.append(replace(expert, state={}))
    vectors = TaskVectors.from_states(base.state, States(names, load), storage=size.storage)
    forward = language_forward(
        base.model, precision=size.precision, checkpointing=size.checkpointing
    )
    problem = MergeProblem(vectors, [one.batches for one in known], forward, base.model)
    validation = [exam(base, name, "validation", size.validation_rows, size) for name in names]
    test = [exam(base, name, "test", size.test_rows, size) for name in names]
    written = [exam(base, name, "test", size.test_rows, size, write=True) for name in names]
    weights = [expert.manifest["model.safetensors"] for expert in experts]
    seen = [data_digest(TASKS[n].load(s)) for n in names for s in ("merge", "validation", "test")]
    deciding = replace(size, seeds=(), candidates=0, epochs=0)  # a method is told the others
    code = code_digest(prepare_language)
    digest = key_of(code, names, base.digest, weights, seen, deciding, place.type)
    unfinished = cache_dir() / "unfinished"
    return LanguageBench(
        base, experts, problem, validation, test, digest, unfinished, written, known
    )


def size_of(suite: str, size: LanguageSize | str) -> LanguageSize:
    """The size of that name. Raises ValueError for suites whose answers are classes."""
    if SUITES[suite].head != "vocabulary":
        raise ValueError(f"suite {suite!r} is answered in classes: use divmerge_core.prepare")
    return LANGUAGE_SIZES[f"{suite}/{size}"] if isinstance(size, str) else size


def completed(
    base: Language, expert: Expert, size: LanguageSize, *, progress: bool = True
) -> Completions:
    """An expert's answers to its task's unlabelled prompts."""
    return completions(
        base,
        expert.state,
        PROMPTS[expert.task],
        first(expert.task, "merge", size.merge_rows),
        key=[expert.manifest["model.safetensors"]],
        max_length=size.recipe.max_length,
        max_new=size.recipe.max_new,
        batch_size=size.batch_size,
        precision=size.precision,
        top=size.top,
        progress=progress,
    )


def first(task: str, split: str, rows: int | None) -> datasets.Dataset:
    """The first rows of a split (they are in random order already)."""
    data = TASKS[task].load(split)
    return data.select(range(min(rows or len(data), len(data))))


def exam(
    base: Language,
    task: str,
    split: str,
    rows: int | None,
    size: LanguageSize,
    *,
    write: bool = False,
) -> LabelledSplit | WrittenExam:
    """A task's labelled rows as an exam: by likelihood; written where asked, or free-form."""
    data, longest = first(task, split, rows), size.recipe.max_length
    if TASKS[task].answers and not write:
        return likelihood_exam(base, PROMPTS[task], data, max_length=longest)
    words = [len(answer_tokens(base, " " + word)) for word in PROMPTS[task].words]
    most = max(words, default=size.recipe.max_new) + SPARE  # what is longer is no word exactly
    return written_exam(
        base,
        PROMPTS[task],
        data,
        max_length=longest,
        max_new=min(size.recipe.max_new, most),
        precision=size.precision,
    )
