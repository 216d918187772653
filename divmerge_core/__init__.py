"""Divergence-based model merging: theta = theta_0 + sum_t Lambda_t tau_t, with Lambda learned.

    from divmerge_core import METHODS, MergeProblem, TaskVectors

    vectors = TaskVectors.from_states(base, {"trec": one, "movie": other})  # tau [T, N]
    problem = MergeProblem(vectors, batches, forward)     # a forward pass and unlabelled inputs
    merged = METHODS["divmerge"](problem)                 # merged parameters [N]

Rooms: `kernels` (the merge and the divergence, and their gradients), `divergences`, `merging` (task
vectors, coefficients, problem, fit), `methods`, `checkpoints` (weights in and out).
"""

from importlib import import_module

# Loaded on first use: `import divmerge_core` alone does not wait for torch and transformers.
PUBLIC = {
    "divergences": ("DIVERGENCES",),
    "merging.coefficients": ("GROUPINGS", "LINKS", "Coefficients"),
    "merging.fit": ("fit_coefficients",),
    "merging.problem": ("Batch", "MergeProblem"),
    "merging.task_vectors": ("Layout", "TaskVectors"),
    "methods": ("METHODS",),
}
__all__ = sorted(name for names in PUBLIC.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str):
    for module, names in PUBLIC.items():
        if name in names:
            return getattr(import_module(f"divmerge_core.{module}"), name)
    raise AttributeError(f"module 'divmerge_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
