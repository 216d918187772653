"""From a divergence's name, with its parameter and a temperature, to what a fit minimises."""

import math
from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.kernels.delta_storage import wide

Objective = Callable[[Tensor, Tensor], Tensor]  # (expert logits, merged logits) [A, V] -> [A]


def read(spec: str) -> tuple[str, dict[str, float]]:
    """`"skew_js:0.1"` -> ("skew_js", {"beta": 0.1}); `"js"` -> ("js", {}).

    Raises ValueError for an unknown name, a parameter that is no number, out of range, or given to
    a divergence that has none.
    """
    name, colon, text = spec.partition(":")
    DIVERGENCES[name]
    parameter = DIVERGENCES.facts.get(name, {}).get("parameter")
    if not colon:
        return name, {}
    if parameter is None:
        raise ValueError(f"divergence {name!r} has no parameter, got {spec!r}; say {name!r}")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(
            f"the parameter {parameter.name} of {name!r} must be a number, got {text!r}; say "
            f"'{name}:{parameter.default:g}'"
        ) from None
    parameter.check(value)
    return name, {parameter.name: value}


def facts_of(spec: str) -> dict:
    """The registered facts of a divergence at its parameter's value. Raises ValueError as `read`.

    >>> facts_of("alpha:0")["symmetric"], facts_of("alpha")["symmetric"]
    (True, False)
    """
    name, given = read(spec)
    facts = {"parameter": None, "fused": None, **DIVERGENCES.facts[name]}
    at = facts.pop("at", None)
    return facts | (at(*given.values()) if given else {})


def objective(spec: str, temperature: float = 1.0) -> Objective:
    """The divergence that `spec` names, of answers at a temperature.

    spec: a name in DIVERGENCES, with a value for its parameter after a colon where it has one, as
    in `skew_js:0.1`. temperature: above 0, what both sides' logits are divided by; above 1 it
    flattens the answers. Distillation multiplies by temperature^2 so that gradients keep their
    size beside another loss (Hinton et al. 2015, arXiv 1503.02531). Here there is no other loss,
    and Adam does not see a factor, so it is left out, and bounds stay what they are. Raises
    ValueError for specs as `read` does, and for other temperatures.

    >>> objective("js") is DIVERGENCES["js"]
    True
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be above 0 and finite, got {temperature}; 1 leaves answers as they "
            "are"
        )
    name, given = read(spec)
    divergence = partial(DIVERGENCES[name], **given) if given else DIVERGENCES[name]
    if temperature == 1:
        return divergence

    def tempered(
        expert: Float[Tensor, "*A V"], merged: Float[Tensor, "*A V"]
    ) -> Float[Tensor, "*A"]:
        sides = [logits.to(wide(logits.dtype)) / temperature for logits in (expert, merged)]
        return divergence(*sides)

    return tempered
