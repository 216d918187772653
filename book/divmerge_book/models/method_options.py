"""Options that a method does not take, refused by the method itself before any model is read.

Every method checks its options before its first forward pass, so that it is begun on two small
layers: one place holds the ranges, the methods.
"""

import inspect
from collections.abc import Mapping, Sequence

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from divmerge_core.merging.problem import Batch, Diverged, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import METHODS, parse


class Begun(Exception):
    """A method has accepted its options and runs the model."""


def begun(*given: object) -> float:
    raise Begun


def small_problem(tasks: Sequence[str]) -> MergeProblem:
    """Two layers with numbers as names, alike in all experts, and one input per task."""
    layers = [nn.ModuleDict({"dense": nn.Linear(2, 2)}) for _ in range(2)]
    module = nn.ModuleDict({"layer": nn.ModuleList(layers)}).requires_grad_(False)
    state = {name: torch.ones_like(one) for name, one in module.named_parameters()}
    batch = Batch({"x": torch.ones(1, 2)}, torch.ones(1))
    vectors = TaskVectors.from_states(state, dict.fromkeys(tasks, state))
    return MergeProblem(vectors, [[batch]] * len(tasks), begun, module)


def check_options(spec: str, tasks: Sequence[str], options: Mapping[str, object]) -> None:
    """Raise ValueError for an option of another type than a method takes, or out of its range.

    options: of them those that the method takes, in the place of its published ones; but for
    `layers`, which the model has to have. tasks: names of the experts, as many as are merged.
    """
    name, own = parse(spec)
    taken = inspect.signature(METHODS[name]).parameters
    published = dict((METHODS.facts[name]["search"] or ({},))[0])
    for option, value in (published | dict(options)).items():
        if option not in taken or option == "layers":
            continue
        try:
            own[option] = TypeAdapter(taken[option].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(
                f"{spec}: {option} is {value!r}; {error.errors()[0]['msg']} (its default is "
                f"{taken[option].default!r})"
            ) from error
    few = {"progress": False, "score": begun, "steps": min(own.get("steps", 1), 1)}
    own |= {option: value for option, value in few.items() if option in taken}
    try:
        METHODS[name](small_problem(tasks), **own)
    except (Begun, Diverged):
        pass  # all options were checked: it asked for logits or a score, or toys made it diverge
    except TypeError as error:  # of a mapping of another method's options
        raise ValueError(f"{spec} does not take {dict(options)}: {error}") from error
