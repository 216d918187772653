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
    **dict.fromkeys(("SUITES", "TASKS", "Task"), "data.tasks"),
    **dict.fromkeys(("SIZES", "Experiment", "make_problem", "prepare"), "evaluation.experiment"),
    **dict.fromkeys(("prepare_language",), "evaluation.experiment"),
    **dict.fromkeys(("Recipe", "fine_tune", "load_expert"), "models.finetuning"),
    "Report": "evaluation.report",
    "compare": "evaluation.benchmark",
    "compare_language": "evaluation.language_benchmark",
    "evaluate": "evaluation.metrics",
    "load_base": "models.encoders",
}
__all__ = sorted(PUBLIC)  # noqa: PLE0605


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(import_module(f"divmerge_book.{PUBLIC[name]}"), name)
    raise AttributeError(f"module 'divmerge_book' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
