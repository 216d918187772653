"""Sizes of runs: how much of a suite is trained, merged and scored."""

from dataclasses import dataclass, field, replace

from divmerge_book.data.tasks import SUITES
from divmerge_book.models.finetuning import Recipe
from divmerge_book.models.language.training import LanguageRecipe
from divmerge_core.registry import Registry


@dataclass(frozen=True)
class Size:
    """How much is trained, merged and scored. A row count of None means all that the split has.

    inputs: unlabelled rows per task that a fit sees; None means the paper's 200, or 400 with one
    coefficient per layer. precision: of the encoder's matrix products while merging and scoring
    (see Recipe). candidates: options per method whose merges are scored on validation rows at the
    first seed; the best serves every seed. None: all; 1: the published values. calls: budget of
    validation scores of a method that searches by itself. steps: most steps of fits that do not run
    the model; None: each method's own.
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
        """The training recipe of a suite's task: GLUE, which is harder, takes more rows.

        GLUE's tasks with fewer than 8,000 training rows take twice as many epochs.
        """
        if suite != "glue_encoder":
            return self.recipe
        few = task in ("cola", "rte", "mrpc")
        return replace(self.glue_recipe, epochs=self.glue_recipe.epochs * (1 + few))


QUICK = Recipe(rows=400)
SMOKE = {"merge_rows": 40, "validation_rows": 50, "test_rows": 100, "epochs": 2, "steps": 40}
FEW = {"merge_rows": 32, "validation_rows": 32, "test_rows": 150, "candidates": 1, "calls": 60}
SIZES = Registry("size")
SIZES.register("smoke")(
    Size("bert_tiny", (0,), QUICK, QUICK, **SMOKE, precision="float32", candidates=1, calls=10)
)
SIZES.register("default")(Size("minilm", (0,), **FEW))
SIZES.register("full")(Size("minilm", (0, 1, 2), inputs=100))


@dataclass(frozen=True)
class LanguageSize:
    """How much is trained, merged and scored. A row count of None means all that the split has.

    base: a name, folder or hub name; None for the suite's. blocks: keep only the base's first ones.
    merge_rows: unlabelled prompts per task, which are all that a fit sees. batch_size: prompts per
    task and step of a fit. top: likeliest tokens of an expert cached per position, None for the
    whole vocabulary in bfloat16. storage: of task vectors. precision and checkpointing: see
    `language_forward`. epochs: of fits. candidates: options per method scored on validation rows.
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


UPPER = LanguageSize(LanguageRecipe(rows=800, lr=3e-4, trains="top:6"))
QUICK_UPPER = replace(UPPER.recipe, rows=64, lr=1e-3, trains="all", max_length=48, max_new=8)
HALF = {"precision": "bfloat16", "checkpointing": True}
GLUE_RECIPE = LanguageRecipe(
    rows=6000, epochs=2, lr=1e-5, batch_size=32, micro=16, max_length=256, max_new=8, **HALF
)
QUICK_GLUE = replace(GLUE_RECIPE, rows=64, epochs=1)
ROWS = {"merge_rows": 100, "validation_rows": 100, "test_rows": 200}
GLUE = LanguageSize(GLUE_RECIPE, **ROWS, storage="bfloat16", **HALF)
BLOCKS = {"blocks": 2, "merge_rows": 8, "validation_rows": 8, "test_rows": 12, "epochs": 2}
FULL = {"seeds": (0, 1, 2), "test_rows": None, "merge_rows": 200}
LANGUAGE_SIZES = Registry("size of a language suite")  # "suite/size"
for name, base, changes in (
    ("embedded_lm/smoke", UPPER, {"recipe": QUICK_UPPER, **BLOCKS}),
    ("embedded_lm/default", UPPER, {}),
    ("embedded_lm/full", UPPER, {**FULL, "merge_rows": 32, "test_rows": 200, "candidates": 3}),
    ("glue/smoke", GLUE, {"recipe": QUICK_GLUE, "merge_rows": 8, "test_rows": 16}),
    ("glue/default", GLUE, {}),
    ("glue/full", GLUE, {"recipe": replace(GLUE_RECIPE, rows=None), **FULL}),
):
    LANGUAGE_SIZES.register(name)(replace(base, **changes))


def size_of(suite: str, size: LanguageSize | str) -> LanguageSize:
    """The size of that name. Raises ValueError for suites whose answers are classes."""
    if SUITES[suite].head != "vocabulary":
        raise ValueError(f"suite {suite!r} is answered in classes: use divmerge_book.prepare")
    return LANGUAGE_SIZES[f"{suite}/{size}"] if isinstance(size, str) else size
