"""What methods need of a user's tasks, told before anything is read."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from pydantic import TypeAdapter, ValidationError

from divmerge_book.evaluation.benchmark import check_fit_for, check_request
from divmerge_book.models.streamed_methods import RULES
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.methods import METHODS, options_of, parse


def check_types(specs: Sequence[str], overrides: Mapping[str, object]) -> None:
    """Raise ValueError for an option of another type than a method takes."""
    for spec, (option, value) in product(specs, overrides.items()):
        taken = inspect.signature(METHODS[parse(spec)[0]]).parameters.get(option)
        try:
            if taken is not None:
                TypeAdapter(taken.annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(
                f"{spec}: {option} is {value!r}; {error.errors()[0]['msg']} (its default is "
                f"{taken.default!r})"
            ) from error


def check_methods(
    specs: Sequence[str],
    tasks: Sequence[str],
    lacking: Mapping[str, Sequence[str]],
    overrides: Mapping[str, object] | None = None,
) -> None:
    """Raise ValueError for methods that these tasks cannot be merged by, and what they lack.

    lacking: split (`merge`, `validation`) -> tasks without rows of it. overrides: options of the
    methods; `inputs` may be more than the book's suites have.
    """
    given = dict(overrides or {})
    check_request(specs, [0], given | ({"inputs": 1} if "inputs" in given else {}))
    check_types(specs, given)
    check_fit_for(specs, [tasks])
    for spec in specs:
        name, _ = parse(spec)
        if METHODS.facts[name].get("returns") == "predictor":
            raise ValueError(
                f"{spec} returns no single merged model, so none can be written; choose one that "
                "does, such as divmerge/layer"
            )
        if name in RULES:  # the method itself refuses options out of range, on one number
            own = {option: value for option, value in given.items() if option in options_of(name)}
            layout, count = Layout(("x",), ((1,),)), len(tasks)
            one = TaskVectors(layout, tuple(tasks), torch.zeros(1), torch.ones(count, 1))
            METHODS[name](MergeProblem(one, [[]] * count, lambda parameters, pairs: []), **own)
        needed = {
            "merge": "unlabelled inputs" in METHODS.facts[name]["needs"],
            "validation": "score" in options_of(name),
        }
        for split in (split for split, needs in needed.items() if needs and lacking[split]):
            uses = "reads unlabelled inputs" if split == "merge" else "searches with a score"
            raise ValueError(
                f"{spec} {uses}: give task {', '.join(map(repr, lacking[split]))} a {split} split "
                f"({split}: FILE), or choose a method that needs none, such as average or ties"
            )
