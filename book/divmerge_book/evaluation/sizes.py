"""Sizes of runs: how much of a suite is trained, merged and scored."""

from collections.abc import Mapping
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
# The setting of an analysis wherever it does not study that very thing, which is the one of the
# table of all methods: inputs of a fit and test rows per task, passes over the inputs, seeds of
# experts, options that a search scores. Captions say where a stored run has another.
STANDARD = {"inputs": FEW["merge_rows"], "rows": FEW["test_rows"], "epochs": 4, "seeds": 3}
STANDARD |= {"candidates": 6}
SIZES = Registry("size")
SIZES.register("smoke")(
    Size("bert_tiny", (0,), QUICK, QUICK, **SMOKE, precision="float32", candidates=1, calls=10)
)
SIZES.register("default")(Size("minilm", (0,), **FEW))
SIZES.register("full")(Size("minilm", (0, 1, 2), inputs=100))


def setting(facts: Mapping) -> dict[str, int | None]:
    """What a stored run's facts say on each item of STANDARD; None where they say nothing."""
    rows = facts.get("rows_per_task", {})
    found = {
        "inputs": facts.get("inputs", facts.get("merge_rows", rows.get("merge"))),
        "rows": facts.get("rows") or rows.get("test"),
        "epochs": facts.get("epochs"),
        "seeds": len(facts.get("seeds", ())),
        "candidates": facts.get("budget") or len(facts.get("rates", ())),
    }
    return {name: value or None for name, value in found.items()}


def departures(facts: Mapping) -> str:
    """How a stored run of an encoder's suite departs from STANDARD, in words; else nothing."""
    own = setting(facts) if facts.get("suite") in ("embedded", "glue_encoder") else {}
    other = {n: value for n, value in own.items() if value not in (None, STANDARD[n])}
    words = [f"{name} {value} (standard {STANDARD[name]})" for name, value in other.items()]
    return f"; not the standard setting, as far as stored: {', '.join(words)}" if words else ""


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
QUICK_UPPER = replace(UPPER.recipe, rows=16, lr=1e-3, trains="all", max_length=48, max_new=8)
HALF = {"precision": "bfloat16", "checkpointing": True}
GLUE_RECIPE = LanguageRecipe(
    rows=6000, epochs=2, lr=1e-5, batch_size=32, micro=16, max_length=256, max_new=8, **HALF
)
SMALL_GLUE = replace(GLUE_RECIPE, lr=5e-5)  # a third of the parameters, larger steps
QUICK_GLUE = replace(GLUE_RECIPE, rows=64, epochs=1)
ROWS = {"merge_rows": 100, "validation_rows": 100, "test_rows": 200}
GLUE = LanguageSize(GLUE_RECIPE, **ROWS, storage="bfloat16", **HALF)
BLOCKS = {"blocks": 2, "merge_rows": 4, "validation_rows": 6, "test_rows": 8, "epochs": 2}
FULL = {"seeds": (0, 1, 2), "test_rows": None, "merge_rows": 200}
LANGUAGE_SIZES = Registry("size of a language suite")  # "suite/size"
for name, base, changes in (
    ("embedded_lm/smoke", UPPER, {"recipe": QUICK_UPPER, **BLOCKS}),
    ("embedded_lm/default", UPPER, {}),
    ("embedded_lm/full", UPPER, {**FULL, "merge_rows": 32, "test_rows": 200, "candidates": 3}),
    ("glue/smoke", GLUE, {"recipe": QUICK_GLUE, "merge_rows": 8, "test_rows": 16}),
    ("glue/default", GLUE, {}),
    ("glue/full", GLUE, {"recipe": replace(GLUE_RECIPE, rows=None), **FULL}),
    ("glue_lm/smoke", GLUE, {"recipe": QUICK_UPPER, **BLOCKS}),
    ("glue_lm/default", GLUE, {"recipe": replace(SMALL_GLUE, rows=2000)}),
    ("glue_lm/full", GLUE, {"recipe": SMALL_GLUE, **FULL, "test_rows": 200, "candidates": 3}),
):
    LANGUAGE_SIZES.register(name)(replace(base, **changes))


def size_of(suite: str, size: LanguageSize | str) -> LanguageSize:
    """The size of that name. Raises ValueError for suites whose answers are classes."""
    if SUITES[suite].head != "vocabulary":
        raise ValueError(f"suite {suite!r} is answered in classes: use divmerge_book.prepare")
    return LANGUAGE_SIZES[f"{suite}/{size}"] if isinstance(size, str) else size
