"""Divergence-based model merging: the package beneath the DivMerge book.

The whole pipeline:

    from divmerge_core import METHODS, compare, evaluate, prepare

    bench = prepare("embedded", ["trec", "movie"])        # base, experts, unlabelled inputs
    vectors = bench.problem.vectors                       # base [N] and task vectors [T, N]
    merged = METHODS["divmerge"](bench.problem)           # coefficients learned; merged model [N]
    rows = evaluate(bench.problem, merged, bench.test)    # its answers on the test rows

    report = compare("embedded", ["trec", "movie"])       # every method, the same inputs and rows
    report.intervals()                                    # ANP with bootstrap intervals
    report.save("report.json")                            # predictions, fits and provenance
"""

from importlib import import_module

# Loaded on first use: `import divmerge_core` alone does not wait for torch and transformers.
PUBLIC = {
    "bench": ("SIZES", "Bench", "make_problem", "prepare"),
    "coefficients": ("GROUPINGS", "LINKS", "Coefficients"),
    "comparison": ("compare",),
    "divergences": ("DIVERGENCES",),
    "encoders": ("load_base",),
    "evaluation": ("evaluate",),
    "experts": ("Recipe", "fine_tune", "load_expert"),
    "fitting": ("fit_coefficients",),
    "methods": ("METHODS",),
    "problem": ("Batch", "MergeProblem"),
    "report": ("Report",),
    "tasks": ("SUITES", "TASKS", "Task"),
    "vectors": ("Layout", "TaskVectors"),
}
__all__ = sorted(name for names in PUBLIC.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str):
    for module, names in PUBLIC.items():
        if name in names:
            return getattr(import_module(f"divmerge_core.{module}"), name)
    raise AttributeError(f"module 'divmerge_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
