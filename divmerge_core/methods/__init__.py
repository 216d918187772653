"""Merging methods: `(problem, *, options) -> merged parameters [N]`, by name in METHODS.

Facts beside each: `source`, and `cite`, its keys in the bibliography; `needs`, the data it looks
at: nothing, unlabelled inputs, validation labels (of rows that choose its scale) or a validation
score (a function that it calls); `cost`, what grows with it: weights (one pass over them), inputs
(forward passes), gradients, or training; `symmetric`, whether the order of tasks is immaterial;
`search`, six sets of options worth trying, the published one first, or none.

Where it applies: `exactly`, the one number of experts that it takes; `returns="predictor"`, where
no single vector comes out; `between=False`, where one expert alone does not give a point between
base and expert; `optional="large"`, where it is made for a second, larger base; `groupings`, those
that comparisons list. `linear`: the option that multiplies all of the change, so that a merge
with another value of it follows from the first. `passes`: the option that counts steps through the
model, one batch per task each. `calls`: a function of the number of experts, how often a step
calls the score. `elsewhere`: its name in mergekit.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.require import require
from divmerge_core.registry import Registry


class Methods(Registry):
    """Methods that refuse, in words, what is no MergeProblem."""

    def register(self, name: str, **facts: Any) -> Callable[[Any], Any]:
        keep = super().register(name, **facts)

        def guarded(method: Callable) -> Callable:
            @wraps(method)
            def call(problem: MergeProblem, *given: Any, **options: Any) -> Any:
                require(problem, MergeProblem, f"the problem of {name}", CURE)
                return method(problem, *given, **options)

            return keep(call)

        return guarded


CURE = "MergeProblem(vectors, batches, forward); a method that reads no inputs takes [] per task"
METHODS = Methods("method", needs="nothing", cost="weights", symmetric=True, search=())

from divmerge_core.methods import (
    adaptive,
    arithmetic,
    clustered,
    competition,
    continual,
    corrected,
    depthwise,
    distilled,
    divmerge,
    evolved,
    fused,
    layerwise,
    masked,
    regression,
    routed,
    selected,
    shifts,
    spectral,
    spherical,
    statistical,
    subspace,
)


def options_of(name: str) -> tuple[str, ...]:
    """Names of the options that a method takes."""
    return tuple(inspect.signature(METHODS[name]).parameters)[1:]


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """`"divmerge/block"` -> ("divmerge", {"grouping": "block"}); `"ties"` -> ("ties", {}).

    Raises ValueError for a method that is unknown or takes no grouping, and an unknown grouping.
    """
    from divmerge_core.merging.coefficients import GROUPINGS

    name, slash, grouping = spec.partition("/")
    taken = options_of(name)
    if not slash:
        return name, {}
    if "grouping" not in taken:
        raise ValueError(
            f"method {name!r} has no grouping, so {spec!r} means nothing; say {name!r}"
        )
    GROUPINGS[grouping]
    return name, {"grouping": grouping}
