"""What chapters and the command line call; the merging itself is in divmerge_core.

from divmerge_book import compare, evaluate, prepare
from divmerge_core import METHODS

experiment = prepare("embedded", ["trec", "movie"])  # base, experts, unlabelled inputs
vectors = experiment.problem.vectors                 # base [N] and task vectors [T, N]
merged = METHODS["divmerge"](experiment.problem)     # fitted coefficients; merged model [N]
rows = evaluate(experiment.problem, merged, experiment.test)  # its predictions on the test rows

report = compare("embedded", ["trec", "movie"])      # every method, the same inputs and rows
report.intervals()                                   # ANP with 95 % intervals
report.save("report.json")                           # predictions, fits and provenance
"""

from importlib import import_module

# Loaded on first use: `import divmerge_book` alone does not wait for torch and transformers.
PUBLIC = {
    "data.tasks": (
        "SUITES",
        "TASKS",
        "Task",
    ),
    "evaluation.benchmark": ("compare",),
    "evaluation.experiment": (
        "SIZES",
        "Experiment",
        "make_problem",
        "prepare",
        "prepare_language",
    ),
    "evaluation.language_benchmark": ("compare_language",),
    "evaluation.metrics": ("evaluate",),
    "evaluation.report": ("Report",),
    "models.encoders": ("load_base",),
    "models.finetuning": (
        "Recipe",
        "fine_tune",
        "load_expert",
    ),
}
__all__ = sorted(name for names in PUBLIC.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str):
    for module, names in PUBLIC.items():
        if name in names:
            return getattr(import_module(f"divmerge_book.{module}"), name)
    raise AttributeError(f"module 'divmerge_book' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
